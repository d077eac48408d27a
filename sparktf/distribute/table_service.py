"""Parts of tables that live on this node, for whoever asks: a thread for every peer.

Requests come over a communicator of each pair of nodes, the one that asks being rank 0. So nodes need not do the same
at the same time, but for updates: those that evaluate other numbers of batches, and a chief that saves or predicts in a
callback, find all rows at any time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparktf.distribute.sparse_optimizers import Array
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import Buffers, summed
from sparktf.errors import PeerLostError, SparktfError, TransportTimeoutError
from sparktf.transport import Communicator

_LOG = logging.getLogger("sparktf.distribute")

# Ranks in a pair.
ASKS, SERVES = 0, 1
# Requests. A request is `REQUEST_NUMBERS` of int64: its kind, the table's number, how many updates the one that asks
# has pushed so far, how many rows follow or are asked for, and the bits of the learning rate.
LOOKUP, PUSH, STATE, LOAD, LEAVE = range(5)
REQUEST_NUMBERS = 5


class SyncedShard:
    """A shard that is updated once all ranks have pushed: what they push is added up by row, in the order of ranks.

    Any thread may call. A caller tells how many updates it has pushed so far, and waits until they are made.

    Parameters
    ----------
    shard : TableShard
    ranks : int
    timeout : float
        Seconds for which a caller may wait.
    """

    def __init__(self, shard: TableShard, ranks: int, timeout: float) -> None:
        self.shard = shard
        self._ranks = set(range(ranks))
        self._timeout = timeout
        self._news = threading.Condition()
        self._pushed: dict[int, tuple[Array, Array, float]] = {}
        self._failure: SparktfError | None = None
        self.version = 0

    def wait(self, clock: int) -> None:
        """Return when so many updates are made.

        Raises
        ------
        TransportTimeoutError
            A rank has not pushed in time.
        """
        deadline = time.monotonic() + self._timeout
        with self._news:
            while self.version < clock and self._failure is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    late = sorted(self._ranks - set(self._pushed))
                    raise TransportTimeoutError(
                        f"Expected the gradients of ranks {late} for update {self.version + 1} of a sharded table "
                        f"within {self._timeout:g} s, while others wait for it. Raise timeout where a step takes "
                        "so long."
                    )
                self._news.wait(left)
            if self._failure is not None:
                raise self._failure

    def lookup(self, ids: Array, clock: int, out: Array) -> Array:
        """Fill `out` with rows as they are after so many updates; see `TableShard.lookup`."""
        self.wait(clock)
        with self._news:
            return self.shard.lookup(ids, out)

    def push(self, rank: int, ids: Array, gradients: Array, rate: float) -> None:
        """Take a rank's gradients for the next update; the rank has waited for the one before.

        Both arrays are read until `wait` says that the update is made. Of the learning rates that of the lowest rank
        counts which has pushed.
        """
        with self._news:
            self._pushed[rank] = ids, gradients, rate
            self._update_when_all_have_pushed()

    def _update_when_all_have_pushed(self) -> None:
        if not self._pushed or not self._ranks <= set(self._pushed) or self._failure is not None:
            return
        pushed = [self._pushed[rank] for rank in sorted(self._pushed)]
        ids, gradients = summed([(ids, gradients) for ids, gradients, _ in pushed], self.shard.spec.dim)
        self.shard.update(ids, gradients, pushed[0][2])
        self._pushed.clear()
        self.version += 1
        self._news.notify_all()

    def leave(self, rank: int) -> None:
        """Wait no longer for a rank; what it has pushed counts."""
        with self._news:
            self._ranks.discard(rank)
            self._update_when_all_have_pushed()

    def load(self, pieces: Iterable[TableState], clock: int) -> None:
        """Set the shard's rows."""
        self.wait(clock)
        with self._news:
            self.shard.load(pieces)

    def fail(self, error: SparktfError) -> None:
        """Let everyone who waits, or will, raise this."""
        with self._news:
            self._failure = self._failure or error
            self._news.notify_all()


class TableService:
    """Answers what peers ask of the shards of this node, until they leave.

    Parameters
    ----------
    shards : sequence of SyncedShard
        One a table.
    communicators : mapping of int to Communicator
        By the rank that asks; they belong to the service from now on.
    """

    def __init__(self, shards: Sequence[SyncedShard], communicators: Mapping[int, Communicator]) -> None:
        self._shards = list(shards)
        self._communicators = dict(communicators)
        self._threads = [
            threading.Thread(target=self._attend, args=pair, name=f"sparktf-table-{pair[0]}", daemon=True)
            for pair in self._communicators.items()
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Return when all have left."""
        for thread in self._threads:
            thread.join()

    def abort(self, reason: str) -> None:
        """End at once; tell all who ask why."""
        for communicator in self._communicators.values():
            communicator.abort(reason)
        self.join()

    def _attend(self, rank: int, communicator: Communicator) -> None:
        """Serve one rank; the function of its thread."""
        visit = _Visit(rank, communicator, self._shards)
        try:
            while visit.answer():
                pass
            communicator.close()
        except SparktfError as error:
            self._fail(rank, error)
        except BaseException as error:  # nobody else would hear of it
            _LOG.warning("serving rank %d of sharded tables failed", rank, exc_info=True)
            self._fail(rank, not_the_peers(rank, error))

    def _fail(self, rank: int, error: SparktfError) -> None:
        reason = getattr(error, "reason", "") or str(error)
        if isinstance(error, PeerLostError):
            error = PeerLostError(f"lost rank {rank}, which asks for rows of sharded tables: {reason}", rank, reason)
        for shard in self._shards:
            shard.fail(error)
        for communicator in self._communicators.values():
            communicator.abort(reason)


class _Visit:
    """One rank's requests, one after the other."""

    def __init__(self, rank: int, communicator: Communicator, shards: Sequence[SyncedShard]) -> None:
        self._rank, self._communicator, self._shards = rank, communicator, shards
        self._request = np.zeros(REQUEST_NUMBERS, np.int64)
        self._buffers = Buffers()

    def answer(self) -> bool:
        """Answer the next request; return False where the rank leaves."""
        self._communicator.recv(ASKS, self._request)
        kind, table, clock, count, _ = (int(number) for number in self._request)
        if kind == LEAVE:
            return False
        shard = self._shards[table]
        if kind == LOOKUP:
            rows = self._buffers.take(count, shard.shard.spec.dim)
            self._communicator.send(ASKS, shard.lookup(self._ids(shard, count), clock, rows))
        elif kind == PUSH:
            rate = float(self._request[4:].view(np.float64)[0])
            # What was pushed before is being read until then.
            shard.wait(clock)
            ids = self._ids(shard, count)
            gradients = self._communicator.recv(ASKS, self._buffers.take(count, shard.shard.spec.dim))
            shard.push(self._rank, ids, gradients, rate)
        elif kind == STATE:
            shard.wait(clock)
            send_pieces(self._communicator, ASKS, shard.shard.pieces())
        else:
            shard.load(receive_pieces(self._communicator, ASKS, shard.shard.spec.dim), clock)
            # Others may look these rows up as soon as the one that asked says so.
            self._communicator.send(ASKS, np.zeros(1, np.uint8))
        return True

    def _ids(self, shard: SyncedShard, count: int) -> Array:
        """Receive which rows of the shard, and return their ids."""
        places = np.empty(count, place_dtype(shard.shard.spec.rows, shard.shard.parts))
        self._communicator.recv(ASKS, places)
        return places.astype(np.int64) * shard.shard.parts + shard.shard.part


def not_the_peers(rank: int, error: BaseException) -> SparktfError:
    """Return what serving a rank has failed of, where not of the rank's loss: none may go on as if it were that."""
    return SparktfError(f"serving rank {rank} of sharded tables: {type(error).__name__}: {error}")


def request(kind: int, table: int = 0, clock: int = 0, count: int = 0, rate: float = 0.0) -> Array:
    """Return what goes before a message of the one that asks."""
    numbers = np.zeros(REQUEST_NUMBERS, np.int64)
    numbers[:4] = kind, table, clock, count
    numbers[4:].view(np.float64)[0] = rate
    return numbers


def split_by_owner(ids: Array, owners: int) -> list[Array]:
    """Return, by owner, where its ids stand."""
    whose = ids % owners
    order = np.argsort(whose, kind="stable")
    return np.split(order, np.searchsorted(whose[order], np.arange(1, owners)))


def place_dtype(rows: int, parts: int) -> np.dtype[np.signedinteger]:
    """Return the dtype in which the number of a row within its part travels."""
    return np.dtype(np.int32 if rows // parts < 2**31 - 1 else np.int64)


def send_pieces(communicator: Communicator, peer: int, pieces: Iterable[TableState]) -> None:
    """Send the pieces of a state."""
    for piece in pieces:
        _tell(communicator, peer, _described(piece))
        for array in (piece.ids, piece.rows, *piece.slots.values()):
            communicator.send(peer, array)
    _tell(communicator, peer, {})


def load_pieces(communicator: Communicator, pieces: Iterable[TableState]) -> None:
    """Send the pieces behind a request to load them; return once they are loaded."""
    send_pieces(communicator, SERVES, pieces)
    communicator.recv(SERVES, np.zeros(1, np.uint8))


def receive_pieces(communicator: Communicator, peer: int, dim: int) -> Iterator[TableState]:
    """Yield what `send_pieces` sends."""
    try:
        while (piece := _receive_piece(communicator, peer, dim)) is not None:
            yield piece
    except GeneratorExit:
        # The reader has enough; what is on its way must not be taken for the answer to its next request.
        while _receive_piece(communicator, peer, dim) is not None:
            pass
        raise


def _receive_piece(communicator: Communicator, peer: int, dim: int) -> TableState | None:
    told = _heard(communicator, peer)
    if not told:
        return None
    count = told["count"]
    ids = communicator.recv(peer, np.empty(count, np.int64))
    rows = communicator.recv(peer, np.empty((count, dim), np.float32))
    slots = {name: communicator.recv(peer, np.empty((count, dim), np.float32)) for name in told["slots"]}
    return TableState(ids, rows, slots, told["updates"], told["optimizer"])


def _tell(communicator: Communicator, peer: int, told: dict[str, Any]) -> None:
    packed = np.frombuffer(json.dumps(told).encode(), np.uint8)
    communicator.send(peer, np.array([packed.size]))
    communicator.send(peer, packed)


def _heard(communicator: Communicator, peer: int) -> dict[str, Any]:
    size = communicator.recv(peer, np.zeros(1, np.int64))
    told: dict[str, Any] = json.loads(communicator.recv(peer, np.empty(int(size[0]), np.uint8)).tobytes())
    return told


def _described(state: TableState) -> dict[str, Any]:
    return {
        "count": len(state.ids),
        "slots": list(state.slots),
        "updates": state.updates,
        "optimizer": state.optimizer,
    }
