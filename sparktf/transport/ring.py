"""Ring collectives, for any link to two neighbours.

The bandwidth-optimal ring of Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", J. Parallel Distrib. Comput. 69 (2009): every rank sends to its right, receives from its left,
and 2(n-1)/n of the array crosses each link. A shard is reduced along one fixed chain of ranks and then
copied, so the result has the same bits everywhere and in every run.

A chunk is passed on as soon as it has arrived, so that sending, receiving and adding overlap. Chunks lie
alike on all ranks, which makes it safe to receive a finished chunk over memory that an earlier step has
posted: the finished chunk contains the posted one, so it can only arrive after that has left.
"""

from __future__ import annotations

from typing import Protocol

from sparktf.transport.contract import Array
from sparktf.transport.reduction import as_bytes, chunk_bounds, combine, finish, shard_bounds

# Large enough to make the cost of a system call vanish, small enough for the second-level cache.
CHUNK_BYTES = 512 * 1024


class Neighbours(Protocol):
    """What a ring needs from a protocol."""

    def post(self, view: memoryview) -> None:
        """Send to the right, in order; the memory must keep its contents until they have left."""

    def fill(self, view: memoryview) -> None:
        """Receive exactly these bytes from the left."""

    def flush(self) -> None:
        """Return when nothing posted is left to send."""


def _longest(flat: Array) -> int:
    return CHUNK_BYTES // flat.itemsize


def reduce_scatter(
    link: Neighbours, flat: Array, op: str, rank: int, size: int, scratch: Array, *, pass_on: bool = False
) -> None:
    """Reduce `flat` over the ring; shard `rank` of it is then the result, the rest is used up.

    Parameters
    ----------
    link : Neighbours
        The two neighbours.
    flat : ndarray
        One-dimensional and contiguous; same dtype and length on every rank.
    op : str
        A checked reduction.
    rank, size : int
        This rank and the world's size.
    scratch : ndarray
        ``CHUNK_BYTES`` of uint8 for what arrives.
    pass_on : bool
        Post the finished shard as well: the first step of `all_gather`.
    """
    bounds = shard_bounds(flat.size, size)
    longest = _longest(flat)
    for start, stop in chunk_bounds(*bounds[(rank - 1) % size], longest):
        link.post(as_bytes(flat[start:stop]))
    for step in range(size - 1):
        last = step == size - 2
        for start, stop in chunk_bounds(*bounds[(rank - step - 2) % size], longest):
            part = flat[start:stop]
            incoming = scratch[: part.nbytes]
            link.fill(incoming.data)
            combine(op, part, incoming.view(flat.dtype), part)
            if last:
                finish(op, part, size)
            if pass_on or not last:
                link.post(as_bytes(part))
    if not pass_on:
        link.flush()


def all_reduce(link: Neighbours, flat: Array, op: str, rank: int, size: int, scratch: Array) -> None:
    """Reduce `flat` over the ring, in place; parameters as in `reduce_scatter`."""
    reduce_scatter(link, flat, op, rank, size, scratch, pass_on=True)
    bounds = shard_bounds(flat.size, size)
    longest = _longest(flat)
    for step in range(size - 1):
        for start, stop in chunk_bounds(*bounds[(rank - step - 1) % size], longest):
            view = as_bytes(flat[start:stop])
            link.fill(view)
            if step < size - 2:
                link.post(view)
    link.flush()


def broadcast(link: Neighbours, flat: Array, root: int, rank: int, size: int) -> None:
    """Pass the root's array along the ring, chunk by chunk, in place."""
    for start, stop in chunk_bounds(0, flat.size, _longest(flat)):
        view = as_bytes(flat[start:stop])
        if rank != root:
            link.fill(view)
        if (rank + 1) % size != root:
            link.post(view)
    link.flush()
