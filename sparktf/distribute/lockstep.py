"""Ranks in lockstep: every step's gradient is that of one process on the global batch."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sparktf.data.batches import StepPlan
from sparktf.distribute.checks import loss_reduction
from sparktf.distribute.clock import StepClock
from sparktf.distribute.fit import FitReport, FitSettings, Order, RankRows, fit_together
from sparktf.distribute.model import Coordination, distribute_model, restore_model
from sparktf.distribute.optimizer import distribute_optimizer, find_optimizers, restore_optimizer
from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.state import broadcast_variables, check_drift, keep_accumulated, seed_generators
from sparktf.distribute.table_fit import tables_in_step
from sparktf.errors import DataError
from sparktf.transport import Communicator


class Lockstep:
    """A rank in step with the others; see `sparktf.distribute.fit.Together`.

    Every rank takes the same number of steps; those without rows take theirs on one that counts for
    nothing.

    Parameters
    ----------
    communicator : Communicator
    reducer : GradientReducer
        Sums the gradients.
    rows : RankRows
    batch_size : int
        Rows per worker and step.

    Raises
    ------
    DataError
        No rank has rows.
    """

    def __init__(self, communicator: Communicator, reducer: GradientReducer, rows: RankRows, batch_size: int) -> None:
        plan = step_plan(rows, batch_size)
        self._communicator = communicator
        self._reducer = reducer
        self._all_rows = rows
        self._plan = plan
        self._held: list[int] = []
        self.rank = communicator.rank
        self.rows = rows.training[communicator.rank]
        self.steps = plan.steps
        self.clock = StepClock(plan, communicator.rank)

    @contextlib.contextmanager
    def hold(self, model: Any, settings: FitSettings, notices: list[str]) -> Iterator[None]:
        """Hold the model and its optimizers in their distributed form.

        Raises
        ------
        ParamError
            The model's losses cannot be reduced exactly over several ranks.
        """
        group = self._communicator
        # Before the first exchange, so that every rank raises this error itself.
        sum_loss = group.size > 1 and loss_reduction(model) == "sum"
        take_chiefs_state(model, group, settings.seed)
        if group.size == 1:
            yield
            return
        self._held = _checksums(model) if self.rank == 0 else []
        optimizers = find_optimizers(model)
        coordination = Coordination(
            group,
            self._reducer,
            self.clock,
            row_weight=self.rows / sum(self._all_rows.training),
            validation_rows=self._all_rows.validation[self.rank],
            sum_loss=sum_loss,
            may_idle=any(self._plan.local_rows(self.steps - 1, rank) == 0 for rank in range(group.size)),
            optimizers=optimizers,
        )
        with without_xla(model, notices), contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                distribute_optimizer(optimizer, self._reducer, lambda: coordination.share)
                stack.callback(restore_optimizer, optimizer)
            distribute_model(model, coordination)
            stack.callback(restore_model, model)
            stack.enter_context(tables_in_step(model, group, lambda: coordination.share))
            yield

    def begin(self, model: Any, settings: FitSettings) -> None:
        """Take the chief's state once more where its callbacks have changed it, as when an earlier fit did not end."""
        # BackupAndRestore runs on the chief only.
        changed = self.rank == 0 and self._communicator.size > 1 and _checksums(model) != self._held
        mine = json.dumps([int(model._initial_epoch or 0), changed])
        model._initial_epoch, changed = json.loads(self._communicator.all_gather_bytes(mine.encode())[0])
        if changed:
            take_chiefs_state(model, self._communicator, settings.seed)

    def end_epoch(self, model: Any, epoch: int) -> None:
        """Check that weights agree, and agree on whether to go on.

        Raises
        ------
        DriftError
            Ranks' weights differ.
        """
        check_drift(model.trainable_variables, self._communicator, epoch)
        if self._communicator.size > 1:
            self._reducer.agree_to_stop()

    def explain(self, error: BaseException) -> BaseException | None:
        """Return what was behind an error that TensorFlow raised in a step."""
        return self._reducer.explain(error)

    def waited_seconds(self) -> float:
        """Return the seconds of communication that no computing hid."""
        return self._communicator.stats.seconds - self._reducer.hidden_seconds


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
    """Train a compiled Keras model in lockstep with the other ranks.

    Parameters are those of `fit_together`, and

    Parameters
    ----------
    communicator : Communicator
    rows : RankRows
    reducer : GradientReducer, optional
        Sums the gradients; closed at the end. Default: one over the communicator.

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
    step_plan(rows, settings.batch_size)
    with reducer or GradientReducer(communicator) as reducing:
        together = Lockstep(communicator, reducing, rows, settings.batch_size)
        return fit_together(model, together, training, validation, settings, callbacks, report)


def step_plan(rows: RankRows, batch_size: int) -> StepPlan:
    """Return the steps of an epoch in which all ranks take as many.

    Raises
    ------
    DataError
        No rank has rows.
    """
    plan = StepPlan(rows=rows.training, batch_size=batch_size)
    if plan.steps == 0:
        raise DataError("Expected rows to train on, received an empty DataFrame (or only validation rows).")
    return plan


def take_chiefs_state(model: Any, communicator: Communicator, seed: int) -> None:
    """Overwrite a model's variables and its optimizers' with the chief's; seed its generators by rank."""
    broadcast_variables(_all_variables(model), communicator)
    keep_accumulated(find_optimizers(model), communicator)
    seed_generators(model, seed, communicator.rank)


def _all_variables(model: Any) -> list[Any]:
    variables = [*model.variables, *(v for optimizer in find_optimizers(model) for v in optimizer.variables)]
    return list({id(v): v for v in variables}.values())


def _checksums(model: Any) -> list[int]:
    return [zlib.crc32(np.asarray(v.numpy()).tobytes()) for v in _all_variables(model)]


@contextlib.contextmanager
def without_xla(model: Any, notices: list[str]) -> Iterator[None]:
    """Set ``jit_compile=True`` aside, and say so among the notices."""
    jit = model.jit_compile
    if jit is True:
        notices.append("jit_compile=True was set aside for this fit: XLA cannot hold the workers' reduce.")
        model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = jit
