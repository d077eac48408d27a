"""Make a model's variables exist before ranks agree on them."""

from __future__ import annotations

from typing import Any


def build_model(model: Any, batch: tuple[Any, ...]) -> None:
    """Build a compiled model's layers, metrics and optimizer.

    Parameters
    ----------
    model : keras.Model
    batch : tuple of tensors
        ``(x,)``, ``(x, y)`` or ``(x, y, weight)`` with shapes and dtypes of a batch; its values are not looked at.
    """
    import keras
    from keras.src.trainers.trainer import Trainer  # to tell a custom train_step from Keras's own

    keras_steps = {getattr(cls, "train_step", None) for cls in type(model).__mro__ if issubclass(cls, Trainer)}
    custom = type(model).train_step not in keras_steps or _is_users(type(model).train_step)
    if custom and model.built:
        # Such a model may have no call() at all (a GAN); what it builds late, all ranks build alike from one seed.
        return
    # The batch may have no rows, and the layers must not take the number of rows for a part of their shape.
    symbols = keras.tree.map_structure(lambda t: keras.KerasTensor((None, *t.shape[1:]), t.dtype.name), batch)
    model._symbolic_build(data_batch=symbols)


def _is_users(function: Any) -> bool:
    return not str(getattr(function, "__module__", "")).startswith("keras.")
