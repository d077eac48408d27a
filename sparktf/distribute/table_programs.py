"""Tables of programs that train on parameter servers, which have no model: workers tell them which tables there are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from sparktf.distribute import pair
from sparktf.distribute.client import ParameterClient
from sparktf.distribute.lane import Lane
from sparktf.distribute.slots import is_handle
from sparktf.distribute.sparse_optimizers import Array, SparseOptimizer, sparse_optimizer
from sparktf.distribute.table import TableShard
from sparktf.distribute.table_access import TableAccess
from sparktf.distribute.table_rows import TableSpec
from sparktf.distribute.table_servers import FreeShard, ServedTable, ServedTables, leave_tables
from sparktf.distribute.table_service import SyncedShard
from sparktf.errors import HandshakeError, ParamError
from sparktf.transport import Communicator

# Of the time allowed, what the others get to push: they are named before the one that waits for the server gives up.
_PATIENCE = 0.75


class MeanShard(SyncedShard):
    """A shard that is updated by the mean of what all workers that train have pushed."""

    def _joined(self, pushed: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        ids, gradients = super()._joined(pushed)
        return ids, gradients / np.float32(len(pushed))


class ToldTables:
    """A parameter server's parts of the tables that workers tell of; none before the first does. Any thread may call.

    Parameters
    ----------
    workers : int
        How many begin.
    timeout : float
        Seconds for which a worker may wait for others.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self._workers, self._timeout = workers, timeout
        self._lock = threading.Lock()
        self._told: dict[str, Any] | None = None
        self._shards: list[SyncedShard] = []
        self._service = ServedTables([], {})
        self._gone: set[int] = set()
        self._admitted: set[int] = set()

    def hear(self, lane: Lane) -> None:
        """Take what a worker tells of tables, and let it ask for rows.

        Raises
        ------
        HandshakeError
            Another worker has told of others.
        PeerLostError
            The worker is lost.
        """
        told = json.loads(pair.receive_bytes(lane.communicator, pair.WORKER))
        with self._lock:
            if self._told is None:
                self._begin(told)
            _check_alike(self._told or told, told, lane.worker)
        link = lane.connect_again()
        with self._lock:
            self._admitted.add(lane.worker)
            self._service.admit(lane.worker, link)

    def _begin(self, told: dict[str, Any]) -> None:
        kind = MeanShard if told["together"] else FreeShard
        for table in told["tables"]:
            shard = TableShard(TableSpec.described(table["spec"]), told["server"], told["servers"])
            shard.use(sparse_optimizer(table["optimizer"], table["config"]))
            self._shards.append(kind(shard, self._workers, _PATIENCE * self._timeout))
        self._told = told
        self._service = ServedTables(self._shards, {})
        for worker in self._gone:
            self._service.leave(worker)

    def rest(self, worker: int) -> None:
        """Note that a worker has come to the end of its training for now; the others no longer wait for it."""
        for shard in self._shards:
            shard.rest(worker)

    def resume(self, workers: Sequence[int]) -> None:
        """Note that all have come to that end, and that these may go on."""
        for shard in self._shards:
            shard.resume(workers)

    def leave(self, worker: int) -> None:
        """Note that a worker is gone for good. One that has asked for rows says so by itself, behind what it pushed."""
        with self._lock:
            self._gone.add(worker)
            asks = worker in self._admitted
        if not asks:
            self._service.leave(worker)

    def join(self) -> None:
        """Return when all workers have left the tables, which they do before they leave the server.

        Raises
        ------
        TransportTimeoutError
            One has not.
        """
        self._service.join(self._timeout)

    def abort(self, reason: str) -> None:
        """End at once; tell all who ask why."""
        self._service.abort(reason)


class ToldTable(ServedTable):
    """A table that servers update as they were told when training began."""

    def __init__(
        self, links: Sequence[Communicator], lock: Any, number: int, before: TableAccess, told: Mapping[str, Any]
    ) -> None:
        super().__init__(links, lock, number, before)
        self._told = told

    def _use(self, optimizer: SparseOptimizer) -> None:
        kind, config = self._told["optimizer"], self._told["config"]
        other = _optimizer_told(optimizer)
        differing = [name for name, value in other["config"].items() if config.get(name, value) != value]
        if kind != optimizer.name or differing:
            theirs, ours = ({name: told[name] for name in differing} for told in (config, other["config"]))
            raise ParamError(
                f"layer {self.name!r}: expected to be trained by what its parameter servers were told of when the "
                f"distributed optimizer was built, {kind} {theirs or ''}, received {optimizer.name} {ours or ''}. Let "
                "the layer follow the distributed optimizer, or give it one of its own: optimizer=..."
            )


@contextmanager
def tables_told(variables: Sequence[Any], optimizer: Any, client: ParameterClient) -> Iterator[None]:
    """Let the tables among an optimizer's variables be those of a program's parameter servers, from the chief's on.

    They stay so: who saves asks the servers.

    Parameters
    ----------
    variables : sequence of keras.Variable
        The same on every worker.
    optimizer : keras.optimizers.Optimizer
        By which tables are trained that have none of their own.
    client : ParameterClient
        That has not started.

    Raises
    ------
    ParamError
        Tables cannot follow the optimizer.
    PeerLostError
        A server is lost, or has been told of other tables.
    """
    layers = [variable._sparktf_layer for variable in variables if is_handle(variable)]
    if not layers:
        yield
        return
    tables = [
        {"name": layer.name, "spec": layer.spec.describe(), **_optimizer_told(layer.trained_by(optimizer))}
        for layer in layers
    ]
    with ExitStack() as stack:
        links = [stack.enter_context(_tell(client, server, tables)) for server in range(len(client.communicators))]
        lock = threading.RLock()
        for number, layer in enumerate(layers):
            before, layer.access = layer.access, ToldTable(links, lock, number, layer.access, tables[number])
            # The others are told of the chief's variables later than this.
            if client.worker == 0 and any(len(piece.ids) for piece in before.pieces()):
                layer.access.load(before.pieces())
        yield
        leave_tables(links)


def served_tables(variables: Sequence[Any]) -> list[ServedTable]:
    """Return the tables among an optimizer's variables that parameter servers have."""
    tables = [variable._sparktf_layer.access for variable in variables if is_handle(variable)]
    return [table for table in tables if isinstance(table, ServedTable)]


def _tell(client: ParameterClient, server: int, tables: Sequence[Mapping[str, Any]]) -> Communicator:
    """Tell a server of the tables; return the connection by which rows are asked for."""
    communicator = client.communicators[server]
    place = {"server": server, "servers": len(client.communicators)}
    told = {**place, "together": not client.overlaps, "tables": tables}
    with pair.naming_server(server):
        communicator.send(pair.SERVER, pair.request(pair.TABLES))
        pair.send_bytes(communicator, pair.SERVER, json.dumps(told).encode())
        return pair.connect_again(communicator, communicator.timeout)


def _optimizer_told(optimizer: SparseOptimizer) -> dict[str, Any]:
    # The learning rate goes with every push, and a name says nothing.
    config = {name: value for name, value in optimizer.config.items() if name not in ("learning_rate", "name")}
    # As JSON has it, numpy's numbers among them.
    return {"optimizer": optimizer.name, "config": json.loads(json.dumps(config, default=float))}


def _check_alike(first: Mapping[str, Any], told: Mapping[str, Any], worker: int) -> None:
    """Check that a worker tells what the first has told, but for names, which Keras numbers in each process."""

    def unnamed(said: Mapping[str, Any]) -> list[Any]:
        tables = [{name: value for name, value in table.items() if name != "name"} for table in said["tables"]]
        return [f"{len(tables)} tables", f"updates of all workers together: {said['together']}", *tables]

    for one, other in zip(unnamed(first), unnamed(told), strict=False):
        if one != other:
            raise HandshakeError(
                f"Expected the same sharded tables on every worker, received {one} and {other} (the latter from worker "
                f"{worker}). Build the same model on every worker, and give its ShardedEmbedding layers a seed."
            )
