"""The ``shm`` protocol: reductions through shared memory within a machine, around a ring of machines between them.

Between machines it goes by sockets or, as ``auto`` may have it, over RDMA.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparktf.errors import ProtocolError, TransportError
from sparktf.transport import ring
from sparktf.transport.channel import Channel, Outbox
from sparktf.transport.collectives import CollectiveCommunicator
from sparktf.transport.contract import Array
from sparktf.transport.hosts import Hosts, find_hosts, host_identity
from sparktf.transport.link import Link
from sparktf.transport.mesh import Exchange, Mesh, connect_mesh
from sparktf.transport.rdma_fabric import FAR_SLOT_BYTES, Fabric
from sparktf.transport.reduction import chunk_bounds, finish, op_code
from sparktf.transport.segment import PATH_BYTES, Segment, on_disk, pack_path, unpack_path
from sparktf.transport.settings import Settings
from sparktf.transport.shared import STAGING_BYTES, Job, SharedGroup
from sparktf.transport.shm_link import ShmLink
from sparktf.transport.tcp import CHUNK_BYTES, INLINE_BYTES
from sparktf.transport.wire import pack_header

# Ranks that wait while others talk to another machine hear of them at least once in so many bytes.
_PART_BYTES = 16 * 1024 * 1024
_NOTHING = memoryview(b"")


def connect(
    *,
    rank: int,
    size: int,
    exchange: Exchange,
    secret: bytes,
    timeout: float,
    host: str | None,
    settings: Settings,
) -> ShmCommunicator:
    """Join a group of at least two on one machine; arguments as in `sparktf.transport.connect`.

    Raises
    ------
    ProtocolError
        The ranks are on several machines, or cannot open each other's memory.
    """
    with connect_mesh(rank, size, exchange, secret, timeout, host, protocol="shm", back=True) as mesh:
        hosts = survey_hosts(mesh, rank, settings, timeout)
        if len(hosts.groups) > 1:
            raise ProtocolError(
                "Expected all ranks on one machine, as protocol='shm' was asked for. Received: groups of ranks "
                f"{hosts.groups} that share no memory{f' ({hosts.trouble})' if hosts.trouble else ''}. Use "
                "protocol='auto', which goes through memory within machines and through sockets between them."
            )
        communicator = ShmCommunicator(rank, size, mesh, timeout, hosts)
        communicator.reason = f"protocol='shm' was asked for{on_disk(hosts.staging.values())}"
        return communicator


def survey_hosts(mesh: Mesh, rank: int, settings: Settings, timeout: float) -> Hosts:
    """Find out which ranks share memory; see `find_hosts`."""
    identity = host_identity() if settings.host_id is None else settings.host_id
    return find_hosts(mesh, rank, identity, STAGING_BYTES, timeout)


class ShmCommunicator(CollectiveCommunicator):
    """A communicator whose ranks on one machine reduce in each other's memory.

    Over several machines every rank first reduces a shard with the others on its machine, then around a ring of the
    ranks that hold the same shard on every machine, and then shares it on its machine again. There are as many shards
    as the machine with the fewest ranks has ranks; further ranks of other machines hold none.

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    mesh : Mesh
        Connections to all others, with the third; they belong to the communicator from now on.
    timeout : float
        Seconds without progress.
    hosts : Hosts
        Which ranks share memory.
    rdma : Settings or None
        Of the RDMA device that leads to other machines; None: sockets do.

    Raises
    ------
    ProtocolError
        As `Fabric` does: a rank lacks what RDMA needs. The mesh can be used for another protocol.
    """

    protocol = "shm"
    chunk_bytes = CHUNK_BYTES

    def __init__(
        self, rank: int, size: int, mesh: Mesh, timeout: float, hosts: Hosts, rdma: Settings | None = None
    ) -> None:
        super().__init__(rank, size, timeout)
        self._machines = len(hosts.groups)
        self._shards = min(len(group) for group in hosts.groups)
        self._fabric = None if rdma is None else self._make_fabric(mesh, hosts, rdma)
        self._outbox = Outbox(INLINE_BYTES, self._on_send_error)
        members = hosts.group_of(rank)
        links = self._make_links(mesh, members)
        self._local = SharedGroup(members, rank, links, [hosts.staging[member].array for member in members])
        self.stats.registrations += 1
        self._across: ring.Ring | None = None
        if neighbours := self._neighbours(hosts):
            left, right = (links[peer] for peer in neighbours)
            number = hosts.groups.index(members)
            self._across = ring.Ring(left, right, number, self._machines, self.chunk_bytes, self.stats)
        if self._machines > 1:
            self.protocol = "shm+rdma" if self._fabric else "shm+tcp"
        self._begin(links, mesh.control, mesh.left)
        for peer in mesh.left:
            self._on_left(peer)

    def _make_fabric(self, mesh: Mesh, hosts: Hosts, settings: Settings) -> Fabric:
        """Connect with all ranks on other machines over RDMA."""
        # Slots of the ring hold a chunk, and lie in locked memory: not longer than where all goes over RDMA.
        self.chunk_bytes = CollectiveCommunicator.chunk_bytes
        near, members = self._neighbours(hosts), hosts.group_of(self.rank)
        slots = {
            peer: self.chunk_bytes if peer in near else FAR_SLOT_BYTES for peer in mesh.data if peer not in members
        }
        fabric = Fabric(self.rank, mesh, slots, self._timeout, settings, self._ask)
        self.stats.registrations += fabric.registrations
        return fabric

    def _make_links(self, mesh: Mesh, members: Sequence[int]) -> dict[int, Link]:
        """Return links to all others, of which `members` are on this machine."""
        links: dict[int, Link] = {}
        for peer, sock in mesh.data.items():
            if peer in members:
                back = mesh.back[peer]
                links[peer] = ShmLink(sock, back, peer, self._timeout, self._ask, self._outbox, self.stats)
                continue
            mesh.back[peer].close()
            if self._fabric is None:
                links[peer] = Channel(sock, peer, self._timeout, self._ask, self._outbox, self.stats)
            else:
                sock.close()
                links[peer] = self._fabric.links[peer]
        return links

    def _neighbours(self, hosts: Hosts) -> tuple[int, ...]:
        """Return who holds this rank's shard on the machines before and after; nobody where it holds none."""
        members = hosts.group_of(self.rank)
        place, count = members.index(self.rank), len(hosts.groups)
        if count == 1 or place >= self._shards:
            return ()
        number = hosts.groups.index(members)
        return hosts.groups[(number - 1) % count][place], hosts.groups[(number + 1) % count][place]

    def _drain(self) -> None:
        if self._fabric is not None:
            self._fabric.drain()

    def _on_left(self, peer: int) -> None:
        if self._fabric is not None:
            self._fabric.peer_left(peer)

    def _free(self) -> None:
        self._outbox.close()
        super()._free()
        if self._fabric is not None:
            self._fabric.close()
        self._local.release()

    def _reduce_large(self, name: str, flat: Array, op: str, compression: str) -> None:
        """Reduce through memory; see `CollectiveCommunicator`."""
        if self._machines == 1:
            self._reduce_here(name, flat, op)
            return
        # Shards of machines are not those of ranks, so that a reduce-scatter needs all of the result.
        for start, stop in chunk_bounds(0, flat.size, _PART_BYTES // flat.itemsize):
            part = flat[start:stop]
            header = pack_header(name, part, self._next(), op_code(op, compression))
            self._reduce_across(header, part, op, compression)

    def _reduce_here(self, name: str, flat: Array, op: str) -> None:
        header = pack_header(name, flat, self._next(), op_code(op))
        job = self._local.begin(header, self._expect, flat, op, self.size)
        if name == "all_reduce":
            self._local.all_reduce(job, self.size)
        else:
            self._local.reduce(job)
            finish(op, flat[job.shard(self.rank)], self.size)
        self._count(job, 2 if name == "all_reduce" else 1)

    def _reduce_across(self, header: bytes, flat: Array, op: str, compression: str) -> None:
        alone = len(self._local.members) == 1
        job = self._local.begin(header, self._expect, flat, op, self._shards)
        if not alone:
            self._local.reduce(job)
        if self._across is not None:
            self._across.right.send(header, _NOTHING)
            self._expect(self._across.left, header)
            self._reduce_around(self._across, flat[job.shard(self._local.place)], op, compression)
        if not alone:
            self._local.share(job)
            self._count(job, 2)

    def _count(self, job: Job, phases: int) -> None:
        """Count what others have read of this rank's memory, and what this rank has read of theirs."""
        others = len(self._local.members) - 1
        own = job.own_bytes(self._local.place)
        there, here = job.flat.nbytes - own, own * others
        self.stats.bytes_sent += there + (here if phases == 2 else 0)
        self.stats.bytes_received += here + (there if phases == 2 else 0)

    def _allocate_bytes(self, nbytes: int) -> Array:
        """Allocate memory that all ranks on this machine map."""
        own = Segment.create(nbytes)
        try:
            packed = memoryview(pack_path(own.path))
            parts = {self.rank: own}
            members = [self._links[member] for member in self._local.members if member != self.rank]
            for link in members:
                link.send(b"", packed)
            for link in members:
                told = bytearray(PATH_BYTES)
                link.fill(memoryview(told))
                parts[link.peer] = self._attach(unpack_path(told), nbytes, link.peer)
            self._local.meet()
        finally:
            own.unlink()
        self._local.add_region([parts[member].array for member in self._local.members])
        slow = on_disk(parts.values())
        self.reason += "" if slow in self.reason else slow
        # Pages of a disk's file cannot be pinned: what is sent of them goes through the links' slots.
        if self._fabric is not None and own.in_memory:
            self._fabric.register(own.array)
        return own.array[:nbytes]

    def _attach(self, path: str, nbytes: int, peer: int) -> Segment:
        try:
            return Segment.attach(path, nbytes)
        except OSError as exc:
            raise TransportError(f"Expected to open rank {peer}'s shared memory: {exc}") from exc
