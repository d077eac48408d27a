"""Tables whose rows are spread over parameter servers, updated as workers' gradients arrive."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from sparktf.distribute import table_wire as wire
from sparktf.distribute.pair import connect_again, naming_server
from sparktf.distribute.sparse_optimizers import Array, SparseOptimizer
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import LocalTable, TableAccess
from sparktf.distribute.table_fit import kept, tables_of
from sparktf.distribute.table_service import SyncedShard, TableService, not_the_peers
from sparktf.distribute.table_wire import Link
from sparktf.errors import PeerLostError, SparktfError
from sparktf.transport import Communicator

_LOG = logging.getLogger("sparktf.distribute")


class FreeShard(SyncedShard):
    """A shard that is updated by each push as it comes. Any thread may call."""

    def wait(self, clock: int) -> None:
        """Return at once: nobody waits for updates of others."""
        with self._news:
            if self._failure is not None:
                raise self._failure

    def push(self, rank: int, ids: Array, gradients: Array, rate: float) -> None:
        """Apply a worker's gradients. Of the learning rates each worker's own counts."""
        with self._news:
            self.shard.update(ids, gradients, rate)
            self.version += 1


class ServedTables(TableService):
    """A parameter server's parts of tables, for as long as workers ask; it goes on without those that are gone.

    Parameters and attributes are those of `TableService`; ranks are workers.
    """

    def leave(self, worker: int) -> None:
        """Note that a worker is gone for good, or never comes. May be called twice."""
        for shard in self._shards:
            shard.leave(worker)

    def _leave(self, rank: int) -> None:
        self.leave(rank)

    def _fail(self, rank: int, error: SparktfError) -> None:
        if not isinstance(error, PeerLostError):
            super()._fail(rank, error)
            return
        # The others go on without it.
        self._links[rank].abort(error.reason or str(error))
        try:
            for shard in self._shards:
                shard.lose(rank)
        except BaseException as failure:  # leaving may complete a round of pushes, and applying it may fail
            super()._fail(rank, not_the_peers(rank, failure))


class ServedTable(TableAccess):
    """A table of which each parameter server owns a part.

    Parameters
    ----------
    links : sequence of Communicator
        One with each server, of `connect_again`.
    lock : threading.Lock
        Of all tables of the links.
    number : int
        Of the table in the model.
    before : TableAccess
        What it takes the place of.
    """

    def __init__(self, links: Sequence[Communicator], lock: Any, number: int, before: TableAccess) -> None:
        super().__init__(before.spec, before.name)
        self._links, self._lock, self._number = _named(links), lock, number
        self._places = wire.place_dtype(self.spec.rows, len(links))
        self._started = before.updates
        # What an eager step has handed over before its optimizer was built.
        self._pushed, self._rate = list(before._pushed), before._rate
        # By server. They differ where a worker was lost while it pushed.
        self._clocks = [0] * len(links)

    def _use(self, optimizer: SparseOptimizer) -> None:
        """Do nothing: servers know the model's optimizer."""

    @property
    def updates(self) -> int:
        """The table's updates so far, as far as this worker has made them."""
        return self._started + max(self._clocks)

    @property
    def waited_seconds(self) -> float:
        """Seconds so far of all tables of the links, told by the first of them."""
        return sum(link.stats.seconds for link in self._links) if self._number == 0 else 0.0

    def _lookup(self, ids: Array, out: Array) -> Array:
        with self._lock:
            asked = []
            for server, places in enumerate(wire.split_by_owner(ids, len(self._links))):
                # A server that has nothing to tell is not asked.
                if len(places):
                    link = self._ask(server, wire.LOOKUP, len(places))
                    link.send(self._placed(ids[places]))
                    asked.append((link, places))
            for link, places in asked:
                out[places] = link.recv(self._buffers.take(len(places), self.spec.dim))
        return out

    def _update(self, ids: Array, gradients: Array, rate: float) -> None:
        with self._lock:
            for server, places in enumerate(wire.split_by_owner(ids, len(self._links))):
                part = self._buffers.take(len(places), self.spec.dim)
                np.take(gradients, places, axis=0, out=part, mode="clip")
                link = self._ask(server, wire.PUSH, len(places), rate)
                link.send(self._placed(ids[places]))
                link.send(part)
                self._clocks[server] += 1

    def settle(self) -> None:
        """Return when all that this worker has pushed is in the table."""
        with self._lock:
            asked = [self._ask(server, wire.SETTLE) for server in range(len(self._links))]
            # Others may have made updates without this worker, which had come to its end: it joins them again.
            self._clocks = [int(link.recv(np.zeros(1, np.int64))[0]) for link in asked]

    def pieces(self) -> Iterator[TableState]:
        """Yield the whole table's state, one server's after another's."""
        with self._lock:
            for server in range(len(self._links)):
                link = self._ask(server, wire.STATE)
                yield from wire.receive_pieces(link, self.spec.dim)

    def load(self, pieces: Iterable[TableState]) -> None:
        """Set the whole table, on all servers."""
        whole = list(pieces)
        for piece in whole:
            piece.check(self.spec)
        with self._lock:
            for server in range(len(self._links)):
                link = self._ask(server, wire.LOAD)
                wire.load_pieces(link, (piece.part(server, len(self._links)) for piece in whole))

    def _ask(self, server: int, kind: int, count: int = 0, rate: float = 0.0) -> Link:
        link = self._links[server]
        link.send(wire.request(kind, self._number, self._clocks[server], count, rate))
        return link

    def _placed(self, ids: Array) -> Array:
        return (ids // len(self._links)).astype(self._places)


@contextmanager
def tables_at_servers(model: Any, links: Sequence[Communicator], share: Callable[[], Any]) -> Iterator[None]:
    """Let a model's tables be those of the servers; they stay so.

    Parameters
    ----------
    model : keras.Model
    links : sequence of Communicator
    share : callable
        Returns, while a step is traced, what this worker's gradients count.
    """
    layers = tables_of(model)
    lock = threading.RLock()
    for number, layer in enumerate(layers):
        layer.access = ServedTable(links, lock, number, layer.access)
        layer.weigh_by(share)
    try:
        yield
    finally:
        for layer in layers:
            layer.weigh_by(None)


def bring_back_tables(model: Any) -> None:
    """Give a model the whole tables that the servers hold: in memory where they are small, else in mapped files."""
    for layer in tables_of(model):
        spec, optimizer = layer.spec, layer.access.optimizer
        slots = 0 if optimizer is None else len(optimizer.slots)
        # As if all rows had been touched.
        state = kept(layer.access, spec.rows * spec.dim * 4 * (1 + slots))
        layer.access = LocalTable(spec, layer.name)
        layer.access.load(state)


def leave_tables(links: Sequence[Communicator]) -> None:
    """Tell servers that this worker asks no more; then close the links.

    Raises
    ------
    PeerLostError, TransportTimeoutError
        A server could not be told, the first of them; all others were.
    """
    with wire.leaving(_named(links)):
        pass


def _named(links: Sequence[Communicator]) -> list[Link]:
    return [Link(link, wire.SERVES, partial(naming_server, server)) for server, link in enumerate(links)]


def links_with_workers(pairs: Sequence[Communicator], timeout: float) -> dict[int, Communicator]:
    """Connect a server with all workers once more, as `connect_again` does; the others go on without one that is lost.

    Parameters
    ----------
    pairs : sequence of Communicator
        One with each worker. That of a lost one has no more to say than that.
    timeout : float
        Seconds for which the server waits for a worker, which may still make its model.

    Returns
    -------
    dict of int to Communicator
        By worker. They belong to the caller.
    """
    links = {}
    with ExitStack() as stack:
        for worker, pair in enumerate(pairs):
            try:
                links[worker] = stack.enter_context(connect_again(pair, timeout))
            except PeerLostError as error:
                _LOG.warning("worker %d is lost before it asks for rows of tables: %s", worker, error.reason or error)
        stack.pop_all()
    return links


def served_model_tables(
    model: Any,
    optimizer: Any,
    server: int,
    servers: int,
    workers: int,
    communicators: Mapping[int, Communicator],
    together: bool,
    timeout: float,
) -> ServedTables:
    """Serve this server's parts of a model's tables.

    Parameters
    ----------
    model : keras.Model
        Compiled; its tables are where training starts.
    optimizer : keras.optimizers.Optimizer
        The model's.
    server, servers : int
        This server's number, and how many there are.
    workers : int
        How many began.
    communicators : mapping of int to Communicator
        One with each worker that is still there, of `links_with_workers`; they belong to the service from now on.
    together : bool
        Updates are made once all workers have pushed.
    timeout : float
        Seconds for which a worker may wait for others where updates are made together.
    """
    kind = SyncedShard if together else FreeShard
    shards = [kind(_part_of(layer, optimizer, server, servers), workers, timeout) for layer in tables_of(model)]
    for shard in shards:
        for lost in set(range(workers)) - set(communicators):
            shard.leave(lost)
    return ServedTables(shards, communicators)


def _part_of(layer: Any, optimizer: Any, server: int, servers: int) -> TableShard:
    shard = TableShard(layer.spec, server, servers)
    shard.load(layer.access.pieces())
    shard.use(layer.trained_by(optimizer))
    return shard
