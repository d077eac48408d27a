"""The ``rdma`` protocol: links over reliable RDMA connections, InfiniBand or RoCE.

Ranks find each other over TCP (`sparktf.transport.mesh`). Over its connections, once they are authenticated and never
before, they tell each other what RDMA needs to know, and later that they live. Tensors travel over RDMA alone, in
clear text: use it on a fabric that is trusted. What a link does is told in `sparktf.transport.rdma_link`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from sparktf.errors import HandshakeError, ProtocolError, TransportError
from sparktf.transport.collectives import CollectiveCommunicator
from sparktf.transport.contract import Array
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.rdma_adapter import Adapter, Region
from sparktf.transport.rdma_device import check_locked_memory
from sparktf.transport.rdma_inbox import SLOTS
from sparktf.transport.rdma_link import RdmaLink
from sparktf.transport.rdma_queue import Card, Completions
from sparktf.transport.settings import Settings
from sparktf.transport.survey import share

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
    mesh = connect_mesh(rank, size, exchange, secret, timeout, host, protocol="rdma")
    try:
        return RdmaCommunicator(rank, size, mesh, timeout, settings)
    except BaseException:
        mesh.close()
        raise


def join(rank: int, size: int, mesh: Mesh, timeout: float, settings: Settings) -> RdmaCommunicator:
    """Make a communicator of a connected mesh, which belongs to it from then on unless this raises."""
    return RdmaCommunicator(rank, size, mesh, timeout, settings)


def preflight(settings: Settings) -> str:
    """Return what this machine lacks for RDMA, and how to get it; empty where nothing is missing."""
    try:
        Adapter(settings).close()
    except ProtocolError as exc:
        return str(exc)
    return ""


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
                share(mesh, rank, {"trouble": str(exc)}, deadline)
                raise
            cards = {str(peer): link.card.to_json() for peer, link in links.items()}
            told = share(mesh, rank, {"cards": cards}, deadline)
            for peer, facts in enumerate(told):
                if "trouble" in facts:
                    raise ProtocolError(f"rank {peer} cannot use RDMA: {facts['trouble']}")
            for peer, link in links.items():
                link.connect(_read_card(told[peer], peer, rank))
            # Nobody may write before the other side's queue pair leads back.
            share(mesh, rank, {}, deadline)
            self._resources = undo.pop_all()
        for sock in (*mesh.data.values(), *mesh.back.values()):
            sock.close()
        self._rdma_links = links
        self._begin(links, mesh.control)

    def close(self) -> None:
        """Wait until what was sent is in the peers' memory, and leave; see `Communicator`."""
        with self._lock:
            if self._failure is None:
                for link in self._rdma_links.values():
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

    def _on_left(self, peer: int) -> None:
        self._rdma_links[peer].peer_left()

    def _free(self) -> None:
        self._watch.stop()
        self._resources.close()
        self._regions.clear()
        self._buffers.clear()


def _read_card(facts: dict[str, Any], peer: int, rank: int) -> Card:
    cards = facts.get("cards")
    fields = cards.get(str(rank)) if isinstance(cards, dict) else None
    if not isinstance(fields, dict):
        raise HandshakeError(f"Expected a card of rank {peer}'s queue pair. Received: {str(facts)[:200]}.")
    return Card.from_json(fields)
