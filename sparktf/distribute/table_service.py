"""Parts of tables that live on this node, for whoever asks: a thread for every peer.

Requests come over a communicator of each pair of nodes, the one that asks being rank 0. So nodes need not do the same
at the same time, but for updates: those that evaluate other numbers of batches, and a chief that saves or predicts in a
callback, find all rows at any time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from sparktf.distribute.sparse_optimizers import Array
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import Buffers, summed
from sparktf.distribute.table_wire import (
    ASKS,
    LEAVE,
    LOOKUP,
    PUSH,
    REQUEST_NUMBERS,
    SETTLE,
    STATE,
    Link,
    naming_rank,
    place_dtype,
    receive_pieces,
    send_pieces,
)
from sparktf.errors import SparktfError, TransportTimeoutError
from sparktf.transport import Communicator

_LOG = logging.getLogger("sparktf.distribute")


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
        self._gone: set[int] = set()
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
        ids, gradients = self._joined([(ids, gradients) for ids, gradients, _ in pushed])
        self.shard.update(ids, gradients, pushed[0][2])
        self._pushed.clear()
        self.version += 1
        self._news.notify_all()

    def _joined(self, pushed: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        return summed(pushed, self.shard.spec.dim)

    def rest(self, rank: int) -> None:
        """Wait for a rank no longer, for now; what it has pushed counts."""
        with self._news:
            self._ranks.discard(rank)
            self._update_when_all_have_pushed()

    def resume(self, ranks: Iterable[int]) -> None:
        """Wait for ranks again, but for those that have left."""
        with self._news:
            self._ranks |= set(ranks) - self._gone

    def leave(self, rank: int) -> None:
        """Wait for a rank no longer; what it has pushed counts."""
        with self._news:
            self._gone.add(rank)
            self.rest(rank)

    def lose(self, rank: int) -> None:
        """Wait for a rank no longer, which is lost; what of it has not been applied no longer will be."""
        with self._news:
            self._pushed.pop(rank, None)
            self.leave(rank)

    def pieces(self, clock: int) -> Iterator[TableState]:
        """Yield the state after so many updates, or more, as `TableShard.pieces` does; others may push meanwhile."""
        self.wait(clock)
        pieces = self.shard.pieces()
        while True:
            # A copy of one moment; who takes it may be slow.
            with self._news:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

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
        self._links: dict[int, Link] = {}
        self._aborted: str | None = None
        self._threads: dict[int, threading.Thread] = {}
        for rank, communicator in communicators.items():
            self.admit(rank, communicator)

    def admit(self, rank: int, communicator: Communicator) -> None:
        """Serve one more rank, over a communicator that belongs to the service from now on."""
        link = Link(communicator, ASKS, partial(naming_rank, rank, "which asks for rows of sharded tables"))
        self._links[rank] = link
        name = f"sparktf-table-{rank}"
        thread = threading.Thread(target=self._attend, args=(rank, link), name=name, daemon=True)
        thread.start()
        self._threads[rank] = thread
        if self._aborted is not None:
            link.abort(self._aborted)

    def join(self, seconds: float | None = None) -> None:
        """Return when all have left.

        Parameters
        ----------
        seconds : float, optional
            For which to wait, where nobody has a reason to ask any more. Default: a rank may be silent for as long as
            its link's timeout.

        Raises
        ------
        TransportTimeoutError
            A rank has not left by then.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        for rank, thread in list(self._threads.items()):
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TransportTimeoutError(
                    f"Expected rank {rank} to leave the sharded tables within {seconds:g} s, now that it trains no "
                    "more; it has neither left nor ended."
                )

    def abort(self, reason: str) -> None:
        """End at once; tell all who ask why."""
        self._aborted = reason
        for link in list(self._links.values()):
            link.abort(reason)
        # A thread may wait for pushes, which no longer come.
        for shard in self._shards:
            shard.fail(SparktfError(f"sharded tables are no longer served: {reason}"))
        self.join()

    def _attend(self, rank: int, link: Link) -> None:
        """Serve one rank; the function of its thread."""
        visit = _Visit(rank, link, self._shards)
        try:
            while visit.answer():
                pass
            self._leave(rank)
            link.close()
        except SparktfError as error:
            self._fail(rank, error)
        except BaseException as error:  # nobody else would hear of it
            _LOG.warning("serving rank %d of sharded tables failed", rank, exc_info=True)
            self._fail(rank, not_the_peers(rank, error))

    def _leave(self, rank: int) -> None:
        """Note that a rank asks no more. In step all leave together, and nobody waits for gradients any more."""

    def _fail(self, rank: int, error: SparktfError) -> None:
        for shard in self._shards:
            shard.fail(error)
        for link in list(self._links.values()):
            link.abort(str(error))


class _Visit:
    """One rank's requests, one after the other."""

    def __init__(self, rank: int, link: Link, shards: Sequence[SyncedShard]) -> None:
        self._rank, self._link, self._shards = rank, link, shards
        self._request = np.zeros(REQUEST_NUMBERS, np.int64)
        self._buffers = Buffers()

    def answer(self) -> bool:
        """Answer the next request; return False where the rank leaves."""
        self._link.recv(self._request)
        kind, table, clock, count, _ = (int(number) for number in self._request)
        if kind == LEAVE:
            return False
        shard = self._shards[table]
        if kind == LOOKUP:
            rows = self._buffers.take(count, shard.shard.spec.dim)
            self._link.send(shard.lookup(self._ids(shard, count), clock, rows))
        elif kind == PUSH:
            rate = float(self._request[4:].view(np.float64)[0])
            # What was pushed before is being read until then.
            shard.wait(clock)
            ids = self._ids(shard, count)
            gradients = self._link.recv(self._buffers.take(count, shard.shard.spec.dim))
            shard.push(self._rank, ids, gradients, rate)
        elif kind == STATE:
            send_pieces(self._link, shard.pieces(clock))
        elif kind == SETTLE:
            shard.wait(clock)
            self._link.send(np.array([shard.version]))
        else:
            shard.load(receive_pieces(self._link, shard.shard.spec.dim), clock)
            # Others may look these rows up as soon as the one that asked says so.
            self._link.send(np.zeros(1, np.uint8))
        return True

    def _ids(self, shard: SyncedShard, count: int) -> Array:
        """Receive which rows of the shard, and return their ids."""
        places = np.empty(count, place_dtype(shard.shard.spec.rows, shard.shard.parts))
        self._link.recv(places)
        return places.astype(np.int64) * shard.shard.parts + shard.shard.part


def not_the_peers(rank: int, error: BaseException) -> SparktfError:
    """Return what serving a rank has failed of, where not of the rank's loss: none may go on as if it were that."""
    return SparktfError(f"serving rank {rank} of sharded tables: {type(error).__name__}: {error}")
