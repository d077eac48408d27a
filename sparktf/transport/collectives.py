"""Every operation of the contract, over links to all peers: what a protocol inherits.

Small arrays go to everybody at once, large ones around a ring. Every operation begins with a header, so that ranks
that call different operations learn so instead of waiting for each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from sparktf.errors import ParamError, TransportError
from sparktf.transport import compressed, ring
from sparktf.transport.contract import Array
from sparktf.transport.guard import GuardedCommunicator
from sparktf.transport.link import Link
from sparktf.transport.reduction import (
    BFLOAT16,
    as_bytes,
    check_array,
    check_compression,
    check_dtype,
    check_gathered,
    check_op,
    check_rows,
    chunk_bounds,
    combine,
    finish,
    op_code,
    shard_bounds,
)
from sparktf.transport.watch import ControlSocket, Watch
from sparktf.transport.wire import HEADER_BYTES, describe_header, header_rows, pack_header

# A rank may send this much to all others together in one hop rather than around the ring in 2(n-1).
_DIRECT_BYTES = 64 * 1024
_NOTHING = memoryview(b"")
_EMPTY = np.empty(0, np.uint8)


class CollectiveCommunicator(GuardedCommunicator):
    """A communicator over links.

    A protocol makes its links and calls `_begin`. It may say how to allocate memory that its links reach without a
    copy (`_allocate_bytes`), and may do reductions its own way (`_reduce_large`).

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    timeout : float
        Seconds without progress.

    Attributes
    ----------
    chunk_bytes : int
        Longest piece that travels around the ring; the same on every rank. Large enough to make the cost of a
        system call vanish, small enough for the second-level cache.
    """

    chunk_bytes = 512 * 1024

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        super().__init__(rank, size, timeout)
        self._collectives = 0
        self._links: dict[int, Link] = {}
        self._inbox = bytearray(HEADER_BYTES)
        self._buffers: dict[str, Array] = {}
        # Allocated here rather than in the first operation, which should not be slower than the others.
        self._slots = self._buffer("slots", 2 * _DIRECT_BYTES)

    def _begin(
        self, links: Mapping[int, Link], controls: Mapping[int, ControlSocket], gone: Iterable[int] = ()
    ) -> None:
        """Take links and control connections by peer; both belong to the communicator from now on.

        `gone` are the peers that have said goodbye while others still connected.
        """
        self._links = dict(sorted(links.items()))
        self._sent_to = dict.fromkeys(self._links, 0)
        self._received_from = dict.fromkeys(self._links, 0)
        left, right = self._links[(self.rank - 1) % self.size], self._links[(self.rank + 1) % self.size]
        self._ring = ring.Ring(left, right, self.rank, self.size, self.chunk_bytes, self.stats)
        self._watch = Watch(controls, self._on_failure, self._on_left, lambda: self._current, self._on_tick, gone)
        self._watch.start()

    @property
    def timeout(self) -> float:
        """Seconds without progress after which an operation fails; see `Communicator`."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        with self._lock:
            if seconds != self._timeout:
                self._timeout = seconds
                for link in self._links.values():
                    link.set_timeout(seconds)

    def all_reduce(self, array: Array, op: str = "sum", compression: str = "none") -> Array:
        """Reduce in place; see `Communicator`."""
        check_array(array, written=True)
        check_op(op, array.dtype)
        check_compression(compression, op, array.dtype)
        with self._operation("all_reduce"):
            self._allow(2 * array.nbytes)
            flat = np.ascontiguousarray(array).reshape(-1)
            self._reduce("all_reduce", flat, op, compression)
            return _put_back(flat, array)

    def reduce_scatter(self, array: Array, op: str = "sum") -> Array:
        """Reduce and keep this rank's shard; see `Communicator`."""
        check_array(array, written=False)
        check_op(op, array.dtype)
        with self._operation("reduce_scatter"):
            self._allow(2 * array.nbytes)
            work = self._buffer("work", array.nbytes)[: array.nbytes].view(array.dtype)
            np.copyto(work.reshape(array.shape), array)
            self._reduce("reduce_scatter", work, op)
            start, stop = shard_bounds(work.size, self.size)[self.rank]
            return work[start:stop].copy()

    def all_gather(self, array: Array, out: Callable[[int], Array] | None = None) -> list[Array]:
        """Collect the arrays of all ranks; see `Communicator`."""
        check_array(array, written=False)
        check_gathered(array, out)
        with self._operation("all_gather"):
            array = np.ascontiguousarray(array).reshape(array.shape)
            if out is None:
                return self._gather(array)
            counts = [int(count[0]) for count in self._gather(np.array([len(array)], np.int64))]
            stops = list(itertools.accumulate(counts))
            whole = check_rows(out(stops[-1]), stops[-1], array)
            places = [whole[stop - count : stop] for count, stop in zip(counts, stops, strict=True)]
            np.copyto(places[self.rank], array)
            return self._gather(places[self.rank], places)

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite with the root's; see `Communicator`."""
        check_array(array, written=True)
        if not 0 <= root < self.size:
            raise ParamError(f"Expected root in 0..{self.size - 1}. Received: {root}.")
        with self._operation("broadcast"):
            self._allow(array.nbytes)
            flat = np.ascontiguousarray(array).reshape(-1)
            header = pack_header("broadcast", flat, self._next(), root)
            # All the way round, also to the root: two ranks that each take themselves for it would never know.
            self._ring.right.send(header, _NOTHING)
            self._expect(self._ring.left, header)
            ring.broadcast(self._ring, flat, root)
            return _put_back(flat, array)

    def barrier(self) -> None:
        """Wait for all; see `Communicator`."""
        with self._operation("barrier"):
            self._reduce("barrier", _EMPTY, "sum")

    def send(self, peer: int, array: Array) -> None:
        """Send to one rank; see `Communicator`."""
        check_array(array, written=False)
        link = self._link(peer)
        with self._operation(f"send to rank {peer}"):
            self._allow(array.nbytes)
            flat = np.ascontiguousarray(array).reshape(-1)
            self._sent_to[peer] += 1
            link.send(pack_header("send", flat, self._sent_to[peer]), as_bytes(flat))
            self.stats.bytes_sent += flat.nbytes

    def recv(self, peer: int, array: Array) -> Array:
        """Receive from one rank; see `Communicator`."""
        check_array(array, written=True)
        link = self._link(peer)
        with self._operation(f"recv from rank {peer}"):
            self._allow(array.nbytes)
            flat = np.ascontiguousarray(array).reshape(-1)
            self._received_from[peer] += 1
            self._expect(link, pack_header("send", flat, self._received_from[peer]))
            link.fill(as_bytes(flat))
            self.stats.bytes_received += flat.nbytes
            return _put_back(flat, array)

    def allocate(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Allocate memory that the protocol reaches directly; see `Communicator`."""
        kind: np.dtype[Any] = np.dtype(dtype)
        check_dtype(kind)
        with self._operation("allocate"):
            like = np.broadcast_to(np.zeros((), kind), shape)
            self._meet(pack_header("allocate", like, self._next()))
            self.stats.registrations += 1
            return self._allocate_bytes(like.nbytes).view(kind).reshape(like.shape)

    def _allocate_bytes(self, nbytes: int) -> Array:
        """Return zeroed bytes for `allocate`; all ranks are here at the same time, with the same number."""
        return np.zeros(nbytes, np.uint8)

    def _ask(self) -> None:
        self._watch.ask()

    def _wake(self) -> None:
        for link in self._links.values():
            link.shutdown()

    def _free(self) -> None:
        self._watch.stop()
        for link in self._links.values():
            link.close()
        self._buffers.clear()

    def _reduce(self, name: str, flat: Array, op: str, compression: str = "none") -> None:
        if flat.nbytes * (self.size - 1) <= _DIRECT_BYTES:
            self._reduce_directly(pack_header(name, flat, self._next(), op_code(op)), flat, op)
        else:
            self._reduce_large(name, flat, op, compression)

    def _reduce_large(self, name: str, flat: Array, op: str, compression: str) -> None:
        """Reduce a contiguous array in place; of a reduce-scatter only this rank's shard need be right."""
        header = pack_header(name, flat, self._next(), op_code(op, compression))
        self._ring.right.send(header, _NOTHING)
        self._expect(self._ring.left, header)
        if name == "all_reduce":
            self._reduce_around(self._ring, flat, op, compression)
        else:
            ring.reduce_scatter(self._ring, flat, op, self.size)

    def _reduce_around(self, circle: ring.Ring, flat: Array, op: str, compression: str) -> None:
        """Reduce over a ring that holds the values of all ranks."""
        if compression == "none":
            ring.all_reduce(circle, flat, op, self.size)
        else:
            half = self._buffer("half", flat.size * BFLOAT16.itemsize)[: flat.size * BFLOAT16.itemsize]
            chunk = circle.chunk_bytes // BFLOAT16.itemsize * flat.itemsize
            whole = self._buffer("whole", min(flat.nbytes, chunk))[: min(flat.nbytes, chunk)]
            compressed.all_reduce(circle, flat, op, self.size, half.view(BFLOAT16), whole.view(flat.dtype))

    def _reduce_directly(self, header: bytes, flat: Array, op: str) -> None:
        """Send the whole to everybody; everybody reduces in the order of ranks, so bits are equal."""
        view = as_bytes(flat)
        slots = [
            self._slots[peer * flat.nbytes : (peer + 1) * flat.nbytes].view(flat.dtype) for peer in range(self.size)
        ]
        for link in self._links.values():
            link.send(header, view)
        for peer, link in self._links.items():
            self._expect(link, header)
            link.fill(as_bytes(slots[peer]))
        slots[self.rank][:] = flat
        combine(op, slots[0], slots[1], flat)
        for slot in slots[2:]:
            combine(op, flat, slot, flat)
        finish(op, flat, self.size)
        self.stats.bytes_sent += flat.nbytes * (self.size - 1)
        self.stats.bytes_received += flat.nbytes * (self.size - 1)

    def _meet(self, header: bytes) -> None:
        """Return once every rank is here, with the same header."""
        for link in self._links.values():
            link.send(header, _NOTHING)
        for link in self._links.values():
            self._expect(link, header)

    def _gather(self, array: Array, places: Sequence[Array] | None = None) -> list[Array]:
        """Collect the arrays of all ranks, into the places given, this rank's own being there, or into new ones."""
        shape = array.shape or (1,)
        row_bytes = array.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        number = self._next()
        header = pack_header("all_gather", array, number, rows=shape[0])
        result = {self.rank: array if places else array.copy()}
        block = array.reshape(-1).view(np.uint8)
        for step in range(self.size):
            # First the own block, then each that has come from the left, but the last: the right has that one.
            last = step == self.size - 1
            if step > 0:
                header = self._take_header()
                rows = header_rows(header, row_bytes)
                self._match(header, pack_header("all_gather", array, number, rows=rows, nbytes=rows * row_bytes))
                origin = (self.rank - step) % self.size
                result[origin] = (
                    places[origin] if places else np.empty((rows, *shape[1:]) if array.ndim else (), array.dtype)
                )
                block = result[origin].reshape(-1).view(np.uint8)
            self._allow(block.nbytes)
            if not last:
                self._ring.post(_NOTHING, header)
            for start, stop in chunk_bounds(0, block.nbytes, self.chunk_bytes):
                if step > 0:
                    self._ring.fill(block[start:stop].data)
                if not last:
                    self._ring.post(block[start:stop].data)
        self._ring.right.flush()
        return [result[rank] for rank in range(self.size)]

    def _next(self) -> int:
        self._collectives += 1
        return self._collectives

    def _take_header(self) -> bytes:
        self._ring.see_off()
        self._ring.left.fill(memoryview(self._inbox))
        return bytes(self._inbox)

    def _expect(self, link: Link, header: bytes) -> None:
        link.fill(memoryview(self._inbox))
        if self._inbox != header:
            self._match(bytes(self._inbox), header, link.peer)

    def _match(self, received: bytes, expected: bytes, peer: int | None = None) -> None:
        if received == expected:
            return
        sender = self._ring.left.peer if peer is None else peer
        raise TransportError(
            f"{self._current}: expected {describe_header(expected)} from rank {sender}. Received: "
            f"{describe_header(received)}. All ranks must call the same operations in the same order, "
            "with arrays of the same dtype and size."
        )

    def _link(self, peer: int) -> Link:
        if peer not in self._links:
            raise ParamError(f"Expected another rank than {self.rank}, in 0..{self.size - 1}. Received: {peer!r}.")
        return self._links[peer]

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
