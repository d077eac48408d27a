"""One link over RDMA: slots that the peer writes into, and credits that say which of them are free again.

A link has `SLOTS` slots of equal size in the memory of either end. The sender writes a fragment into the next slot of
the receiver, with an immediate that makes it known; the slot is free again when the receiver, having read it, has
given back a credit. Credits ride on fragments of the other direction, or travel alone once half of them are owed.

Three kinds of fragments:

- *data* is read from its slot;
- an *offer* holds the address and key of an array that the receiver of this operation's result has registered;
- *placed* data was written straight into an array that was offered; it takes its turn among the slots, which keeps
  order and flow control as they are, and leaves its slot empty.

What is sent out of registered memory is not copied at either end. Everything else is copied into a slot of the
sender's own first, which is free when the receiver's is: what was read there has been sent.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparktf.errors import TransportError
from sparktf.transport.contract import Array
from sparktf.transport.link import Gone, Link, Silent
from sparktf.transport.rdma_device import Adapter, Region, address_of
from sparktf.transport.rdma_queue import Card, Completions, QueuePair

SLOTS = 8
# Requests that may be outstanding: all slots, and as many credits twice over.
_DEPTH = 4 * SLOTS
# Pieces that share a fragment begin at multiples of this, so that `take` gives aligned memory.
_ALIGN = 64
# How long what a peer sent before its goodbye, which came over another way, may take to be seen.
_AFTER_GOODBYE = 0.1
# Registering costs nothing here, but a request of its own does: less than this is cheaper copied.
_DIRECT_BYTES = 16 * 1024
_CREDIT, _DATA, _OFFER, _PLACED = range(4)
_KIND_BITS = 2
_OFFER_FORM = struct.Struct("<QQ")


@dataclass(slots=True)
class _Fragment:
    """What one work request will carry: a header and a body, or a body alone, from registered memory or not."""

    kind: int
    header: bytes
    body: memoryview
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None


class RdmaLink(Link):
    """The link to one peer.

    Parameters
    ----------
    adapter : Adapter
        The device.
    completions : Completions
        Shared by all links of a communicator.
    regions : list of Region
        Memory of `Communicator.allocate`; shared, and may grow.
    peer : int
        The rank at the other end.
    slot_bytes : int
        Longest fragment; the same at both ends, a multiple of 64.
    timeout : float
        Seconds without progress.
    on_quiet : callable
        Called when half of the timeout has passed without progress.
    """

    def __init__(
        self,
        adapter: Adapter,
        completions: Completions,
        regions: list[Region],
        peer: int,
        slot_bytes: int,
        timeout: float,
        on_quiet: Callable[[], None],
    ) -> None:
        self.peer = peer
        self._completions, self._regions = completions, regions
        self._slot_bytes, self._timeout, self._on_quiet = slot_bytes, timeout, on_quiet
        # The peer may write into the one, and into nothing else but what is offered to it.
        self._inbox = adapter.allocate(SLOTS * slot_bytes, remote=True)
        self._outbox = adapter.allocate(SLOTS * slot_bytes, remote=False)
        self._pair = QueuePair(adapter, completions, _DEPTH, 2 * SLOTS, self._outbox)
        completions.attach(self._pair.number, self._on_completion)
        self.card = Card(
            self._pair.number, self._pair.psn, adapter.port.gid, adapter.port.lid, adapter.port.mtu,
            self._inbox.address, self._inbox.rkey,
        )  # fmt: skip
        e = adapter.verbs.e
        self._statuses = {getattr(e, name): name for name in dir(e) if name.startswith("IBV_WC_") and "_ERR" in name}
        self._received = e.IBV_WC_RECV_RDMA_WITH_IMM
        self._remote = (0, 0)
        # Sending: what waits for a slot; slots used and given back in all; the last request out of user memory.
        self._waiting: deque[_Fragment] = deque()
        self._sent = self._freed = self._last_direct = 0
        self._base, self._target = 0, (0, 0)
        # Receiving: (kind, bytes) of fragments that have come, how many are done with, credits owed for them.
        self._arrived: deque[tuple[int, int]] = deque()
        self._done = self._owed = self._offset = self._lent = 0
        self._offers: deque[tuple[int, int]] = deque()
        self._events = 0
        self._broken = ""
        self._left_at: float | None = None

    def connect(self, card: Card) -> None:
        """Lead the link to the peer that the card is of."""
        self._pair.connect(card)
        self._remote = (card.address, card.rkey)

    def send(self, header: bytes, view: memoryview) -> None:
        """Send a header and a view; see `Link`."""
        self.post(view, header)
        self.flush()

    def post(self, view: memoryview, header: bytes = b"") -> None:
        """Begin to send; see `Link`."""
        key = self._source_key(view)
        if header and (key is not None or _aligned(len(header)) + view.nbytes > self._slot_bytes or not view.nbytes):
            self._waiting.append(_Fragment(_DATA, header, view[:0]))
            header = b""
        if view.nbytes:
            self._cut(_DATA, header, view, key, None)
        self._pump()

    def flush(self) -> None:
        """Wait until the memory of all that was posted may be changed; see `Link`."""
        self._wait(lambda: not self._waiting and self._pair.has_completed(self._last_direct), "taking data")

    def fill(self, view: memoryview) -> None:
        """Receive one piece; see `Link`."""
        self._give_back_lent()
        while view.nbytes:
            kind, length = self._next_fragment()
            count = min(length - self._offset, view.nbytes)
            if kind == _DATA:
                start = self._slot_start() + self._offset
                view[:count] = self._inbox.array.data[start : start + count]
            view = view[count:]
            self._advance(count)

    def take(self, nbytes: int) -> memoryview:
        """Receive one piece where it lies; see `Link`."""
        self._give_back_lent()
        kind, length = self._next_fragment()
        if kind != _DATA or self._offset + nbytes > length:
            raise TransportError(f"Expected a piece of {nbytes} bytes from rank {self.peer}. Received: {length} bytes.")
        start = self._slot_start() + self._offset
        self._lent = nbytes
        return self._inbox.array.data[start : start + nbytes]

    def offer(self, array: Array) -> None:
        """Let the peer place pieces straight into `array`; see `Link`."""
        address = address_of(array)
        region = self._region_of(address, array.nbytes)
        offer = _OFFER_FORM.pack(address, region.rkey) if region else _OFFER_FORM.pack(0, 0)
        self._waiting.append(_Fragment(_OFFER, offer, memoryview(b"")))
        self._pump()

    def accept(self, array: Array) -> None:
        """Learn where the peer wants pieces of `array`; see `Link`."""
        self._wait(lambda: bool(self._offers), "entering the operation")
        self._base, self._target = address_of(array), self._offers.popleft()

    def place(self, view: memoryview) -> None:
        """Begin to send a piece to where the peer wants it; see `Link`."""
        address, rkey = self._target
        if not address or not view.nbytes:
            self.post(view)
            return
        offset = address_of(np.frombuffer(view, np.uint8)) - self._base
        self._cut(_PLACED, b"", view, self._source_key(view), (address + offset, rkey))
        self._pump()

    def shutdown(self) -> None:
        """Make every call raise `Gone`; see `Link`."""
        self._broken = self._broken or "the link was shut down"
        self._completions.wake()

    def peer_left(self) -> None:
        """Hear that the peer has closed its communicator: it sends nothing more; called by any thread."""
        self._left_at = time.monotonic()
        self._completions.wake()

    def drain(self, seconds: float) -> None:
        """Wait until all that was sent is in the peer's memory, or will never be."""
        pair = self._pair
        if self._broken or pair.has_completed(pair.last):
            return
        last = pair.write((self._outbox.address, self._outbox.lkey), 0, self._remote, None, signal=True)
        deadline = time.monotonic() + seconds
        while not self._broken and not pair.has_completed(last) and (left := deadline - time.monotonic()) > 0:
            self._completions.turn(left)

    def close(self) -> None:
        """Destroy the queue pair; the slots are the adapter's to release."""
        self._pair.close()

    def _cut(self, kind: int, header: bytes, view: memoryview, key: int | None, target: tuple[int, int] | None) -> None:
        """Queue a view in fragments of at most a slot's size."""
        address = 0 if key is None else address_of(np.frombuffer(view, np.uint8))
        for start in range(0, view.nbytes, self._slot_bytes):
            body = view[start : start + self._slot_bytes]
            source = None if key is None else (address + start, key)
            there = None if target is None else (target[0] + start, target[1])
            self._waiting.append(_Fragment(kind, header, body, source, there))

    def _pump(self) -> None:
        """Post what slots and the send queue have room for, and credits where many are owed."""
        if self._broken:
            return
        while self._waiting and self._sent - self._freed < SLOTS and self._pair.has_room:
            self._post(self._waiting.popleft())
        if self._owed >= SLOTS // 2 and self._pair.has_room:
            self._write((self._outbox.address, self._outbox.lkey), 0, self._remote, _CREDIT, signal=False)

    def _post(self, fragment: _Fragment) -> None:
        start = self._sent % SLOTS * self._slot_bytes
        self._sent += 1
        source, length = fragment.source, fragment.body.nbytes
        if source is None:
            length = self._copy(fragment, start)
            source = (self._outbox.address + start, self._outbox.lkey)
        target = fragment.target or (self._remote[0] + start, self._remote[1])
        direct = fragment.source is not None
        number = self._write(source, length, target, fragment.kind, signal=direct)
        if direct:
            self._last_direct = number

    def _copy(self, fragment: _Fragment, start: int) -> int:
        """Copy a fragment into the own slot; return its length."""
        slots, header, body = self._outbox.array.data, fragment.header, fragment.body
        slots[start : start + len(header)] = header
        if not body.nbytes:
            return len(header)
        begin = start + _aligned(len(header))
        slots[begin : begin + body.nbytes] = body
        return begin + body.nbytes - start

    def _write(self, local: tuple[int, int], nbytes: int, remote: tuple[int, int], kind: int, *, signal: bool) -> int:
        immediate = self._owed << _KIND_BITS | kind
        self._owed = 0
        return self._pair.write(local, nbytes, remote, immediate, signal=signal)

    def _on_completion(self, completion: Any) -> None:
        self._events += 1
        if completion.status:
            # All that follows the first error is the same error again.
            name = self._statuses.get(completion.status, "unknown error")
            self._broken = self._broken or (
                f"RDMA failed with {name} (status {completion.status}, vendor's {completion.vendor_err}, "
                f"work request {completion.wr_id})"
            )
        elif completion.opcode == self._received:
            self._pair.receive()
            immediate = socket.ntohl(completion.imm_data)
            self._freed += immediate >> _KIND_BITS
            self._on_arrival(immediate & (1 << _KIND_BITS) - 1, completion.byte_len)
            self._pump()
        else:
            self._pair.completed(completion.wr_id)
            self._pump()

    def _on_arrival(self, kind: int, length: int) -> None:
        if kind == _CREDIT:
            return
        if kind == _OFFER:
            start = (self._done + len(self._arrived)) % SLOTS * self._slot_bytes
            self._offers.append(_OFFER_FORM.unpack_from(self._inbox.array.data, start))
        self._arrived.append((kind, length))
        self._skip_offers()

    def _skip_offers(self) -> None:
        """Give back the slots of offers that are next in turn: they were read when they came."""
        while self._arrived and self._arrived[0][0] == _OFFER:
            self._give_back()

    def _next_fragment(self) -> tuple[int, int]:
        self._wait(lambda: bool(self._arrived), "sending data")
        return self._arrived[0]

    def _advance(self, count: int) -> None:
        """Note that so much of the first fragment was read; pieces within it are aligned."""
        self._offset = _aligned(self._offset + count)
        if self._offset >= self._arrived[0][1]:
            self._offset = 0
            self._give_back()
            self._skip_offers()
            self._pump()

    def _give_back_lent(self) -> None:
        if self._lent:
            lent, self._lent = self._lent, 0
            self._advance(lent)

    def _give_back(self) -> None:
        self._arrived.popleft()
        self._done += 1
        self._owed += 1

    def _slot_start(self) -> int:
        return self._done % SLOTS * self._slot_bytes

    def _source_key(self, view: memoryview) -> int | None:
        """Return the local key of a view that is worth sending from where it is; None where it must be copied."""
        if view.nbytes < _DIRECT_BYTES or not self._regions:
            return None
        region = self._region_of(address_of(np.frombuffer(view, np.uint8)), view.nbytes)
        return region.lkey if region else None

    def _region_of(self, address: int, nbytes: int) -> Region | None:
        return next((region for region in self._regions if region.holds(address, nbytes)), None)

    def _wait(self, ready: Callable[[], bool], doing: str) -> None:
        """Return when `ready` says so; raise `Gone` or `Silent` where it never will."""
        seen, asked, since = -1, False, 0.0
        while not ready():
            now = time.monotonic()
            if self._broken:
                raise Gone(self.peer, self._broken)
            if self._left_at is not None and now - self._left_at > _AFTER_GOODBYE:
                raise Gone(self.peer, "it has left")
            if self._events != seen:
                seen, since, asked = self._events, now, False
            quiet = now - since
            if quiet >= self._timeout:
                raise Silent(self.peer, doing)
            if quiet >= self._timeout / 2 and not asked:
                asked = True
                self._on_quiet()
            wait = (self._timeout if asked else self._timeout / 2) - quiet
            self._completions.turn(wait if self._left_at is None else _AFTER_GOODBYE)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
