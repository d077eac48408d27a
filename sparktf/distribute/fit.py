"""Keras's ``fit`` on one rank of several, whatever holds them together."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sparktf.data.batches import epoch_order
from sparktf.distribute.callbacks import after_others, before_others, callbacks_of_rank, numbers, progress_callback
from sparktf.distribute.clock import StepClock
from sparktf.distribute.table_fit import check_callbacks, table_failure, table_seconds
from sparktf.errors import SparktfError, located

Order = Callable[[], "np.ndarray[Any, Any]"]


class Together(Protocol):
    """How a rank trains with the others: in lockstep (mode "sync"), or at its own pace (mode "async").

    Attributes
    ----------
    rank : int
        Among those that have rows.
    rows : int
        This rank's training rows.
    steps : int
        Of this rank in an epoch.
    clock : StepClock
    """

    rank: int
    rows: int
    steps: int
    clock: StepClock

    def hold(self, model: Any, settings: FitSettings, notices: list[str]) -> contextlib.AbstractContextManager[None]:
        """Hold the model and its optimizers in their distributed form."""

    def begin(self, model: Any, settings: FitSettings) -> None:
        """Start from the chief's state; called after the user's callbacks have begun."""

    def end_epoch(self, model: Any, epoch: int) -> None:
        """Agree with the others that an epoch is over, after the user's callbacks."""

    def explain(self, error: BaseException) -> BaseException | None:
        """Return what was behind an error that TensorFlow raised in a step; None where it was TensorFlow's own."""

    def waited_seconds(self) -> float:
        """Return the seconds so far that this rank waited for others or for data to travel."""


@dataclass(frozen=True)
class FitSettings:
    """What a fit is told.

    Parameters
    ----------
    batch_size : int
        Rows per worker and step.
    epochs : int
    shuffle : bool
        Permute each rank's rows anew in every epoch.
    seed : int
        Fixes the permutations and the seed generators of the model.
    """

    batch_size: int
    epochs: int
    shuffle: bool
    seed: int


@dataclass(frozen=True)
class RankRows:
    """How many rows every rank holds; one entry a rank."""

    training: tuple[int, ...]
    validation: tuple[int, ...]


@dataclass
class FitReport:
    """What a fit did.

    Attributes
    ----------
    history : dict of str to list of float
        Metrics and losses: one entry an epoch, NaN where an epoch has none; equal on all ranks. A metric of several
        numbers is ``name_0``, ``name_1``, ...
    epoch_seconds : list of float
        Wall-clock seconds of each epoch's training on this rank, without validation.
    seconds : float
        Wall-clock seconds of the whole fit on this rank.
    communicate_seconds : float
        Seconds of it that this rank waited for collectives: not those that ran while TensorFlow computed, nor
        TensorFlow's own.
    steps_per_epoch : int
    notices : list of str
        What was changed for the fit, for people.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    epoch_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    communicate_seconds: float = 0.0
    steps_per_epoch: int = 0
    notices: list[str] = field(default_factory=list)


def fit_together(
    model: Any,
    together: Together,
    training: Callable[[Order, int], Any],
    validation: Any,
    settings: FitSettings,
    callbacks: Sequence[Any] = (),
    report: Callable[[dict[str, Any]], None] | None = None,
) -> FitReport:
    """Train a compiled Keras model together with the other ranks.

    Parameters
    ----------
    model : keras.Model
        Compiled; trained in place. Every rank brings the same model; the chief's weights count.
    together : Together
    training : callable
        ``training(order, steps)`` gives a tf.data.Dataset of exactly `steps` batches of (x, y[, weight]); it calls
        ``order()`` at the start of each epoch for the order of this rank's rows. Batches after the last row are empty.
    validation : tf.data.Dataset or None
        This rank's validation batches; None where no rank has any.
    settings : FitSettings
    callbacks : sequence of keras.callbacks.Callback
        This rank's own copies of all of the user's callbacks.
    report : callable, optional
        Receives progress (see `progress_callback`).

    Raises
    ------
    SparktfError
        As `together` says.
    """
    check_callbacks(model, callbacks)
    result = FitReport(steps_per_epoch=together.steps)
    epoch = _Epoch()

    def order() -> np.ndarray[Any, Any]:
        return epoch_order(
            together.rows, shuffle=settings.shuffle, seed=settings.seed, epoch=epoch.number, rank=together.rank
        )

    def begin(number: int) -> None:
        together.clock.reset()
        epoch.begin(number)

    epoch_logs: list[dict[str, float]] = []

    def end(number: int, logs: dict[str, Any]) -> None:
        epoch_logs.append(numbers(logs))
        together.end_epoch(model, number)
        result.epoch_seconds.append(epoch.seconds())

    # Begun before and ended after all of the user's, whose wishes to stop count.
    around = [
        before_others(begin),
        after_others(lambda: together.begin(model, settings), epoch.training_ends, end),
    ]
    observers = [progress_callback(report, together.steps)] if report is not None else []
    mine = callbacks_of_rank(callbacks, together.rank)
    started, waited = time.monotonic(), together.waited_seconds()
    with together.hold(model, settings, result.notices):
        _fit(
            model,
            together,
            epoch,
            training(order, together.steps),
            epochs=settings.epochs,
            validation_data=validation,
            callbacks=[around[0], *mine, *observers, around[1]],
        )
        result.communicate_seconds = table_seconds(model)
    names = dict.fromkeys(name for logs in epoch_logs for name in logs)
    result.history = {name: [logs.get(name, math.nan) for logs in epoch_logs] for name in names}
    result.seconds = time.monotonic() - started
    result.communicate_seconds += together.waited_seconds() - waited
    return result


class _Epoch:
    """The number of the epoch that runs and when its training began and ended."""

    def __init__(self) -> None:
        self.number = 0
        self._began = time.monotonic()
        self._ended: float | None = None

    def begin(self, number: int) -> None:
        self.number = number
        self._began = time.monotonic()
        self._ended = None

    def training_ends(self) -> None:
        self._ended = time.monotonic()

    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self._began


def _fit(model: Any, together: Together, epoch: _Epoch, dataset: Any, **arguments: Any) -> None:
    import tensorflow as tf

    try:
        model.fit(dataset, verbose=0, shuffle=False, **arguments)
    except tf.errors.OpError as error:
        # TensorFlow's own error holds only the text of what was raised inside the step.
        reason = table_failure(model) or together.explain(error)
        if isinstance(reason, SparktfError):
            raise located(reason, f"epoch {epoch.number + 1}, step {together.clock.step}") from error
        if reason is not None:
            raise reason from error
        raise
