"""Ring collectives over links to two neighbours.

The bandwidth-optimal ring of Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", J. Parallel Distrib. Comput. 69 (2009): every rank sends to its right, receives from its left,
and 2(n-1)/n of the array crosses each link. A shard is reduced along one fixed chain of ranks and then
copied, so the result has the same bits everywhere and in every run.

A chunk is passed on as soon as it has arrived, so that sending, receiving and adding overlap. Chunks lie
alike on all ranks, which makes it safe to receive a finished chunk over memory that an earlier step has
posted: the finished chunk contains the posted one, so it can only arrive after that has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparktf.transport.contract import Array, Stats
from sparktf.transport.link import Link
from sparktf.transport.reduction import as_bytes, chunk_bounds, combine, finish, shard_bounds


@dataclass(frozen=True)
class Ring:
    """One rank's place in a ring.

    Attributes
    ----------
    left, right : Link
        To the ranks before and after; the same one in a ring of two.
    rank, size : int
        The place in the ring, and how many are in it.
    chunk_bytes : int
        Longest piece, the same on every rank.
    stats : Stats
        Where payload bytes are counted.
    """

    left: Link
    right: Link
    rank: int
    size: int
    chunk_bytes: int
    stats: Stats

    def post(self, view: memoryview, header: bytes = b"") -> None:
        """Begin to send to the right."""
        self.right.post(view, header)
        self.stats.bytes_sent += view.nbytes

    def place(self, view: memoryview) -> None:
        """Begin to send what the right neighbour fills into the same stretch of its own array."""
        self.right.place(view)
        self.stats.bytes_sent += view.nbytes

    def see_off(self) -> None:
        """Before this rank waits for the left: have sent what was posted, where that would not go on meanwhile."""
        if self.left.sends_alone and not self.right.sends_alone:
            self.right.flush()

    def fill(self, view: memoryview) -> None:
        """Receive from the left into `view`."""
        self.see_off()
        self.left.fill(view)
        self.stats.bytes_received += view.nbytes

    def take(self, like: Array) -> Array:
        """Receive an array of this length and dtype from the left, valid until the next receive."""
        self.see_off()
        view = self.left.take(like.nbytes)
        self.stats.bytes_received += like.nbytes
        return np.frombuffer(view, like.dtype)

    def chunks(self, flat: Array, shard: int) -> list[Array]:
        """Return the chunks of a shard; shards are counted around the ring."""
        start, stop = shard_bounds(flat.size, self.size)[shard % self.size]
        bounds = chunk_bounds(start, stop, self.chunk_bytes // flat.itemsize)
        return [flat[begin:end] for begin, end in bounds]


def reduce_scatter(ring: Ring, flat: Array, op: str, members: int, *, pass_on: bool = False) -> None:
    """Reduce `flat` over the ring; shard ``ring.rank`` of it is then the result, the rest is used up.

    Parameters
    ----------
    ring : Ring
        The neighbours.
    flat : ndarray
        One-dimensional and contiguous; same dtype and length on every rank.
    op : str
        A checked reduction.
    members : int
        How many ranks the values come from, for a mean.
    pass_on : bool
        Post the finished shard as well: the first step of `all_gather`.
    """
    for part in ring.chunks(flat, ring.rank - 1):
        ring.post(as_bytes(part))
    if pass_on:
        ring.right.accept(flat)
    for step in range(ring.size - 1):
        last = step == ring.size - 2
        for part in ring.chunks(flat, ring.rank - step - 2):
            combine(op, part, ring.take(part), part)
            if last:
                finish(op, part, members)
            if not last:
                ring.post(as_bytes(part))
            elif pass_on:
                ring.place(as_bytes(part))
    if not pass_on:
        ring.right.flush()


def all_reduce(ring: Ring, flat: Array, op: str, members: int) -> None:
    """Reduce `flat` over the ring, in place; parameters as in `reduce_scatter`."""
    ring.left.offer(flat)
    reduce_scatter(ring, flat, op, members, pass_on=True)
    for step in range(ring.size - 1):
        for part in ring.chunks(flat, ring.rank - step - 1):
            ring.fill(as_bytes(part))
            if step < ring.size - 2:
                ring.place(as_bytes(part))
    ring.right.flush()


def broadcast(ring: Ring, flat: Array, root: int) -> None:
    """Pass the root's array along the ring, chunk by chunk, in place."""
    receives, sends = ring.rank != root, (ring.rank + 1) % ring.size != root
    if receives:
        ring.left.offer(flat)
    if sends:
        ring.right.accept(flat)
    for start, stop in chunk_bounds(0, flat.size, ring.chunk_bytes // flat.itemsize):
        view = as_bytes(flat[start:stop])
        if receives:
            ring.fill(view)
        if sends:
            ring.place(view)
    ring.right.flush()
