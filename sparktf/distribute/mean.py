"""Optimizers of programs that train in step by themselves: the plain mean of all ranks' gradients.

What `sparktf.distribute.fit` does beyond it (weights by rows, metrics, stopping) needs a fit of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from sparktf.distribute.derive import derive
from sparktf.distribute.optimizer import distribute_optimizer
from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.state import broadcast_variables
from sparktf.distribute.table_fit import tables_in_program
from sparktf.errors import ParamError
from sparktf.transport import Communicator


class _FromTheChiefMixin:
    """`build` with all ranks' variables set to the chief's first, and tables spread."""

    _sparktf_communicator: Communicator
    _sparktf_closing: ExitStack | None

    def build(self, variables: Sequence[Any]) -> None:
        import tensorflow as tf

        if not self.built:  # type: ignore[attr-defined]
            # Keras may build an optimizer while it traces the first step.
            with tf.init_scope():
                # A table's variable is zero everywhere; to assign it is to end a step.
                plain = [variable for variable in variables if not hasattr(variable, "_sparktf_layer")]
                broadcast_variables(plain, self._sparktf_communicator)
                if self._sparktf_closing is not None:
                    self._sparktf_closing.enter_context(tables_in_program(variables, self._sparktf_communicator))
        super().build(variables)  # type: ignore[misc]


def gradient_mean(
    optimizer: Any, communicator: Communicator, reducer: GradientReducer, closing: ExitStack | None = None
) -> Any:
    """Make an optimizer apply the mean of all ranks' gradients, from the chief's weights on; it stays so.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Changed in place.
    communicator : Communicator
    reducer : GradientReducer
    closing : ExitStack, optional
        Where `ShardedEmbedding` layers that it trains have their tables spread until it is left; None: they are not.

    Returns
    -------
    keras.optimizers.Optimizer
        `optimizer`.

    Raises
    ------
    ParamError
        It is not a Keras 3 optimizer, or is distributed already.
    """
    import keras
    import tensorflow as tf

    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ParamError(
            f"Expected an optimizer of keras.optimizers, received {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__}."
        )
    if hasattr(optimizer, "_sparktf_reduce"):
        raise ParamError(f"Expected an optimizer that is not distributed yet, received {optimizer.name!r} again.")
    distribute_optimizer(optimizer, reducer, lambda: tf.constant(1.0 / communicator.size))
    object.__setattr__(optimizer, "_sparktf_communicator", communicator)
    object.__setattr__(optimizer, "_sparktf_closing", closing)
    derive(optimizer, _FromTheChiefMixin)
    if optimizer.built:
        broadcast_variables(optimizer._trainable_variables, communicator)
        if closing is not None:
            closing.enter_context(tables_in_program(optimizer._trainable_variables, communicator))
    leave_xla_off()
    return optimizer


def leave_xla_off() -> None:
    """Make Keras's choice for ``jit_compile="auto"`` no, in this process: XLA cannot hold the ranks' reduce."""
    import keras

    keras.Model._resolve_auto_jit_compile = lambda self: False
