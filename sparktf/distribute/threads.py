"""Threads that the end of a process does not wait for, as it does for those of an executor."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


class Threads:
    """Threads that run what they are given, in the order in which they are given it.

    Parameters
    ----------
    count : int
        How many at most; each is started when there is something for it to do.
    name : str
        Of every thread.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Have a thread run `job`; return what will hold its result. Any thread may call this."""
        future: Future[Result] = Future()
        with self._lock:
            if len(self._threads) < self._count:
                # Python joins all others when a program ends: one that waits for a peer would hold it for the timeout.
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """Cancel what no thread has begun, and return once the rest is done."""
        with self._lock:
            with suppress(queue.Empty):
                while (waiting := self._jobs.get_nowait()) is not None:
                    waiting[0].cancel()
            for _ in self._threads:
                self._jobs.put(None)
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (given := self._jobs.get()) is not None:
            future, job = given
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as exc:
                    future.set_exception(exc)
            # Not to be held while there is nothing to do.
            del given, future, job
