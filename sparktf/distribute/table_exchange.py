"""Tables whose rows are spread over the ranks of a fit, updated in step."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from sparktf.distribute import table_wire as wire
from sparktf.distribute.sparse_optimizers import Array, SparseOptimizer
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import TableAccess
from sparktf.distribute.table_meeting import connect_everyone
from sparktf.distribute.table_service import SyncedShard, TableService
from sparktf.distribute.table_wire import Link, naming_rank
from sparktf.errors import HandshakeError
from sparktf.transport import Communicator

# Of the time allowed, what the others get to push: they are named before the one that waits for this node gives up.
_PATIENCE = 0.75


class TableGroup:
    """All ranks' parts of some tables, and the ways to them. Use it in a ``with`` block.

    Parameters
    ----------
    communicator : Communicator
        The group's, by which ranks find each other.
    tables : sequence of TableAccess
        As this rank has them so far; the same on every rank, their rows too.
    scale : float
        What gradients are multiplied by, beside a rank's share.

    Attributes
    ----------
    tables : list of SyncedTable
        In their place.

    Raises
    ------
    HandshakeError
        Ranks have different tables.
    """

    def __init__(self, communicator: Communicator, tables: Sequence[TableAccess], scale: float = 1.0) -> None:
        rank, size = communicator.rank, communicator.size
        _agree(communicator, tables)
        patience = _PATIENCE * communicator.timeout
        self.rank, self.size, self.scale = rank, size, scale
        self.shards = [SyncedShard(_part_of(table, rank, size), size, patience) for table in tables]
        asking, serving = connect_everyone(communicator)
        self._asking = {
            owner: Link(link, wire.SERVES, partial(naming_rank, owner, "which has rows of sharded tables"))
            for owner, link in asking.items()
        }
        self._service = TableService(self.shards, serving)
        self._lock = threading.RLock()
        try:
            self.tables = [SyncedTable(self, number, table) for number, table in enumerate(tables)]
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}")
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.close()
        else:
            self.abort(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Leave in good order: returns when all ranks have left.

        Raises
        ------
        PeerLostError, TransportTimeoutError
            A rank could not be told so, the first of them; all others were.
        """
        with wire.leaving(list(self._asking.values())) as failures:
            if failures:
                # One that could not be told may never leave, either.
                self._service.abort(str(failures[0]))
            self._service.join()

    def abort(self, reason: str) -> None:
        """Leave at once, and tell the others why."""
        for link in self._asking.values():
            link.abort(reason)
        self._service.abort(reason)

    @property
    def moved_bytes(self) -> int:
        """Payload bytes so far of this rank's requests and the answers to them; over all ranks, as much as all send."""
        return sum(link.stats.bytes_sent + link.stats.bytes_received for link in self._asking.values())

    @property
    def seconds(self) -> float:
        """Seconds so far in which this rank asked others, or waited for their answers."""
        return sum(link.stats.seconds for link in self._asking.values())

    @property
    def others(self) -> list[int]:
        """The other ranks, beginning with the next: not all ask the same one first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def ask(self, owner: int, kind: int, table: int, clock: int = 0, count: int = 0, rate: float = 0.0) -> Link:
        """Send a request; return the link by which its rest goes, and the answer comes."""
        self._asking[owner].send(wire.request(kind, table, clock, count, rate))
        return self._asking[owner]


class SyncedTable(TableAccess):
    """A table of which each rank owns a part; all ranks push, then it is updated, once a step.

    Parameters
    ----------
    group : TableGroup
    number : int
        Of the table in the group.
    before : TableAccess
        What it takes the place of.

    Attributes
    ----------
    clock : int
        Updates that this rank has pushed.
    """

    def __init__(self, group: TableGroup, number: int, before: TableAccess) -> None:
        super().__init__(before.spec, before.name)
        self._group, self._number = group, number
        self._own = group.shards[number]
        self._places = wire.place_dtype(self.spec.rows, group.size)
        self._started = self._own.shard.updates
        # What an eager step has handed over before its optimizer was built.
        self._pushed = [(ids, gradients * np.float32(group.scale)) for ids, gradients in before._pushed]
        self._rate = before._rate
        self.clock = 0
        if before.optimizer is not None:
            self.use(before.optimizer)

    def push(self, ids: Array, gradients: Array, share: float, rate: float) -> None:
        """Hand over gradients; see `TableAccess`."""
        super().push(ids, gradients, share * self._group.scale, rate)

    def _use(self, optimizer: SparseOptimizer) -> None:
        # Every rank says so of its own part, before it pushes.
        self._own.wait(self.clock)
        before = self._own.shard.updates
        self._own.shard.use(optimizer)
        self._started += self._own.shard.updates - before

    @property
    def updates(self) -> int:
        """The table's updates so far."""
        return self._started + self.clock

    @property
    def waited_seconds(self) -> float:
        """Seconds so far of all tables of the group, told by the first of them."""
        return self._group.seconds if self._number == 0 else 0.0

    def _lookup(self, ids: Array, out: Array) -> Array:
        with self._group._lock:
            split = wire.split_by_owner(ids, self._group.size)
            asked: dict[int, tuple[Link, Array]] = {}
            for owner in self._group.others:
                # An owner that has nothing to tell is not asked.
                if len(split[owner]):
                    link = self._group.ask(owner, wire.LOOKUP, self._number, self.clock, len(split[owner]))
                    link.send(self._placed(ids[split[owner]]))
                    asked[owner] = link, split[owner]
            mine = split[self._group.rank]
            out[mine] = self._own.lookup(ids[mine], self.clock, self._buffers.take(len(mine), self.spec.dim))
            for link, places in asked.values():
                out[places] = link.recv(self._buffers.take(len(places), self.spec.dim))
        return out

    def _update(self, ids: Array, gradients: Array, rate: float) -> None:
        with self._group._lock:
            split = wire.split_by_owner(ids, self._group.size)
            for owner in self._group.others:
                places = split[owner]
                link = self._group.ask(owner, wire.PUSH, self._number, self.clock, len(places), rate)
                link.send(self._placed(ids[places]))
                part = self._buffers.take(len(places), self.spec.dim)
                link.send(np.take(gradients, places, axis=0, out=part, mode="clip"))
            mine = split[self._group.rank]
            self._own.wait(self.clock)
            self._own.push(self._group.rank, ids[mine], gradients[mine], rate)
            self.clock += 1

    def settle(self) -> None:
        """Return when this rank's part has seen all updates that this rank has pushed."""
        self._own.wait(self.clock)

    def pieces(self) -> Iterator[TableState]:
        """Yield the whole table's state, one rank's after another's."""
        with self._group._lock:
            yield from self._own.pieces(self.clock)
            for owner in self._group.others:
                link = self._group.ask(owner, wire.STATE, self._number, self.clock)
                yield from wire.receive_pieces(link, self.spec.dim)

    def load(self, pieces: Iterable[TableState]) -> None:
        """Set the whole table, everywhere."""
        whole = list(pieces)
        for piece in whole:
            piece.check(self.spec)
        with self._group._lock:
            for owner in self._group.others:
                link = self._group.ask(owner, wire.LOAD, self._number, self.clock)
                wire.load_pieces(link, (piece.part(owner, self._group.size) for piece in whole))
            self._own.load(whole, self.clock)

    def _placed(self, ids: Array) -> Array:
        return (ids // self._group.size).astype(self._places)


def _part_of(table: TableAccess, rank: int, size: int) -> TableShard:
    shard = TableShard(table.spec, rank, size)
    shard.load(table.pieces())
    return shard


def _agree(communicator: Communicator, tables: Sequence[TableAccess]) -> None:
    """Check that all ranks bring the same tables, rows included."""
    mine = [json.dumps([table.name, table.spec.describe(), _digest(table)]) for table in tables]
    everyones = [json.loads(told) for told in communicator.all_gather_bytes(json.dumps(mine).encode())]
    differing = [rank for rank, theirs in enumerate(everyones) if theirs != everyones[0]]
    if differing:
        pairs = zip(everyones[0], everyones[differing[0]], strict=False)
        counts = [f"{len(everyones[rank])} tables" for rank in (0, differing[0])]
        theirs = next(([one, other] for one, other in pairs if one != other), counts)
        raise HandshakeError(
            f"Expected the same sharded tables on every rank, received others on ranks {differing} than on rank 0: "
            f"{theirs[0]} and {theirs[1]}. Build the same model on every rank, and give its ShardedEmbedding layers a "
            "seed."
        )


def _digest(table: TableAccess) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in table.pieces():
        for array in (piece.ids, piece.rows):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
