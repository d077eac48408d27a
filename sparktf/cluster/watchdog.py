"""Ends a node that hangs where no driver hears it (Spark Connect); elsewhere the driver does that."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from sparktf.cluster.control import ControlClient
from sparktf.cluster.readiness import START_SECONDS
from sparktf.errors import NodeError

_LOG = logging.getLogger("sparktf.cluster")

# Code that a Python exception does not reach, an op of TensorFlow's for one, keeps the process from ending by itself.
# What it does reach has a child process to end and connections to close. Python drops what is raised while it collects
# garbage, so that it is raised more than once.
_TRIES, _GRACE_SECONDS = 3, 10.0
_STANDARD_ERROR = 2
_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Raises a NodeError in the main thread once nothing has gone on for too long; as a context manager.

    The exception goes through whatever hangs, so that its traceback says where. A main thread that does not react ends
    with its process, after all threads' tracebacks have gone to its standard error. Other threads than the main one
    cannot be interrupted, and are not watched.

    Parameters
    ----------
    rank : int
        The node's.
    control : ControlClient
        Knows when something went on last.
    seconds : float
        Without anything going on. Before the first progress, while TensorFlow is imported, rows are read, and the model
        is made and traced, it is `START_SECONDS` more.
    timeout : float
        The job's, in seconds, for the message.
    """

    def __init__(self, rank: int, control: ControlClient, seconds: float, timeout: float) -> None:
        self._rank, self._control, self._seconds, self._timeout = rank, control, seconds, timeout
        self._started = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(_SIGNAL, self._raise)
            self._thread = threading.Thread(target=self._watch, name="sparktf-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._done.set()
            if self._thread is not None:
                self._thread.join()
        finally:
            if self._thread is not None:
                signal.signal(_SIGNAL, self._before)

    def _watch(self) -> None:
        while (left := self._deadline() - time.monotonic()) > 0:
            # Not longer: the first progress may come at any time.
            if self._done.wait(min(left, self._seconds)):
                return
        for _ in range(_TRIES):
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
            if self._done.wait(_GRACE_SECONDS):
                return
        try:
            _LOG.error("%s", self._message())
            # Not sys.stderr, in whose place a program may have put something else.
            faulthandler.dump_traceback(_STANDARD_ERROR)
        finally:
            os._exit(1)

    def _deadline(self) -> float:
        moved_at = self._control.moved_at()
        patience = self._seconds if self._control.training() else self._seconds + START_SECONDS
        return (self._started if moved_at is None else moved_at) + patience

    def _raise(self, number: int, frame: FrameType | None) -> None:
        # What ends in the same moment has not hung.
        if not self._done.is_set():
            raise NodeError(self._message(), self._rank)

    def _message(self) -> str:
        return f"rank {self._rank}: no progress for {self._timeout:g} s (timeout): its program hangs"
