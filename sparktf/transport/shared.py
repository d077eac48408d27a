"""Reductions among the ranks of one machine, in each other's memory.

Each rank reduces one shard straight out of the arrays of all and then copies the other shards from the ranks that
reduced them. The array is taken in chunks that stay in the processor's cache between the two. Arrays that lie in
memory of `SharedGroup.add_region` are read where they are; others pass through staging memory of two slots.

Values are combined in the order of ranks, so the result has the same bits everywhere, in every run and for both kinds
of memory. Ranks wait for each other by one byte over the sockets between them: a few microseconds on one machine, with
the deadlines and the failures of every link, and the system calls order the memory accesses on every processor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sparktf.transport.contract import Array
from sparktf.transport.link import Link
from sparktf.transport.reduction import combine, finish, shard_bounds

# What is reduced before it is shared. Small enough to be found in a cache again, large enough that two meetings a
# chunk cost little; arrays that are read in place pass through the caches once less.
CHUNK_BYTES = 2 * 1024 * 1024
_IN_PLACE_BYTES = 4 * 1024 * 1024
# Every rank's staging memory: two slots for what comes in and two for what goes out.
STAGING_BYTES = 4 * CHUNK_BYTES
# Partial sums stay in the first- or second-level cache while the arrays of all ranks stream past.
_BLOCK_BYTES = 128 * 1024
_ALIGNMENT = 64
# Where an array lies: the number of the region, the offset in it.
_PLACE = struct.Struct("<qQ")
_BELL = b"\1"
_NOTHING = memoryview(b"")


@dataclass(frozen=True)
class _Region:
    """Memory that every rank has mapped: each rank's own part of it, by place in the group."""

    address: int
    parts: list[Array]


class Job:
    """One array's way through a group: where every rank reads and writes, chunk by chunk.

    Parameters
    ----------
    flat : ndarray
        This rank's array.
    op : str
        The reduction.
    shards : int
        Into how many shards it is cut; the ranks of those places reduce one each.
    sources : list of ndarray or None
        The arrays of all ranks, where all can be read in place.
    """

    def __init__(self, flat: Array, op: str, shards: int, sources: list[Array] | None) -> None:
        self.flat, self.op, self.sources = flat, op, sources
        self.bounds = shard_bounds(flat.size, shards)
        per_line = _ALIGNMENT // flat.itemsize
        # Whole cache lines, so that no two ranks write to the same one.
        chunk_bytes = CHUNK_BYTES if sources is None else _IN_PLACE_BYTES
        self.width = max(1, chunk_bytes // shards // flat.itemsize // per_line) * per_line

    def own_bytes(self, place: int) -> int:
        """Return how many bytes the shard of a place has, 0 where it has none."""
        return self.flat[self.shard(place)].nbytes

    def shard(self, place: int) -> slice:
        """Return where the shard of a place lies in the array; empty where it has none."""
        return slice(*self.bounds[place]) if place < len(self.bounds) else slice(0, 0)

    @property
    def chunks(self) -> int:
        """How many chunks the longest shard has."""
        start, stop = self.bounds[0]
        return -(-(stop - start) // self.width)

    def piece(self, shard: int, chunk: int) -> slice:
        """Return where one chunk of one shard lies in the array; empty where the shard is shorter."""
        whole = self.shard(shard)
        start, stop = whole.start, whole.stop
        begin = min(start + chunk * self.width, stop)
        return slice(begin, min(begin + self.width, stop))


class SharedGroup:
    """One rank's place among those of its machine.

    Parameters
    ----------
    members : list of int
        The ranks on this machine, in order.
    rank : int
        This rank.
    links : mapping of int to Link
        To all others of `members`.
    staging : list of ndarray
        Every member's staging memory, `STAGING_BYTES` of uint8, in the order of `members`.

    Attributes
    ----------
    place : int
        This rank's place among `members`.
    """

    def __init__(self, members: list[int], rank: int, links: Mapping[int, Link], staging: list[Array]) -> None:
        self.members = members
        self.place = members.index(rank)
        self._links = [links[member] for member in members if member != rank]
        self._incoming = [area[: 2 * CHUNK_BYTES] for area in staging]
        self._outgoing = [area[2 * CHUNK_BYTES :] for area in staging]
        self._regions: list[_Region] = []
        self._scratch = np.empty(_BLOCK_BYTES, np.uint8)
        self._told = memoryview(bytearray(_PLACE.size))
        self._bell = memoryview(bytearray(1))

    def add_region(self, parts: list[Array]) -> None:
        """Take memory that every rank has mapped, one part a rank; the same regions in the same order on every rank."""
        own = parts[self.place]
        self._regions.append(_Region(own.ctypes.data, parts))

    def release(self) -> None:
        """Let go of all memory, which lives on where somebody else refers to it."""
        for held in (self._incoming, self._outgoing, self._regions):
            held.clear()

    def begin(self, header: bytes, expect: Callable[[Link, bytes], None], flat: Array, op: str, shards: int) -> Job:
        """Meet with all ranks of the group, and agree on whether arrays can be read in place.

        Parameters
        ----------
        header : bytes
            The operation's header.
        expect : callable
            Receives a header from a link and raises where it is another.
        flat, op, shards
            As for `Job`.
        """
        own = self._find(flat)
        packed = memoryview(_PLACE.pack(*own))
        for link in self._links:
            link.send(header, packed)
        places = {self.members[self.place]: own}
        for link in self._links:
            expect(link, header)
            link.fill(self._told)
            places[link.peer] = _PLACE.unpack(self._told)
        if any(region < 0 for region, _ in places.values()):
            return Job(flat, op, shards, None)
        sources = []
        for number, member in enumerate(self.members):
            region, offset = places[member]
            part = self._regions[region].parts[number][offset : offset + flat.nbytes]
            sources.append(part.view(flat.dtype))
        return Job(flat, op, shards, sources)

    def all_reduce(self, job: Job, count: int) -> None:
        """Reduce in place; `count` is how many ranks a mean is over."""
        for chunk in range(job.chunks):
            self._reduce_chunk(job, chunk)
            finish(job.op, self._own(job, chunk), count)
            self._share_chunk(job, chunk)
        self._end(job)

    def reduce(self, job: Job) -> None:
        """Reduce this rank's shard only, without the division of a mean; other shards are left as they were."""
        for chunk in range(job.chunks):
            self._reduce_chunk(job, chunk)
        self._end(job)

    def share(self, job: Job) -> None:
        """Copy every other rank's shard, as it lies in that rank's array."""
        for chunk in range(job.chunks):
            self._share_chunk(job, chunk)
        self._end(job)

    def meet(self) -> None:
        """Return once every rank of the group has called this as often."""
        for link in self._links:
            link.send(_BELL, _NOTHING)
        for link in self._links:
            link.fill(self._bell)

    def _find(self, flat: Array) -> tuple[int, int]:
        """Return the region and offset of an array, (-1, 0) where it is in none."""
        address = flat.__array_interface__["data"][0]
        for number, region in enumerate(self._regions):
            offset = address - region.address
            if offset >= 0 and offset + flat.nbytes <= region.parts[self.place].nbytes:
                return number, offset
        return -1, 0

    def _own(self, job: Job, chunk: int) -> Array:
        return job.flat[job.piece(self.place, chunk)]

    def _slot(self, areas: list[Array], place: int, job: Job, chunk: int) -> Array:
        start = chunk % 2 * CHUNK_BYTES
        return areas[place][start : start + CHUNK_BYTES].view(job.flat.dtype)

    def _reduce_chunk(self, job: Job, chunk: int) -> None:
        own = self._own(job, chunk)
        if job.sources is not None:
            # In place, all have been here since `begin`, and nobody writes to another's shard.
            if own.size:
                where = job.piece(self.place, chunk)
                self._combine(job.op, [source[where] for source in job.sources], own)
            return
        slot = self._slot(self._incoming, self.place, job, chunk)
        for shard in range(len(job.bounds)):
            if shard != self.place:
                part = job.flat[job.piece(shard, chunk)]
                slot[shard * job.width : shard * job.width + part.size] = part
        self.meet()
        if own.size:
            start = self.place * job.width
            slots = [self._slot(self._incoming, place, job, chunk) for place in range(len(self.members))]
            sources = [slot[start : start + own.size] for slot in slots]
            sources[self.place] = own
            self._combine(job.op, sources, own)

    def _share_chunk(self, job: Job, chunk: int) -> None:
        own = self._own(job, chunk)
        if job.sources is None:
            self._slot(self._outgoing, self.place, job, chunk)[: own.size] = own
        self.meet()
        for shard in range(len(job.bounds)):
            if shard == self.place:
                continue
            where = job.piece(shard, chunk)
            part = job.flat[where]
            if job.sources is None:
                part[:] = self._slot(self._outgoing, shard, job, chunk)[: part.size]
            else:
                part[:] = job.sources[shard][where]

    def _combine(self, op: str, sources: list[Array], own: Array) -> None:
        """Reduce equally long arrays in order into `own`, which may be one of them, block by block."""
        scratch = self._scratch.view(own.dtype)
        # The first two are read before their result is written; a later one must not be overwritten by it.
        direct = all(source.ctypes.data != own.ctypes.data for source in sources[2:])
        for start in range(0, own.size, scratch.size):
            stop = min(start + scratch.size, own.size)
            target = own[start:stop] if direct else scratch[: stop - start]
            combine(op, sources[0][start:stop], sources[1][start:stop], target)
            for source in sources[2:]:
                combine(op, target, source[start:stop], target)
            if not direct:
                own[start:stop] = target

    def _end(self, job: Job) -> None:
        """Keep arrays that are read in place from being changed before all have read them."""
        if job.sources is not None:
            self.meet()
