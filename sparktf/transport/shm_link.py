"""A link between two processes of one host: large pieces through shared memory, everything else by the sockets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from socket import socket

import numpy as np

from sparktf.errors import TransportError
from sparktf.transport.channel import Channel, Outbox
from sparktf.transport.contract import Array, Stats
from sparktf.transport.link import Gone
from sparktf.transport.segment import PATH_BYTES, Segment, pack_path, unpack_path

# Smaller pieces are faster by the socket.
_SMALLEST = 64 * 1024
_SLOT_BYTES = 512 * 1024
_SLOTS = 4
_BELL = b"\1"
_NOTHING = memoryview(b"")


class ShmLink(Channel):
    """A channel whose large pieces lie in memory; the channel itself only tells that they do.

    Each direction has a file of `_SLOTS` slots that the sender makes with the first large piece. The receiver gives
    a slot back by a byte over a connection of its own, so that it cannot be taken for data. System calls on both
    sides order the memory accesses of the two processes on every processor.

    Parameters
    ----------
    sock, peer, timeout, on_quiet, outbox, stats
        As for `Channel`.
    back : socket
        A second connection to the same peer; belongs to the link from now on.
    """

    def __init__(
        self,
        sock: socket,
        back: socket,
        peer: int,
        timeout: float,
        on_quiet: Callable[[], None],
        outbox: Outbox,
        stats: Stats,
    ) -> None:
        super().__init__(sock, peer, timeout, on_quiet, outbox, stats)
        self._back = Channel(back, peer, timeout, on_quiet, outbox, stats)
        self._sending: Segment | None = None
        self._receiving: Segment | None = None
        self._sent = self._received = 0
        self._bell, self._credit = memoryview(bytearray(1)), memoryview(bytearray(1))

    def send(self, header: bytes, view: memoryview) -> None:
        """Send by the socket or by memory; see `Link`."""
        if view.nbytes <= _SMALLEST:
            super().send(header, view)
            return
        super().send(header, _NOTHING)
        if self._sending is None:
            self._sending = Segment.create(_SLOTS * _SLOT_BYTES)
            self._stats.registrations += 1
            super().send(pack_path(self._sending.path), _NOTHING)
            # The file must keep its name until the receiver has opened it, even if this rank closes at once.
            self._back.fill(self._credit)
        source = np.frombuffer(view, np.uint8)
        for start in range(0, source.size, _SLOT_BYTES):
            if self._sent >= _SLOTS:
                self._back.fill(self._credit)
            part = source[start : start + _SLOT_BYTES]
            self._slot(self._sending, self._sent)[: part.size] = part
            self._sent += 1
            super().send(_BELL, _NOTHING)

    def fill(self, view: memoryview) -> None:
        """Receive by the socket or by memory; see `Link`."""
        if view.nbytes <= _SMALLEST:
            super().fill(view)
            return
        if self._receiving is None:
            self._receiving = self._attach()
        target = np.frombuffer(view, np.uint8)
        for start in range(0, target.size, _SLOT_BYTES):
            super().fill(self._bell)
            part = target[start : start + _SLOT_BYTES]
            part[:] = self._slot(self._receiving, self._received)[: part.size]
            self._received += 1
            self._give_back()

    def set_timeout(self, seconds: float) -> None:
        """Wait for so many seconds from now on; see `Link`."""
        super().set_timeout(seconds)
        self._back.set_timeout(seconds)

    def shutdown(self) -> None:
        """End both connections; see `Link`."""
        super().shutdown()
        self._back.shutdown()

    def close(self) -> None:
        """Release everything; see `Link`."""
        super().close()
        self._back.close()
        if self._sending is not None:
            # The receiver has done so, unless it died before the first piece came.
            self._sending.unlink()
        self._sending = self._receiving = None

    def _attach(self) -> Segment:
        packed = bytearray(PATH_BYTES)
        super().fill(memoryview(packed))
        path = unpack_path(packed)
        try:
            segment = Segment.attach(path, _SLOTS * _SLOT_BYTES)
        except FileNotFoundError as exc:
            raise Gone(self.peer, f"its shared memory {path} is gone") from exc
        except OSError as exc:
            raise TransportError(f"Expected to open rank {self.peer}'s shared memory: {exc}") from exc
        segment.unlink()
        self._stats.registrations += 1
        self._give_back()
        return segment

    def _give_back(self) -> None:
        # Whoever has sent its last piece may have left, and wants nothing back.
        with suppress(Gone):
            self._back.send(_BELL, _NOTHING)

    def _slot(self, segment: Segment, number: int) -> Array:
        start = number % _SLOTS * _SLOT_BYTES
        return segment.array[start : start + _SLOT_BYTES]
