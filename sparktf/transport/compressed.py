"""A ring all-reduce with half the bytes on the wire: bfloat16 between the ranks, float32 in every sum.

The ring is that of `sparktf.transport.ring`. What travels is rounded to bfloat16, with 8 bits of significand: a
relative error of up to 2**-8 a hop. The finished shard is rounded where it is finished, so that all ranks hold the
same bits.
"""

from __future__ import annotations

import numpy as np

from sparktf.transport.contract import Array
from sparktf.transport.reduction import as_bytes, chunk_bounds, finish, shard_bounds
from sparktf.transport.ring import Ring


def all_reduce(ring: Ring, flat: Array, op: str, members: int, half: Array, whole: Array) -> None:
    """Add up `flat` over the ring, in place.

    Parameters
    ----------
    ring : Ring
        The neighbours.
    flat : ndarray of float32
        One-dimensional and contiguous; same length on every rank.
    op : {"sum", "mean"}
    members : int
        How many ranks the values come from, for a mean.
    half : ndarray of bfloat16
        Of the same length: what is sent and received; its contents do not matter.
    whole : ndarray of float32
        As long as a chunk at least, or as `flat`: what has come, widened; its contents do not matter.
    """
    for part, small in _chunks(ring, flat, half, ring.rank - 1):
        small[:] = part
        ring.post(as_bytes(small))
    for step in range(ring.size - 1):
        for part, small in _chunks(ring, flat, half, ring.rank - step - 2):
            widened = whole[: part.size]
            np.copyto(widened, ring.take(small))
            part += widened
            if step == ring.size - 2:
                finish(op, part, members)
            small[:] = part
            if step == ring.size - 2:
                part[:] = small
            ring.post(as_bytes(small))
    for step in range(ring.size - 1):
        for part, small in _chunks(ring, flat, half, ring.rank - step - 1):
            ring.fill(as_bytes(small))
            part[:] = small
            if step < ring.size - 2:
                ring.post(as_bytes(small))
    ring.right.flush()


def _chunks(ring: Ring, flat: Array, half: Array, shard: int) -> list[tuple[Array, Array]]:
    """Return the chunks of a shard in both; shards are counted around the ring."""
    start, stop = shard_bounds(flat.size, ring.size)[shard % ring.size]
    bounds = chunk_bounds(start, stop, ring.chunk_bytes // half.itemsize)
    return [(flat[begin:end], half[begin:end]) for begin, end in bounds]
