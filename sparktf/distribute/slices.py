"""Sparse gradients (of embeddings) on their way over the ranks: joined, not added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparktf.distribute.buckets import ALIGN_BYTES
from sparktf.transport import Communicator

Array = np.ndarray[Any, Any]


class SlicesExchange:
    """Joins the ranks' slices, those of one rank after those of another.

    Their number differs from step to step: buffers grow to the largest yet and are used again. Two sets alternate, for
    TensorFlow reads the results where they lie, and may still do so when the next step's slices arrive.

    Parameters
    ----------
    communicator : Communicator

    Attributes
    ----------
    allocations : int
        Buffers made so far.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._buffers: dict[tuple[int, int], Array] = {}
        self._turn = 0
        self.allocations = 0

    def join(self, share: float, slices: Sequence[Array]) -> list[Array]:
        """Join all ranks' slices.

        Parameters
        ----------
        share : float
            This rank's rows by the rows of all ranks; its values are multiplied by it, and left out where it is 0.
        slices : sequence of ndarray
            Values (rows of a table) and indices (int) of each sparse gradient in turn.

        Returns
        -------
        list of ndarray
            In the same order; read them before the step after the next.
        """
        self._turn = 1 - self._turn
        return [self._join(place, share, array) for place, array in enumerate(slices)]

    def _join(self, place: int, share: float, array: Array) -> Array:
        mine = array[:0] if share == 0.0 else array
        if place % 2 == 0:
            weighted = self._rows(-1 - place, len(mine), array)
            mine = np.multiply(mine, array.dtype.type(share), out=weighted)
        whole: list[Array] = []

        def out(rows: int) -> Array:
            whole.append(self._rows(place, rows, array))
            return whole[0]

        self._communicator.all_gather(mine, out)
        return whole[0]

    def _rows(self, name: int, rows: int, like: Array) -> Array:
        """Return a buffer of so many rows, made anew only where none has been as large."""
        shape = (rows, *like.shape[1:])
        nbytes = int(np.prod(shape)) * like.itemsize
        held = self._buffers.get((self._turn, name))
        if held is None or held.nbytes < nbytes:
            # Half as much again, so that a slowly growing number does not mean a new one each step.
            memory = np.empty(nbytes + nbytes // 2 + ALIGN_BYTES, np.uint8)
            held = memory[-memory.ctypes.data % ALIGN_BYTES :]
            self._buffers[self._turn, name] = held
            self.allocations += 1
        return held[:nbytes].view(like.dtype).reshape(shape)
