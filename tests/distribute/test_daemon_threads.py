"""Threads that a program does not wait for when it ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.threads import Threads
from sparktf.transport import Communicator
from sparktf.transport.testing import processes


def test_what_is_given_is_run_in_order_and_its_failures_are_kept() -> None:
    order: list[int] = []
    threads = Threads(1, "sparktf-test")
    futures = [threads.submit(lambda number=number: order.append(number)) for number in range(5)]  # type: ignore[misc]
    failed = threads.submit(lambda: 1 // 0)
    assert [future.result(5) for future in futures] == [None] * 5
    assert order == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        failed.result(5)
    threads.close()


def test_closing_takes_back_what_has_not_begun_and_waits_for_the_rest() -> None:
    threads, begun, end = Threads(2, "sparktf-test"), threading.Barrier(3), threading.Event()

    def talk() -> str:
        begun.wait(5)
        end.wait(5)
        return "said"

    running = [threads.submit(talk) for _ in range(2)]
    waiting = threads.submit(talk)
    begun.wait(5)
    threading.Timer(0.2, end.set).start()
    threads.close()
    assert [future.result(0) for future in running] == ["said", "said"]
    assert waiting.cancelled()
    assert "sparktf-test" not in {thread.name for thread in threading.enumerate()}


def _end_with_a_bucket_under_way(communicator: Communicator) -> None:
    reducer = GradientReducer(communicator)
    exchange = reducer.exchange(1, [(np.dtype("float32"), (1000,))])
    exchange.begin()
    if communicator.rank == 1:
        time.sleep(60)
    exchange.pack(0, 0.5, [np.ones(1000, np.float32)], stop=False)
    exchange.send(0)
    # No clean-up of ours runs.
    globals()["_kept"] = reducer
    communicator.close = communicator.abort = lambda *_: None  # type: ignore[method-assign]


def test_a_process_that_ends_with_a_bucket_under_way_does_not_wait_for_its_peers(tmp_path: Path) -> None:
    with processes("tcp", 2, _end_with_a_bucket_under_way, tmp_path, timeout=20.0) as ranks:
        for rank in ranks:
            assert rank.report()["event"] == "connected"
        assert ranks[0].exit_code(10.0) == 0
