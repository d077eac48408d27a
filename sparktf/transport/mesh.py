"""How the ranks of a group find each other over TCP: authenticated connections between every pair.

One carries data, another control messages, so that "I have failed" overtakes any amount of data; some protocols want
a third, for answers to data. Every rank listens, all learn all addresses by one exchange, and each rank connects to
those below it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from sparktf.errors import HandshakeError, TransportError
from sparktf.transport.dial import reach, set_buffers
from sparktf.transport.doorman import BACK, CONTROL, DATA, Doorman, Group
from sparktf.transport.lookout import LOOK_SECONDS, Lookout
from sparktf.transport.tls import Credentials
from sparktf.transport.watch import pack_abort

Exchange = Callable[[bytes], list[bytes]]

# The connections of this process. A forked one must not keep them open: peers see a process end by its sockets.
_CONNECTIONS: WeakSet[socket.socket] = WeakSet()


def _close_in_child() -> None:
    for sock in list(_CONNECTIONS):
        sock.close()


os.register_at_fork(after_in_child=_close_in_child)


@dataclass
class Mesh:
    """The connections of one rank, by the rank of the peer; `back` is empty unless it was asked for.

    A ``with`` block closes them where it raises, having told the peers why, and leaves them to whoever took them over
    otherwise. `left` holds the peers that have said goodbye already.
    """

    rank: int
    data: dict[int, socket.socket] = field(default_factory=dict)
    back: dict[int, socket.socket] = field(default_factory=dict)
    control: dict[int, socket.socket] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)

    def add(self, channel: str, peer: int, sock: socket.socket) -> None:
        """Keep a connection; a second one of the same kind from the same peer is closed."""
        table = self._table(channel)
        if peer in table:
            sock.close()
        else:
            table[peer] = sock
            _CONNECTIONS.add(sock)

    def complete(self, channels: Iterable[str]) -> set[int]:
        """Return the peers of whom there is a connection of every one of these kinds."""
        return set.intersection(*(set(self._table(channel)) for channel in channels))

    def _table(self, channel: str) -> dict[int, socket.socket]:
        return {DATA: self.data, BACK: self.back, CONTROL: self.control}[channel]

    def count(self) -> int:
        """Return how many connections there are."""
        return len(self.data) + len(self.back) + len(self.control)

    def close(self) -> None:
        """Close every connection."""
        for sock in (*self.data.values(), *self.back.values(), *self.control.values()):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._tell(error)
            self.close()

    def _tell(self, error: BaseException) -> None:
        """Tell the peers why this rank gives up, so that they blame the right one, and need not wait for it."""
        blame = getattr(error, "peer", None)
        reason = getattr(error, "reason", "") or f"rank {self.rank}: {error or type(error).__name__}"
        frame = pack_abort(self.rank if blame is None else blame, reason)
        for sock in self.control.values():
            # Whoever cannot be told is gone already.
            with suppress(OSError):
                sock.setblocking(False)
                sock.send(frame)


def connect_mesh(
    rank: int,
    size: int,
    exchange: Exchange,
    secret: bytes,
    timeout: float,
    host: str | None,
    *,
    protocol: str = "",
    back: bool = False,
    credentials: Credentials | None = None,
) -> Mesh:
    """Connect this rank with all others.

    Parameters
    ----------
    rank, size : int
        This rank and the world's size, at least 2.
    exchange : callable
        The rendezvous; called once.
    secret : bytes
        The job's secret.
    timeout : float
        Seconds that all connections together may take, counted from the end of the exchange.
    host : str or None
        The address to listen on and to advertise; None takes that of this machine's name.
    protocol : str
        What was asked for; ranks that ask for another are refused.
    back : bool
        Whether to make the third connection, the same on every rank.
    credentials : Credentials or None
        Encrypt all connections; on every rank or on none.

    Raises
    ------
    HandshakeError
        A peer holds another secret or belongs to another world.
    PeerLostError
        A peer has ended meanwhile, or tells that it gives up.
    TransportTimeoutError
        A rank did not come in time.
    TransportError
        This rank cannot listen, or cannot reach another.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(host if host is not None else default_host(), size))
        book, job = _exchange_addresses(rank, size, exchange, listener, protocol)
        group = Group(rank, size, job, secret, time.monotonic() + timeout, credentials)
        mesh = stack.enter_context(Mesh(rank))
        doorman = stack.enter_context(Doorman(listener, group))
        channels = (DATA, BACK, CONTROL) if back else (DATA, CONTROL)
        for peer in range(rank):
            for channel in channels:
                mesh.add(channel, peer, reach(book[peer], group, channel, peer))
        lookout = Lookout(book, mesh.control, mesh.left)
        while mesh.count() < len(channels) * (size - 1):
            missing = set(range(rank + 1, size)) - mesh.complete(channels)
            arrival = doorman.next(missing, LOOK_SECONDS)
            if arrival is not None:
                mesh.add(*arrival)
            else:
                lookout.look(missing, doorman.refused)
        return mesh


def default_host() -> str:
    """Return the address of this machine's name, or the loopback address where the name has none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _listen(host: str, size: int) -> socket.socket:
    sock: socket.socket | None = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, number)
        set_buffers(sock)
        sock.bind(address)
        # All connections of every peer may arrive while we are still in the exchange.
        sock.listen(3 * size + 16)
    except OSError as exc:
        if sock is not None:
            sock.close()
        raise TransportError(
            f"Expected to listen on {host!r}, which this machine refuses: {exc}. "
            "Pass host= an address of this machine that the other nodes can reach."
        ) from exc
    return sock


def _exchange_addresses(
    rank: int, size: int, exchange: Exchange, listener: socket.socket, protocol: str
) -> tuple[list[tuple[str, int]], str]:
    """Return every rank's address, and a name for this group that only its members derive."""
    host, port = listener.getsockname()[:2]
    # The token makes two groups different even where addresses, ports and the secret are the same.
    own = {"rank": rank, "size": size, "host": host, "port": port, "token": secrets.token_hex(16), "protocol": protocol}
    packed = json.dumps(own).encode()
    entries = exchange(packed)
    if len(entries) != size:
        raise HandshakeError(f"Expected the exchange to give {size} entries (size). Received: {len(entries)}.")
    if entries[rank] != packed:
        raise HandshakeError(f"Expected entry {rank} of the exchange to be this rank's own. It is another's.")
    book = []
    for peer, entry in enumerate(entries):
        try:
            card: dict[str, Any] = json.loads(entry)
            found = (card["rank"], card["size"])
            book.append((str(card["host"]), int(card["port"])))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
            raise HandshakeError(
                f"Expected an address from rank {peer}. Received: {bytes(entry[:200])!r}. "
                "Do all ranks use the same protocol and version?"
            ) from exc
        if found != (peer, size):
            raise HandshakeError(
                f"Expected entry {peer} of the exchange to be of rank {peer} in a world of {size}. "
                f"Received: rank {found[0]} in a world of {found[1]}."
            )
        if card.get("protocol") != protocol:
            raise HandshakeError(
                f"Expected all ranks to ask for protocol {protocol!r}. "
                f"Received: {card.get('protocol')!r} from rank {peer}."
            )
    return book, hashlib.sha256(b"\n".join(entries)).hexdigest()
