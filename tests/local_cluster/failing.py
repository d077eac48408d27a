"""Callbacks that break a fit on one rank; a module of its own, so that executors can import it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import keras


class Break(keras.callbacks.Callback):
    """Break one rank at the beginning of the second epoch.

    Parameters
    ----------
    rank : int
    how : {"raise", "SIGKILL", "SIGSTOP"}
    """

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.rank = rank
        self.how = how

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # The node may be a child process, without Spark's context; a lone worker's model knows of no group.
        group = getattr(self.model, "_sparktf", None)
        if epoch == 0 or (group.communicator.rank if group is not None else 0) != self.rank:
            return
        if self.how == "raise":
            raise RuntimeError(f"kaboom at {time.time()}")
        os.kill(os.getpid(), getattr(signal, self.how))
