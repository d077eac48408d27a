"""Who may join a group: what connections are checked against, and the listener's side of the handshakes."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from sparktf._version import __version__
from sparktf.errors import HandshakeError, PeerLostError, TransportTimeoutError
from sparktf.transport.handshake import Identity, accept, hung_up, too_slow
from sparktf.transport.tls import Credentials

# What a connection is for. Data, and back: what answers data where it must not be taken for data.
DATA, BACK, CONTROL = CHANNELS = ("data", "back", "control")
# A peer answers in milliseconds; a stranger that says nothing is dropped after this many seconds.
_STRANGER_SECONDS = 10.0
# Strangers may not make us start threads without end; with this many at once, newcomers wait in the listener's queue,
# and genuine peers come through once the silent ones have timed out.
_MOST_HANDSHAKES = 256
# Long enough not to spin where files have run out, short enough not to be noticed.
_RETRY_SECONDS = 0.05

Arrival = tuple[str, int, socket.socket]


class StrayError(HandshakeError):
    """A peer holds the secret and belongs to another group: to an earlier attempt of the same job, say."""


@dataclass(frozen=True)
class Group:
    """What every connection of one group is checked against."""

    rank: int
    size: int
    job: str
    secret: bytes = field(repr=False)
    deadline: float
    credentials: Credentials | None = None

    def identity(self, channel: str, peer: int | None) -> Identity:
        """Return what this rank says of itself on one connection."""
        return {
            "job": self.job,
            "rank": self.rank,
            "size": self.size,
            "version": __version__,
            "channel": channel,
            "to": peer,
            "certificate": self.credentials.certificate if self.credentials else None,
        }

    def secure(self, sock: socket.socket, theirs: Identity, deadline: float, *, server: bool) -> socket.socket:
        """Encrypt a connection whose peer has proven its identity, where the group does so."""
        if self.credentials is None:
            return sock
        return self.credentials.wrap(sock, theirs, deadline, server=server)

    def check(self, theirs: Identity) -> int:
        """Return the proven peer's rank, or raise `HandshakeError` where it belongs to another group.

        `StrayError` where nothing but the group differs.
        """
        for name, ours in (("version", __version__), ("size", self.size), ("job", self.job)):
            if theirs.get(name) != ours:
                kind = StrayError if name == "job" else HandshakeError
                raise kind(
                    f"Expected a peer of {name} {ours!r}. Received: rank {theirs.get('rank')!r} "
                    f"with {name} {theirs.get(name)!r}. All ranks must be started alike."
                )
        rank = theirs.get("rank")
        if not isinstance(rank, int) or not 0 <= rank < self.size or rank == self.rank:
            raise HandshakeError(f"Expected a peer's rank in 0..{self.size - 1}. Received: {rank!r}.")
        return rank


class Doorman:
    """Accepts connections and shakes hands with each in its own thread: no stranger holds up a peer."""

    def __init__(self, listener: socket.socket, group: Group) -> None:
        self._listener = listener
        self._group = group
        self._arrived: queue.SimpleQueue[Arrival | HandshakeError] = queue.SimpleQueue()
        # What to shut down in order to wake the thread that shakes hands over a socket.
        self._busy: dict[socket.socket, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._room = threading.Semaphore(_MOST_HANDSHAKES)
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
            for sock in (self._listener, *self._busy.values()):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._room.release()
        self._thread.join()
        for thread in self._threads:
            thread.join()
        while not self._arrived.empty():
            item = self._arrived.get()
            if not isinstance(item, HandshakeError):
                item[2].close()

    def next(self, missing: set[int], seconds: float) -> Arrival | None:
        """Return the next peer that has proven itself: channel, rank, socket; None where nobody came in time.

        Parameters
        ----------
        missing : set of int
            The ranks that have not come yet, for the message where nobody comes.
        seconds : float
            How long to wait, within the group's deadline.

        Raises
        ------
        TransportTimeoutError
            The group's deadline has passed.
        HandshakeError
            A peer has proven that it holds the secret, and was started otherwise: with another size, say.
        """
        group = self._group
        left = group.deadline - time.monotonic()
        try:
            item = self._arrived.get(timeout=max(0.0, min(seconds, left)))
        except queue.Empty:
            if left > seconds:
                return None
            raise TransportTimeoutError(
                f"Expected rank(s) {', '.join(map(str, sorted(missing)))} to connect to rank {group.rank} "
                f"within the timeout.{self.refused}"
            ) from None
        if isinstance(item, HandshakeError):
            raise item
        return item

    @property
    def refused(self) -> str:
        """The last stranger and why it was refused, as a sentence; empty where there was none."""
        return f" Last refused: {self._refused}" if self._refused else ""

    def _accept(self) -> None:
        while True:
            self._room.acquire()
            try:
                sock, address = self._listener.accept()
            except OSError:
                # The listener was shut down, as everybody is here or this rank gives up; otherwise the caller
                # hung up, or there are too many open files for the moment.
                if self._closed:
                    return
                self._room.release()
                time.sleep(_RETRY_SECONDS)
                continue
            thread = threading.Thread(target=self._shake, args=(sock, address), name="sparktf-handshake", daemon=True)
            with self._lock:
                if self._closed:
                    sock.close()
                    return
                self._busy[sock] = sock
                self._threads = [*(other for other in self._threads if other.is_alive()), thread]
                # Inside the lock, so that whoever joins the thread finds it started.
                thread.start()

    def _shake(self, sock: socket.socket, address: Any) -> None:
        group = self._group
        try:
            deadline = min(group.deadline, time.monotonic() + _STRANGER_SECONDS)
            theirs = accept(sock, group.secret, group.identity("any", None), deadline)
        except (HandshakeError, OSError) as exc:
            # Anybody can connect; only whoever holds the secret may end this rank's waiting. Peers that only ask
            # whether this rank still listens hang up, and must not hide why somebody else was refused.
            if not self._refused or not isinstance(exc.__cause__, PeerLostError):
                self._refused = f"{address[0]}:{address[1]}: {exc}"
            self._finish(sock, None)
            return
        try:
            peer = group.check(theirs)
            if theirs.get("channel") not in CHANNELS or theirs.get("to") != group.rank:
                raise HandshakeError(f"Expected a connection for rank {group.rank}. Received: {theirs!r}.")
            ready = self._secure(sock, theirs, deadline)
        except HandshakeError as exc:
            if isinstance(exc, StrayError) or hung_up(exc) or too_slow(exc):
                # A stray is not one of those that are waited for; another calls again where it is still there, as after
                # a pause of the machine.
                self._refused = f"{address[0]}:{address[1]}: {exc}"
                self._finish(sock, None)
            else:
                self._finish(sock, exc)
            return
        self._finish(sock, (theirs["channel"], peer, ready))

    def _secure(self, sock: socket.socket, theirs: Identity, deadline: float) -> socket.socket:
        """Encrypt a connection where the group does so; `__exit__` can still wake this thread."""
        if self._group.credentials is None:
            return sock
        try:
            twin = sock.dup()
        except OSError as exc:
            raise HandshakeError(f"Expected a file descriptor to encrypt with. {exc}") from exc
        with twin:
            with self._lock:
                # Encryption takes the descriptor out of the socket itself.
                self._busy[sock] = twin
                if self._closed:
                    raise HandshakeError("This rank does not wait for connections any more.")
            return self._group.secure(sock, theirs, deadline, server=True)

    def _finish(self, sock: socket.socket, outcome: Arrival | HandshakeError | None) -> None:
        """Let go of a socket: hand it over where it is the outcome, close it otherwise."""
        with self._lock:
            # In one step: once `__exit__` has looked nothing may arrive; what is handed over stays open.
            del self._busy[sock]
            if outcome is not None and not self._closed:
                self._arrived.put(outcome)
            if not isinstance(outcome, tuple):
                sock.close()
            elif self._closed:
                outcome[2].close()
        self._room.release()
