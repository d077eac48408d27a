"""Who ends while others still connect: seen at once, rather than when the time to connect has run out."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from sparktf.errors import PeerLostError, TransportError
from sparktf.transport.framing import FrameReader
from sparktf.transport.watch import CONTROL_FRAME_LIMIT, UNREADABLE, read_abort, says_goodbye

# How often a rank that waits looks around; well within the two seconds after which a killed peer is to be reported.
LOOK_SECONDS = 0.25
# Half as often it asks whether those that have not come still listen.
_PROBE_SECONDS = 0.5
# A rank that is all connected stops to listen a moment before its last connection has been noticed here.
_REFUSALS = 2
_ENDED = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Lookout:
    """Looks after the peers of a rank that waits for others to connect.

    Parameters
    ----------
    book : sequence of (str, int)
        By rank: where it listens, and does so until it is connected with all or gives up.
    controls : dict of int to socket
        Control connections by peer; more may come into it.
    left : set of int
        Where to note the peers that have said goodbye; they were done before others had begun.
    """

    def __init__(self, book: Sequence[tuple[str, int]], controls: Mapping[int, socket.socket], left: set[int]) -> None:
        self._book = book
        self._controls = controls
        self._left = left
        self._refusals: dict[int, int] = {}
        self._probed: dict[int, float] = {}
        self._begin = time.monotonic()

    def look(self, missing: set[int], refused: str = "") -> None:
        """Raise `PeerLostError` where a peer has ended, be it connected or one of the missing.

        `refused` says who was refused, which may have been one of the missing.
        """
        for peer in self._ended():
            self._hear(peer)
        begin = time.monotonic()
        # Whoever has waited longest first: one that answers nothing takes all the time that there is.
        for peer in sorted(missing, key=lambda peer: (self._probed.get(peer, self._begin), peer)):
            now = time.monotonic()
            if now - begin > LOOK_SECONDS or now - self._probed.get(peer, self._begin) < _PROBE_SECONDS:
                return
            self._probed[peer] = now
            self._refusals[peer] = self._refusals.get(peer, 0) + 1 if self._refuses(peer) else 0
            if self._refusals[peer] >= _REFUSALS:
                message = f"connecting: lost rank {peer}: it ended before it had connected to this one.{refused}"
                raise PeerLostError(message, peer)

    def _ended(self) -> list[int]:
        """Return the connected peers whose end is known to the kernel, whatever has been read of their words."""
        poll = select.poll()
        peers = {sock.fileno(): peer for peer, sock in self._controls.items() if peer not in self._left}
        for descriptor in peers:
            poll.register(descriptor, _ENDED)
        return sorted(peers[descriptor] for descriptor, _ in poll.poll(0))

    def _hear(self, peer: int) -> None:
        """Read a peer's last words; raise what they say unless it is a goodbye."""
        for kind, payload in _read_all(self._controls[peer]):
            if says_goodbye(kind):
                self._left.add(peer)
                return
            with suppress(*UNREADABLE):
                told = read_abort(kind, payload)
                if told is not None:
                    blamed, reason = told
                    raise PeerLostError(f"connecting: rank {blamed} failed: {reason}", blamed, reason)
        raise PeerLostError(
            f"connecting: lost rank {peer}: its connection ended before all ranks were connected: "
            "the process was killed or has crashed",
            peer,
        )

    def _refuses(self, peer: int) -> bool:
        """Return whether a peer's machine says at once that nobody listens there."""
        try:
            with socket.create_connection(self._book[peer], timeout=LOOK_SECONDS):
                return False
        except ConnectionRefusedError:
            return True
        except OSError:
            # Too busy, or nothing is heard: the deadline is for that.
            return False


def _read_all(sock: socket.socket) -> list[tuple[int, bytes]]:
    """Return all whole frames that a peer has sent before it ended."""
    reader, frames = FrameReader(CONTROL_FRAME_LIMIT), []
    with suppress(OSError, TransportError):
        sock.settimeout(LOOK_SECONDS)
        while data := sock.recv(65536):
            frames += reader.feed(data)
    return frames
