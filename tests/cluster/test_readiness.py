"""Ranks that get ready at different times."""

from __future__ import annotations

import time

import pytest

from sparktf.cluster import readiness
from sparktf.cluster.readiness import GettingReady, gather_when_ready, not_ready_yet
from sparktf.errors import PeerLostError, TransportTimeoutError
from sparktf.transport import Communicator
from sparktf.transport.testing import results_of_threads, run_threads

LATE, TIMEOUT = 6.0, 3.0


def test_those_that_are_ready_wait_longer_than_the_timeout_and_say_that_they_live() -> None:
    def main(communicator: Communicator) -> tuple[list[bytes], int]:
        words: list[float] = []
        begin = time.monotonic()
        while communicator.rank == 1 and time.monotonic() - begin < LATE:
            time.sleep(TIMEOUT / 4)
            not_ready_yet(communicator)
        # Also of nothing: that a rank is ready is another matter than what it has to say.
        mine = b"" if communicator.rank == 2 else bytes([communicator.rank])
        told = gather_when_ready(communicator, mine, lambda: words.append(time.monotonic()))
        return told, len(words)

    outcomes = results_of_threads("tcp", 3, main, timeout=TIMEOUT)
    assert [told for told, _ in outcomes] == [[b"\0", b"\1", b""]] * 3
    assert [words >= 3 for _, words in outcomes] == [True, False, True]


def test_a_rank_that_fails_before_it_is_ready_is_told_to_the_others() -> None:
    def main(communicator: Communicator) -> object:
        if communicator.rank == 0:
            return gather_when_ready(communicator, b"mine")
        not_ready_yet(communicator)
        return communicator.abort("RuntimeError: kaboom before it was ready")

    raised = run_threads("tcp", 2, main)[0]
    assert isinstance(raised, PeerLostError), raised
    assert raised.reason == "RuntimeError: kaboom before it was ready"


@pytest.mark.parametrize("at_the_beginning", [True, False])
def test_a_rank_that_gets_ready_for_longer_than_the_timeout_keeps_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch, at_the_beginning: bool
) -> None:
    if not at_the_beginning:
        monkeypatch.setattr(readiness, "START_SECONDS", 0.0)

    def main(communicator: Communicator) -> tuple[list[bytes], int]:
        words: list[float] = []
        with GettingReady(communicator, TIMEOUT, lambda: words.append(time.monotonic())) as getting_ready:
            for _ in range(16 if communicator.rank == 1 else 0):
                time.sleep(LATE / 16)
                if not at_the_beginning:
                    getting_ready.moved()
            getting_ready.ready()
            return gather_when_ready(communicator, bytes([communicator.rank])), len(words)

    outcomes = results_of_threads("tcp", 3, main, timeout=TIMEOUT)
    assert [told for told, _ in outcomes] == [[b"\0", b"\1", b"\2"]] * 3
    assert outcomes[1][1] >= 3, "it says itself that it lives"


def test_a_rank_that_gets_no_further_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "START_SECONDS", 0.0)

    def main(communicator: Communicator) -> list[bytes]:
        with GettingReady(communicator, TIMEOUT) as getting_ready:
            if communicator.rank == 1:
                time.sleep(3 * TIMEOUT)
            getting_ready.ready()
            return gather_when_ready(communicator)

    waiting, late = run_threads("tcp", 2, main, timeout=TIMEOUT)
    assert isinstance(waiting, TransportTimeoutError), waiting
    assert "waiting for rank 1" in str(waiting)
    assert isinstance(late, TransportTimeoutError | PeerLostError), late


def test_a_rank_that_gets_ready_hears_of_one_that_failed_and_one_that_fails_tells_at_once() -> None:
    def main(communicator: Communicator) -> object:
        with GettingReady(communicator, TIMEOUT) as getting_ready:
            if communicator.rank == 0:
                time.sleep(TIMEOUT / 2)
                communicator.abort("RuntimeError: kaboom while it got ready")
                raise RuntimeError("kaboom while it got ready")
            for _ in range(100):
                time.sleep(TIMEOUT / 20)
                getting_ready.moved()
            return "not told"

    failed, told = run_threads("tcp", 2, main, timeout=TIMEOUT)
    assert isinstance(failed, RuntimeError)
    assert isinstance(told, PeerLostError), told
    assert told.reason == "RuntimeError: kaboom while it got ready"
