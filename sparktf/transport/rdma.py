"""The ``rdma`` protocol: links over reliable RDMA connections, InfiniBand or RoCE.

Ranks find each other over TCP (`sparktf.transport.mesh`); over the authenticated control connections they tell each
other what RDMA needs to know, and later that they live. Tensors travel over RDMA alone, in clear text: use it on a
fabric that is trusted. What a link does is told in `sparktf.transport.rdma_link`.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from socket import socket
from typing import Any

from sparktf.errors import HandshakeError, PeerLostError, ProtocolError, TransportError, TransportTimeoutError
from sparktf.transport.collectives import CollectiveCommunicator
from sparktf.transport.contract import Array
from sparktf.transport.framing import recv_frame, send_frame
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.rdma_device import Adapter, Region, check_locked_memory
from sparktf.transport.rdma_link import SLOTS, RdmaLink
from sparktf.transport.rdma_queue import Card, Completions
from sparktf.transport.settings import Settings

_CARD = 1
_CARD_LIMIT = 4096
# Slots of links that are in no ring: they carry small arrays, and what is sent point to point.
_FAR_SLOT_BYTES = 128 * 1024
# Completions that a link can have outstanding: its send queue and its receive queue, and some to spare.
_COMPLETIONS = 8 * SLOTS
# What a peer that has left may delay `close`, where its own reliability does not.
_DRAIN_SECONDS = 2.0


def connect(
    *,
    rank: int,
    size: int,
    exchange: Exchange,
    secret: bytes,
    timeout: float,
    host: str | None,
    settings: Settings,
) -> RdmaCommunicator:
    """Join a group of at least two over RDMA; arguments as in `sparktf.transport.connect`."""
    mesh = connect_mesh(rank, size, exchange, secret, timeout, host)
    try:
        return RdmaCommunicator(rank, size, mesh, timeout, settings)
    except BaseException:
        mesh.close()
        raise


def check(settings: Settings) -> None:
    """Raise `ProtocolError`, naming what is missing, where this machine cannot do RDMA as it is."""
    Adapter(settings).close()


class RdmaCommunicator(CollectiveCommunicator):
    """A communicator over RDMA.

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    mesh : Mesh
        Connections to all others; they belong to the communicator from now on.
    timeout : float
        Seconds without progress, and that connecting may take.
    settings : Settings
        Which device to use.

    Raises
    ------
    ProtocolError
        This rank or another lacks what RDMA needs; says which rank, and what.
    """

    protocol = "rdma"

    def __init__(self, rank: int, size: int, mesh: Mesh, timeout: float, settings: Settings) -> None:
        super().__init__(rank, size, timeout)
        self._regions: list[Region] = []
        deadline = time.monotonic() + timeout
        with ExitStack() as undo:
            try:
                links = self._open_links(mesh, settings, undo)
            except TransportError as exc:
                _tell(mesh.control, {peer: {"error": str(exc)} for peer in mesh.control}, deadline)
                raise
            _tell(mesh.control, {peer: link.card.to_json() for peer, link in links.items()}, deadline)
            for peer, fields in _hear(mesh.control, deadline).items():
                links[peer].connect(Card.from_json(fields))
            # Nobody may write before the other side's queue pair leads back.
            _tell(mesh.control, {peer: {} for peer in links}, deadline)
            _hear(mesh.control, deadline)
            self._resources = undo.pop_all()
        self._rdma_links = list(links.values())
        for sock in mesh.data.values():
            sock.close()
        self._begin(links, mesh.control)

    def close(self) -> None:
        """Wait until what was sent is in the peers' memory, and leave; see `Communicator`."""
        with self._lock:
            if self._failure is None:
                for link in self._rdma_links:
                    link.drain(_DRAIN_SECONDS)
            super().close()

    def _open_links(self, mesh: Mesh, settings: Settings, undo: ExitStack) -> dict[int, RdmaLink]:
        near = {(self.rank - 1) % self.size, (self.rank + 1) % self.size}
        slots = {peer: self.chunk_bytes if peer in near else _FAR_SLOT_BYTES for peer in mesh.control}
        check_locked_memory(2 * SLOTS * sum(slots.values()))
        self._adapter = Adapter(settings)
        undo.callback(self._adapter.close)
        if self._adapter.port.longest_request < self.chunk_bytes:
            raise ProtocolError(
                f"Expected {self._adapter.name} to take work requests of {self.chunk_bytes} bytes. "
                f"Received: max_msg_sz {self._adapter.port.longest_request}."
            )
        completions = Completions(self._adapter, _COMPLETIONS * len(slots))
        undo.callback(completions.close)
        links = {}
        for peer, slot_bytes in slots.items():
            link = RdmaLink(self._adapter, completions, self._regions, peer, slot_bytes, self._timeout, self._ask)
            undo.callback(link.close)
            links[peer] = link
            self.stats.registrations += 2
        return links

    def _allocate_bytes(self, nbytes: int) -> Array:
        if nbytes == 0:
            return super()._allocate_bytes(nbytes)
        region = self._adapter.allocate(nbytes, remote=True)
        self._regions.append(region)
        return region.array

    def _free(self) -> None:
        self._watch.stop()
        self._resources.close()
        self._regions.clear()
        self._buffers.clear()


def _tell(controls: dict[int, socket], messages: dict[int, dict[str, Any]], deadline: float) -> None:
    """Send every peer its message; the control connections are still this thread's."""
    for peer, sock in controls.items():
        send_frame(sock, _CARD, json.dumps(messages[peer]).encode(), max(0.0, deadline - time.monotonic()))


def _hear(controls: dict[int, socket], deadline: float) -> dict[int, dict[str, Any]]:
    """Return every peer's message; raise where one says that it cannot go on."""
    heard = {}
    for peer, sock in controls.items():
        try:
            _, payload = recv_frame(sock, max(0.0, deadline - time.monotonic()), _CARD_LIMIT)
            heard[peer] = json.loads(payload)
        except (PeerLostError, TransportTimeoutError) as exc:
            raise type(exc)(f"connecting over rdma: rank {peer}: {exc}") from exc
        except ValueError as exc:
            raise HandshakeError(f"connecting over rdma: rank {peer} sent what is no message: {exc}") from exc
        if "error" in heard[peer]:
            raise ProtocolError(f"rank {peer} says: {heard[peer]['error']}")
    return heard
