"""What the others see of a process that is killed, stopped or ends, for any protocol."""

# Test names are sentences already.
# ruff: noqa: D102

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import numpy as np

from sparktf.transport.contract import Communicator
from sparktf.transport.testing.worlds import SLOWNESS, processes


def reduce_forever(communicator: Communicator) -> None:
    """Reduce until something breaks; large and small arrays in turn."""
    small, large = np.ones(8, np.float32), np.ones(1 << 20, np.float32)
    while True:
        communicator.all_reduce(small, "mean")
        communicator.all_reduce(large, "mean")


def check_killed_process(protocol: str, directory: Path) -> None:
    """Kill one of three ranks that reduce; check that the others name it within two seconds."""
    with processes(protocol, 3, reduce_forever, directory, timeout=30.0) as ranks:
        for rank in ranks:
            assert rank.report()["event"] == "connected"
        time.sleep(0.3)
        begin = time.monotonic()
        ranks[1].signal(signal.SIGKILL)
        failures = [ranks[0].report(), ranks[2].report()]
    assert [failure["error"] for failure in failures] == ["PeerLostError"] * 2
    assert [failure["peer"] for failure in failures] == [1, 1]
    assert all(failure["at"] - begin < 2 for failure in failures)


def _leave(communicator: Communicator) -> None:
    communicator.all_reduce(np.ones(300_000))
    # An exit from within the ``with`` block that runs no clean-up of ours.
    threading.Thread(target=communicator.barrier, daemon=True).start()
    globals()["_kept"] = communicator
    communicator.close = communicator.abort = lambda *_: None  # type: ignore[method-assign]


class LostProcesses:
    """What the others see of a process that is killed or stopped."""

    protocol = ""

    def test_a_killed_process_is_reported_by_all_others_within_two_seconds(self, tmp_path: Path) -> None:
        check_killed_process(self.protocol, tmp_path)

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
            assert failure["at"] - begin < 3 * SLOWNESS
        assert "TransportTimeoutError" in {failure["error"] for failure in failures}

    def test_a_process_that_ends_without_closing_does_not_hang(self, tmp_path: Path) -> None:
        with processes(self.protocol, 2, _leave, tmp_path, timeout=20.0) as ranks:
            for rank in ranks:
                assert rank.report()["event"] == "connected"
            assert [rank.exit_code(10.0 * SLOWNESS) for rank in ranks] == [0, 0]
