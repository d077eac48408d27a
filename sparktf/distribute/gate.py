"""Which pushes a parameter server applies, and when a worker may go on: stale synchronous parallel.

As in Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013: every
worker has a clock, the number of its updates so far, and waits where it would leave the slowest too far behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sparktf.errors import TransportTimeoutError

# A push that is under way: whose, and over which of the worker's lanes.
Push = tuple[int, int]


class Gate:
    """The clocks of all workers at one server. Any thread may call; `apply` and `at_end` are called by one at a time.

    Parameters
    ----------
    workers : int
    max_staleness : int or None
        No worker is ever more updates ahead of the slowest that still trains. 0: the pushes of all workers are
        applied together, once. None: no bound.
    apply : callable
        Applies some workers' pushes, in the order of the workers, as one update.
    timeout : float
        Seconds for which nobody need push while somebody waits.
    at_end : callable
        Called with the workers that have finished when all have, before any of them may push again.
    lanes : int
        As many pushes of each worker may be under way.

    Attributes
    ----------
    clocks : list of int
        Each worker's updates since all began, or began again.
    lead : int
        The most that any worker was ahead of the slowest.
    pushes : list of int
        Each worker's, all told.
    """

    def __init__(
        self,
        workers: int,
        max_staleness: int | None,
        apply: Callable[[Sequence[Push]], None],
        timeout: float,
        at_end: Callable[[Sequence[int]], None] = lambda finished: None,
        lanes: int = 1,
    ) -> None:
        self._together = max_staleness == 0
        # A worker computes on while its last pushes are under way: more updates than it has answers to.
        self._bound = max_staleness - lanes if max_staleness else None
        self._apply = apply
        self._timeout = timeout
        self._at_end = at_end
        self._news = threading.Condition()
        self._moved_at = time.monotonic()
        self._present = set(range(workers))
        self._finished: set[int] = set()
        self._pushed: set[Push] = set()
        # What a worker's clock shows once its last push over a lane is applied.
        self._numbers: dict[Push, int] = {}
        self._ends = 0
        self.clocks = [0] * workers
        self.pushes = [0] * workers
        self.lead = 0

    def push(self, push: Push) -> None:
        """Take a push: apply it, or keep it until all that train have pushed."""
        worker, _ = push
        with self._news:
            self.pushes[worker] += 1
            self._pushed.add(push)
            self._numbers[push] = self.clocks[worker] + 1
            self._advance()

    def passed(self, push: Push, seconds: float) -> bool:
        """Wait until the last push over that lane is applied and the worker would not be too far ahead with the next.

        Returns
        -------
        bool
            False where `seconds` have passed first.

        Raises
        ------
        TransportTimeoutError
            Nobody has pushed for the timeout.
        """
        return self._wait(lambda: push not in self._pushed and self._near(push), seconds)

    def finish(self, worker: int) -> int:
        """Note that a worker has come to the end of its training for now; the others no longer wait for it.

        Returns
        -------
        int
            What `finished` wants to know.
        """
        with self._news:
            self._finished.add(worker)
            end = self._ends
            self._advance()
            return end

    def finished(self, end: int, seconds: float) -> bool:
        """Wait until all workers have come to that end; returns and raises as `passed` does."""
        return self._wait(lambda: self._ends > end, seconds)

    def idle_seconds(self) -> float:
        """Return how long nobody has pushed, finished or left."""
        return time.monotonic() - self._moved_at

    def leave(self, worker: int) -> bool:
        """Note that a worker is gone for good. May be called twice.

        Returns
        -------
        bool
            It had pushed, which is not applied and no longer will be.
        """
        with self._news:
            theirs = {push for push in self._pushed if push[0] == worker}
            self._present.discard(worker)
            self._finished.discard(worker)
            self._pushed -= theirs
            self._advance()
            return bool(theirs)

    def _advance(self) -> None:
        training = self._present - self._finished
        if self._pushed and (not self._together or {worker for worker, _ in self._pushed} >= training):
            self._apply(sorted(self._pushed))
            for worker, _ in self._pushed:
                self.clocks[worker] += 1
            self._pushed.clear()
            clocks = [self.clocks[worker] for worker in training]
            self.lead = max(self.lead, max(clocks, default=0) - min(clocks, default=0))
        if not training:
            self._at_end(sorted(self._finished))
            # All begin their next training side by side.
            self._finished.clear()
            self._ends += 1
            self.clocks = [0] * len(self.clocks)
            self._numbers.clear()
        self._moved_at = time.monotonic()
        self._news.notify_all()

    def _near(self, push: Push) -> bool:
        number, training = self._numbers.get(push, 0), self._present - self._finished
        slowest = min((self.clocks[other] for other in training), default=number)
        return self._bound is None or number - slowest <= self._bound

    def _wait(self, reached: Callable[[], bool], seconds: float) -> bool:
        with self._news:
            if self._news.wait_for(reached, seconds):
                return True
            waited = self.idle_seconds()
            if waited <= self._timeout:
                return False
            pushed = {worker for worker, _ in self._pushed}
            awaited = sorted(self._present - self._finished - pushed, key=lambda w: (self.clocks[w], w))
            raise TransportTimeoutError(
                f"Expected an update of worker {awaited[0] if awaited else '?'} within {self._timeout:g} s (timeout); "
                f"nobody has sent one for {waited:.0f} s, and others wait for it. Raise timeout where a step, a "
                "callback or the validation takes so long."
            )
