"""Which compiled models a world of several ranks can train exactly; the others are refused with a message."""

from __future__ import annotations

from typing import Any

from sparktf.errors import ParamError

EXACT_REDUCTIONS = ("sum_over_batch_size", "mean", "sum")


def loss_reduction(model: Any) -> str:
    """Say how a compiled model's losses are reduced over the rows.

    Parameters
    ----------
    model : keras.Model
        Compiled.

    Returns
    -------
    str
        ``"mean"`` or ``"sum"``; ``"mean"`` where a custom ``train_step`` computes its own loss.

    Raises
    ------
    ParamError
        For a reduction whose divisor is not the number of rows, and for means and sums side by side.
    """
    reductions = {_reduction(loss) for loss in _losses(model)}
    unknown = sorted(str(r) for r in reductions if r not in EXACT_REDUCTIONS)
    if unknown:
        raise ParamError(
            f"Expected losses with a reduction out of {list(EXACT_REDUCTIONS)}, received {unknown}: its divisor is not "
            "the number of rows, so that several workers would not train as one process does. Use "
            "reduction='sum_over_batch_size', or numWorkers=1."
        )
    kinds = {"sum" if r == "sum" else "mean" for r in reductions}
    if len(kinds) > 1:
        raise ParamError(
            "Expected all losses of the model to be reduced alike, received 'sum' beside 'sum_over_batch_size'. Give "
            "all of them one reduction, or use numWorkers=1."
        )
    return kinds.pop() if kinds else "mean"


def refuse_masks(predictions: Any) -> None:
    """Refuse outputs that carry a Keras mask: their loss is divided by the unmasked entries of the local batch.

    Raises
    ------
    ParamError
    """
    import keras

    for output in keras.tree.flatten(predictions):
        if getattr(output, "_keras_mask", None) is not None:
            raise ParamError(
                "Expected model outputs without a mask, received one that carries a mask (from mask_zero=True or a "
                "Masking layer): Keras divides its loss by the unmasked entries of each worker's batch, so that "
                "several workers would not train as one process does. Pool over the time steps, weigh the loss with "
                "weightCol, or use numWorkers=1."
            )


def _losses(model: Any) -> list[Any]:
    import keras

    loss = getattr(model, "loss", None)
    return [item for item in keras.tree.flatten(loss) if item is not None]


def _reduction(loss: Any) -> Any:
    import keras

    if isinstance(loss, keras.losses.Loss):
        return loss.reduction
    # Names and functions are wrapped by Keras into means over the rows.
    return "sum_over_batch_size"
