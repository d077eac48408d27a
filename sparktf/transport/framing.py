"""Length-prefixed frames over a stream socket, with deadlines.

A frame is one byte of kind, eight bytes of payload length (network order) and the payload. What a kind means
is the caller's business. No payload is ever unpickled here or anywhere behind it.
"""

from __future__ import annotations

import socket
import struct
import time

from sparktf.errors import PeerLostError, TransportError, TransportTimeoutError

_HEADER = struct.Struct("!BQ")


def pack_frame(kind: int, payload: bytes) -> bytes:
    """Return a whole frame as bytes, for small payloads."""
    return _HEADER.pack(kind, len(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes that arrives in any pieces into frames.

    Parameters
    ----------
    limit : int
        Largest payload in bytes that is accepted.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes; return the (kind, payload) of every frame that is now complete.

        Raises
        ------
        TransportError
            A frame announces more than the limit; the stream cannot be followed any further.
        """
        self._pending += data
        frames = []
        while len(self._pending) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._pending)
            _check_length(length, self._limit)
            end = _HEADER.size + length
            if len(self._pending) < end:
                break
            frames.append((kind, bytes(self._pending[_HEADER.size : end])))
            del self._pending[:end]
        return frames


def send_frame(sock: socket.socket, kind: int, payload: bytes | memoryview, timeout: float | None) -> None:
    """Send one frame.

    Parameters
    ----------
    sock : socket
        A connected stream socket; its own timeout is overwritten.
    kind : int
        0 to 255.
    payload : bytes or memoryview
        The payload; a memoryview must be contiguous.
    timeout : float or None
        Seconds for the whole frame; None waits without end.

    Raises
    ------
    PeerLostError
        The connection broke.
    TransportTimeoutError
        The frame was not out in time; part of it may be, so the connection cannot be used again.
    """
    view = memoryview(payload).cast("B")
    header = _HEADER.pack(kind, view.nbytes)
    try:
        sock.settimeout(timeout)
        if view.nbytes <= 65536:
            # One write, so that a small frame leaves as one packet.
            sock.sendall(header + bytes(view))
        else:
            begin = time.monotonic()
            sock.sendall(header)
            sock.settimeout(_left(None if timeout is None else begin + timeout, "sending a frame"))
            sock.sendall(view)
    except TimeoutError as exc:
        raise TransportTimeoutError(
            f"Expected to send a frame of {view.nbytes} bytes within {timeout} s; the peer did not take it."
        ) from exc
    except OSError as exc:
        raise PeerLostError(f"The connection broke while sending a frame of {view.nbytes} bytes: {exc}") from exc


def recv_frame(sock: socket.socket, timeout: float | None, limit: int) -> tuple[int, bytes]:
    """Receive one frame.

    Parameters
    ----------
    sock : socket
        A connected stream socket; its own timeout is overwritten.
    timeout : float or None
        Seconds for the whole frame, so that a peer that drips bytes cannot hold us; None waits without end.
    limit : int
        Largest payload in bytes that is accepted.

    Returns
    -------
    (int, bytes)
        Kind and payload.

    Raises
    ------
    PeerLostError
        The peer closed the connection, or it broke.
    TransportTimeoutError
        The frame was not complete in time.
    TransportError
        The peer announced more than `limit` bytes.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    kind, length = _HEADER.unpack(_recv_exactly(sock, _HEADER.size, deadline))
    _check_length(length, limit)
    return kind, bytes(_recv_exactly(sock, length, deadline))


def _recv_exactly(sock: socket.socket, length: int, deadline: float | None) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        try:
            sock.settimeout(_left(deadline, "receiving a frame"))
            count = sock.recv_into(view)
        except TransportTimeoutError:
            raise
        except TimeoutError as exc:
            raise TransportTimeoutError(
                f"Expected {length} bytes of a frame in time. Received: {length - view.nbytes} of them."
            ) from exc
        except OSError as exc:
            raise PeerLostError(f"The connection broke while receiving a frame: {exc}") from exc
        if count == 0:
            raise PeerLostError(
                f"The peer closed the connection; {view.nbytes} of {length} bytes of a frame were missing."
            )
        view = view[count:]
    return data


def _left(deadline: float | None, doing: str) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeoutError(f"The time allowed ended while {doing}.")
    return left


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise TransportError(
            f"Expected a frame of at most {limit} bytes. Received: one that announces {length}. "
            "The peer is not one of ours, or speaks another version."
        )
