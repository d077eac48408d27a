"""A table within a saved Keras model: rows that are not new, with their slots.

Small ones are among the archive's weights, large ones are files of its assets, which are written and read in pieces: a
process that looks up rows maps them, and never has all of them in its memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from sparktf.distribute.sparse_optimizers import Array
from sparktf.distribute.table import TableState
from sparktf.distribute.table_access import TableAccess
from sparktf.errors import PersistenceError

PACKED_BYTES = 64 << 20
"""Up to here a table, its slots included, is among a model's weights."""

_BESIDE = "beside"
_SLOT = "slot_"
_INDEX = "table.json"


def save_table(access: TableAccess, store: Any) -> bool:
    """Write a table into a Keras store of weights; return whether it is too large for that, and has to stand beside.

    Parameters
    ----------
    access : TableAccess
    store : mapping of str to ndarray
    """
    pieces: list[TableState] = []
    for piece in access.pieces():
        pieces.append(piece)
        if sum(p.nbytes for p in pieces) > PACKED_BYTES:
            store[_BESIDE] = np.array(1)
            return True
    state = TableState.joined(pieces, access.spec.dim)
    store["ids"], store["rows"] = state.ids, state.rows
    for name, slot in state.slots.items():
        store[_SLOT + name] = slot
    store["updates"] = np.array(state.updates)
    store["optimizer"] = np.frombuffer(state.optimizer.encode() or b"-", np.uint8)
    return False


def load_table(access: TableAccess, store: Any) -> bool:
    """Set a table to what `save_table` wrote; return whether it stands beside."""
    names = list(store.keys())
    if _BESIDE in names:
        return True
    slots = {name.removeprefix(_SLOT): np.array(store[name]) for name in names if name.startswith(_SLOT)}
    optimizer = np.array(store["optimizer"]).tobytes().decode()
    ids, rows, updates = (np.array(store[name]) for name in ("ids", "rows", "updates"))
    access.load([TableState(ids, rows, slots, int(updates), "" if optimizer == "-" else optimizer)])
    return False


def write_pieces(pieces: Iterable[TableState], directory: str) -> None:
    """Write a table's state into files of a directory, piece by piece.

    Pieces whose ids go on where those of the one before ended share a section: a file of ids, one of rows, and one for
    each slot, as they lie in memory (little-endian). `mapped_pieces` gives back a piece for each section.
    """
    told: dict[str, Any] = {"counts": [], "slots": [], "updates": 0, "optimizer": ""}
    files: dict[str, BinaryIO] = {}
    last = -1
    try:
        for piece in pieces:
            told |= {"slots": list(piece.slots), "updates": piece.updates, "optimizer": piece.optimizer}
            if not len(piece.ids):
                continue
            if not files or int(piece.ids[0]) <= last:
                _close(files)
                files = _open(directory, len(told["counts"]), piece)
                told["counts"].append(0)
            for name, array in _arrays(piece):
                files[name].write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
            told["counts"][-1] += len(piece.ids)
            last = int(piece.ids[-1])
    finally:
        _close(files)
    with open(os.path.join(directory, _INDEX), "w") as index:
        json.dump(told, index)


def mapped_pieces(directory: str, dim: int) -> list[TableState]:
    """Return the state that `write_pieces` wrote, mapped into memory; the files may be removed meanwhile.

    Raises
    ------
    PersistenceError
        A file is missing, or is not as long as the others say.
    """

    def mapped(name: str, dtype: str, *shape: int) -> Array:
        # A file without bytes cannot be mapped.
        return np.memmap(os.path.join(directory, name), dtype, "r", shape=shape) if shape[0] else np.empty(shape, dtype)

    try:
        with open(os.path.join(directory, _INDEX)) as index:
            told = json.load(index)
        return [
            TableState(
                mapped(f"{number}.ids", "<i8", count),
                mapped(f"{number}.rows", "<f4", count, dim),
                {name: mapped(f"{number}.{_SLOT}{name}", "<f4", count, dim) for name in told["slots"]},
                told["updates"],
                told["optimizer"],
            )
            for number, count in enumerate(told["counts"] or [0])
        ]
    except (OSError, ValueError, KeyError) as error:
        raise PersistenceError(f"the files of a sharded table cannot be read: {error}") from error


def _arrays(piece: TableState) -> Iterator[tuple[str, Array]]:
    yield "ids", piece.ids
    yield "rows", piece.rows
    for name, slot in piece.slots.items():
        yield _SLOT + name, slot


def _open(directory: str, number: int, piece: TableState) -> dict[str, BinaryIO]:
    return {name: open(os.path.join(directory, f"{number}.{name}"), "wb") for name, _ in _arrays(piece)}


def _close(files: dict[str, BinaryIO]) -> None:
    for file in files.values():
        file.close()
