"""Ranks that get ready at different times."""

from __future__ import annotations

import time

from sparktf.cluster.readiness import gather_when_ready, not_ready_yet
from sparktf.errors import PeerLostError
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
