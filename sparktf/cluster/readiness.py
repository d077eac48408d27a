"""Ranks that get ready at different times: those that are show that they live, and notice who does not.

All of a group go through the same rounds until all are ready, however long that takes one of them; a round itself ends
within the communicator's timeout.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sparktf.distribute.group import Group

# What a node may take to start, to import TensorFlow above all, beyond the job's timeout.
START_SECONDS = 120.0
# Ranks that get ready meet this often, in seconds, and no less often than four times within the timeout.
_MEET_SECONDS = 10.0
_NOT_YET, _READY = b"", b"!"


def not_ready_yet(group: Group) -> None:
    """Take part in a round while this rank has nothing to put in. Call it well within the timeout, again and again."""
    group.all_gather_bytes(_NOT_YET)


def gather_when_ready(group: Group, mine: bytes = b"", alive: Callable[[], None] = lambda: None) -> list[bytes]:
    """Return what each rank has put in, as soon as all have.

    Parameters
    ----------
    group : Group
    mine : bytes
    alive : callable
        Called after every round in which a rank was not ready.
    """
    while not all(everyones := group.all_gather_bytes(_READY + mine)):
        alive()
    return [told[len(_READY) :] for told in everyones]


class GettingReady:
    """Takes part in rounds, in a thread, while this rank's own thread gets ready; as a context manager around that.

    TensorFlow's import, a large model and a slow query each hold a node for longer than a short timeout, and another
    not at all: Spark has reused its Python worker, or its partition is empty.

    Parameters
    ----------
    group : Group
        Nobody else may use it until `ready` has returned.
    timeout : float
        The job's, in seconds, and the group's. Others give a rank up that has not `moved` for so long; at the
        beginning, `START_SECONDS` more.
    alive : callable
        Called after every round.
    """

    def __init__(self, group: Group, timeout: float, alive: Callable[[], None] = lambda: None) -> None:
        self._group, self._alive = group, alive
        self._interval = min(_MEET_SECONDS, timeout / 4)
        # A rank that hangs takes part no more, and the others wait for the timeout from then on.
        self._until = time.monotonic() + START_SECONDS
        self._done = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._meet, name="sparktf-getting-ready", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not joined: where this rank has failed, the round that the thread is in ends with the group.
        self._done.set()

    def moved(self) -> None:
        """Say that this rank has got on.

        Raises
        ------
        TransportError
            Another rank has failed meanwhile.
        """
        # Into twice the interval falls a round.
        self._until = max(self._until, time.monotonic() + 2 * self._interval)
        self._raise()

    def ready(self) -> None:
        """Leave the rounds to the caller, whose next is `gather_when_ready`.

        Raises
        ------
        TransportError
            Another rank has failed meanwhile.
        """
        self._done.set()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _meet(self) -> None:
        try:
            while not self._done.wait(self._interval):
                if time.monotonic() < self._until:
                    not_ready_yet(self._group)
                    self._alive()
        except Exception as error:
            # For the rank's own thread to raise.
            self._error = error
