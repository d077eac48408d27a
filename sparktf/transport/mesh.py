"""How the ranks of a group find each other over TCP: two authenticated connections between every pair.

One carries data, the other control messages, so that "I have failed" overtakes any amount of data. Every rank
listens, all learn all addresses by one exchange, and each rank connects to those below it.
"""

from __future__ import annotations

import hashlib
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from sparktf._version import __version__
from sparktf.errors import HandshakeError, TransportError, TransportTimeoutError
from sparktf.transport.handshake import Identity, accept, initiate

Exchange = Callable[[bytes], list[bytes]]

_Arrival = tuple[str, int, socket.socket]

DATA, CONTROL = "data", "control"
# A peer answers in milliseconds; a stranger that says nothing is dropped after this many seconds.
_STRANGER_SECONDS = 10.0
# Strangers may not make us start threads without end; with more than these at once, newcomers are dropped and
# genuine peers come through once the silent ones have timed out.
_MOST_HANDSHAKES = 256
# The kernel doubles the number and cuts it to net.core.[rw]mem_max.
_SOCKET_BUFFER = 4 * 1024 * 1024


@dataclass
class Mesh:
    """The connections of one rank, by the rank of the peer."""

    data: dict[int, socket.socket] = field(default_factory=dict)
    control: dict[int, socket.socket] = field(default_factory=dict)

    def add(self, channel: str, peer: int, sock: socket.socket) -> None:
        """Keep a connection; a second one of the same kind from the same peer is closed."""
        table = self.data if channel == DATA else self.control
        if peer in table:
            sock.close()
        else:
            table[peer] = sock

    def close(self) -> None:
        """Close every connection."""
        for sock in (*self.data.values(), *self.control.values()):
            sock.close()


@dataclass(frozen=True)
class _Group:
    """What every connection of one group is checked against."""

    rank: int
    size: int
    job: str
    secret: bytes
    deadline: float

    def identity(self, channel: str, peer: int | None) -> Identity:
        return {
            "job": self.job,
            "rank": self.rank,
            "size": self.size,
            "version": __version__,
            "channel": channel,
            "to": peer,
        }

    def check(self, theirs: Identity) -> int:
        """Return the proven peer's rank, or raise `HandshakeError` where it belongs to another group."""
        for name, ours in (("version", __version__), ("size", self.size), ("job", self.job)):
            if theirs.get(name) != ours:
                raise HandshakeError(
                    f"Expected a peer of {name} {ours!r}. Received: rank {theirs.get('rank')!r} "
                    f"with {name} {theirs.get(name)!r}. All ranks must be started alike."
                )
        rank = theirs.get("rank")
        if not isinstance(rank, int) or not 0 <= rank < self.size or rank == self.rank:
            raise HandshakeError(f"Expected a peer's rank in 0..{self.size - 1}. Received: {rank!r}.")
        return rank


def connect_mesh(
    rank: int, size: int, exchange: Exchange, secret: bytes, timeout: float, host: str | None
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

    Raises
    ------
    HandshakeError
        A peer holds another secret or belongs to another world.
    TransportTimeoutError
        A rank did not come in time.
    TransportError
        This rank cannot listen, or cannot reach another.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(host if host is not None else default_host(), size))
        book, job = _exchange_addresses(rank, size, exchange, listener)
        group = _Group(rank, size, job, secret, time.monotonic() + timeout)
        mesh = Mesh()
        undo = stack.enter_context(ExitStack())
        undo.callback(mesh.close)
        doorman = stack.enter_context(_Doorman(listener, group))
        for peer in range(rank):
            for channel in (DATA, CONTROL):
                mesh.add(channel, peer, _reach(book[peer], group, channel, peer))
        while len(mesh.data) + len(mesh.control) < 2 * (size - 1):
            mesh.add(*doorman.next(mesh))
        undo.pop_all()
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
        _set_buffers(sock)
        sock.bind(address)
        # Both connections of every peer may arrive while we are still in the exchange.
        sock.listen(2 * size + 16)
    except OSError as exc:
        if sock is not None:
            sock.close()
        raise TransportError(
            f"Expected to listen on {host!r}, which this machine refuses: {exc}. "
            "Pass host= an address of this machine that the other nodes can reach."
        ) from exc
    return sock


def _exchange_addresses(
    rank: int, size: int, exchange: Exchange, listener: socket.socket
) -> tuple[list[tuple[str, int]], str]:
    """Return every rank's address, and a name for this group that only its members derive."""
    host, port = listener.getsockname()[:2]
    # The token makes two groups different even where addresses, ports and the secret are the same.
    own = {"rank": rank, "size": size, "host": host, "port": port, "token": secrets.token_hex(16)}
    packed = json.dumps(own).encode()
    entries = exchange(packed)
    if len(entries) != size:
        raise HandshakeError(
            f"Expected the exchange to give {size} entries (size). Received: {len(entries)}."
        )
    if entries[rank] != packed:
        raise HandshakeError(f"Expected entry {rank} of the exchange to be this rank's own. It is another's.")
    book = []
    for peer, entry in enumerate(entries):
        try:
            card: dict[str, Any] = json.loads(entry)
            found = (card["rank"], card["size"])
            book.append((str(card["host"]), int(card["port"])))
        except (ValueError, KeyError, TypeError) as exc:
            raise HandshakeError(
                f"Expected an address from rank {peer}. Received: {bytes(entry[:200])!r}. "
                "Do all ranks use the same protocol and version?"
            ) from exc
        if found != (peer, size):
            raise HandshakeError(
                f"Expected entry {peer} of the exchange to be of rank {peer} in a world of {size}. "
                f"Received: rank {found[0]} in a world of {found[1]}."
            )
    return book, hashlib.sha256(b"\n".join(entries)).hexdigest()


def _reach(address: tuple[str, int], group: _Group, channel: str, peer: int) -> socket.socket:
    """Connect to a lower rank and shake hands."""
    where = f"rank {peer} at {address[0]}:{address[1]}"
    left = group.deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeoutError(f"Expected to reach {where} in time; the time allowed has ended.")
    try:
        sock = _dial(address, left)
    except TimeoutError as exc:
        raise TransportTimeoutError(f"Expected {where} to answer within {left:.1f} s.") from exc
    except OSError as exc:
        raise TransportError(
            f"Expected to reach {where}: {exc}. The node has ended, or a firewall is in between."
        ) from exc
    try:
        theirs = initiate(sock, group.secret, group.identity(channel, peer), group.deadline)
        if group.check(theirs) != peer:
            raise HandshakeError(f"Expected rank {peer} at {address}. Received: rank {theirs['rank']}.")
    except HandshakeError as exc:
        sock.close()
        raise HandshakeError(f"Handshake with {where} failed. {exc}") from exc
    except BaseException:
        sock.close()
        raise
    return sock


def _dial(address: tuple[str, int], timeout: float) -> socket.socket:
    family, kind, number, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, number)
    try:
        # Before connecting, as the window's scale is agreed then.
        _set_buffers(sock)
        sock.settimeout(timeout)
        sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_buffers(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)


class _Doorman:
    """Accepts connections and shakes hands with each in its own thread: no stranger holds up a peer."""

    def __init__(self, listener: socket.socket, group: _Group) -> None:
        self._listener = listener
        self._group = group
        self._arrived: queue.SimpleQueue[_Arrival | HandshakeError] = queue.SimpleQueue()
        self._busy: dict[socket.socket, None] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        self._refused = ""
        self._thread = threading.Thread(target=self._accept, name="sparktf-doorman", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            # Shutting down, unlike closing, wakes the threads that wait in these sockets.
            for sock in (self._listener, *self._busy):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for thread in self._threads:
            thread.join()
        while not self._arrived.empty():
            item = self._arrived.get()
            if not isinstance(item, HandshakeError):
                item[2].close()

    def next(self, mesh: Mesh) -> tuple[str, int, socket.socket]:
        """Return the next peer that has proven itself: channel, rank, socket.

        Parameters
        ----------
        mesh : Mesh
            What has been connected so far, for the message where nobody comes.
        """
        group = self._group
        try:
            item = self._arrived.get(timeout=max(0.0, group.deadline - time.monotonic()))
        except queue.Empty:
            peers = set(range(group.rank + 1, group.size)) - (set(mesh.data) & set(mesh.control))
            refused = f" Last refused: {self._refused}" if self._refused else ""
            raise TransportTimeoutError(
                f"Expected rank(s) {', '.join(map(str, sorted(peers)))} to connect to rank {group.rank} "
                f"within the timeout.{refused}"
            ) from None
        if isinstance(item, HandshakeError):
            raise item
        return item

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._listener.accept()
            except OSError:
                # The listener was shut down: everybody is here, or this rank gives up.
                return
            thread = threading.Thread(
                target=self._shake, args=(sock, address), name="sparktf-handshake", daemon=True
            )
            with self._lock:
                if self._closed or len(self._busy) >= _MOST_HANDSHAKES:
                    sock.close()
                    continue
                self._busy[sock] = None
                self._threads.append(thread)
                # Inside the lock, so that whoever joins the thread finds it started.
                thread.start()

    def _shake(self, sock: socket.socket, address: Any) -> None:
        group = self._group
        try:
            deadline = min(group.deadline, time.monotonic() + _STRANGER_SECONDS)
            theirs = accept(sock, group.secret, group.identity("any", None), deadline)
        except (HandshakeError, OSError) as exc:
            # Anybody can connect; only whoever holds the secret may end this rank's waiting.
            self._refused = f"{address[0]}:{address[1]}: {exc}"
            self._finish(sock, None)
            return
        try:
            peer = group.check(theirs)
            if theirs.get("channel") not in (DATA, CONTROL) or theirs.get("to") != group.rank:
                raise HandshakeError(f"Expected a connection for rank {group.rank}. Received: {theirs!r}.")
        except HandshakeError as exc:
            self._finish(sock, exc)
            return
        self._finish(sock, (theirs["channel"], peer, sock))

    def _finish(self, sock: socket.socket, outcome: _Arrival | HandshakeError | None) -> None:
        """Let go of a socket: hand it over where it is the outcome, close it otherwise."""
        with self._lock:
            # In one step: once `__exit__` has looked, nothing may arrive; once handed over, nothing may shut down.
            del self._busy[sock]
            if outcome is not None and not self._closed:
                self._arrived.put(outcome)
            if self._closed or not isinstance(outcome, tuple):
                sock.close()
