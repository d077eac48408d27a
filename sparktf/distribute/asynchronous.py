"""Keras optimizers whose updates are made by parameter servers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from sparktf.distribute.client import ParameterClient
from sparktf.distribute.derive import derive, restore
from sparktf.distribute.mean import leave_xla_off
from sparktf.distribute.pair import Part
from sparktf.distribute.served import check_optimizer, splits
from sparktf.distribute.shards import Array
from sparktf.distribute.slots import Values, is_handle, served
from sparktf.distribute.table_programs import served_tables, tables_told
from sparktf.errors import ParamError


class _PushingMixin:
    """`build` that makes no state, `apply` that pushes and pulls; mixed in before the optimizer's own class.

    ``iterations`` are the servers' updates, by which a schedule goes.
    """

    _sparktf_client: ParameterClient
    _sparktf_splits: bool
    # Where they are given: a step's rows, as a tensor, and whether this worker wants all to stop.
    _sparktf_rows: Callable[[], Any] | None
    _sparktf_stop: Callable[[], bool]
    _sparktf_closing: ExitStack | None
    # The optimizer's own.
    built: bool
    global_clipnorm: float | None
    _iterations: Any
    _learning_rate: Any
    _trainable_variables: Sequence[Any]
    _check_variables_are_known: Callable[[Sequence[Any]], None]

    def build(self, variables: Sequence[Any]) -> None:
        import keras
        import tensorflow as tf

        if not self.built and self._sparktf_rows is None:
            if self._sparktf_closing is not None:
                # Keras may build an optimizer while it traces the first step.
                with tf.init_scope():
                    self._sparktf_closing.enter_context(tables_told(variables, self, self._sparktf_client))
            start(self, variables)
        # Not the optimizer's own, which makes variables for its state: that lives on the servers.
        keras.optimizers.Optimizer.build(self, variables)

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        import tensorflow as tf

        if not self.built:
            self.build(list(trainable_variables or ()))
        applied = self._trainable_variables if trainable_variables is None else trainable_variables
        given = {id(variable): gradient for variable, gradient in zip(applied, grads, strict=True)}
        self._check_variables_are_known(applied)
        for variable in applied:
            if is_handle(variable) and given[id(variable)] is not None:
                # A table's, which goes to servers in its own way.
                variable.assign(given[id(variable)])
        gradients = [_dense(given.get(id(v)), v) for v in served(self._trainable_variables)]
        if self.global_clipnorm is not None and gradients:
            gradients, _ = tf.clip_by_global_norm(gradients, self.global_clipnorm)
        if self._sparktf_client.overlaps:
            # The answer to a push before: it came while TensorFlow computed.
            self._pull(gradients)
            self._push(gradients)
        else:
            self._pull([self._push(gradients)])
        return self._iterations

    def _push(self, gradients: Sequence[Any]) -> Any:
        import keras
        import tensorflow as tf

        rate = self._learning_rate
        told = tf.cast(rate.value if isinstance(rate, keras.Variable) else math.nan, tf.float64)
        rows = tf.cast(1 if self._sparktf_rows is None else self._sparktf_rows(), tf.float64)

        def push(rate: Array, rows: Array, *arrays: Array) -> Array:
            self._sparktf_client.push(arrays, float(rate), float(rows), self._sparktf_stop())
            return np.array(0)

        # Weights that came before have been copied where the variables are read: now others may be received.
        read = [tf.convert_to_tensor(v.value) for v in (self._iterations, *served(self._trainable_variables))]
        with tf.control_dependencies(read):
            return tf.numpy_function(push, [told, rows, *gradients], tf.int64, stateful=True)

    def _pull(self, after: Sequence[Any]) -> None:
        """Take the newest weights that have come, and assign them."""
        import tensorflow as tf

        variables = served(self._trainable_variables)
        flat = [part for parts in self._sparktf_client.weights for part in parts]

        def pull() -> list[Any]:
            weights = self._sparktf_client.pull()
            return [np.array(self._sparktf_client.version), *(part for parts in weights for part in parts)]

        dtypes = [tf.as_dtype(part.dtype) for part in flat]
        with tf.control_dependencies(after):
            version, *parts = tf.nest.flatten(tf.numpy_function(pull, [], [tf.int64, *dtypes], stateful=True))
        parts = [tf.ensure_shape(part, like.shape) for part, like in zip(parts, flat, strict=True)]
        self._iterations.assign(tf.ensure_shape(version, ()))
        for variable, rows in zip(variables, self._sparktf_client.weights, strict=True):
            mine, parts = parts[: len(rows)], parts[len(rows) :]
            # A copy: the next weights will be received into the same memory.
            variable.assign(tf.raw_ops.DeepCopy(x=mine[0]) if len(mine) == 1 else tf.concat(mine, 0))

    def finalize_variable_values(self, var_list: Any) -> None:
        if self.built:
            finish(self)


def push_and_pull(
    optimizer: Any,
    client: ParameterClient,
    rows: Callable[[], Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    closing: ExitStack | None = None,
) -> Any:
    """Make an optimizer leave its updates to parameter servers, from the chief's weights on.

    Sparse gradients are sent as dense ones. A variable without a gradient in a step is sent zeros.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Changed in place; not built yet.
    client : ParameterClient
    rows : callable, optional
        Returns, while a step is traced, the rows that its gradients stand for, a scalar tensor. Then the caller begins
        with `start`, and the optimizer may be built; else it begins by itself when Keras builds it.
    stop : callable
        Whether this worker wants all to stop.
    closing : ExitStack, optional
        Where an optimizer begins by itself: the tables of `ShardedEmbedding` layers that it trains live on the servers
        until it is left; None: they do not.

    Returns
    -------
    keras.optimizers.Optimizer
        `optimizer`.

    Raises
    ------
    ParamError
        It cannot live on servers, is distributed already, or has made a step.
    """
    check_optimizer(optimizer)
    if hasattr(optimizer, "_sparktf_reduce") or hasattr(optimizer, "_sparktf_client"):
        raise ParamError(f"Expected an optimizer that is not distributed yet, received {optimizer.name!r} again.")
    if optimizer.built and rows is None:
        raise ParamError(f"Expected an optimizer that has made no step yet, received {optimizer.name!r}, which has.")
    held = {"client": client, "splits": splits(optimizer), "rows": rows, "stop": stop, "closing": closing}
    for name, value in held.items():
        object.__setattr__(optimizer, f"_sparktf_{name}", value)
    derive(optimizer, _PushingMixin)
    leave_xla_off()
    return optimizer


def restore_pushing(optimizer: Any) -> None:
    """Undo `push_and_pull`; one that was not built before has to be built anew."""
    restore(optimizer)
    for name in ("client", "splits", "rows", "stop", "closing"):
        object.__delattr__(optimizer, f"_sparktf_{name}")


def start(optimizer: Any, variables: Sequence[Any], state: Values | None = None) -> None:
    """Tell the servers what an optimizer that pushes is to train, and take the chief's weights.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Of `push_and_pull`.
    variables : sequence of keras.Variable
    state : dict of Slot to ndarray, optional
        The optimizer's own, where it goes on; the chief's counts.

    Raises
    ------
    ParamError
        Variables that servers cannot hold.
    """
    import tensorflow as tf

    tables = sum(map(is_handle, variables))
    variables = served(variables)
    check_variables(variables)
    parts = [Part(v.path, tuple(v.shape), v.dtype) for v in variables]
    client: ParameterClient = optimizer._sparktf_client
    # Keras may build an optimizer while it traces the first step.
    with tf.init_scope():
        name = type(optimizer).__name__
        client.start(parts, [v.numpy() for v in variables], name, optimizer._sparktf_splits, state, tables)
        _assign(variables, client.weights)
        optimizer._iterations.assign(client.version)


def finish(optimizer: Any) -> None:
    """Wait until all workers have come to the end of their training for now, and take the newest weights."""
    client: ParameterClient = optimizer._sparktf_client
    tables = served_tables(optimizer._trainable_variables)
    # Whoever has been told that all have come to the end finds all that they have pushed.
    for table in tables:
        table.settle()
    _assign(served(optimizer._trainable_variables), client.finish())
    for table in tables:
        table.settle()
    optimizer._iterations.assign(client.version)


def check_variables(variables: Sequence[Any]) -> None:
    """Check that servers can hold variables.

    Raises
    ------
    ParamError
        One has a constraint, or is set by its gradient.
    """
    constrained = [v.path for v in variables if v.constraint is not None]
    if constrained:
        raise ParamError(
            f"Expected variables without constraints for mode='async', received one at {constrained[0]}: servers do "
            "not know it. Remove it, or use mode='sync'."
        )
    overwritten = [v.path for v in variables if getattr(v, "overwrite_with_gradient", False)]
    if overwritten:
        raise ParamError(f"mode='async' cannot train {overwritten[0]}, which is set by its gradient: use mode='sync'.")


def _dense(gradient: Any, variable: Any) -> Any:
    import tensorflow as tf

    if gradient is None:
        return tf.zeros(variable.shape, variable.dtype)
    # Adds up the repeated rows of a sparse one.
    return tf.ensure_shape(tf.cast(tf.convert_to_tensor(gradient), variable.dtype), variable.shape)


def _assign(variables: Sequence[Any], weights: Sequence[Sequence[Array]]) -> None:
    for variable, parts in zip(variables, weights, strict=True):
        variable.assign(parts[0] if len(parts) == 1 else np.concatenate(parts))
