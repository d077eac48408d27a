"""Which part of which variable lives on which parameter server, and how parts lie in a message; pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparktf.distribute.buckets import ALIGN_BYTES
from sparktf.errors import ParamError

Array = np.ndarray[Any, Any]

# A variable larger than this part of a server's fair share is split. What is left whole is small enough that no server
# gets more than a quarter above its share.
_WHOLE = 1 / 4


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a variable; all of one that is not split.

    Attributes
    ----------
    variable : int
        Its place among the trainable variables.
    start, stop : int
        In its first axis. A scalar counts as one row.
    """

    variable: int
    start: int
    stop: int


def plan_shards(
    shapes: Sequence[Sequence[int]], itemsizes: Sequence[int], servers: int, split: bool
) -> list[list[Slice]]:
    """Spread variables over parameter servers by their size.

    Large ones are cut by rows, a part for each server; the others go, the largest first, to whichever server holds
    least (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).

    Parameters
    ----------
    shapes : sequence of sequence of int
        Of the variables.
    itemsizes : sequence of int
        Bytes of an element of each.
    servers : int
    split : bool
        False: leave all variables whole, as optimizers need that look at a variable as one thing.

    Returns
    -------
    list of list of Slice
        By server, in the order of the variables.
    """
    sizes = [math.prod(shape) * itemsize for shape, itemsize in zip(shapes, itemsizes, strict=True)]
    fair = sum(sizes) / servers
    shards: list[list[Slice]] = [[] for _ in range(servers)]
    loads = [0.0] * servers
    for variable in sorted(range(len(sizes)), key=lambda v: (-sizes[v], v)):
        rows = row_count(shapes[variable])
        parts = min(servers, rows) if split and sizes[variable] > _WHOLE * fair else 1
        for part in range(parts):
            piece = Slice(variable, part * rows // parts, (part + 1) * rows // parts)
            server = min(range(servers), key=lambda s: (loads[s], s))
            shards[server].append(piece)
            loads[server] += sizes[variable] * (piece.stop - piece.start) / max(rows, 1)
    return [sorted(shard, key=lambda piece: (piece.variable, piece.start)) for shard in shards]


def check_shards(shards: Sequence[Sequence[Slice]]) -> None:
    """Check that every server has something to hold.

    Raises
    ------
    ParamError
    """
    if not all(shards):
        count = sum(map(len, shards))
        raise ParamError(
            f"Expected at most as many parameter servers as there are variables to spread, received {len(shards)} "
            f"servers for {count} variables (or parts of them). Take fewer servers."
        )


def row_count(shape: Sequence[int]) -> int:
    """Return the length of a variable's first axis, 1 for a scalar."""
    return shape[0] if len(shape) else 1


def slice_shape(shape: Sequence[int], piece: Slice) -> tuple[int, ...]:
    """Return the shape of a slice of a variable."""
    return (piece.stop - piece.start, *shape[1:]) if len(shape) else ()


@dataclass(frozen=True)
class Layout:
    """Arrays one behind the other in a stretch of bytes, each on a boundary from which TensorFlow takes it as it is.

    Parameters
    ----------
    dtypes : tuple of numpy.dtype
    shapes : tuple of tuple of int
    """

    dtypes: tuple[np.dtype[Any], ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """The length of the stretch."""
        return self._starts()[-1]

    def allocate(self) -> list[Array]:
        """Return such arrays in memory of their own."""
        memory = np.zeros(self.nbytes + ALIGN_BYTES, np.uint8)
        return self.views(memory[-memory.ctypes.data % ALIGN_BYTES :])

    def views(self, memory: Array) -> list[Array]:
        """Return the arrays that lie in `memory`, uint8 of at least `nbytes`."""
        return [
            memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for start, dtype, shape in zip(self._starts(), self.dtypes, self.shapes, strict=False)
        ]

    def _starts(self) -> list[int]:
        starts = [0]
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            starts.append(starts[-1] + -(-math.prod(shape) * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES)
        return starts
