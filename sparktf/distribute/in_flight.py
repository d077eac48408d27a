"""What a worker has under way with its parameter servers: begun by one thread, carried by others, taken in order."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from sparktf.distribute.pair import naming_server
from sparktf.distribute.threads import Threads
from sparktf.errors import SparktfError


@dataclass(frozen=True)
class _UnderWay:
    futures: list[Future[None]]
    done: Callable[[], None]


class InFlight:
    """Talks with all servers at the same time, several of them under way at once. Used by one thread.

    Parameters
    ----------
    threads : int
        As many talks with single servers as there can ever be at a time.

    Attributes
    ----------
    waited_seconds : float
        For which `settle` has waited.
    failure : SparktfError or None
        What ended one, first of all.
    """

    def __init__(self, threads: int) -> None:
        self._threads = Threads(threads, "sparktf-push")
        # The oldest first.
        self._under_way: deque[_UnderWay] = deque()
        self.waited_seconds = 0.0
        self.failure: SparktfError | None = None

    def begin(self, talk: Callable[[int], None], servers: int, done: Callable[[], None]) -> None:
        """Begin to talk with the first so many servers; `settle` calls `done` once all are through with it."""

        def run(server: int) -> None:
            with naming_server(server):
                talk(server)

        talks = [functools.partial(run, server) for server in range(servers)]
        self._under_way.append(_UnderWay([self._threads.submit(one) for one in talks], done))

    def settle(self, most: int) -> None:
        """Wait until no more than so many are under way; finish with those that are done in the order of their begin.

        Raises
        ------
        SparktfError
            What any of them met.
        """
        began = time.monotonic()
        try:
            while self._finish_done() > most:
                # A server that is lost is heard of at once, however long another one says that it is not time yet.
                wait([f for u in self._under_way for f in u.futures if not f.done()], return_when=FIRST_COMPLETED)
        except SparktfError as error:
            self.failure = self.failure or error
            raise
        finally:
            self.waited_seconds += time.monotonic() - began

    def _finish_done(self) -> int:
        for future in [f for u in self._under_way for f in u.futures if f.done()]:
            future.result()
        while self._under_way and all(future.done() for future in self._under_way[0].futures):
            self._under_way.popleft().done()
        return len(self._under_way)

    def close(self) -> None:
        """End the threads, once none of them waits any more."""
        self._threads.close()
