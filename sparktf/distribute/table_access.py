"""How a layer reaches its table, wherever that lives; and the table that lives in this process alone."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sparktf.distribute.buckets import ALIGN_BYTES
from sparktf.distribute.sparse_optimizers import Array, SparseOptimizer
from sparktf.distribute.table import TableShard, TableState, piece_rows
from sparktf.distribute.table_rows import TableSpec
from sparktf.errors import DataError, ParamError, SparktfError


class TableAccess(ABC):
    """What a layer asks of its table.

    A step looks up what it needs (``lookup``, once for each call of the layer), hands over the gradients (``push``,
    once for each of these) and ends with one update of the table (``commit``). Called by one thread at a time, but for
    lookups.

    Parameters
    ----------
    spec : TableSpec
    name : str
        The layer's, for messages.

    Attributes
    ----------
    optimizer : SparseOptimizer or None
        By which it is updated; None before that is known.
    failure : SparktfError or None
        What a call raised: TensorFlow repeats only its text.
    """

    def __init__(self, spec: TableSpec, name: str) -> None:
        self.spec = spec
        self.name = name
        self.optimizer: SparseOptimizer | None = None
        self.failure: SparktfError | None = None
        self._pushed: list[tuple[Array, Array]] = []
        self._rate = 0.0
        self._buffers = Buffers()

    def lookup(self, ids: Array) -> Array:
        """Return rows as they are after all of this process's updates.

        Parameters
        ----------
        ids : ndarray of int64, (n,)
            Each once.

        Returns
        -------
        ndarray of float32, (n, dim)
            In memory that is used again once nobody refers to it.

        Raises
        ------
        DataError
            An id is none of the table's.
        """
        self.check_ids(ids)
        return self._lookup(ids, self._buffers.take(len(ids), self.spec.dim))

    def check_ids(self, ids: Array) -> None:
        """Check that all ids are the table's."""
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.spec.rows):
            wrong = ids[(ids < 0) | (ids >= self.spec.rows)][0]
            raise DataError(
                f"layer {self.name!r}: expected ids from 0 to {self.spec.rows - 1}, received {int(wrong)}. Make rows "
                "larger, or take hashing=True, which takes any number or text for an id."
            )

    def push(self, ids: Array, gradients: Array, share: float, rate: float) -> None:
        """Hand over gradients, for the next commit.

        Parameters
        ----------
        ids : ndarray of int64, (n,)
            Each once.
        gradients : ndarray of float32, (n, dim)
            Copied.
        share : float
            What this process's gradients count; where it is 0 they are not looked at (0 * NaN would be NaN).
        rate : float
            The learning rate.
        """
        count = 0 if share == 0.0 else len(ids)
        weighted = np.multiply(gradients[:count], np.float32(share), out=self._buffers.take(count, self.spec.dim))
        self._pushed.append((ids[:count].copy(), weighted))
        self._rate = rate

    def commit(self) -> None:
        """Make one update of all that was pushed since the last one; none where nothing was."""
        if not self._pushed:
            return
        pushed, self._pushed = self._pushed, []
        self._update(*(pushed[0] if len(pushed) == 1 else summed(pushed, self.spec.dim)), self._rate)

    def use(self, optimizer: SparseOptimizer) -> None:
        """Update by this optimizer from the next commit on."""
        self._use(optimizer)
        self.optimizer = optimizer

    @abstractmethod
    def _use(self, optimizer: SparseOptimizer) -> None: ...

    @abstractmethod
    def _lookup(self, ids: Array, out: Array) -> Array: ...

    @abstractmethod
    def _update(self, ids: Array, gradients: Array, rate: float) -> None: ...

    @property
    @abstractmethod
    def updates(self) -> int:
        """The table's updates so far, as far as this process has made them with the others."""

    @property
    def waited_seconds(self) -> float:
        """Seconds so far in which this process waited for rows of others, or sent them gradients."""
        return 0.0

    @abstractmethod
    def pieces(self) -> Iterator[TableState]:
        """Yield all rows of the table that are not new, in pieces, with their slots."""

    @abstractmethod
    def load(self, pieces: Iterable[TableState]) -> None:
        """Set the whole table to a state, which comes in pieces of ascending ids; rows of no piece are new."""


class LocalTable(TableAccess):
    """A table of which all rows live here; one that is only read takes no more memory than its state."""

    def __init__(self, spec: TableSpec, name: str) -> None:
        super().__init__(spec, name)
        self._stored: list[TableState] = []
        self._shard: TableShard | None = None

    def _use(self, optimizer: SparseOptimizer) -> None:
        if self._shard is None:
            shard = TableShard(self.spec)
            shard.load(self._stored)
            self._shard, self._stored = shard, []
        self._shard.use(optimizer)

    def _lookup(self, ids: Array, out: Array) -> Array:
        if self._shard is not None:
            return self._shard.lookup(ids, out)
        new = np.ones(len(ids), np.bool_)
        for state in self._stored:
            new &= ~state.find(ids, out)
        out[new] = self.spec.new_rows(ids[new])
        return out

    def _update(self, ids: Array, gradients: Array, rate: float) -> None:
        if self._shard is None:
            raise ParamError(f"layer {self.name!r}: expected an optimizer before the first update, received none.")
        self._shard.update(ids, gradients, rate)

    @property
    def updates(self) -> int:
        """The table's updates so far."""
        if self._shard is not None:
            return self._shard.updates
        return max((state.updates for state in self._stored), default=0)

    def pieces(self) -> Iterator[TableState]:
        """Yield what is stored; see `TableAccess`."""
        if self._shard is not None:
            yield from self._shard.pieces()
        for state in self._stored:
            yield from state.sliced(piece_rows(self.spec.dim, len(state.slots)))

    def load(self, pieces: Iterable[TableState]) -> None:
        """Set the whole table; see `TableAccess`. The pieces are kept as they are until the table is trained."""
        if self._shard is not None:
            self._shard.load(pieces)
            return
        stored = list(pieces)
        for state in stored:
            state.check(self.spec)
        self._stored = stored


class Buffers:
    """Memory for rows that is used again: as much as was needed at one time, in pieces as large as the largest yet."""

    def __init__(self) -> None:
        self._held: list[Array] = []
        self._lock = threading.Lock()
        self.allocations = 0

    def take(self, rows: int, dim: int) -> Array:
        """Return memory that nobody refers to, as float32 of (rows, dim); its contents are undefined."""
        nbytes = rows * dim * 4
        with self._lock:
            for place in range(len(self._held)):
                # Of the list and of the call that asks: TensorFlow lets go of what it was given when it has read it.
                if sys.getrefcount(self._held[place]) > 2:
                    continue
                if self._held[place].nbytes < nbytes + ALIGN_BYTES:
                    self._held[place] = self._allocate(nbytes)
                return _rows_of(self._held[place], rows, dim)
            self._held.append(self._allocate(nbytes))
            return _rows_of(self._held[-1], rows, dim)

    def _allocate(self, nbytes: int) -> Array:
        self.allocations += 1
        # Half as much again, so that a slowly growing number does not mean a new one each step.
        return np.empty(nbytes + nbytes // 2 + ALIGN_BYTES, np.uint8)


def _rows_of(memory: Array, rows: int, dim: int) -> Array:
    """Return rows in some memory, beginning where TensorFlow takes them as they are."""
    start = -memory.ctypes.data % ALIGN_BYTES
    return memory[start : start + rows * dim * 4].view(np.float32).reshape(rows, dim)


def summed(parts: list[tuple[Array, Array]], dim: int) -> tuple[Array, Array]:
    """Add up gradients by row, in the order of the parts.

    Parameters
    ----------
    parts : list of (ids, gradients)
        In each part an id stands once.
    dim : int

    Returns
    -------
    ids : ndarray, ascending
    gradients : ndarray of float32, (len(ids), dim)
    """
    ids = np.unique(np.concatenate([ids for ids, _ in parts]))
    total: Any = np.zeros((len(ids), dim), np.float32)
    for some, gradients in parts:
        # As each id is there once, this adds every row.
        total[np.searchsorted(ids, some)] += gradients
    return ids, total
