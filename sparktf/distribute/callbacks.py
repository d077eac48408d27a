"""Callbacks of a distributed fit: which of the user's run where, and those that the fit itself needs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# A callback with this attribute set to True runs on the chief only.
CHIEF_ONLY_MARK = "sparktf_chief_only"

# Numbers of an epoch that a screen shows; a metric may have one for every class.
_SHOWN = 1000

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


def before_others(on_epoch_begin: Callable[[int], None]) -> Any:
    """Return a callback, to stand before the user's, that calls back as an epoch begins with its number, from 0."""
    import keras

    class _Before(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            on_epoch_begin(epoch)

    return _Before()


def after_others(
    on_train_begin: Callable[[], None],
    on_validation_begin: Callable[[], None],
    on_epoch_end: Callable[[int, dict[str, Any]], None],
) -> Any:
    """Return a callback, to stand behind the user's, that calls back before the first epoch and after each.

    Parameters
    ----------
    on_train_begin, on_validation_begin : callable
    on_epoch_end : callable
        Called with the epoch's number, from 0, and its logs as the user's callbacks left them.
    """
    import keras

    class _After(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            on_train_begin()

        def on_test_begin(self, logs: Any = None) -> None:
            on_validation_begin()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            on_epoch_end(epoch, dict(logs or {}))

    return _After()


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return logs as plain numbers.

    A metric of several numbers (F1 of each class) becomes ``name_0``, ``name_1``, ...; what is not a number is left
    out.
    """
    found: dict[str, float] = {}
    for name, value in logs.items():
        values = np.asarray(value)
        if values.dtype.kind not in "fiub" and values.dtype.name != "bfloat16":
            continue
        flat = values.astype(np.float64).reshape(-1)
        several = values.ndim > 0
        found |= {f"{name}_{i}" if several else name: float(number) for i, number in enumerate(flat)}
    return found


def progress_callback(report: Callable[[dict[str, Any]], None], steps: int, interval: float = 0.5) -> Any:
    """Return a callback that reports progress at most every `interval` seconds, and at each epoch's end.

    Parameters
    ----------
    report : callable
        Called with ``{"epoch", "step", "steps"}`` while an epoch runs and ``{"epoch", "logs", "seconds"}`` at its end,
        with nothing while it is evaluated;
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
            self._began = time.monotonic()
            # The first batch is reported in any case: all before it, tracing above all, takes its own time.
            self._reported = -math.inf

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._epoch = epoch + 1
            self._began = time.monotonic()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.monotonic()
            if now - self._reported >= interval:
                self._reported = now
                report({"epoch": self._epoch, "step": batch + 1, "steps": steps})

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.monotonic()
            if now - self._reported >= interval:
                self._reported = now
                report({})

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            shown = dict(itertools.islice(numbers(logs or {}).items(), _SHOWN))
            report({"epoch": epoch + 1, "logs": shown, "seconds": time.monotonic() - self._began})

    return _Progress()
