"""The ``tcp`` protocol: links over a mesh of sockets."""

from __future__ import annotations

from sparktf.transport.channel import Channel, Outbox
from sparktf.transport.collectives import CollectiveCommunicator
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.settings import Settings

# Up to here a thread costs more than it overlaps, and the kernel's smallest buffers hold it.
INLINE_BYTES = 64 * 1024


def connect(
    *,
    rank: int,
    size: int,
    exchange: Exchange,
    secret: bytes,
    timeout: float,
    host: str | None,
    settings: Settings,
) -> TcpCommunicator:
    """Join a group of at least two over TCP; arguments as in `sparktf.transport.connect`."""
    mesh = connect_mesh(rank, size, exchange, secret, timeout, host, protocol="tcp")
    return TcpCommunicator(rank, size, mesh, timeout)


class TcpCommunicator(CollectiveCommunicator):
    """A communicator over a connected mesh.

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    mesh : Mesh
        Connections to all others; they belong to the communicator from now on. The third is closed if there.
    timeout : float
        Seconds without progress.
    """

    protocol = "tcp"

    def __init__(self, rank: int, size: int, mesh: Mesh, timeout: float) -> None:
        super().__init__(rank, size, timeout)
        self._outbox = Outbox(INLINE_BYTES, self._on_send_error)
        for sock in mesh.back.values():
            sock.close()
        channels = {peer: Channel(sock, peer, timeout, self._ask, self._outbox) for peer, sock in mesh.data.items()}
        self._begin(channels, mesh.control)

    def _free(self) -> None:
        self._outbox.close()
        super()._free()
