"""Callbacks of a distributed fit: which of the user's run where, and those that the fit itself needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

# A callback with this attribute set to True runs on the chief only.
CHIEF_ONLY_MARK = "sparktf_chief_only"

# Keras's own that write files, by name: the set differs between Keras versions.
_WRITERS = (
    "ModelCheckpoint",
    "CSVLogger",
    "TensorBoard",
    "BackupAndRestore",
    "RemoteMonitor",
    "OrbaxCheckpoint",
)


def callbacks_of_rank(callbacks: Sequence[Any], rank: int) -> list[Any]:
    """Return the user's callbacks that run on a rank.

    Schedules and early stopping have to run everywhere; those that write files run on the chief only, and so do
    those whose attribute ``sparktf_chief_only`` is True.

    Parameters
    ----------
    callbacks : sequence of keras.callbacks.Callback
        This rank's own copies.
    rank : int
    """
    if rank == 0:
        return list(callbacks)
    return [callback for callback in callbacks if not _chief_only(callback)]


def _chief_only(callback: Any) -> bool:
    import keras

    writers = tuple(getattr(keras.callbacks, name) for name in _WRITERS if hasattr(keras.callbacks, name))
    return isinstance(callback, writers) or bool(getattr(callback, CHIEF_ONLY_MARK, False))


def epoch_callback(on_begin: Callable[[int], None], on_end: Callable[[int], None]) -> Any:
    """Return a callback that calls back at each epoch's begin and end with the epoch's number, from 0."""
    import keras

    class _Epochs(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            on_begin(epoch)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            on_end(epoch)

    return _Epochs()


def progress_callback(report: Callable[[dict[str, Any]], None], steps: int, interval: float = 0.5) -> Any:
    """Return a callback that reports progress at most every `interval` seconds, and at each epoch's end.

    Parameters
    ----------
    report : callable
        Called with ``{"epoch", "step", "steps"}`` while an epoch runs and ``{"epoch", "logs", "seconds"}`` at its end;
        epochs and steps count from 1.
    steps : int
        Steps an epoch.
    interval : float
        Seconds.
    """
    import keras

    class _Progress(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._epoch = 0
            self._began = self._reported = time.monotonic()

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._epoch = epoch + 1
            self._began = time.monotonic()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.monotonic()
            if now - self._reported >= interval:
                self._reported = now
                report({"epoch": self._epoch, "step": batch + 1, "steps": steps})

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items()}
            report({"epoch": epoch + 1, "logs": numbers, "seconds": time.monotonic() - self._began})

    return _Progress()
