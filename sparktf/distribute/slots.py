"""An optimizer's state by variable: what parameter servers hold, in parts, of what a saved model has whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sparktf.distribute.derive import plain_class
from sparktf.distribute.shards import Array, Slice

ITERATIONS = "iteration"


@dataclass(frozen=True)
class Slot:
    """One of an optimizer's variables.

    Attributes
    ----------
    name : str
        The optimizer's own name for it ("momentum"); `ITERATIONS`.
    variable : int
        Whose it is, by its place among those of the optimizer's that are `served`; -1 for the optimizer's own.
    """

    name: str
    variable: int


# An optimizer's variables by what they are.
Slots = Mapping[Slot, Any]
Values = dict[Slot, Array]


def is_handle(variable: Any) -> bool:
    """Tell whether a variable stands for the table of a `sparktf.distribute.ShardedEmbedding`."""
    return hasattr(variable, "_sparktf_layer")


def served(variables: Sequence[Any]) -> list[Any]:
    """Return the variables that live on parameter servers as they are."""
    return [variable for variable in variables if not is_handle(variable)]


def build_optimizer(optimizer: Any, variables: Sequence[Any]) -> Slots:
    """Build an optimizer, and note whose state each of its variables is.

    Parameters
    ----------
    optimizer : keras.optimizers.Optimizer
        Not built yet.
    variables : sequence of keras.Variable

    Returns
    -------
    mapping of Slot to keras.Variable
        Without the learning rate. An optimizer that makes variables in a way of its own (Adafactor's factors) has them
        not in here.
    """
    places = {id(variable): place for place, variable in enumerate(served(variables))}
    found: dict[Slot, Any] = {Slot(ITERATIONS, -1): optimizer._iterations}
    make = optimizer.add_variable_from_reference

    def noting(reference_variable: Any, name: str | None = None, initializer: Any = "zeros") -> Any:
        made = make(reference_variable, name=name, initializer=initializer)
        found[Slot(name or "var", places[id(reference_variable)])] = made
        return made

    object.__setattr__(optimizer, "add_variable_from_reference", noting)
    try:
        optimizer.build(list(variables))
    finally:
        object.__delattr__(optimizer, "add_variable_from_reference")
    return found


def slots_of(optimizer: Any) -> Slots:
    """Return `build_optimizer`'s answer for an optimizer that is built already."""
    # Another one of its kind makes the same variables in the same order.
    kind: Any = plain_class(optimizer)
    twin = kind.from_config(optimizer.get_config())
    noted = {id(v): slot for slot, v in build_optimizer(twin, optimizer._trainable_variables).items()}
    pairs = zip(twin.variables, optimizer.variables, strict=True)
    return {noted[id(theirs)]: ours for theirs, ours in pairs if id(theirs) in noted}


def slot_values(optimizer: Any, slots: Slots) -> Values:
    """Return the state as arrays; nothing where some of it could not be told whose it is."""
    rate = optimizer._learning_rate
    known = {id(v) for v in slots.values()} | {id(rate)}
    if any(id(v) not in known for v in optimizer.variables):
        return {}
    return {slot: np.array(variable.numpy(), order="C") for slot, variable in slots.items()}


def set_slots(optimizer: Any, slots: Slots, values: Values) -> None:
    """Assign a state that `slot_values` returned."""
    for slot, value in values.items():
        slots[slot].assign(value)


def sliced(values: Values, shard: Sequence[Slice]) -> Values:
    """Cut the state of a server's slices out of that of whole variables."""
    own = {slot: value for slot, value in values.items() if slot.variable < 0}
    for place, piece in enumerate(shard):
        for slot, value in values.items():
            if slot.variable == piece.variable:
                own[Slot(slot.name, place)] = value[piece.start : piece.stop] if value.ndim else value
    return own


def joined(parts: Sequence[tuple[Sequence[Slice], Values]]) -> Values:
    """Put the state of whole variables together from those of servers' slices; the reverse of `sliced`."""
    whole: Values = {}
    pieces: dict[Slot, list[tuple[int, Array]]] = {}
    for shard, values in parts:
        for slot, value in values.items():
            if slot.variable < 0:
                whole.setdefault(slot, value)
            else:
                piece = shard[slot.variable]
                pieces.setdefault(Slot(slot.name, piece.variable), []).append((piece.start, value))
    for slot, found in pieces.items():
        rows = [value for _, value in sorted(found, key=lambda part: part[0])]
        whole[slot] = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return whole


def pack(values: Values) -> bytes:
    """Return a state as bytes: a JSON header, then the arrays."""
    told = [[s.name, s.variable, v.dtype.name, list(v.shape)] for s, v in values.items()]
    header = json.dumps(told).encode()
    return b"".join([struct.pack("<q", len(header)), header, *(v.tobytes() for v in values.values())])


def unpack(data: bytes) -> Values:
    """Return what `pack` packed."""
    (size,) = struct.unpack_from("<q", data)
    start = 8 + size
    values: Values = {}
    for name, variable, kind, shape in json.loads(data[8:start]):
        dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)
        count = int(np.prod(shape, dtype=np.int64))
        values[Slot(name, variable)] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
    return values
