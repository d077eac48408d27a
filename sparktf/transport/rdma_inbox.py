"""What an RDMA link receives: fragments that a peer has written into this rank's slots, read in turn.

Knows no device: it is told what has come, and tells how many slots are free again.
"""

from __future__ import annotations

import struct
from collections import deque

from sparktf.transport.contract import Array

SLOTS = 8
# Pieces that share a fragment begin at multiples of this, so that what is lent is aligned memory.
ALIGN = 64
CREDIT, DATA, OFFER, PLACED = range(4)
"""What an immediate announces: nothing but credits; or data in the next slot; or an offer in it; or data that was
written straight into an array that was offered, for which the next slot is left empty."""

# An immediate's 32 bits: the kind, and above it how many slots are free again.
_KIND_BITS = 2
# Address and key; 0 and 0 offer nothing.
_OFFER_FORM = struct.Struct("<QQ")

Target = tuple[int, int]


def pack_immediate(kind: int, credits: int) -> int:
    """Return the 32 bits that go with a fragment."""
    return credits << _KIND_BITS | kind


def unpack_immediate(immediate: int) -> tuple[int, int]:
    """Return the kind and the credits."""
    return immediate & (1 << _KIND_BITS) - 1, immediate >> _KIND_BITS


def pack_offer(target: Target) -> bytes:
    """Return the contents of an offer."""
    return _OFFER_FORM.pack(*target)


def aligned(nbytes: int) -> int:
    """Return where the piece after one of so many bytes begins."""
    return -(-nbytes // ALIGN) * ALIGN


class Inbox:
    """The slots that one peer writes into.

    A slot is in use from the moment the peer writes into it until its fragment has been read, in order.

    Parameters
    ----------
    memory : ndarray
        `SLOTS` slots of equal size, uint8.

    Attributes
    ----------
    owed : int
        Slots that have become free since the peer was last told; whoever tells it sets this to 0.
    offers : deque of (int, int)
        Addresses and keys that the peer has offered, the oldest first; taken by whoever uses them.
    """

    def __init__(self, memory: Array) -> None:
        self._memory = memory.data
        self._slot_bytes = memory.nbytes // SLOTS
        self._fragments: deque[tuple[int, int]] = deque()
        self._done = self._offset = self._lent = 0
        self.owed = 0
        self.offers: deque[Target] = deque()

    @property
    def ready(self) -> bool:
        """Whether there is a fragment to be read."""
        return bool(self._fragments)

    def arrive(self, kind: int, length: int) -> None:
        """Note that a fragment has come."""
        if kind == OFFER:
            start = (self._done + len(self._fragments)) % SLOTS * self._slot_bytes
            address, key = _OFFER_FORM.unpack_from(self._memory, start)
            self.offers.append((address, key))
        self._fragments.append((kind, length))
        self._skip_offers()

    def read(self, view: memoryview) -> int:
        """Read as much as `view` takes and the first fragment has; return how much that was."""
        kind, length = self._fragments[0]
        count = min(length - self._offset, view.nbytes)
        if kind == DATA:
            start = self._start()
            view[:count] = self._memory[start : start + count]
        self._advance(count)
        return count

    def lend(self, nbytes: int) -> memoryview | None:
        """Return the next bytes where they lie, until `give_back`; None where they are not in one fragment."""
        kind, length = self._fragments[0]
        if kind != DATA or self._offset + nbytes > length:
            return None
        start = self._start()
        self._lent = nbytes
        return self._memory[start : start + nbytes]

    def give_back(self) -> None:
        """End what was lent, if anything."""
        if self._lent:
            lent, self._lent = self._lent, 0
            self._advance(lent)

    def _start(self) -> int:
        return self._done % SLOTS * self._slot_bytes + self._offset

    def _advance(self, count: int) -> None:
        self._offset = aligned(self._offset + count)
        if self._offset >= self._fragments[0][1]:
            self._offset = 0
            self._free()
            self._skip_offers()

    def _skip_offers(self) -> None:
        """Free the slots of offers that are next in turn: they were read when they came."""
        while self._fragments and self._fragments[0][0] == OFFER:
            self._free()

    def _free(self) -> None:
        self._fragments.popleft()
        self._done += 1
        self.owed += 1
