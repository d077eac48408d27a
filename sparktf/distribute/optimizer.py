"""Keras optimizers whose gradients are reduced over the ranks before they are applied.

The optimizer's object is kept and its class exchanged for a derived one, so that everything that holds a
reference to it (the model, schedules, callbacks) sees the change, and so that it can be undone. Reducing happens in
the outermost optimizer's ``apply``: before loss scaling looks for Inf and NaN (they survive the sum, so that all ranks
skip the same steps), and before clipping, which is thereby that of the global gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sparktf.distribute.derive import derive, restore
from sparktf.distribute.reducer import GradientReducer, weigh
from sparktf.errors import ParamError


class _ReducingMixin:
    """`apply` with the gradients reduced first; mixed in before the optimizer's own class.

    An optimizer that accumulates gradients is given its rank's own, weighted, and reduces their sum where it updates
    the variables: once an update, not once a step.
    """

    _sparktf_reduce: Callable[[Sequence[Any], Any, Sequence[Any]], list[Any]]
    _sparktf_share: Callable[[], Any]
    _sparktf_applied: Sequence[Any]

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        share = self._sparktf_share()
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = self._trainable_variables if trainable_variables is None else trainable_variables  # type: ignore[attr-defined]
        if accumulates(self):
            object.__setattr__(self, "_sparktf_applied", variables)
            grads = [None if gradient is None else weigh(gradient, share) for gradient in grads]
        else:
            grads = list(grads)
            present = [i for i, gradient in enumerate(grads) if gradient is not None]
            given = [grads[i] for i in present]
            reduced = self._sparktf_reduce(given, share, [variables[i] for i in present]) if present else []
            for i, gradient in zip(present, reduced, strict=True):
                grads[i] = gradient
        return super().apply(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        # What Keras calls first with the sum of what was accumulated, of all variables that have gradients.
        if accumulates(self):
            grads = self._sparktf_reduce(grads, 1.0, self._sparktf_applied)
        return super()._clip_gradients(grads)  # type: ignore[misc]


class _DecidingMixin:
    """Loss scaling around an optimizer that accumulates: ranks agree on whether to skip a step, and on no more.

    The inner optimizer reduces the gradients, once an update.
    """

    _sparktf_reduce: Callable[[Sequence[Any], Any, Sequence[Any]], list[Any]]
    _sparktf_share: Callable[[], Any]

    def check_finite(self, grads: Sequence[Any]) -> Any:
        import tensorflow as tf

        # What a rank without rows has computed counts for nothing.
        finite = tf.logical_or(super().check_finite(grads), self._sparktf_share() <= 0)  # type: ignore[misc]
        (overflows,) = self._sparktf_reduce([tf.cast(tf.logical_not(finite), tf.float32)], 1.0, ())
        return tf.equal(overflows, 0)


def accumulates(optimizer: Any) -> bool:
    """Tell whether an optimizer adds up the gradients of several steps before it updates the variables."""
    return bool(getattr(optimizer, "gradient_accumulation_steps", None))


def accumulating(optimizer: Any) -> Any | None:
    """Return the optimizer that accumulates: this one, or the one inside a LossScaleOptimizer; None where none does."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return next((o for o in (optimizer, inner) if accumulates(o)), None)


def find_optimizers(model: Any) -> list[Any]:
    """Every Keras optimizer reachable from a model, in an order that is the same on all ranks.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    list of keras.optimizers.Optimizer
        The compiled one first, then those that the model and its layers hold as attributes (as models with a
        custom ``train_step`` do). The inner one of a LossScaleOptimizer is not listed: its outer one is.

    Raises
    ------
    ParamError
        For an optimizer that is not Keras 3's.
    """
    import keras

    found: dict[int, Any] = {}
    inner: set[int] = set()
    for value in _attributes(model):
        if isinstance(value, keras.optimizers.Optimizer):
            found[id(value)] = value
            if isinstance(value, keras.optimizers.LossScaleOptimizer):
                inner.add(id(value.inner_optimizer))
        elif hasattr(value, "apply_gradients") and not isinstance(value, type):
            raise ParamError(
                f"Expected Keras 3 optimizers, received {type(value).__module__}.{type(value).__qualname__}: its "
                "gradients cannot be reduced over the workers. Use one from keras.optimizers."
            )
    return [optimizer for key, optimizer in found.items() if key not in inner]


def _attributes(model: Any) -> Iterator[Any]:
    if getattr(model, "optimizer", None) is not None:
        yield model.optimizer
    for layer in model._flatten_layers():
        for value in list(vars(layer).values()):
            if isinstance(value, list | tuple):
                yield from value
            elif isinstance(value, dict):
                yield from value.values()
            else:
                yield value


def distribute_optimizer(optimizer: Any, reducer: GradientReducer, share: Callable[[], Any]) -> None:
    """Make an optimizer reduce its gradients over the ranks; undo it with `restore_optimizer`.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Changed in place.
    reducer : GradientReducer
    share : callable
        Returns, while a step is traced, the scalar float32 tensor of this rank's share of the step's rows.
    """
    key = reducer.new_key()
    inner = accumulating(optimizer)
    scaled = inner not in (None, optimizer)
    derive(optimizer, _DecidingMixin if scaled else _ReducingMixin)
    object.__setattr__(optimizer, "_sparktf_reduce", lambda *given: reducer.reduce(key, *given))
    object.__setattr__(optimizer, "_sparktf_share", share)
    if scaled:
        distribute_optimizer(inner, reducer, share)


def restore_optimizer(optimizer: Any) -> None:
    """Undo `distribute_optimizer`."""
    inner = accumulating(optimizer)
    if inner not in (None, optimizer):
        restore_optimizer(inner)
    restore(optimizer)
    object.__delattr__(optimizer, "_sparktf_reduce")
    object.__delattr__(optimizer, "_sparktf_share")
    vars(optimizer).pop("_sparktf_applied", None)
