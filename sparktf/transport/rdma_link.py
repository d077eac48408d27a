"""One link over RDMA: slots that the peer writes into, and credits that say which of them are free again.

A link has `SLOTS` slots of equal size in the memory of either end. The sender writes a fragment into the next slot of
the receiver, with an immediate that makes it known; the slot is free again when the receiver, having read it, has
given back a credit. Credits ride on fragments of the other direction, or travel alone once half of them are owed.

Before a ring operation each rank offers its array to the rank on its left, by address and key, where the array was
allocated by the communicator. Finished pieces are then placed straight into it. They take their turn among the slots
all the same, which keeps order and flow control as they are.

What is sent out of registered memory is not copied on the way. Everything else is copied into a slot of the sender's
own first; that slot is free when the receiver's is, as what has been read there has been sent.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparktf.errors import TransportError
from sparktf.transport.contract import Array
from sparktf.transport.link import Gone, Link, Silent
from sparktf.transport.rdma_adapter import Adapter, Region, address_of
from sparktf.transport.rdma_inbox import (
    CREDIT,
    DATA,
    OFFER,
    PLACED,
    SLOTS,
    Inbox,
    Target,
    aligned,
    pack_immediate,
    pack_offer,
    unpack_immediate,
)
from sparktf.transport.rdma_queue import Card, Completions, QueuePair

# Requests that may be outstanding: for every slot a fragment and a credit, twice over.
_DEPTH = 4 * SLOTS
# Less than this is cheaper to copy than to send on its own.
_DIRECT_BYTES = 16 * 1024
# How long what a peer sent before its goodbye, which travels another way, may take to be seen.
_AFTER_GOODBYE = 0.1
_NOWHERE: Target = (0, 0)


@dataclass(slots=True)
class _Fragment:
    """What one work request will carry: a header and a body, or a body alone out of registered memory."""

    kind: int
    header: bytes
    body: memoryview
    source: Target | None = None
    target: Target | None = None


class RdmaLink(Link):
    """The link to one peer.

    Parameters
    ----------
    adapter : Adapter
        The device.
    completions : Completions
        Shared by all links of a communicator.
    regions : list of Region
        Memory of `Communicator.allocate`; shared by all links, and may grow.
    peer : int
        The rank at the other end.
    slot_bytes : int
        Longest fragment; the same at both ends, a multiple of 64.
    timeout : float
        Seconds without progress.
    on_quiet : callable
        Called when half of the timeout has passed without progress.
    """

    sends_alone = False

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
        slots = adapter.allocate(SLOTS * slot_bytes, remote=True)
        self._own_slots = adapter.allocate(SLOTS * slot_bytes, remote=False)
        self._inbox = Inbox(slots.array)
        self._pair = QueuePair(adapter, completions, _DEPTH, 2 * SLOTS, self._own_slots)
        completions.attach(self._pair.number, self._on_completion)
        self.card = Card.of(self._pair, adapter.port, slots)
        self._statuses = adapter.statuses
        self._is_arrival = adapter.verbs.e.IBV_WC_RECV_RDMA_WITH_IMM
        self._peer_slots = _NOWHERE
        self._waiting: deque[_Fragment] = deque()
        # Fragments sent, and those of them whose slot is free again.
        self._sent = self._freed = 0
        # The last request out of the caller's memory, and the last that asks whether the peer can be reached.
        self._last_direct = self._probe = 0
        # Where the array of the operation begins, here and at the peer.
        self._base, self._target = 0, _NOWHERE
        self._events = 0
        self._broken = ""
        self._left_at: float | None = None

    def connect(self, card: Card) -> None:
        """Lead the link to the peer that the card is of."""
        self._pair.connect(card)
        self._peer_slots = (card.address, card.rkey)

    def probe(self) -> None:
        """Begin to find out whether the peer can be reached: write nothing, and have its device confirm that."""
        self._probe = self._pair.write(self._own_slots.here, 0, self._peer_slots, None, signal=True)

    def await_probe(self, deadline: float) -> None:
        """Return once the peer's device has answered.

        Parameters
        ----------
        deadline : float
            Absolute time, as of ``time.monotonic()``.

        Raises
        ------
        TransportError
            It does not answer.
        """
        if not self._answered(deadline):
            raise TransportError(
                f"rank {self.peer} cannot be reached over RDMA from {self.card.gid}: "
                f"{self._broken or 'its device does not answer'}. Are both ports of one network? SPARKTF_RDMA_DEVICE "
                "and SPARKTF_RDMA_GID_INDEX choose others."
            )

    def send(self, header: bytes, view: memoryview) -> None:
        """Send a header and a view; see `Link`."""
        self.post(view, header)
        self.flush()

    def post(self, view: memoryview, header: bytes = b"") -> None:
        """Begin to send; see `Link`."""
        source = self._source(view)
        together = source is None and view.nbytes and aligned(len(header)) + view.nbytes <= self._slot_bytes
        if header and not together:
            self._waiting.append(_Fragment(DATA, header, view[:0]))
            header = b""
        self._cut(DATA, header, view, source, None)
        self._pump()

    def flush(self) -> None:
        """Wait until the memory of all that was posted may be changed; see `Link`."""
        self._wait(lambda: not self._waiting and self._pair.has_completed(self._last_direct), "taking data")

    def fill(self, view: memoryview) -> None:
        """Receive one piece; see `Link`."""
        self._inbox.give_back()
        while view.nbytes:
            self._wait_for_data()
            view = view[self._inbox.read(view) :]
            self._pump()

    def take(self, nbytes: int) -> memoryview:
        """Receive one piece where it lies; see `Link`."""
        self._inbox.give_back()
        self._pump()
        self._wait_for_data()
        view = self._inbox.lend(nbytes)
        if view is None:
            raise TransportError(f"Expected a piece of {nbytes} bytes from rank {self.peer}. Received: another length.")
        return view

    def offer(self, array: Array) -> None:
        """Let the peer place pieces straight into `array`; see `Link`."""
        address = address_of(array)
        region = self._region_of(address, array.nbytes)
        target = (address, region.rkey) if region else _NOWHERE
        self._waiting.append(_Fragment(OFFER, pack_offer(target), memoryview(b"")))
        self._pump()

    def accept(self, array: Array) -> None:
        """Learn where the peer wants pieces of `array`; see `Link`."""
        self._wait(lambda: bool(self._inbox.offers), "entering the operation")
        self._base, self._target = address_of(array), self._inbox.offers.popleft()

    def place(self, view: memoryview) -> None:
        """Begin to send a piece to where the peer wants it; see `Link`."""
        if self._target == _NOWHERE or not view.nbytes:
            self.post(view)
            return
        address, rkey = self._target
        offset = address_of(np.frombuffer(view, np.uint8)) - self._base
        self._cut(PLACED, b"", view, self._source(view), (address + offset, rkey))
        self._pump()

    def set_timeout(self, seconds: float) -> None:
        """Wait for so many seconds from now on; see `Link`."""
        self._timeout = seconds

    def shutdown(self) -> None:
        """Make every call raise `Gone`; see `Link`."""
        self._broken = self._broken or "the link was shut down"
        self._completions.wake()

    def peer_left(self) -> None:
        """Hear that the peer has closed its communicator and sends nothing more; called by any thread."""
        self._left_at = time.monotonic()
        self._completions.wake()

    def drain(self, seconds: float) -> None:
        """Wait until all that was sent is in the peer's memory, or will never be."""
        if self._broken or self._pair.has_completed(self._pair.last):
            return
        self.probe()
        self._answered(time.monotonic() + seconds)

    def close(self) -> None:
        """Destroy the queue pair; the slots are the adapter's to release."""
        self._pair.close()

    def _answered(self, deadline: float) -> bool:
        """Wait until the probe, and with it all that was posted before, has completed; return whether it has."""
        while not self._pair.has_completed(self._probe) and not self._broken:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._completions.turn(left)
        return self._pair.has_completed(self._probe)

    def _cut(self, kind: int, header: bytes, view: memoryview, source: Target | None, target: Target | None) -> None:
        """Queue a view in fragments of at most a slot's size."""
        for start in range(0, view.nbytes, self._slot_bytes):
            body = view[start : start + self._slot_bytes]
            self._waiting.append(_Fragment(kind, header, body, _further(source, start), _further(target, start)))

    def _pump(self) -> None:
        """Post what slots and the send queue have room for, and credits where many are owed."""
        if self._broken:
            return
        while self._waiting and self._sent - self._freed < SLOTS and self._pair.has_room:
            self._post(self._waiting.popleft())
        if self._inbox.owed >= SLOTS // 2 and self._pair.has_room:
            self._write(self._own_slots.here, 0, self._peer_slots, CREDIT, signal=False)

    def _post(self, fragment: _Fragment) -> None:
        start = self._sent % SLOTS * self._slot_bytes
        self._sent += 1
        target = fragment.target or (self._peer_slots[0] + start, self._peer_slots[1])
        if fragment.source is None:
            source = (self._own_slots.address + start, self._own_slots.lkey)
            self._write(source, self._copy(fragment, start), target, fragment.kind, signal=False)
        else:
            # Signalled, as the caller wants to know when its memory is free again.
            nbytes = fragment.body.nbytes
            self._last_direct = self._write(fragment.source, nbytes, target, fragment.kind, signal=True)

    def _copy(self, fragment: _Fragment, start: int) -> int:
        """Copy a fragment into the own slot; return its length."""
        slots, header, body = self._own_slots.array.data, fragment.header, fragment.body
        slots[start : start + len(header)] = header
        if not body.nbytes:
            return len(header)
        begin = start + aligned(len(header))
        slots[begin : begin + body.nbytes] = body
        return begin + body.nbytes - start

    def _write(self, local: Target, nbytes: int, remote: Target, kind: int, *, signal: bool) -> int:
        immediate = pack_immediate(kind, self._inbox.owed)
        self._inbox.owed = 0
        return self._pair.write(local, nbytes, remote, immediate, signal=signal)

    def _on_completion(self, completion: Any) -> None:
        self._events += 1
        if completion.status:
            # All that follows the first error is its consequence.
            name = self._statuses.get(completion.status, "an unknown error")
            self._broken = self._broken or (
                f"RDMA failed with {name} (status {completion.status}, vendor's {completion.vendor_err}, "
                f"work request {completion.wr_id})"
            )
            return
        if completion.opcode == self._is_arrival:
            self._pair.receive()
            kind, credits = unpack_immediate(socket.ntohl(completion.imm_data))
            self._freed += credits
            if kind != CREDIT:
                self._inbox.arrive(kind, completion.byte_len)
        else:
            self._pair.completed(completion.wr_id)
        self._pump()

    def _source(self, view: memoryview) -> Target | None:
        """Return address and local key of a view that is worth sending from where it is; None: it must be copied."""
        if view.nbytes < _DIRECT_BYTES or not self._regions:
            return None
        address = address_of(np.frombuffer(view, np.uint8))
        region = self._region_of(address, view.nbytes)
        return (address, region.lkey) if region else None

    def _region_of(self, address: int, nbytes: int) -> Region | None:
        return next((region for region in self._regions if region.holds(address, nbytes)), None)

    def _wait_for_data(self) -> None:
        if not self._inbox.ready:
            self._wait(lambda: self._inbox.ready, "sending data")

    def _wait(self, ready: Callable[[], bool], doing: str) -> None:
        """Return when `ready` says so; raise `Gone` or `Silent` where it never will."""
        seen, asked, since = -1, False, 0.0
        while not ready():
            now = time.monotonic()
            left = self._left_at is not None and now - self._left_at > _AFTER_GOODBYE
            if self._broken or left:
                # What had come before counts, as it does with a connection that ends.
                if self._completions.turn(0.0):
                    continue
                raise Gone(self.peer, self._broken or "it has left")
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


def _further(target: Target | None, nbytes: int) -> Target | None:
    return None if target is None else (target[0] + nbytes, target[1])
