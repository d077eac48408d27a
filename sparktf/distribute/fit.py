"""Keras's ``fit`` on one rank, in step with the others."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparktf.data.batches import StepPlan, epoch_order
from sparktf.distribute.callbacks import after_others, before_others, callbacks_of_rank, numbers, progress_callback
from sparktf.distribute.checks import loss_reduction
from sparktf.distribute.clock import StepClock
from sparktf.distribute.model import Coordination, distribute_model, restore_model
from sparktf.distribute.optimizer import distribute_optimizer, find_optimizers, restore_optimizer
from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.state import broadcast_variables, check_drift, keep_accumulated, seed_generators
from sparktf.errors import DataError
from sparktf.transport import Communicator

Order = Callable[[], "np.ndarray[Any, Any]"]


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


def fit_rank(
    model: Any,
    communicator: Communicator,
    rows: RankRows,
    training: Callable[[Order, int], Any],
    validation: Any,
    settings: FitSettings,
    callbacks: Sequence[Any] = (),
    report: Callable[[dict[str, Any]], None] | None = None,
    reducer: GradientReducer | None = None,
) -> FitReport:
    """Train a compiled Keras model together with the other ranks.

    Every rank takes the same number of steps; a step's gradient is the one of a single process on the global batch.

    Parameters
    ----------
    model : keras.Model
        Compiled; trained in place. Every rank brings the same model; the chief's weights count.
    communicator : Communicator
    rows : RankRows
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
    reducer : GradientReducer, optional
        Sums the gradients; closed at the end. Default: one over the communicator.

    Returns
    -------
    FitReport

    Raises
    ------
    DataError
        No rank has rows.
    ParamError
        The model's losses cannot be reduced exactly over several ranks.
    DriftError
        Ranks' weights differ at an epoch's end.
    TransportError
        A peer was lost.
    """
    plan = StepPlan(rows=rows.training, batch_size=settings.batch_size)
    if plan.steps == 0:
        raise DataError("Expected rows to train on, received an empty DataFrame (or only validation rows).")
    with reducer or GradientReducer(communicator) as reducing:
        return _fit_in_step(
            model, communicator, reducing, rows, plan, training, validation, settings, callbacks, report
        )


def _fit_in_step(
    model: Any,
    communicator: Communicator,
    reducer: GradientReducer,
    rows: RankRows,
    plan: StepPlan,
    training: Callable[[Order, int], Any],
    validation: Any,
    settings: FitSettings,
    callbacks: Sequence[Any],
    report: Callable[[dict[str, Any]], None] | None,
) -> FitReport:
    result = FitReport(steps_per_epoch=plan.steps)
    epoch = _Epoch()
    clock = StepClock(plan, communicator.rank)

    def order() -> np.ndarray[Any, Any]:
        mine = rows.training[communicator.rank]
        return epoch_order(
            mine, shuffle=settings.shuffle, seed=settings.seed, epoch=epoch.number, rank=communicator.rank
        )

    def begin(number: int) -> None:
        clock.reset()
        epoch.begin(number)

    def resume() -> None:
        # BackupAndRestore runs on the chief only, and may have found an earlier fit that did not end.
        first = int(communicator.all_gather_bytes(str(int(model._initial_epoch or 0)).encode())[0])
        if first:
            model._initial_epoch = first
            _take_chiefs_state(model, communicator, settings.seed)

    epoch_logs: list[dict[str, float]] = []

    def end(number: int, logs: dict[str, Any]) -> None:
        epoch_logs.append(numbers(logs))
        check_drift(model.trainable_variables, communicator, number)
        if communicator.size > 1:
            reducer.agree_to_stop()
        result.epoch_seconds.append(epoch.seconds())

    # Begun before and ended after all of the user's, whose wishes to stop count.
    around = [before_others(begin), after_others(resume, epoch.training_ends, end)]
    observers = [progress_callback(report, plan.steps)] if report is not None else []
    mine = callbacks_of_rank(callbacks, communicator.rank)
    started, talked = time.monotonic(), communicator.stats.seconds
    with _in_step(model, communicator, reducer, clock, rows, plan, settings, result.notices):
        _fit(
            model,
            reducer,
            training(order, plan.steps),
            epochs=settings.epochs,
            validation_data=validation,
            callbacks=[around[0], *mine, *observers, around[1]],
        )
    names = dict.fromkeys(name for logs in epoch_logs for name in logs)
    result.history = {name: [logs.get(name, math.nan) for logs in epoch_logs] for name in names}
    result.seconds = time.monotonic() - started
    result.communicate_seconds = communicator.stats.seconds - talked - reducer.hidden_seconds
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


def _fit(model: Any, reducer: GradientReducer, dataset: Any, **arguments: Any) -> None:
    import tensorflow as tf

    try:
        model.fit(dataset, verbose=0, shuffle=False, **arguments)
    except tf.errors.OpError as error:
        # TensorFlow's own error holds only the text of what was raised inside the step.
        reason = reducer.explain(error)
        if reason is not None:
            raise reason from error
        raise


@contextlib.contextmanager
def _in_step(
    model: Any,
    communicator: Communicator,
    reducer: GradientReducer,
    clock: StepClock,
    rows: RankRows,
    plan: StepPlan,
    settings: FitSettings,
    notices: list[str],
) -> Iterator[None]:
    """Hold the model and its optimizers in their distributed form."""
    # Before the first exchange, so that every rank raises this error itself.
    sum_loss = communicator.size > 1 and loss_reduction(model) == "sum"
    _take_chiefs_state(model, communicator, settings.seed)
    if communicator.size == 1:
        yield
        return
    optimizers = find_optimizers(model)
    coordination = Coordination(
        communicator,
        reducer,
        clock,
        row_weight=rows.training[communicator.rank] / sum(rows.training),
        validation_rows=rows.validation[communicator.rank],
        sum_loss=sum_loss,
        may_idle=any(plan.local_rows(plan.steps - 1, rank) == 0 for rank in range(communicator.size)),
        optimizers=optimizers,
    )
    with _without_xla(model, notices), contextlib.ExitStack() as stack:
        for optimizer in optimizers:
            distribute_optimizer(optimizer, reducer, lambda: coordination.share)
            stack.callback(restore_optimizer, optimizer)
        distribute_model(model, coordination)
        stack.callback(restore_model, model)
        yield


def _take_chiefs_state(model: Any, communicator: Communicator, seed: int) -> None:
    optimizers = find_optimizers(model)
    variables = [*model.variables, *(v for optimizer in optimizers for v in optimizer.variables)]
    broadcast_variables({id(v): v for v in variables}.values(), communicator)
    keep_accumulated(optimizers, communicator)
    seed_generators(model, seed, communicator.rank)


@contextlib.contextmanager
def _without_xla(model: Any, notices: list[str]) -> Iterator[None]:
    jit = model.jit_compile
    if jit is True:
        notices.append("jit_compile=True was set aside for this fit: XLA cannot hold the workers' reduce.")
        model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = jit
