"""The control side of a mesh: a thread that hears of failures while the caller computes or waits for data."""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

from sparktf.errors import TransportError
from sparktf.transport.framing import FrameReader, pack_frame

_ABORT, _BYE, _PING, _PONG = range(1, 5)
# A reason is a traceback at most; larger ones are cut.
_REASON_CHARS = 8192
CONTROL_FRAME_LIMIT = 64 * 1024
_TICK_SECONDS = 1.0
# What reading another version's message may raise.
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


def pack_abort(peer: int, reason: str) -> bytes:
    """Return the frame that says that the group has failed, and which rank is to blame."""
    return pack_frame(_ABORT, json.dumps({"peer": peer, "reason": reason[:_REASON_CHARS]}).encode())


def read_abort(kind: int, payload: bytes) -> tuple[int, str] | None:
    """Return the rank to blame and the reason, None where the frame says something else; may raise `UNREADABLE`."""
    if kind != _ABORT:
        return None
    said = json.loads(payload)
    return int(said["peer"]), str(said["reason"])


def says_goodbye(kind: int) -> bool:
    """Return whether a frame says that its sender leaves in good order."""
    return kind == _BYE


class ControlSocket(Protocol):
    """What the watch needs of a socket."""

    def fileno(self) -> int:
        """Return the descriptor to wait for."""

    def setblocking(self, flag: bool, /) -> None:
        """Make calls return at once."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set a socket option."""

    def send(self, data: bytes, /) -> int:
        """Send or raise `BlockingIOError`."""

    def recv(self, nbytes: int, /) -> bytes:
        """Receive or raise `BlockingIOError`."""

    def close(self) -> None:
        """Give the descriptor back."""


OnFailure = Callable[[int, str, bool], None]


class Watch:
    """Listens to every peer's control connection.

    Parameters
    ----------
    controls : dict of int to socket
        Control connections by peer; they belong to the watch from now on.
    on_failure : callable
        Called in the watch's thread with (rank to blame, reason, told): told is True where a peer told us,
        False where its connection ended without a farewell.
    on_left : callable
        Called in the watch's thread with the rank of a peer that has said goodbye.
    doing : callable
        Returns what this rank is doing, in words, for peers that ask.
    on_tick : callable
        Called in the watch's thread every second.
    left : iterable of int
        Peers that have said goodbye before this began to listen.
    """

    def __init__(
        self,
        controls: Mapping[int, ControlSocket],
        on_failure: OnFailure,
        on_left: Callable[[int], None],
        doing: Callable[[], str],
        on_tick: Callable[[], None] = lambda: None,
        left: Iterable[int] = (),
    ) -> None:
        self._controls = controls
        self._on_failure = on_failure
        self._on_left = on_left
        self._doing = doing
        self._on_tick = on_tick
        self._news = threading.Condition()
        self._answers: dict[int, str] = {}
        # By peer: since when it owes an answer.
        self._asked: dict[int, float] = {}
        self._left = set(left)
        self._send_lock = threading.Lock()
        self._waker, self._wakee = socket.socketpair()
        for sock in controls.values():
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._run, name="sparktf-watch", daemon=True)

    def start(self) -> None:
        """Begin to listen; what there is to hear may come at once, so that its owner must be ready."""
        self._thread.start()

    def tell_abort(self, peer: int, reason: str) -> None:
        """Tell everybody that the group has failed, and which rank is to blame."""
        self._tell(pack_abort(peer, reason))

    def tell_bye(self) -> None:
        """Tell everybody that this rank leaves in good order."""
        self._tell(pack_frame(_BYE, b""))

    def ask(self) -> None:
        """Ask every peer whether it is alive, and what it is doing; several threads may wait for peers and ask."""
        now = time.monotonic()
        with self._news:
            for peer in self._controls.keys() - self._left:
                self._asked.setdefault(peer, now)
        self._tell(pack_frame(_PING, b""))

    def answers(self) -> dict[int, str]:
        """Return what each peer was doing when it answered last."""
        with self._news:
            return dict(self._answers)

    def silent(self, seconds: float) -> set[int]:
        """Return the peers that have owed an answer for so many seconds."""
        before = time.monotonic() - seconds
        with self._news:
            return {peer for peer, since in self._asked.items() if since <= before and peer not in self._left}

    def left(self, peer: int) -> bool:
        """Return whether a peer has said goodbye."""
        with self._news:
            return peer in self._left

    def stop(self) -> None:
        """End the thread and close the control connections; not to be called in the watch's own thread."""
        self._waker.close()
        self._thread.join()
        self._wakee.close()
        for sock in self._controls.values():
            sock.close()

    def _tell(self, frame: bytes) -> None:
        with self._send_lock:
            for peer, sock in self._controls.items():
                if peer in self._left:
                    continue
                # Whoever cannot be told is gone already, or has not read 64 KiB of such frames.
                with suppress(OSError):
                    sock.send(frame)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakee, selectors.EVENT_READ)
            for peer, sock in self._controls.items():
                selector.register(sock, selectors.EVENT_READ, (peer, FrameReader(CONTROL_FRAME_LIMIT)))
            tick = time.monotonic() + _TICK_SECONDS
            while True:
                heard = selector.select(max(0.0, tick - time.monotonic()))
                if time.monotonic() >= tick:
                    self._on_tick()
                    tick = time.monotonic() + _TICK_SECONDS
                for key, _ in heard:
                    if key.data is None:
                        return
                    peer, reader = key.data
                    if not self._hear(peer, reader):
                        selector.unregister(key.fileobj)

    def _hear(self, peer: int, reader: FrameReader) -> bool:
        """Read what has come from one peer; return whether more can come."""
        try:
            data = self._controls[peer].recv(65536)
            frames = reader.feed(data)
        except BlockingIOError:
            return True
        except (OSError, TransportError) as exc:
            self._ended(peer, str(exc))
            return False
        try:
            for kind, payload in frames:
                self._act(peer, kind, payload)
        except UNREADABLE as exc:
            # The peer has proven itself, so this is another version or a fault, not an attack.
            self._on_failure(peer, f"its control message cannot be read: {exc!r}", False)
            return False
        if not data:
            self._ended(peer, "its connection ended without a goodbye: the process was killed or has crashed")
        return bool(data)

    def _act(self, peer: int, kind: int, payload: bytes) -> None:
        told = read_abort(kind, payload)
        if told is not None:
            self._on_failure(*told, True)
        elif kind == _BYE:
            with self._news:
                self._left.add(peer)
            self._on_left(peer)
        elif kind == _PING:
            frame = pack_frame(_PONG, self._doing().encode())
            with self._send_lock, suppress(OSError):
                self._controls[peer].send(frame)
        elif kind == _PONG:
            with self._news:
                self._answers[peer] = payload.decode(errors="replace")
                self._asked.pop(peer, None)

    def _ended(self, peer: int, why: str) -> None:
        if not self.left(peer):
            self._on_failure(peer, why, False)
