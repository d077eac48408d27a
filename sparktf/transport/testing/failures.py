"""What happens when something goes wrong, for any protocol."""

# Test names are sentences already.
# ruff: noqa: D102

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from sparktf.errors import PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.contract import Communicator
from sparktf.transport.registry import connect
from sparktf.transport.testing.worlds import SECRET, SLOWNESS, MemoryExchange, results_of_threads, run_threads


def all_raised(outcomes: list[Any], kind: type[BaseException]) -> bool:
    """Return whether every rank ended with this kind of exception."""
    return all(isinstance(outcome, kind) for outcome in outcomes)


def _wait_alone(comm: Communicator, gone: threading.Event, words: str) -> float:
    """Let rank 0 wait in a barrier to which rank 1 does not come; return the seconds until it says these words."""
    if comm.rank == 1:
        gone.wait(10 * SLOWNESS)
        return 0.0
    begin = time.monotonic()
    try:
        with pytest.raises(TransportTimeoutError, match=words):
            comm.barrier()
    finally:
        gone.set()
    return time.monotonic() - begin


class Failures:
    """What happens when something goes wrong."""

    protocol = ""

    def test_operations_that_do_not_match_are_an_error_on_every_rank(self) -> None:
        def main(comm: Communicator) -> None:
            comm.all_reduce(np.ones(10 + comm.rank))

        outcomes = run_threads(self.protocol, 3, main)
        assert all_raised(outcomes, TransportError)
        assert any("same order" in str(outcome) for outcome in outcomes)

    @pytest.mark.parametrize("size", [2, 3])
    def test_ranks_that_each_broadcast_their_own_are_an_error_on_every_rank(self, size: int) -> None:
        def main(comm: Communicator) -> None:
            comm.broadcast(np.full(100_000, comm.rank), comm.rank)

        outcomes = run_threads(self.protocol, size, main)
        assert all_raised(outcomes, TransportError)
        assert any("same order" in str(outcome) for outcome in outcomes)

    @pytest.mark.parametrize("length", [4, 2_000_000])
    def test_the_reason_of_an_abort_reaches_all_who_wait(self, length: int) -> None:
        def main(comm: Communicator) -> None:
            comm.barrier()
            if comm.rank == 1:
                raise ValueError("the model exploded")
            comm.all_reduce(np.ones(length))

        outcomes = run_threads(self.protocol, 3, main)
        assert isinstance(outcomes[1], ValueError)
        for outcome in (outcomes[0], outcomes[2]):
            assert isinstance(outcome, PeerLostError)
            assert outcome.peer == 1
            assert outcome.reason == "ValueError: the model exploded"
            # The word may come before a slow rank has left the barrier.
            assert "all_reduce" in str(outcome) or "barrier" in str(outcome)

    def test_an_abort_reaches_ranks_that_wait_for_nothing_yet(self) -> None:
        told = threading.Event()

        def main(comm: Communicator) -> None:
            comm.barrier()
            if comm.rank == 0:
                comm.abort("enough")
                told.set()
            told.wait(10 * SLOWNESS)
            comm.barrier()

        outcomes = run_threads(self.protocol, 2, main)
        assert all_raised(outcomes, PeerLostError)
        assert [outcome.reason for outcome in outcomes] == ["enough", "enough"]

    def test_abort_from_another_thread_wakes_whoever_waits(self) -> None:
        def main(comm: Communicator) -> float:
            comm.barrier()
            if comm.rank == 0:
                timer = threading.Timer(0.2, comm.abort, ["stopped by the user"])
                timer.start()
                begin = time.monotonic()
                with pytest.raises(PeerLostError, match="stopped by the user"):
                    comm.recv(1, np.ones(4))
                timer.join()
                return time.monotonic() - begin
            with pytest.raises(PeerLostError, match="stopped by the user"):
                comm.recv(0, np.ones(4))
            return 0.0

        waited, _ = run_threads(self.protocol, 2, main)
        assert waited < 2 * SLOWNESS

    def test_a_peer_that_closes_too_early_is_named(self) -> None:
        def main(comm: Communicator) -> None:
            comm.barrier()
            if comm.rank != 1:
                comm.all_reduce(np.ones(500_000))

        outcomes = run_threads(self.protocol, 3, main)
        assert outcomes[1] is None
        assert all_raised([outcomes[0], outcomes[2]], PeerLostError)
        assert {outcomes[0].peer, outcomes[2].peer} == {1}

    def test_what_was_sent_before_a_rank_left_arrives_however_late_it_is_received(self) -> None:
        gone = threading.Event()

        def main(comm: Communicator) -> float:
            if comm.rank == 0:
                comm.send(1, np.full(1000, 7.0))
                comm.close()
                gone.set()
                return 7.0
            gone.wait(10 * SLOWNESS)
            # Longer than a protocol may wait for what is still on its way.
            time.sleep(0.5)
            return float(comm.recv(0, np.zeros(1000))[-1])

        assert results_of_threads(self.protocol, 2, main) == [7.0, 7.0]

    def test_closing_right_after_the_last_operation_loses_nothing(self) -> None:
        def main(comm: Communicator) -> float:
            return float(comm.all_reduce(np.ones(300_000))[-1])

        for _ in range(5):
            assert results_of_threads(self.protocol, 3, main) == [3.0] * 3

    def test_a_closed_communicator_refuses_operations_and_a_second_close_is_nothing(self) -> None:
        def main(comm: Communicator) -> str:
            comm.close()
            comm.close()
            with pytest.raises(TransportError, match="closed") as caught:
                comm.barrier()
            return str(caught.value)

        assert all("barrier" in text for text in run_threads(self.protocol, 2, main))

    def test_a_rank_that_does_not_come_is_reported_within_the_timeout(self) -> None:
        gone = threading.Event()

        def main(comm: Communicator) -> float:
            return _wait_alone(comm, gone, r"barrier \(operation 1\).*rank 1")

        waited, _ = run_threads(self.protocol, 2, main, timeout=1.0)
        assert 0.5 < waited < 2 * SLOWNESS

    def test_a_timeout_that_is_set_later_counts(self) -> None:
        gone = threading.Event()

        def main(comm: Communicator) -> float:
            comm.barrier()
            if comm.rank == 0:
                comm.timeout = 1.0 * SLOWNESS
            return _wait_alone(comm, gone, r"barrier \(operation 2\).*rank 1: it is alive")

        waited, _ = run_threads(self.protocol, 2, main, timeout=8.0)
        assert 0.5 < waited < 3 * SLOWNESS

    def test_another_secret_is_refused(self) -> None:
        outcomes = run_threads(
            self.protocol, 2, lambda comm: comm.barrier(), timeout=2.0, secrets=[SECRET, b"another job's"]
        )
        assert all_raised(outcomes, TransportError)
        assert all("secret" in str(outcome) for outcome in outcomes)

    def test_another_world_size_is_refused(self) -> None:
        meeting = MemoryExchange(2)
        caught: list[Exception] = []

        def main(rank: int) -> None:
            exchange = meeting.of(rank)
            size = 2 + rank
            try:
                connect(
                    self.protocol,
                    rank=rank,
                    size=size,
                    # Rank 1 believes in a world of three, and is given three entries.
                    exchange=lambda entry: [*exchange(entry), entry][:size],
                    secret=SECRET,
                    timeout=2.0 * SLOWNESS,
                    host="127.0.0.1",
                )
            except TransportError as exc:
                caught.append(exc)

        threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10 * SLOWNESS)
        assert len(caught) == 2
        assert all("world" in str(exc) for exc in caught)

    def test_nothing_is_left_behind(self) -> None:
        def fine(comm: Communicator) -> None:
            comm.all_reduce(np.ones(300_000))

        def broken(comm: Communicator) -> None:
            fine(comm)
            if comm.rank == 0:
                raise ValueError("on purpose")
            fine(comm)

        # The first world may open what the process keeps for good.
        run_threads(self.protocol, 3, fine)
        gc.collect()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for main in (fine, broken, broken, fine):
            run_threads(self.protocol, 3, main)
        gc.collect()
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
