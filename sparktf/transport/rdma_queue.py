"""Queue pairs, and the completion queue that all of a rank's queue pairs share.

The reliable connections of the InfiniBand Architecture Specification, volume 1, as ``ibv_create_qp(3)`` and
``ibv_modify_qp(3)`` describe them: in order, without loss, or an error completion.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from sparktf.errors import HandshakeError, TransportError
from sparktf.transport.rdma_adapter import Adapter, Region, close_channel, open_channel
from sparktf.transport.rdma_device import Port, refusals

# An unanswered packet is sent again after 4.096 us * 2^18 = 1.1 s, six times: an error after 7.5 s. Losses are mostly
# reported by the receiver, long before. Soft-RoCE under emulation resends needlessly at 2^14, and never gives up at 7.
_TIMEOUT, _RETRIES = 18, 6
# Credits see to it that the receiver is always ready; where it is not, that is a fault to be reported.
_NOT_READY_RETRIES, _NOT_READY_TIMER = 6, 12
# Every connection's number of outstanding reads; none are used, but 0 is refused by some devices.
_READS = 1
# One completion in so many requests: fewer wake-ups, and still no full queue.
_SIGNAL_EVERY = 8
_POLL = 32
# The numbers on a card, and how many bits each has.
_BITS = {"number": 24, "psn": 24, "lid": 16, "mtu": 3, "address": 64, "rkey": 32}


@dataclass(frozen=True)
class Card:
    """What a peer must know to write to this rank: the queue pair, and the memory that it may write into.

    Attributes
    ----------
    number, psn : int
        The queue pair's number, and the number of the first packet that it sends.
    gid, lid, mtu : str, int, int
        The port's address and MTU; see `Port`.
    address, rkey : int
        Where the peer's slots begin, and the key to them.
    """

    number: int
    psn: int
    gid: str
    lid: int
    mtu: int
    address: int
    rkey: int

    @classmethod
    def of(cls, pair: QueuePair, port: Port, slots: Region) -> Card:
        """Return the card of a queue pair and the slots behind it."""
        return cls(pair.number, pair.psn, port.gid, port.lid, port.mtu, slots.address, slots.rkey)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Card:
        """Read what `to_json` has made; raise `HandshakeError` where it is something else."""
        whole = all(type(fields.get(name)) is int and 0 <= fields[name] < 1 << bits for name, bits in _BITS.items())
        if fields.keys() != {*_BITS, "gid"} or not whole or not isinstance(fields["gid"], str):
            raise HandshakeError(f"Expected a card of gid, {', '.join(_BITS)}. Received: {str(fields)[:200]}.")
        return cls(**fields)


class Completions:
    """A completion queue with its channel: tells each queue pair's owner what has completed, and waits for more.

    Parameters
    ----------
    adapter : Adapter
        The device.
    entries : int
        How many completions it must hold.
    """

    def __init__(self, adapter: Adapter, entries: int) -> None:
        self._owners: dict[int, Callable[[Any], None]] = {}
        self._channel, descriptor = open_channel(adapter)
        with refusals(f"making a queue of {entries} completions"):
            self.queue = adapter.verbs.cq.CQ(adapter.context, entries, None, self._channel, 0)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Closed under whoever wakes, the eventfd's number could be another file's by then.
        self._waking, self._closed = threading.Lock(), False
        self._descriptor = descriptor
        self._select = select.poll()
        self._select.register(descriptor, select.POLLIN)
        self._select.register(self._wake, select.POLLIN)

    def attach(self, number: int, owner: Callable[[Any], None]) -> None:
        """Have the completions of a queue pair given to `owner`."""
        self._owners[number] = owner

    def turn(self, seconds: float) -> bool:
        """Give out what has completed; where that is nothing, wait for something, or for `wake`.

        Returns
        -------
        bool
            Whether anything was given out.
        """
        if self._give_out():
            return True
        self.queue.req_notify()
        # What completed before the request is not notified of.
        if self._give_out():
            return True
        for descriptor, _ in self._select.poll(max(0.0, seconds) * 1000):
            if descriptor == self._descriptor:
                self._channel.get_cq_event(self.queue)
                self.queue.ack_events(1)
            else:
                os.eventfd_read(self._wake)
        return self._give_out()

    def wake(self) -> None:
        """Make `turn` come back, the next one where none waits; called by any thread, at any time."""
        with self._waking, suppress(OSError):
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the queue and its channel; every queue pair must have been closed."""
        self.queue.close()
        close_channel(self._channel)
        with self._waking:
            self._closed = True
            os.close(self._wake)

    def _give_out(self) -> bool:
        count, completions = self.queue.poll(_POLL)
        for completion in completions:
            owner = self._owners.get(completion.qp_num)
            if owner is not None:
                owner(completion)
        return bool(count)


class QueuePair:
    """One reliable connection.

    Parameters
    ----------
    adapter : Adapter
        The device.
    completions : Completions
        Where completions go.
    depth : int
        How many requests may be outstanding.
    receives : int
        How many immediates may be on their way to this rank.
    scratch : Region
        Named by receive requests, which must name some memory; nothing is written through them.
    """

    def __init__(self, adapter: Adapter, completions: Completions, depth: int, receives: int, scratch: Region) -> None:
        self._adapter = adapter
        self._error = adapter.verbs.Error
        self._depth = depth
        self._posted = self._completed = self._signalled = 0
        self._longest = adapter.port.longest_request
        verbs, e = adapter.verbs, adapter.verbs.e
        capacity = verbs.qp.QPCap(max_send_wr=depth, max_recv_wr=receives, max_send_sge=1, max_recv_sge=1)
        queue = completions.queue
        attributes = verbs.qp.QPInitAttr(qp_type=e.IBV_QPT_RC, scq=queue, rcq=queue, cap=capacity, sq_sig_all=0)
        initial = verbs.qp.QPAttr(port_num=adapter.port.number)
        initial.qp_access_flags = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        with refusals(f"making a queue pair on {adapter.name}"):
            self._pair = verbs.qp.QP(adapter.domain, attributes)
            self._pair.to_init(initial)
        self.number: int = self._pair.qp_num
        self.psn = secrets.randbits(24)
        self._prepare_requests(verbs, scratch)
        for _ in range(receives):
            self.receive()

    def _prepare_requests(self, verbs: SimpleNamespace, scratch: Region) -> None:
        """Make the requests that are posted again and again; making one costs more than posting it."""
        e = verbs.e
        self._plain, self._immediate = e.IBV_WR_RDMA_WRITE, e.IBV_WR_RDMA_WRITE_WITH_IMM
        self._flag = e.IBV_SEND_SIGNALED
        element = verbs.wr.SGE(scratch.address, 8, scratch.lkey)
        self._receive = verbs.wr.RecvWR(num_sge=1, sg=[element])
        element.close()
        self._element = verbs.wr.SGE(scratch.address, 0, scratch.lkey)
        self._write = verbs.wr.SendWR(opcode=self._immediate, num_sge=1, sg=[self._element], send_flags=0)
        # The request copied the element; now it shares it, and frees it when it is closed.
        self._write.sg_list = self._element

    def connect(self, card: Card) -> None:
        """Lead the queue pair to the peer that the card is of."""
        verbs, port = self._adapter.verbs, self._adapter.port
        attributes = verbs.qp.QPAttr(port_num=port.number, path_mtu=min(card.mtu, port.mtu))
        attributes.dest_qp_num, attributes.rq_psn = card.number, card.psn
        attributes.max_dest_rd_atomic, attributes.min_rnr_timer = _READS, _NOT_READY_TIMER
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = _TIMEOUT, _RETRIES, _NOT_READY_RETRIES
        attributes.sq_psn, attributes.max_rd_atomic = self.psn, _READS
        with refusals(f"leading a queue pair to {card.gid}, from {port.gid} (SPARKTF_RDMA_GID_INDEX chooses)"):
            route = verbs.addr.GlobalRoute(dgid=verbs.addr.GID(card.gid), sgid_index=port.gid_index, hop_limit=64)
            attributes.ah_attr = verbs.addr.AHAttr(port_num=port.number, is_global=1, gr=route, dlid=card.lid)
            self._pair.to_rts(attributes)

    @property
    def has_room(self) -> bool:
        """Whether another request may be posted."""
        return self._posted - self._completed < self._depth

    def write(
        self, local: tuple[int, int], nbytes: int, remote: tuple[int, int], immediate: int | None, *, signal: bool
    ) -> int:
        """Post an RDMA write.

        Parameters
        ----------
        local, remote : (int, int)
            Address and key of what is written, and of where it is written to.
        nbytes : int
            How much; 0 writes nothing, and delivers the immediate.
        immediate : int or None
            32 bits that the peer is given with the completion of one of its receive requests; None: it hears nothing.
        signal : bool
            Whether a completion is wanted. Some others are signalled as well; each covers all that was posted before.

        Returns
        -------
        int
            The request's number, for `has_completed`.
        """
        if nbytes > self._longest:
            raise TransportError(
                f"Expected a work request of at most {self._longest} bytes (the port's max_msg_sz, or 1 MiB). "
                f"Received: {nbytes}."
            )
        self._posted += 1
        signal = signal or self._posted - self._signalled >= _SIGNAL_EVERY
        element, request = self._element, self._write
        element.addr, element.lkey = local
        element.length = nbytes
        request.wr_id = self._posted
        request.send_flags = self._flag if signal else 0
        if immediate is None:
            request.opcode = self._plain
        else:
            request.opcode = self._immediate
            request.imm_data = socket.htonl(immediate)
        request.set_wr_rdma(remote[1], remote[0])
        try:
            self._pair.post_send(request)
        except self._error as exc:
            raise TransportError(f"The device refuses an RDMA write of {nbytes} bytes: {exc}.") from exc
        if signal:
            self._signalled = self._posted
        return self._posted

    def completed(self, number: int) -> None:
        """Note that a request has completed, and with it all before."""
        self._completed = number

    def has_completed(self, number: int) -> bool:
        """Return whether a request is known to have completed; its memory may then be changed."""
        return self._completed >= number

    @property
    def last(self) -> int:
        """The number of the last request."""
        return self._posted

    def receive(self) -> None:
        """Be ready for one more immediate."""
        try:
            self._pair.post_recv(self._receive)
        except self._error as exc:
            raise TransportError(f"The device refuses a receive request: {exc}.") from exc

    def close(self) -> None:
        """Destroy the queue pair and its requests."""
        self._pair.close()
        self._write.close()
        self._receive.close()
