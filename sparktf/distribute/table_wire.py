"""What nodes say to each other about tables: requests, states in pieces, and whose fault it is where that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from sparktf.distribute.sparse_optimizers import Array
from sparktf.distribute.table import TableState
from sparktf.errors import PeerLostError, SparktfError, TransportTimeoutError
from sparktf.transport import Communicator
from sparktf.transport.contract import Stats

# Ranks in a pair.
ASKS, SERVES = 0, 1
# Requests. A request is `REQUEST_NUMBERS` of int64: its kind, the table's number, how many updates the one that asks
# has pushed so far, how many rows follow or are asked for, and the bits of the learning rate. SETTLE: answered, once
# all that the one that asks has pushed is in the table, with the number of the table's updates.
LOOKUP, PUSH, STATE, LOAD, LEAVE, SETTLE = range(6)
REQUEST_NUMBERS = 5

_NUMBERS = " (of the two, 0 asks and 1 serves)"


class Link:
    """One end of a communicator of two nodes, about tables, whose errors say which node they are about.

    In the pair everyone is rank 0 or 1: those numbers must reach nobody as ranks of the world.

    Parameters
    ----------
    communicator : Communicator
        Belongs to the link from now on.
    peer : {ASKS, SERVES}
        The other node's in the pair.
    naming : callable
        Returns a context in which an error of the communicator becomes one that names the other node, as
        `naming_rank` does.
    """

    def __init__(
        self, communicator: Communicator, peer: int, naming: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.communicator = communicator
        self._peer = peer
        self._naming = naming

    def send(self, array: Array) -> None:
        """Send an array; see `Communicator.send`."""
        with self._naming():
            self.communicator.send(self._peer, array)

    def recv(self, array: Array) -> Array:
        """Fill an array with what the other sends, and return it; see `Communicator.recv`."""
        with self._naming():
            return self.communicator.recv(self._peer, array)

    def close(self) -> None:
        """Leave in good order."""
        with self._naming():
            self.communicator.close()

    def abort(self, reason: str) -> None:
        """Leave at once, and tell the other why."""
        self.communicator.abort(reason)

    @property
    def stats(self) -> Stats:
        """The communicator's."""
        return self.communicator.stats


@contextmanager
def naming_rank(rank: int, part: str) -> Iterator[None]:
    """Say which rank of the world an error of a pair is about, and what part it has in it."""
    try:
        yield
    except PeerLostError as error:
        told = error.reason or f"{error}{_NUMBERS}"
        raise PeerLostError(f"lost rank {rank}, {part}: {told}", rank, error.reason) from error
    except TransportTimeoutError as error:
        raise TransportTimeoutError(f"waiting for rank {rank}, {part}: {error}{_NUMBERS}") from error


@contextmanager
def leaving(links: Sequence[Link]) -> Iterator[list[SparktfError]]:
    """Tell all that serve that this node asks no more; close the links behind the block.

    One that fails keeps no other from being told or closed. The block is told the failures; the first is raised at the
    end.
    """
    failures: list[SparktfError] = []

    def each(act: Callable[[Link], None]) -> None:
        for link in links:
            try:
                act(link)
            except SparktfError as error:
                failures.append(error)

    each(lambda link: link.send(request(LEAVE)))
    try:
        yield failures
    finally:
        each(Link.close)
    if failures:
        raise failures[0]


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


def send_pieces(link: Link, pieces: Iterable[TableState]) -> None:
    """Send the pieces of a state."""
    for piece in pieces:
        _tell(link, _described(piece))
        for array in (piece.ids, piece.rows, *piece.slots.values()):
            link.send(array)
    _tell(link, {})


def load_pieces(link: Link, pieces: Iterable[TableState]) -> None:
    """Send the pieces behind a request to load them; return once they are loaded."""
    send_pieces(link, pieces)
    link.recv(np.zeros(1, np.uint8))


def receive_pieces(link: Link, dim: int) -> Iterator[TableState]:
    """Yield what `send_pieces` sends."""
    try:
        while (piece := _receive_piece(link, dim)) is not None:
            yield piece
    except GeneratorExit:
        # The reader has enough; what is on its way must not be taken for the answer to its next request.
        while _receive_piece(link, dim) is not None:
            pass
        raise


def _receive_piece(link: Link, dim: int) -> TableState | None:
    told = _heard(link)
    if not told:
        return None
    count = told["count"]
    ids = link.recv(np.empty(count, np.int64))
    rows = link.recv(np.empty((count, dim), np.float32))
    slots = {name: link.recv(np.empty((count, dim), np.float32)) for name in told["slots"]}
    return TableState(ids, rows, slots, told["updates"], told["optimizer"])


def _tell(link: Link, told: dict[str, Any]) -> None:
    packed = np.frombuffer(json.dumps(told).encode(), np.uint8)
    link.send(np.array([packed.size]))
    link.send(packed)


def _heard(link: Link) -> dict[str, Any]:
    size = link.recv(np.zeros(1, np.int64))
    told: dict[str, Any] = json.loads(link.recv(np.empty(int(size[0]), np.uint8)).tobytes())
    return told


def _described(state: TableState) -> dict[str, Any]:
    return {
        "count": len(state.ids),
        "slots": list(state.slots),
        "updates": state.updates,
        "optimizer": state.optimizer,
    }
