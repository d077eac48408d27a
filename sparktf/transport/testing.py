"""The tests that every protocol passes, for backends in and outside this package.

Use it with pytest in these lines::

    import pytest
    pytest.register_assert_rewrite("sparktf.transport.testing")
    from sparktf.transport.testing import TransportConformance

    class TestMine(TransportConformance):
        protocol = "mine"

Ranks are real: threads for what is computed, processes for what is killed. It needs pytest and hypothesis.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparktf.errors import ParamError, PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.contract import Array, Communicator
from sparktf.transport.reduction import OPS
from sparktf.transport.registry import connect
from sparktf.transport.worlds import SECRET, MemoryExchange, processes, run_threads

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8", "bool")
_FUNCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}
_SETTINGS = settings(
    max_examples=40,
    deadline=None,
    # The same inherited test runs for several classes, one a protocol.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


def reduce_forever(communicator: Communicator) -> None:
    """Reduce until something breaks; large and small arrays in turn."""
    small, large = np.ones(8, np.float32), np.ones(1 << 20, np.float32)
    while True:
        communicator.all_reduce(small, "mean")
        communicator.all_reduce(large, "mean")


def arrays(size: int, length: int, dtype: str, seed: int) -> list[Array]:
    """Return one array a rank whose sums are exact in any dtype and order."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2 if dtype == "bool" else 8, length).astype(kind) for _ in range(size)]


def expected(parts: list[Array], op: str) -> Array:
    """Return what numpy makes of the arrays of all ranks."""
    if parts[0].dtype == np.bool_:
        result = np.logical_and.reduce(parts) if op == "min" else np.logical_or.reduce(parts)
    else:
        result = _FUNCTIONS[op](np.stack(parts).astype(np.float64), axis=0)
    return np.asarray(result).astype(parts[0].dtype)


def all_raised(outcomes: list[Any], kind: type[BaseException]) -> bool:
    """Return whether every rank ended with this kind of exception."""
    return all(isinstance(outcome, kind) for outcome in outcomes)


class Collectives:
    """What the operations compute."""

    protocol = ""

    @_SETTINGS
    @given(
        size=st.integers(1, 4),
        length=st.one_of(st.integers(0, 12), st.integers(0, 10_000), st.sampled_from([40_000, 300_001])),
        dtype=st.sampled_from(_DTYPES),
        op=st.sampled_from(OPS),
        seed=st.integers(0, 99),
    )
    def test_reductions_equal_those_of_numpy(
        self, size: int, length: int, dtype: str, op: str, seed: int
    ) -> None:
        parts = arrays(size, length, dtype, seed)
        if op == "mean" and not dtype.startswith(("float", "bfloat")):
            op = "sum"
        whole = expected(parts, op)

        def main(comm: Communicator) -> tuple[Array, Array, bool]:
            given_array = parts[comm.rank].copy()
            shard = comm.reduce_scatter(given_array, op)
            kept = bool(np.array_equal(given_array, parts[comm.rank]))
            assert comm.all_reduce(given_array, op) is given_array
            return given_array, shard, kept

        for rank, (reduced, shard, kept) in enumerate(run_threads(self.protocol, size, main)):
            assert reduced.dtype == whole.dtype
            # A third has no exact binary form; everything else is exact.
            exact = op != "mean"
            assert np.allclose(reduced.astype(float), whole.astype(float), rtol=0 if exact else 1e-2, atol=0)
            assert np.array_equal(shard, np.array_split(reduced, size)[rank])
            assert kept, "reduce_scatter changed its argument"

    @pytest.mark.parametrize("length", [1000, 700_001])
    def test_results_have_the_same_bits_on_all_ranks_and_in_every_run(self, length: int) -> None:
        def main(comm: Communicator) -> bytes:
            values = np.random.default_rng(comm.rank).standard_normal(length).astype(np.float32)
            return comm.all_reduce(values, "mean").tobytes()

        results = run_threads(self.protocol, 3, main) + run_threads(self.protocol, 3, main)
        assert len(set(results)) == 1

    @_SETTINGS
    @given(lengths=st.lists(st.sampled_from([0, 1, 5, 3000, 200_000]), min_size=1, max_size=4))
    def test_all_gather_takes_a_different_length_from_every_rank(self, lengths: list[int]) -> None:
        def main(comm: Communicator) -> list[Array]:
            return comm.all_gather(np.full((lengths[comm.rank], 2), comm.rank, np.int32))

        for parts in run_threads(self.protocol, len(lengths), main):
            assert [part.shape for part in parts] == [(length, 2) for length in lengths]
            assert all((part == rank).all() for rank, part in enumerate(parts))

    def test_all_gather_bytes_keeps_order_and_lengths(self) -> None:
        outcomes = run_threads(self.protocol, 3, lambda comm: comm.all_gather_bytes(b"ab" * comm.rank))
        assert outcomes == [[b"", b"ab", b"abab"]] * 3

    @pytest.mark.parametrize("length", [0, 7, 400_000])
    def test_broadcast_gives_every_rank_the_roots_array(self, length: int) -> None:
        def main(comm: Communicator) -> list[bool]:
            return [
                bool((comm.broadcast(np.full(length, comm.rank, np.float64), root) == root).all())
                for root in range(comm.size)
            ]

        assert run_threads(self.protocol, 3, main) == [[True] * 3] * 3

    def test_point_to_point_reaches_any_rank_between_collectives(self) -> None:
        def main(comm: Communicator) -> list[float]:
            got = []
            for sender in range(comm.size):
                for receiver in range(comm.size):
                    if sender != receiver and comm.rank == sender:
                        comm.send(receiver, np.full(200_000, 10 * sender + receiver, np.float32))
                    elif sender != receiver and comm.rank == receiver:
                        got.append(float(comm.recv(sender, np.zeros(200_000, np.float32))[-1]))
                comm.barrier()
            return got

        assert run_threads(self.protocol, 3, main) == [[10, 20], [1, 21], [2, 12]]

    def test_arrays_of_any_shape_and_stride_are_reduced_in_place(self) -> None:
        def main(comm: Communicator) -> tuple[Array, Array, Array]:
            columns = np.ones((6, 4), np.float32)
            comm.all_reduce(columns[:, ::2])
            return columns, comm.all_reduce(np.ones((2, 3, 4))), comm.all_reduce(np.array(2.0))

        for columns, cube, scalar in run_threads(self.protocol, 2, main):
            assert columns.tolist() == [[2, 1, 2, 1]] * 6
            assert cube.shape == (2, 3, 4)
            assert scalar.shape == ()
            assert scalar == 4

    def test_buffers_are_allocated_once(self) -> None:
        def main(comm: Communicator) -> bool:
            def step() -> int:
                comm.all_reduce(np.ones(300_000, np.float32))
                comm.all_reduce(np.ones(3, np.float32))
                comm.reduce_scatter(np.ones(300_000, np.float32))
                return comm.stats.registrations

            first = step()
            return all(step() == first for _ in range(5))

        assert run_threads(self.protocol, 2, main) == [True, True]

    def test_a_world_of_one_needs_no_peer(self) -> None:
        def main(comm: Communicator) -> bool:
            assert (comm.rank, comm.size, comm.protocol) == (0, 1, self.protocol)
            comm.barrier()
            assert comm.all_gather_bytes(b"x") == [b"x"]
            return bool((comm.broadcast(comm.all_reduce(np.ones(5), "mean")) == 1).all())

        assert run_threads(self.protocol, 1, main) == [True]

    def test_a_wrong_argument_is_refused_before_anything_is_sent(self) -> None:
        def main(comm: Communicator) -> bool:
            frozen = np.ones(3)
            frozen.flags.writeable = False
            for array, op in ((np.ones(3), "product"), (np.ones(3, int), "mean"), (frozen, "sum")):
                with pytest.raises(ParamError):
                    comm.all_reduce(array, op)
            with pytest.raises(ParamError):
                comm.all_reduce(np.array(["text"]))
            return bool(comm.all_reduce(np.ones(1))[0] == comm.size)

        assert run_threads(self.protocol, 2, main) == [True, True]


class Failures:
    """What happens when something goes wrong."""

    protocol = ""

    def test_operations_that_do_not_match_are_an_error_on_every_rank(self) -> None:
        def main(comm: Communicator) -> None:
            comm.all_reduce(np.ones(10 + comm.rank))

        outcomes = run_threads(self.protocol, 3, main)
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
            assert "all_reduce" in str(outcome)

    def test_an_abort_reaches_ranks_that_wait_for_nothing_yet(self) -> None:
        told = threading.Event()

        def main(comm: Communicator) -> None:
            comm.barrier()
            if comm.rank == 0:
                comm.abort("enough")
                told.set()
            told.wait(10)
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
        assert waited < 2

    def test_a_peer_that_closes_too_early_is_named(self) -> None:
        def main(comm: Communicator) -> None:
            comm.barrier()
            if comm.rank != 1:
                comm.all_reduce(np.ones(500_000))

        outcomes = run_threads(self.protocol, 3, main)
        assert outcomes[1] is None
        assert all_raised([outcomes[0], outcomes[2]], PeerLostError)
        assert {outcomes[0].peer, outcomes[2].peer} == {1}

    def test_closing_right_after_the_last_operation_loses_nothing(self) -> None:
        def main(comm: Communicator) -> float:
            return float(comm.all_reduce(np.ones(300_000))[-1])

        for _ in range(5):
            assert run_threads(self.protocol, 3, main) == [3.0] * 3

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
            if comm.rank == 1:
                gone.wait(10)
                return 0.0
            begin = time.monotonic()
            try:
                with pytest.raises(TransportTimeoutError, match=r"barrier \(operation 1\).*rank 1"):
                    comm.barrier()
            finally:
                gone.set()
            return time.monotonic() - begin

        waited, _ = run_threads(self.protocol, 2, main, timeout=1.0)
        assert 0.5 < waited < 2

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
                    timeout=2.0,
                    host="127.0.0.1",
                )
            except TransportError as exc:
                caught.append(exc)

        threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
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


class LostProcesses:
    """What the others see of a process that is killed or stopped."""

    protocol = ""

    def test_a_killed_process_is_reported_by_all_others_within_two_seconds(self, tmp_path: Path) -> None:
        with processes(self.protocol, 3, reduce_forever, tmp_path, timeout=30.0) as ranks:
            for rank in ranks:
                assert rank.report()["event"] == "connected"
            time.sleep(0.3)
            begin = time.monotonic()
            ranks[1].signal(signal.SIGKILL)
            failures = [ranks[0].report(), ranks[2].report()]
        assert [failure["error"] for failure in failures] == ["PeerLostError"] * 2
        assert [failure["peer"] for failure in failures] == [1, 1]
        assert all(failure["at"] - begin < 2 for failure in failures)

    def test_a_stopped_process_is_reported_within_the_timeout(self, tmp_path: Path) -> None:
        with processes(self.protocol, 3, reduce_forever, tmp_path, timeout=2.0) as ranks:
            for rank in ranks:
                assert rank.report()["event"] == "connected"
            time.sleep(0.3)
            begin = time.monotonic()
            ranks[1].signal(signal.SIGSTOP)
            failures = [ranks[0].report(), ranks[2].report()]
        for failure in failures:
            assert failure["error"] in ("PeerLostError", "TransportTimeoutError")
            assert "rank 1" in failure["message"]
            # What moved last did so at most a moment after the signal; the rest is a busy machine's.
            assert failure["at"] - begin < 3
        assert "TransportTimeoutError" in {failure["error"] for failure in failures}

    def test_a_process_that_ends_without_closing_does_not_hang(self, tmp_path: Path) -> None:
        with processes(self.protocol, 2, _leave, tmp_path, timeout=20.0) as ranks:
            for rank in ranks:
                assert rank.report()["event"] == "connected"
            assert [rank.exit_code(10.0) for rank in ranks] == [0, 0]


def _leave(communicator: Communicator) -> None:
    communicator.all_reduce(np.ones(300_000))
    # An exit from within the ``with`` block that runs no clean-up of ours.
    threading.Thread(target=communicator.barrier, daemon=True).start()
    globals()["_kept"] = communicator
    communicator.close = communicator.abort = lambda *_: None  # type: ignore[method-assign]


class TransportConformance(Collectives, Failures, LostProcesses):
    """All of it; set `protocol` in a subclass."""
