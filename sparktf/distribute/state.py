"""What ranks agree on besides gradients: weights at the start, non-trainable state, seeds, metric states, drift."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sparktf.distribute.group import Group
from sparktf.distribute.optimizer import accumulating
from sparktf.errors import DriftError

_DIGEST_BYTES = 8  # of each variable's hash: a drift goes unseen once in 2**64


def broadcast_variables(variables: Iterable[Any], communicator: Group) -> None:
    """Overwrite variables with the chief's values.

    Parameters
    ----------
    variables : iterable of keras.Variable
        The same list, shapes and dtypes on every rank.
    communicator : Group
    """
    if communicator.size == 1:
        return
    for variable in variables:
        value = np.array(variable.numpy(), order="C")
        flat = value.reshape(-1)
        # As bytes: broadcasting copies, so that the dtype does not matter, and a bool or uint32 goes through too.
        communicator.broadcast(flat.view(np.uint8) if flat.size else np.zeros(0, np.uint8))
        if communicator.rank != 0:
            variable.assign(value)


def seed_variables(model: Any) -> list[Any]:
    """Return the states of a model's seed generators, in an order that is the same on every rank."""
    states: dict[int, Any] = {}
    for layer in model._flatten_layers():
        for generator in getattr(layer, "_seed_generators", ()):
            states[id(generator.state)] = generator.state
    return list(states.values())


def seed_generators(model: Any, seed: int, rank: int) -> None:
    """Set every seed generator of a model from the job's seed, the rank and the generator's position.

    Ranks so draw independent dropout masks, and a second fit draws the same ones.
    """
    for index, state in enumerate(seed_variables(model)):
        # SeedSequence takes no negative numbers; two's complement keeps every seed distinct.
        drawn = np.random.SeedSequence([seed % 2**64, rank, index]).generate_state(int(np.prod(state.shape)))
        state.assign(drawn.reshape(state.shape).astype(state.dtype))


def state_variables(model: Any) -> list[Any]:
    """Return non-trainable variables without the seed generators' (BatchNorm's moving means and the like)."""
    seeds = {id(state) for state in seed_variables(model)}
    return [v for v in model.non_trainable_variables if id(v) not in seeds]


def average_state(model: Any, weight: float, communicator: Group) -> None:
    """Make non-trainable state equal on all ranks.

    Parameters
    ----------
    model : keras.Model
    weight : float
        This rank's rows by the rows of all ranks; the weights of all ranks add up to 1.
    communicator : Group

    Notes
    -----
    Floating variables become their row-weighted mean, others the chief's. The mean is taken of the differences from
    the chief's value, so that a value on which all ranks agree stays as it is to the last bit.
    """
    if communicator.size == 1:
        return
    for variable in state_variables(model):
        mine = np.array(variable.numpy(), order="C")
        chiefs = mine.reshape(-1).copy()
        communicator.broadcast(chiefs.view(np.uint8) if chiefs.size else np.zeros(0, np.uint8))
        if _is_floating(chiefs.dtype):
            wide = chiefs.astype(np.float64)
            difference = mine.reshape(-1).astype(np.float64) - wide
            # A rank without rows has weight 0, and a state of NaN there must not reach the others.
            difference = difference * weight if weight > 0 else np.zeros_like(difference)
            chiefs = (wide + communicator.all_reduce(difference)).astype(chiefs.dtype)
        variable.assign(chiefs.reshape(mine.shape))


def keep_accumulated(optimizers: Iterable[Any], communicator: Group) -> None:
    """Forget what optimizers have accumulated, but on the chief: ranks that have its state would count it anew."""
    for variable in _accumulators(optimizers) if communicator.rank else ():
        variable.assign(np.zeros(variable.shape, variable.dtype))


def sum_accumulated(optimizers: Iterable[Any], communicator: Group) -> None:
    """Hand the chief the sum over the ranks of what optimizers have accumulated since their last update.

    The sum over all ranks stays what it was, and a model that the chief saves holds all of it.
    """
    if communicator.size == 1:
        return
    for variable in _accumulators(optimizers):
        total = communicator.all_reduce(np.array(variable.numpy(), np.float32, order="C"))
        if communicator.rank == 0:
            variable.assign(total.astype(variable.dtype))
        else:
            variable.assign(np.zeros(variable.shape, variable.dtype))


def _accumulators(optimizers: Iterable[Any]) -> list[Any]:
    # One that is not built yet has none.
    found = [getattr(accumulating(o), "_accumulated_gradients", ()) for o in optimizers]
    return [variable for variables in found for variable in variables if variable is not None]


def sum_metric_states(metrics: Sequence[Any], communicator: Group) -> None:
    """Add up the states of Keras metrics over the ranks, in place.

    Keras's metrics keep sums (totals and counts, confusion matrices), so that the result of the summed states is the
    metric over all rows: right for AUC or F1, where a mean of the ranks' results is not.

    Parameters
    ----------
    metrics : sequence of keras.metrics.Metric
        The same on every rank, built.
    communicator : Group
    """
    if communicator.size == 1:
        return
    variables = list({id(v): v for metric in metrics for v in metric.variables}.values())
    by_dtype: dict[np.dtype[Any], list[Any]] = {}
    for variable in variables:
        by_dtype.setdefault(np.dtype(variable.numpy().dtype), []).append(variable)
    for dtype in sorted(by_dtype, key=str):
        group = by_dtype[dtype]
        values = [v.numpy() for v in group]
        wide = np.float64 if _is_floating(dtype) else np.int64
        total = np.concatenate([value.reshape(-1) for value in values]).astype(wide)
        communicator.all_reduce(total)
        start = 0
        for variable, value in zip(group, values, strict=True):
            variable.assign(total[start : start + value.size].astype(dtype).reshape(value.shape))
            start += value.size


def common_names(names: Iterable[str], communicator: Group) -> list[str]:
    """Return the names that any rank has, in the order of the first rank that has them; equal on all ranks."""
    everyones = communicator.all_gather_bytes(json.dumps(list(names)).encode())
    return list(dict.fromkeys(name for theirs in everyones for name in json.loads(theirs)))


def mean_of_logs(logs: Mapping[str, Any], weight: float, communicator: Group) -> dict[str, Any]:
    """Row-weighted mean over the ranks of logs that no metric stands behind.

    Parameters
    ----------
    logs : mapping of str to float or (nested) list of float
        This rank's logs; ranks may have different ones (a rank without validation rows has none).
    weight : float
        This rank's rows behind the logs; a rank with 0 does not count.
    communicator : Group

    Returns
    -------
    dict of str to float or numpy.ndarray
        Equal on all ranks.
    """
    everyones = communicator.all_gather_bytes(json.dumps([weight, dict(logs)]).encode())
    totals: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for their_weight, their_logs in map(json.loads, everyones):
        for name, value in their_logs.items() if their_weight else ():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64) * their_weight
            weights[name] = weights.get(name, 0.0) + their_weight
    means = {name: total / weights[name] for name, total in totals.items()}
    return {name: mean if np.ndim(mean) else float(mean) for name, mean in means.items()}


def check_drift(variables: Sequence[Any], communicator: Group, epoch: int) -> None:
    """Compare a hash of each variable over the ranks.

    Raises
    ------
    DriftError
        On every rank, naming the first variable that differs and the ranks that differ from the chief.
    """
    if communicator.size == 1:
        return
    mine = b"".join(
        hashlib.blake2b(np.ascontiguousarray(v.numpy()).tobytes(), digest_size=_DIGEST_BYTES).digest()
        for v in variables
    )
    everyones = communicator.all_gather_bytes(mine)
    for index, variable in enumerate(variables):
        part = slice(index * _DIGEST_BYTES, (index + 1) * _DIGEST_BYTES)
        differing = [rank for rank, digests in enumerate(everyones) if digests[part] != everyones[0][part]]
        if differing:
            raise DriftError(
                f"Expected equal weights on all ranks at the end of epoch {epoch + 1}, but variable "
                f"{variable.path!r} of ranks {differing} differs from the chief's. Something changes weights without "
                "going through the optimizer (a callback, or a train_step that assigns them), differently on each "
                "rank; or the machines compute differently."
            )


def _is_floating(dtype: np.dtype[Any]) -> bool:
    # bfloat16 (ml_dtypes) has kind "V".
    return dtype.kind == "f" or dtype.name == "bfloat16"
