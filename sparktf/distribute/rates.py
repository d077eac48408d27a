"""Whose learning rate counts at a parameter server: callbacks set it on workers, of whom any may leave."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Rates:
    """The learning rates that workers have told; that of the lowest worker that is still there counts.

    Any thread may call.

    Parameters
    ----------
    workers : int
    follow : callable
        Called with the rate that counts, by one thread at a time, whenever that is another one than before.
    """

    def __init__(self, workers: int, follow: Callable[[float], None]) -> None:
        self._present = set(range(workers))
        self._told: dict[int, float] = {}
        self._follow = follow
        self._counts: float | None = None
        self._lock = threading.Lock()

    def tell(self, worker: int, rate: float) -> None:
        """Note a worker's rate; NaN where its optimizer has a schedule, which the server follows by itself."""
        with self._lock:
            if rate == rate:
                self._told[worker] = rate
            self._choose()

    def leave(self, worker: int) -> None:
        """Note that a worker is gone for good. May be called twice."""
        with self._lock:
            self._present.discard(worker)
            self._choose()

    def _choose(self) -> None:
        # One that has told none yet counts as well: it is where it began, as the server is.
        rate = self._told.get(min(self._present)) if self._present else None
        if rate is not None and rate != self._counts:
            self._counts = rate
            self._follow(rate)
