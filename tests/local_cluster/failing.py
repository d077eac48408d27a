"""Callbacks that break a fit on one rank; a module of its own, so that executors can import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras


class Break(keras.callbacks.Callback):
    """Break one rank at the beginning of the second epoch.

    Parameters
    ----------
    rank : int
    how : {"raise", "SIGKILL", "SIGSTOP"}
    when : str, optional
        Path of a file to write the time into just before a signal.
    """

    def __init__(self, rank: int, how: str, when: str = "") -> None:
        super().__init__()
        self.rank = rank
        self.how = how
        self.when = when

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # The node may be a child process, without Spark's context; a lone worker's model knows of no group.
        group = getattr(self.model, "_sparktf", None)
        if epoch == 0 or (group.communicator.rank if group is not None else 0) != self.rank:
            return
        if self.how == "raise":
            raise RuntimeError(f"kaboom at {time.time()}")
        if self.when:
            Path(self.when).write_text(str(time.time()))
        os.kill(os.getpid(), getattr(signal, self.how))


def breaking_model(rank: int) -> Callable[[], keras.Model]:
    """Return a modelFn whose model breaks on one rank, in its own training step."""

    def make() -> keras.Model:
        class Breaking(keras.Model):
            def train_step(self, data: Any) -> Any:
                if self._sparktf.communicator.rank == rank:
                    raise RuntimeError(f"kaboom at {time.time()}")
                return super().train_step(data)

        entry = keras.Input((4,))
        model = Breaking(entry, keras.layers.Dense(1)(entry))
        model.compile("adam", "mse")
        return model

    return make
