"""The ``rdma`` protocol: links over reliable RDMA connections, InfiniBand or RoCE.

Ranks find each other over TCP (`sparktf.transport.mesh`). Over its connections, once they are authenticated and never
before, they tell each other what RDMA needs to know, and later that they live. Tensors travel over RDMA alone, in
clear text: use it on a fabric that is trusted. What a link does is told in `sparktf.transport.rdma_link`.
"""

from __future__ import annotations

from sparktf.errors import TransportError
from sparktf.transport.collectives import CollectiveCommunicator
from sparktf.transport.contract import Array
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.rdma_adapter import Adapter
from sparktf.transport.rdma_device import check_locked_memory
from sparktf.transport.rdma_fabric import FAR_SLOT_BYTES, Fabric, link_bytes
from sparktf.transport.settings import Settings


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
    with connect_mesh(rank, size, exchange, secret, timeout, host, protocol="rdma") as mesh:
        return RdmaCommunicator(rank, size, mesh, timeout, settings)


def preflight(settings: Settings) -> str:
    """Return what this machine lacks for RDMA, and how to get it; empty where nothing is missing."""
    try:
        Adapter(settings).close()
        # Links to more than one peer take more, which they say once it is known how many.
        check_locked_memory(link_bytes(CollectiveCommunicator.chunk_bytes), settings.later_bytes)
    except TransportError as exc:
        return str(exc)
    return ""


class RdmaCommunicator(CollectiveCommunicator):
    """A communicator over RDMA.

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    mesh : Mesh
        Connections to all others; they belong to the communicator from now on, unless this raises.
    timeout : float
        Seconds without progress, and that connecting may take.
    settings : Settings
        Which device to use.

    Raises
    ------
    ProtocolError
        This rank or another lacks what RDMA needs, or cannot reach a third; says which rank, and what. Every rank
        raises it, and the mesh can be used for another protocol.
    """

    protocol = "rdma"

    def __init__(self, rank: int, size: int, mesh: Mesh, timeout: float, settings: Settings) -> None:
        super().__init__(rank, size, timeout)
        near = {(rank - 1) % size, (rank + 1) % size}
        slots = {peer: self.chunk_bytes if peer in near else FAR_SLOT_BYTES for peer in mesh.control}
        self._fabric = Fabric(rank, mesh, slots, timeout, settings, self._ask)
        self.stats.registrations += self._fabric.registrations
        for sock in (*mesh.data.values(), *mesh.back.values()):
            sock.close()
        self._begin(self._fabric.links, mesh.control, mesh.left)
        for peer in mesh.left:
            self._on_left(peer)

    def _drain(self) -> None:
        self._fabric.drain()

    def _allocate_bytes(self, nbytes: int) -> Array:
        return self._fabric.allocate(nbytes) if nbytes else super()._allocate_bytes(nbytes)

    def _on_left(self, peer: int) -> None:
        self._fabric.peer_left(peer)

    def _free(self) -> None:
        super()._free()
        self._fabric.close()
