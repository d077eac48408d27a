"""The rows of a table that live on one node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparktf.distribute.sparse_optimizers import Array, SparseOptimizer
from sparktf.distribute.table_rows import TableSpec
from sparktf.errors import ParamError

# Rows are read out of a shard in pieces of this size.
_PIECE_BYTES = 4 << 20


@dataclass
class TableState:
    """Rows that differ from new ones, and what the optimizer keeps for them.

    Attributes
    ----------
    ids : ndarray of int64, (n,)
        Ascending.
    rows : ndarray of float32, (n, dim)
    slots : dict of str to ndarray of float32, (n, dim)
    updates : int
        Of the table so far.
    optimizer : str
        Whose slots they are; empty where there are none.
    """

    ids: Array
    rows: Array
    slots: dict[str, Array] = field(default_factory=dict)
    updates: int = 0
    optimizer: str = ""

    @classmethod
    def joined(cls, states: Sequence[TableState], dim: int) -> TableState:
        """Join the states of shards, by ascending id."""
        known = next((s for s in states if s.optimizer), None)
        ids = np.concatenate([np.zeros(0, np.int64), *(s.ids for s in states)])
        order = np.argsort(ids)

        def join(parts: list[Array]) -> Array:
            return np.concatenate([np.zeros((0, dim), np.float32), *parts])[order]

        names = known.slots if known else {}
        slots = {name: join([s.slots[name] for s in states if len(s.ids)]) for name in names}
        updates = max((s.updates for s in states), default=0)
        return cls(ids[order], join([s.rows for s in states]), slots, updates, known.optimizer if known else "")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.ids.nbytes + self.rows.nbytes + sum(slot.nbytes for slot in self.slots.values())

    def check(self, spec: TableSpec) -> None:
        """Check that it may be a table's.

        Raises
        ------
        ParamError
        """
        if self.rows.shape[1:] != (spec.dim,) or int(self.ids.max(initial=-1)) >= spec.rows:
            raise ParamError(
                f"Expected the state of a table of {spec.rows:,} rows of {spec.dim}, received ids up to "
                f"{int(self.ids.max(initial=-1)):,} and rows of {self.rows.shape[1:]}."
            )

    def part(self, part: int, parts: int) -> TableState:
        """Return the rows of one of several shards."""
        mine = self.ids % parts == part
        slots = {name: slot[mine] for name, slot in self.slots.items()}
        return TableState(self.ids[mine], self.rows[mine], slots, self.updates, self.optimizer)

    def sliced(self, count: int) -> Iterator[TableState]:
        """Yield it in pieces of so many rows, at least one piece."""
        for start in range(0, max(1, len(self.ids)), count):
            some = slice(start, start + count)
            slots = {name: slot[some] for name, slot in self.slots.items()}
            yield TableState(self.ids[some], self.rows[some], slots, self.updates, self.optimizer)

    def find(self, ids: Array, out: Array) -> Array:
        """Fill the rows of `out`, float32 of (n, dim), whose ids are here; return which these are: bool, (n,)."""
        places = np.searchsorted(self.ids, ids)
        there = np.zeros(len(ids), np.bool_)
        inside = places < len(self.ids)
        there[inside] = self.ids[places[inside]] == ids[inside]
        out[there] = self.rows[places[there]]
        return there


class TableShard:
    """One of several parts of a table, or all of it.

    Part `p` of `n` holds the rows whose id is ``p`` modulo ``n``. Ids by frequency (those of MLlib's StringIndexer) so
    spread evenly, where blocks would put all that are frequent on one node. Rows take memory when they are first
    updated: the kernel gives pages of zeros as they are written.

    Calls must not overlap with `update` or `load`; that is the business of whoever hosts the shard.

    Parameters
    ----------
    spec : TableSpec
    part, parts : int

    Attributes
    ----------
    updates : int
        Of the whole table so far.
    """

    def __init__(self, spec: TableSpec, part: int = 0, parts: int = 1) -> None:
        self.spec, self.part, self.parts = spec, part, parts
        count = len(range(part, spec.rows, parts))
        try:
            self._values = np.zeros((count, spec.dim), np.float32)
            self._held = np.zeros(count, np.bool_)
        except MemoryError as error:
            raise ParamError(_too_large(spec, parts, count)) from error
        self._slots: dict[str, Array] = {}
        self._optimizer: SparseOptimizer | None = None
        self._state_of = ""
        self.updates = 0

    def use(self, optimizer: SparseOptimizer) -> None:
        """Update by this optimizer from now on; slots of another kind are forgotten."""
        if self._state_of == optimizer.name and set(self._slots) == set(optimizer.slots):
            self._optimizer = optimizer
            return
        try:
            self._slots = {name: np.zeros(self._values.shape, np.float32) for name in optimizer.slots}
        except MemoryError as error:
            raise ParamError(_too_large(self.spec, self.parts, len(self._held), 1 + len(optimizer.slots))) from error
        for name, start in optimizer.slots.items():
            if start:
                self._slots[name][self._held] = start
        self._optimizer, self._state_of, self.updates = optimizer, optimizer.name, 0

    def lookup(self, ids: Array, out: Array | None = None) -> Array:
        """Return rows.

        Parameters
        ----------
        ids : ndarray of int64, (n,)
            Of this part.
        out : ndarray of float32, (n, dim), optional
            To be filled and returned.

        Returns
        -------
        ndarray of float32, (n, dim)
        """
        places = ids // self.parts
        # Not "raise", the default, for which numpy would copy once more.
        rows: Array = np.take(self._values, places, axis=0, out=out, mode="clip")
        new = np.flatnonzero(~self._held[places])
        if new.size:
            rows[new] = self.spec.new_rows(ids[new])
        return rows

    def update(self, ids: Array, gradients: Array, rate: float) -> None:
        """Make one update of the table.

        Parameters
        ----------
        ids : ndarray of int64, (n,)
            Of this part, each once; none at all is an update as well.
        gradients : ndarray of float32, (n, dim)
        rate : float
            The learning rate.
        """
        if self._optimizer is None:
            raise ParamError("Expected an optimizer for the table before its first update, received none.")
        self.updates += 1
        if not len(ids):
            return
        places = ids // self.parts
        self._hold(ids, places)
        rows = self._values[places]
        slots = {name: slot[places] for name, slot in self._slots.items()}
        self._optimizer.update(rows, gradients, slots, rate, self.updates)
        self._values[places] = rows
        for name, slot in slots.items():
            self._slots[name][places] = slot

    def _hold(self, ids: Array, places: Array) -> None:
        """Store rows that were new so far."""
        new = np.flatnonzero(~self._held[places])
        if not new.size:
            return
        self._values[places[new]] = self.spec.new_rows(ids[new])
        for name, start in (self._optimizer.slots if self._optimizer else {}).items():
            if start:
                self._slots[name][places[new]] = start
        self._held[places[new]] = True

    @property
    def held(self) -> int:
        """How many rows are stored; the others are new."""
        return int(np.count_nonzero(self._held))

    @property
    def nbytes(self) -> int:
        """Bytes of its state."""
        return self.held * (8 + 4 * self.spec.dim * (1 + len(self._slots)))

    def pieces(self, slots: bool = True) -> Iterator[TableState]:
        """Yield the state in pieces by ascending id, at least one.

        There may be updates and loads between two pieces: each piece holds its rows, and what belongs to them, as they
        are when it is taken. Rows that were new when the first was taken are in none.

        Parameters
        ----------
        slots : bool
            With what the optimizer keeps.
        """
        stored = np.flatnonzero(self._held)
        count = piece_rows(self.spec.dim, len(self._slots) if slots else 0)
        for start in range(0, max(1, len(stored)), count):
            places = stored[start : start + count]
            # Those that a load has made new again have no values.
            places = places[self._held[places]]
            yield TableState(
                places * self.parts + self.part,
                self._values[places],
                {name: slot[places] for name, slot in self._slots.items()} if slots else {},
                self.updates,
                self._state_of if slots else "",
            )

    def state(self) -> TableState:
        """Return the whole state; for shards that fit in memory twice."""
        return TableState.joined(list(self.pieces()), self.spec.dim)

    def load(self, pieces: Iterable[TableState]) -> None:
        """Become what the pieces of a state say, as far as their rows are of this part; all other rows are new again.

        Memory is taken for the part alone, and for one piece.
        """
        self._held[:] = False
        self._slots, self._state_of, self.updates = {}, "", 0
        for piece in pieces:
            piece.check(self.spec)
            self._state_of, self.updates = piece.optimizer, piece.updates
            mine = piece if self.parts == 1 else piece.part(self.part, self.parts)
            places = mine.ids // self.parts
            self._held[places] = True
            self._values[places] = mine.rows
            for name, slot in mine.slots.items():
                if name not in self._slots:
                    self._slots[name] = np.zeros(self._values.shape, np.float32)
                self._slots[name][places] = slot
        if self._optimizer is not None:
            # Keeps the slots where they are of its kind.
            self.use(self._optimizer)


def piece_rows(dim: int, slots: int) -> int:
    """Return how many rows of so many numbers, and so many slots, a piece of a state has."""
    return max(1, _PIECE_BYTES // (4 * dim * (1 + slots)))


def _too_large(spec: TableSpec, parts: int, count: int, arrays: int = 1) -> str:
    return (
        f"Expected a table whose part fits this node's memory, received {count:,} of {spec.rows:,} rows of {spec.dim} "
        f"numbers, {arrays} times: {count * spec.dim * 4 * arrays:,} bytes. Spread it over more than {parts} nodes, or "
        "take an optimizer with less state."
    )
