"""A link over one TCP connection with deadlines, and the thread that sends while the caller receives."""

from __future__ import annotations

import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from sparktf.transport.contract import Stats
from sparktf.transport.link import Gone, Link, Silent

# The timeout is cut into this many waits: halfway through, peers are asked whether they are alive, and time
# that passed before a partial receive is not counted twice.
WAITS = 4
# A short piece is waited for awake this long, because being woken costs an idle processor 30 to 50 us; peers in step
# answer within a few. The other processes of a full machine get the processor meanwhile.
_AWAKE_SECONDS = 20e-6
_SHORT_BYTES = 64 * 1024


class Channel(Link):
    """A connected socket to one peer, used by one sending and one receiving thread at a time.

    Parameters
    ----------
    sock : socket
        Connected and authenticated; belongs to the channel from now on.
    peer : int
        The rank at the other end.
    timeout : float
        Seconds without progress after which an operation raises `Silent`.
    on_quiet : callable
        Called when half of the timeout has passed without progress.
    outbox : Outbox
        Sends what is posted; shared by the channels of one rank, whose communicator closes it after `shutdown`
        and before `close`.
    stats : Stats
        Where buffers of the channel's own are counted.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: int,
        timeout: float,
        on_quiet: Callable[[], None],
        outbox: Outbox,
        stats: Stats,
    ) -> None:
        self.peer = peer
        self._sock = sock
        self._on_quiet = on_quiet
        self._outbox = outbox
        self._stats = stats
        self._scratch = bytearray()
        self._prepare(sock, timeout / WAITS)

    def _prepare(self, sock: socket.socket, wait: float) -> None:
        """Make calls of a socket give up after `wait` seconds."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Timeouts kept by the kernel: Python's own cost a poll() more for every call.
        sock.settimeout(None)
        packed = struct.pack("@ll", int(wait), max(1, int(wait % 1 * 1e6)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)

    def _write(self, parts: list[memoryview]) -> int:
        """Send some of these bytes, return how many; raise `BlockingIOError` where nothing went in time."""
        return self._sock.sendmsg(parts) if len(parts) > 1 else self._sock.send(parts[0])

    def _read(self, view: memoryview, flags: int) -> int:
        """Receive some of these bytes, return how many, 0 at the end; raise `BlockingIOError` where nothing came."""
        return self._sock.recv_into(view, 0, flags)

    def send(self, header: bytes, view: memoryview) -> None:
        """Send a header (possibly empty) and payload as one message."""
        quiet = 0
        parts = [part for part in (memoryview(header), view) if part.nbytes]
        while parts:
            try:
                count = self._write(parts)
            except BlockingIOError:
                quiet = self._waited(quiet, "taking data")
                continue
            except OSError as exc:
                raise Gone(self.peer, str(exc)) from exc
            # The kernel may have waited in this call before it could take a part.
            quiet = 1
            while parts and count >= parts[0].nbytes:
                count -= parts.pop(0).nbytes
            if parts and count:
                parts[0] = parts[0][count:]

    def post(self, view: memoryview, header: bytes = b"") -> None:
        """Send by the outbox; see `Link`."""
        self._outbox.post(self, view, header)

    def flush(self) -> None:
        """Wait for the outbox; see `Link`."""
        self._outbox.flush()

    def take(self, nbytes: int) -> memoryview:
        """Receive into a buffer that grows to the longest piece; see `Link`."""
        if len(self._scratch) < nbytes:
            self._scratch = bytearray(nbytes)
            self._stats.registrations += 1
        view = memoryview(self._scratch)[:nbytes]
        self.fill(view)
        return view

    def fill(self, view: memoryview) -> None:
        """Receive exactly ``view.nbytes`` bytes."""
        quiet = 0
        awake_until = time.perf_counter() + _AWAKE_SECONDS if view.nbytes <= _SHORT_BYTES else 0.0
        flags = socket.MSG_DONTWAIT if awake_until else socket.MSG_WAITALL
        while view.nbytes:
            try:
                count = self._read(view, flags)
            except BlockingIOError:
                if flags == socket.MSG_WAITALL:
                    quiet = self._waited(quiet, "sending data")
                elif time.perf_counter() < awake_until:
                    os.sched_yield()
                else:
                    flags = socket.MSG_WAITALL
                continue
            except OSError as exc:
                raise Gone(self.peer, str(exc)) from exc
            if count == 0:
                raise Gone(self.peer, "the connection was closed")
            quiet = 1
            view = view[count:]

    def _waited(self, quiet: int, doing: str) -> int:
        quiet += 1
        if quiet >= WAITS:
            raise Silent(self.peer, doing)
        if quiet == WAITS // 2:
            self._on_quiet()
        return quiet

    def set_timeout(self, seconds: float) -> None:
        """Wait for so many seconds from now on; see `Link`."""
        with suppress(OSError):
            self._prepare(self._sock, seconds / WAITS)

    def shutdown(self) -> None:
        """End both directions and wake whoever waits in this channel; may be called by any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Not connected any more, which is what was wanted.
            return

    def close(self) -> None:
        """Give the socket back; nobody may be inside `send` or `fill`."""
        self._sock.close()


class Outbox:
    """Sends in order: small pieces at once, large ones in a thread, so that the caller can receive meanwhile.

    Once a piece has gone to the thread all later ones do until `flush`: a small piece that waited in the
    caller for a full connection could keep it from reading, and a ring of such callers would never move.

    Parameters
    ----------
    inline_bytes : int
        Largest piece sent by the caller itself; it must fit the kernel's buffers twice.
    on_error : callable
        Called in the thread with what went wrong, mostly `Gone` or `Silent`; nothing is sent from then on.
    """

    def __init__(self, inline_bytes: int, on_error: Callable[[Exception], None]) -> None:
        self._inline_bytes = inline_bytes
        self._on_error = on_error
        self._threaded = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[tuple[Channel, bytes, memoryview] | None] = queue.SimpleQueue()
        self._drained = threading.Semaphore(0)
        self._error: Exception | None = None

    def post(self, channel: Channel, view: memoryview, header: bytes = b"") -> None:
        """Send, or queue, one piece; its memory must stay as it is until it has left."""
        if not self._threaded and view.nbytes <= self._inline_bytes:
            channel.send(header, view)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sparktf-outbox", daemon=True)
            self._thread.start()
        self._threaded = True
        self._jobs.put((channel, header, view))

    def flush(self) -> None:
        """Return when all that was posted has been handed to the kernel; raise what the thread met."""
        if not self._threaded:
            return
        self._jobs.put(None)
        self._drained.acquire()
        self._threaded = False
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; its channels must have been shut down, or be drained."""
        if self._thread is not None:
            self._closing = True
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                if self._closing:
                    return
                self._drained.release()
            elif self._error is None:
                channel, header, view = job
                try:
                    channel.send(header, view)
                except Exception as exc:
                    # Kept for `flush`: an error that ended this thread would leave the caller waiting.
                    self._error = exc
                    self._on_error(exc)
            del job
