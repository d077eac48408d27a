"""The row on which a rank that has run out of rows takes its steps.

It counts for nothing, but is a real one: a model may refuse made-up values, as a lookup without a place for unknown
words does.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparktf.data.spool import Spool
from sparktf.distribute.group import Group

# Arrays of one row, by column.
Row = Mapping[str, "np.ndarray[Any, Any]"]


def stand_in(
    spool: Spool, names: Sequence[str], ours: np.ndarray[Any, Any], rows: Sequence[int], group: Group
) -> Row | None:
    """Return this rank's first row, or another rank's where it has none; all ranks call this.

    Parameters
    ----------
    spool : Spool
    names : sequence of str
        Columns.
    ours : ndarray
        int64, the rows of the spool that this rank trains on.
    rows : sequence of int
        Of each rank, to train on.
    group : Group
        Of all ranks.

    Returns
    -------
    mapping of str to ndarray or None
        None where all that have rows are lost.
    """
    own = spool.take(ours[:1], names) if len(ours) else None
    if min(rows) > 0:
        return own
    found = group.all_gather_bytes(pack_row(own) if own is not None else b"")
    return own if own is not None else next((unpack_row(packed) for packed in found if packed), None)


def pack_row(row: Row) -> bytes:
    """Return a row as JSON; `unpack_row` makes a row of it. Nothing is pickled."""
    return json.dumps({name: _told(array) for name, array in row.items()}).encode()


def unpack_row(packed: bytes) -> Row:
    """Return the row that `pack_row` was given."""
    return {name: _array(told) for name, told in json.loads(packed).items()}


def _told(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    # Strings are objects of bytes.
    items = list(array.ravel()) if array.dtype == object else [np.ascontiguousarray(array).tobytes()]
    return {"dtype": array.dtype.name, "shape": array.shape, "data": [base64.b64encode(i).decode() for i in items]}


def _array(told: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    items = [base64.b64decode(text) for text in told["data"]]
    if told["dtype"] == "object":
        array = np.empty(len(items), object)
        array[:] = items
    else:
        array = np.frombuffer(items[0], np.dtype(told["dtype"]))
    return array.reshape(told["shape"])
