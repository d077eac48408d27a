"""The ``tcp`` protocol: ring collectives over a mesh of sockets; small arrays go to everybody at once."""

from __future__ import annotations

import numpy as np

from sparktf.errors import ParamError, TransportError
from sparktf.transport import ring
from sparktf.transport.channel import Channel, Outbox
from sparktf.transport.contract import Array
from sparktf.transport.guard import GuardedCommunicator
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.reduction import (
    as_bytes,
    check_array,
    check_op,
    chunk_bounds,
    combine,
    finish,
    op_code,
    shard_bounds,
)
from sparktf.transport.watch import Watch
from sparktf.transport.wire import HEADER_BYTES, describe_header, header_rows, pack_header

# Up to here a thread costs more than it overlaps, and the kernel's smallest buffers hold it.
_INLINE_BYTES = 64 * 1024
# A rank may send this much to all others together in one hop rather than around the ring in 2(n-1).
_DIRECT_BYTES = 64 * 1024
_EMPTY = np.empty(0, np.uint8)


def connect(
    *, rank: int, size: int, exchange: Exchange, secret: bytes, timeout: float, host: str | None
) -> TcpCommunicator:
    """Join a group of at least two over TCP; arguments as in `sparktf.transport.connect`."""
    mesh = connect_mesh(rank, size, exchange, secret, timeout, host)
    return TcpCommunicator(rank, size, mesh, timeout)


class TcpCommunicator(GuardedCommunicator):
    """A communicator over a connected mesh.

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    mesh : Mesh
        Connections to all others; they belong to the communicator from now on.
    timeout : float
        Seconds without progress.
    """

    protocol = "tcp"

    def __init__(self, rank: int, size: int, mesh: Mesh, timeout: float) -> None:
        super().__init__(rank, size, timeout)
        self._collectives = 0
        self._sent_to = dict.fromkeys(mesh.data, 0)
        self._received_from = dict.fromkeys(mesh.data, 0)
        self._channels = {peer: Channel(sock, peer, timeout, self._ask) for peer, sock in sorted(mesh.data.items())}
        self._left = self._channels[(rank - 1) % size]
        self._right = self._channels[(rank + 1) % size]
        self._outbox = Outbox(_INLINE_BYTES, self._on_send_error)
        self._inbox = bytearray(HEADER_BYTES)
        self._buffers: dict[str, Array] = {}
        # Allocated here rather than in the first operation, which should not be slower than the others.
        self._scratch = self._buffer("scratch", ring.CHUNK_BYTES)
        self._slots = self._buffer("slots", 2 * _DIRECT_BYTES)
        # Last, as it may at once hear of a failure and wake what is above.
        self._watch = Watch(mesh.control, self._on_failure, lambda: self._current)

    def all_reduce(self, array: Array, op: str = "sum") -> Array:
        """Reduce in place; see `Communicator`."""
        check_array(array, written=True)
        check_op(op, array.dtype)
        with self._operation("all_reduce"):
            flat = np.ascontiguousarray(array).reshape(-1)
            self._reduce("all_reduce", flat, op)
            return _put_back(flat, array)

    def reduce_scatter(self, array: Array, op: str = "sum") -> Array:
        """Reduce and keep this rank's shard; see `Communicator`."""
        check_array(array, written=False)
        check_op(op, array.dtype)
        with self._operation("reduce_scatter"):
            work = self._buffer("work", array.nbytes)[: array.nbytes].view(array.dtype)
            np.copyto(work.reshape(array.shape), array)
            self._reduce("reduce_scatter", work, op)
            start, stop = shard_bounds(work.size, self.size)[self.rank]
            return work[start:stop].copy()

    def all_gather(self, array: Array) -> list[Array]:
        """Collect the arrays of all ranks; see `Communicator`."""
        check_array(array, written=False)
        with self._operation("all_gather"):
            return self._gather(np.ascontiguousarray(array).reshape(array.shape))

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite with the root's; see `Communicator`."""
        check_array(array, written=True)
        if not 0 <= root < self.size:
            raise ParamError(f"Expected root in 0..{self.size - 1}. Received: {root}.")
        with self._operation("broadcast"):
            flat = np.ascontiguousarray(array).reshape(-1)
            header = pack_header("broadcast", flat, self._next(), root)
            if self.rank != root:
                self._expect(self._left, header)
            if self._right.peer != root:
                self._right.send(header, memoryview(b""))
            ring.broadcast(self, flat, root, self.rank, self.size)
            return _put_back(flat, array)

    def barrier(self) -> None:
        """Wait for all; see `Communicator`."""
        with self._operation("barrier"):
            self._reduce("barrier", _EMPTY, "sum")

    def send(self, peer: int, array: Array) -> None:
        """Send to one rank; see `Communicator`."""
        check_array(array, written=False)
        channel = self._channel(peer)
        with self._operation(f"send to rank {peer}"):
            flat = np.ascontiguousarray(array).reshape(-1)
            self._sent_to[peer] += 1
            channel.send(pack_header("send", flat, self._sent_to[peer]), as_bytes(flat))
            self.stats.bytes_sent += flat.nbytes

    def recv(self, peer: int, array: Array) -> Array:
        """Receive from one rank; see `Communicator`."""
        check_array(array, written=True)
        channel = self._channel(peer)
        with self._operation(f"recv from rank {peer}"):
            flat = np.ascontiguousarray(array).reshape(-1)
            self._received_from[peer] += 1
            self._expect(channel, pack_header("send", flat, self._received_from[peer]))
            channel.fill(as_bytes(flat))
            self.stats.bytes_received += flat.nbytes
            return _put_back(flat, array)

    def _ask(self) -> None:
        self._watch.ask()

    def _wake(self) -> None:
        for channel in self._channels.values():
            channel.shutdown()

    def _free(self) -> None:
        self._outbox.close()
        self._watch.stop()
        for channel in self._channels.values():
            channel.close()
        self._buffers.clear()

    def post(self, view: memoryview) -> None:
        """Send to the right neighbour (for the ring algorithms)."""
        self._outbox.post(self._right, view)
        self.stats.bytes_sent += view.nbytes

    def fill(self, view: memoryview) -> None:
        """Receive from the left neighbour (for the ring algorithms)."""
        self._left.fill(view)
        self.stats.bytes_received += view.nbytes

    def flush(self) -> None:
        """Wait until all is sent (for the ring algorithms)."""
        self._outbox.flush()

    def _reduce(self, name: str, flat: Array, op: str) -> None:
        header = pack_header(name, flat, self._next(), op_code(op))
        if flat.nbytes * (self.size - 1) <= _DIRECT_BYTES:
            self._reduce_directly(header, flat, op)
            return
        self._right.send(header, memoryview(b""))
        self._expect(self._left, header)
        algorithm = ring.all_reduce if name == "all_reduce" else ring.reduce_scatter
        algorithm(self, flat, op, self.rank, self.size, self._scratch)

    def _reduce_directly(self, header: bytes, flat: Array, op: str) -> None:
        """Send the whole to everybody; everybody reduces in the order of ranks, so bits are equal."""
        view = as_bytes(flat)
        slots = [
            self._slots[peer * flat.nbytes : (peer + 1) * flat.nbytes].view(flat.dtype) for peer in range(self.size)
        ]
        for channel in self._channels.values():
            channel.send(header, view)
        for peer, channel in self._channels.items():
            self._expect(channel, header)
            channel.fill(as_bytes(slots[peer]))
        slots[self.rank][:] = flat
        combine(op, slots[0], slots[1], flat)
        for slot in slots[2:]:
            combine(op, flat, slot, flat)
        finish(op, flat, self.size)
        self.stats.bytes_sent += flat.nbytes * (self.size - 1)
        self.stats.bytes_received += flat.nbytes * (self.size - 1)

    def _gather(self, array: Array) -> list[Array]:
        shape = array.shape or (1,)
        row_bytes = array.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        number = self._next()
        header = pack_header("all_gather", array, number, rows=shape[0])
        result = {self.rank: array.copy()}
        self._post_block(header, array.reshape(-1).view(np.uint8))
        for step in range(self.size - 1):
            self._left.fill(memoryview(self._inbox))
            header = bytes(self._inbox)
            rows = header_rows(header)
            self._match(header, pack_header("all_gather", array, number, rows=rows, nbytes=rows * row_bytes))
            block = np.empty(rows * row_bytes, np.uint8)
            last = step == self.size - 2
            if block.nbytes == 0 and not last:
                self._post_block(header, block)
            for start, stop in chunk_bounds(0, block.nbytes, ring.CHUNK_BYTES):
                self.fill(block[start:stop].data)
                if not last:
                    self._post_block(header if start == 0 else b"", block[start:stop])
            origin = (self.rank - step - 1) % self.size
            result[origin] = block.view(array.dtype).reshape((rows, *shape[1:]) if array.ndim else ())
        self._outbox.flush()
        return [result[rank] for rank in range(self.size)]

    def _post_block(self, header: bytes, block: Array) -> None:
        self._outbox.post(self._right, block.data, header)
        self.stats.bytes_sent += block.nbytes

    def _next(self) -> int:
        self._collectives += 1
        return self._collectives

    def _expect(self, channel: Channel, header: bytes) -> None:
        channel.fill(memoryview(self._inbox))
        if self._inbox != header:
            self._match(bytes(self._inbox), header, channel.peer)

    def _match(self, received: bytes, expected: bytes, peer: int | None = None) -> None:
        if received == expected:
            return
        sender = self._left.peer if peer is None else peer
        raise TransportError(
            f"{self._current}: expected {describe_header(expected)} from rank {sender}. Received: "
            f"{describe_header(received)}. All ranks must call the same operations in the same order, "
            "with arrays of the same dtype and size."
        )

    def _channel(self, peer: int) -> Channel:
        if peer not in self._channels:
            raise ParamError(f"Expected another rank than {self.rank}, in 0..{self.size - 1}. Received: {peer!r}.")
        return self._channels[peer]

    def _buffer(self, name: str, nbytes: int) -> Array:
        """Return a buffer that is kept between operations and grows when it must."""
        held = self._buffers.get(name)
        if held is None or held.nbytes < nbytes:
            held = np.empty(nbytes, np.uint8)
            self._buffers[name] = held
            self.stats.registrations += 1
        return held


def _put_back(flat: Array, array: Array) -> Array:
    """Copy the result into the caller's array where that was not contiguous."""
    if not array.flags.c_contiguous:
        np.copyto(array, flat.reshape(array.shape))
    return array
