"""A Keras model that takes its steps together with the other ranks.

The model object is kept and its class exchanged for a derived one (see `sparktf.distribute.derive`), so that Keras's
own ``fit`` runs: its callbacks, validation, history, ``steps_per_execution`` and custom ``train_step`` are Keras's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from sparktf.distribute.checks import refuse_masks
from sparktf.distribute.clock import StepClock
from sparktf.distribute.derive import derive, restore
from sparktf.distribute.group import Group, Stopping
from sparktf.distribute.state import (
    average_state,
    common_names,
    mean_of_logs,
    sum_accumulated,
    sum_metric_states,
)


class Coordination:
    """What a distributed model knows of its group; hangs on the model while it trains.

    Parameters
    ----------
    communicator : Group
    reducer : Stopping
    clock : StepClock
    row_weight : float
        This rank's training rows by those of all ranks.
    validation_rows : int
        This rank's validation rows.
    sum_loss : bool
        The compiled losses are sums over the rows, not means.
    may_idle : bool
        Some rank takes a step without rows; where none does, the graph need not branch.
    optimizers : sequence of keras.optimizers.Optimizer
        Those that reduce.
    lockstep : bool
        All ranks take a step together; else the clock knows no rows but this rank's.
    epoch_ends : callable
        Called when this rank has taken an epoch's steps.
    """

    def __init__(
        self,
        communicator: Group,
        reducer: Stopping,
        clock: StepClock,
        *,
        row_weight: float,
        validation_rows: int,
        sum_loss: bool,
        may_idle: bool,
        optimizers: Sequence[Any] = (),
        lockstep: bool = True,
        epoch_ends: Callable[[], None] = lambda: None,
    ) -> None:
        self.communicator = communicator
        self.reducer = reducer
        self.clock = clock
        self.row_weight = row_weight
        self.validation_rows = validation_rows
        self.sum_loss = sum_loss
        self.may_idle = may_idle
        self.optimizers = optimizers
        self.lockstep = lockstep
        self.epoch_ends = epoch_ends
        # Tensors of the step that is being traced.
        self.local_rows: Any = None
        self.share: Any = None
        self.inverse_share: Any = None
        # Rows of this rank in the last step, for logs that no metric stands behind.
        self.last_rows: Any = None
        self.evaluating = 0
        self.joint = False
        # What the present batch counts for in the losses of single outputs.
        self.loss_weight: Any = None

    def step_weight(self) -> Any:
        """Return what this rank's part of a step counts for in means over steps; while a step is traced."""
        import tensorflow as tf

        return self.share if self.lockstep else tf.cast(self.local_rows, tf.float32)

    def table_share(self) -> Any:
        """Return what this rank's gradients of a sharded table count; while a step is traced."""
        import tensorflow as tf

        return self.share if self.lockstep else tf.cast(tf.minimum(self.local_rows, 1), tf.float32)


class _DistributedMixin:
    """Mixed in before the model's own class while it trains."""

    _sparktf: Coordination

    @property
    def stop_training(self) -> bool:
        return self._sparktf.reducer.stop_agreed

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        # One rank's wish; it becomes true for all ranks after the same step.
        if value:
            self._sparktf.reducer.request_stop()
        else:
            self._sparktf.reducer.clear_stop()

    def train_step(self, data: Any) -> Any:
        import tensorflow as tf

        group = self._sparktf
        local, total = group.clock.tick()
        group.last_rows.assign(local)
        group.local_rows = local
        group.share = tf.cast(local, tf.float32) / tf.cast(total, tf.float32)
        group.inverse_share = tf.cast(total, tf.float32) / tf.cast(tf.maximum(local, 1), tf.float32)
        if not group.may_idle:
            return super().train_step(data)  # type: ignore[misc]
        step = super().train_step  # type: ignore[misc]
        return tf.cond(local > 0, lambda: step(data), lambda: self._idle_step(step, data))

    def _idle_step(self, step: Any, data: Any) -> Any:
        """Take a step on a row that counts for nothing: the same collectives and update, without a trace of its own."""
        import keras
        import tensorflow as tf

        variables = _without_seeds(self)
        before = [tf.identity(v.value) for v in variables]
        row = keras.tree.map_structure(lambda t: None if t is None else _a_row(t), data, none_is_leaf=True)
        logs = step(row)
        with tf.control_dependencies([t for t in keras.tree.flatten(logs) if t is not None]):
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)
        results = self.get_metrics_result()  # type: ignore[attr-defined]
        return {name: results.get(name, value) for name, value in logs.items()} if isinstance(logs, dict) else logs

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        import tensorflow as tf

        group = self._sparktf
        predictions = kwargs.get("y_pred", args[2] if len(args) > 2 else None)
        refuse_masks(predictions)
        training = bool(kwargs.get("training", not group.evaluating))
        group.loss_weight = group.step_weight() if training else _rows_of(predictions)
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        if not group.sum_loss or not training or loss is None:
            return loss
        # Every rank's loss is weighted by its share later on, which is right for means and for regularizers; a sum
        # over the rows is divided by the share beforehand.
        others = tf.add_n([tf.cast(value, loss.dtype) for value in self.losses] or [tf.zeros([], loss.dtype)])  # type: ignore[attr-defined]
        return (loss - others) * tf.cast(group.inverse_share, loss.dtype) + others

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        group = self._sparktf
        # Only the validation that fit starts is one that all ranks take part in; a callback's own is the rank's.
        joint_before, group.joint = group.joint, bool(kwargs.get("_use_cached_eval_dataset"))
        group.evaluating += 1
        try:
            with warnings.catch_warnings():
                if group.joint and not group.validation_rows:
                    # Keras takes a rank that has no rows to validate for one whose data ended too early.
                    warnings.filterwarnings("ignore", message="Your input ran out of data")
                return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            group.evaluating -= 1
            group.joint = joint_before

    def _get_metrics_result_or_logs(self, logs: Any) -> Any:
        # Keras calls this once at the end of each epoch's steps and once in each evaluation.
        group = self._sparktf
        if group.evaluating and not group.joint:
            return super()._get_metrics_result_or_logs(logs)  # type: ignore[misc]
        if not group.evaluating:
            group.epoch_ends()
        sum_metric_states(self.metrics, group.communicator)  # type: ignore[attr-defined]
        results = self.get_metrics_result()  # type: ignore[attr-defined]
        if group.evaluating:
            return _with_plain_logs(results, logs, group.validation_rows, group.communicator)
        average_state(self, group.row_weight, group.communicator)
        sum_accumulated(group.optimizers, group.communicator)
        return _with_plain_logs(results, logs, float(group.last_rows.numpy()), group.communicator)


def distribute_model(model: Any, coordination: Coordination) -> None:
    """Make a compiled, built model train together with the other ranks; undo it with `restore_model`."""
    import tensorflow as tf

    coordination.last_rows = tf.Variable(0, dtype=tf.int64, trainable=False, name="last_rows")
    object.__setattr__(model, "_sparktf", coordination)
    derive(model, _DistributedMixin)
    for tracker in _loss_trackers(model):
        object.__setattr__(tracker, "update_state", _weighing(tracker.update_state, coordination))
    _forget_functions(model)


def restore_model(model: Any) -> None:
    """Undo `distribute_model`."""
    restore(model)
    object.__delattr__(model, "_sparktf")
    for tracker in _loss_trackers(model):
        vars(tracker).pop("update_state", None)
    # Keras sets it in every fit; the property of the derived class kept it from doing so.
    model.stop_training = False
    _forget_functions(model)


def _loss_trackers(model: Any) -> list[Any]:
    """Return the metrics in which Keras records the loss of each of several outputs."""
    return list(getattr(getattr(model, "_compile_loss", None), "metrics", ()))


def _weighing(update_state: Any, group: Coordination) -> Any:
    """Give each rank's loss the part in a step's that it has in the global batch: Keras counts batches, not rows."""
    import tensorflow as tf

    def update(value: Any, sample_weight: Any = None) -> Any:
        if group.sum_loss and not group.evaluating:
            value = value * tf.cast(group.inverse_share, value.dtype)
        return update_state(value, sample_weight=sample_weight if group.loss_weight is None else group.loss_weight)

    return update


def _rows_of(predictions: Any) -> Any:
    import keras
    import tensorflow as tf

    flat = keras.tree.flatten(predictions)
    return tf.shape(flat[0])[0] if flat else None


def _forget_functions(model: Any) -> None:
    model.train_function = None
    model.test_function = None


def _a_row(tensor: Any) -> Any:
    """Return the first row of a batch; of one that has none, zeros or an empty text."""
    import tensorflow as tf

    shape = tf.concat([[1], tf.shape(tensor)[1:]], axis=0)
    zeros = tf.fill(shape, "") if tensor.dtype == tf.string else tf.zeros(shape, tensor.dtype)
    row = tf.concat([tensor, zeros], axis=0)[:1]
    row.set_shape([1, *tensor.shape[1:]])
    return row


def _without_seeds(model: Any) -> list[Any]:
    from sparktf.distribute.state import state_variables

    metrics = [v for metric in model.metrics for v in metric.variables]
    return list({id(v): v for v in [*state_variables(model), *metrics]}.values())


def _with_plain_logs(results: dict[str, Any], logs: Any, rows: float, communicator: Group) -> dict[str, Any]:
    """Take each of the step's logs from its metric where there is one, else its mean over the ranks."""
    mine = _flat(logs) if isinstance(logs, dict) else {}
    # Also a rank without logs takes part, and learns the others'.
    names = common_names(mine, communicator)
    plain = {name: _numbers(value) for name, value in mine.items() if name not in results}
    known = {**mean_of_logs(plain, rows, communicator), **results}
    return {name: known[name] for name in names if name in known} or results


def _flat(logs: dict[str, Any]) -> dict[str, Any]:
    """Flatten logs as Keras does: all of the compiled metrics may be one dict in them."""
    flat: dict[str, Any] = {}
    for name, value in logs.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat


def _numbers(value: Any) -> Any:
    import numpy as np

    return np.asarray(value, np.float64).tolist()
