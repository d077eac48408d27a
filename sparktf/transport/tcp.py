"""The ``tcp`` protocol: links over a mesh of sockets, encrypted where that was asked for."""

from __future__ import annotations

from collections.abc import Mapping

from sparktf.transport.channel import Channel, Outbox
from sparktf.transport.collectives import CollectiveCommunicator
from sparktf.transport.link import Link
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.settings import Settings
from sparktf.transport.tls import Credentials, TlsChannel, TlsControl
from sparktf.transport.watch import ControlSocket

# Up to here a thread costs more than it overlaps, and the kernel's smallest buffers hold it.
INLINE_BYTES = 64 * 1024
# Longer than what links with registered slots use: at 64 MiB a tenth faster than with half of it, or twice.
CHUNK_BYTES = 2 * 1024 * 1024


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
    credentials = Credentials() if settings.tls else None
    name, kind = ("tcp over TLS", TlsCommunicator) if settings.tls else ("tcp", TcpCommunicator)
    with connect_mesh(
        rank, size, exchange, secret, timeout, host, protocol=name, back=settings.tls, credentials=credentials
    ) as mesh:
        return kind(rank, size, mesh, timeout)


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
    chunk_bytes = CHUNK_BYTES

    def __init__(self, rank: int, size: int, mesh: Mesh, timeout: float) -> None:
        super().__init__(rank, size, timeout)
        self._outbox = Outbox(INLINE_BYTES, self._on_send_error)
        self._begin(self._make_links(mesh, timeout), self._make_controls(mesh), mesh.left)

    def _make_links(self, mesh: Mesh, timeout: float) -> dict[int, Link]:
        for sock in mesh.back.values():
            sock.close()
        return {
            peer: Channel(sock, peer, timeout, self._ask, self._outbox, self.stats) for peer, sock in mesh.data.items()
        }

    def _make_controls(self, mesh: Mesh) -> Mapping[int, ControlSocket]:
        return mesh.control

    def _free(self) -> None:
        self._outbox.close()
        super()._free()


class TlsCommunicator(TcpCommunicator):
    """The same over encrypted connections, of which the mesh has the third; parameters as for `TcpCommunicator`."""

    def _make_links(self, mesh: Mesh, timeout: float) -> dict[int, Link]:
        links: dict[int, Link] = {}
        for peer in mesh.data:
            # Of any two ranks, one sends by the first connection and the other by the second.
            pair = (mesh.data[peer], mesh.back[peer]) if self.rank < peer else (mesh.back[peer], mesh.data[peer])
            links[peer] = TlsChannel(*pair, peer, timeout, self._ask, self._outbox, self.stats)
        return links

    def _make_controls(self, mesh: Mesh) -> Mapping[int, ControlSocket]:
        return {peer: TlsControl(sock) for peer, sock in mesh.control.items()}
