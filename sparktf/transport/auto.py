"""The choice of ``protocol="auto"``: made together, once all ranks are connected and have told what they have."""

from __future__ import annotations

import time

from sparktf.errors import ProtocolError
from sparktf.transport import rdma, tcp
from sparktf.transport.contract import Communicator
from sparktf.transport.hosts import Hosts
from sparktf.transport.mesh import Exchange, connect_mesh
from sparktf.transport.segment import on_disk
from sparktf.transport.settings import Settings
from sparktf.transport.shm import ShmCommunicator, survey_hosts
from sparktf.transport.survey import share


def connect(
    *,
    rank: int,
    size: int,
    exchange: Exchange,
    secret: bytes,
    timeout: float,
    host: str | None,
    settings: Settings,
) -> Communicator:
    """Join a group of at least two by the best way that all ranks have; arguments as in `sparktf.transport.connect`.

    Shared memory among the ranks of a machine; between machines RDMA where every rank has a device that reaches all
    others, else sockets.
    """
    if settings.tls:
        communicator: Communicator = tcp.connect(
            rank=rank, size=size, exchange=exchange, secret=secret, timeout=timeout, host=host, settings=settings
        )
        communicator.reason = "encryption was asked for"
        return communicator
    with connect_mesh(rank, size, exchange, secret, timeout, host, protocol="auto", back=True) as mesh:
        told = share(mesh, rank, {"rdma": rdma.preflight(settings)}, time.monotonic() + timeout)
        troubles = [f"rank {peer}: {facts.get('rdma')}" for peer, facts in enumerate(told) if facts.get("rdma")]
        hosts = survey_hosts(mesh, rank, settings, timeout)
        shares = max(map(len, hosts.groups)) > 1
        if not troubles and len(hosts.groups) > 1:
            try:
                if shares:
                    communicator = ShmCommunicator(rank, size, mesh, timeout, hosts, settings)
                else:
                    communicator = rdma.RdmaCommunicator(rank, size, mesh, timeout, settings)
            except ProtocolError as exc:
                # Raised on all ranks alike: too little memory may be locked, say, or ports are of different networks.
                troubles = [str(exc)]
            else:
                within = f"{_describe(hosts)}; " if shares else ""
                communicator.reason = (
                    f"{within}every rank has an RDMA device with an active port that reaches all others"
                    f"{on_disk(hosts.staging.values())}"
                )
                return communicator
        if shares:
            communicator = ShmCommunicator(rank, size, mesh, timeout, hosts)
        else:
            communicator = tcp.TcpCommunicator(rank, size, mesh, timeout)
        why = f", no RDMA ({_first_sentence(troubles[0])})" if troubles else ", which is nearer than RDMA"
        between = ", sockets between them" if 1 < len(hosts.groups) < size else ""
        communicator.reason = f"{_describe(hosts)}{between}{why}{on_disk(hosts.staging.values()) if shares else ''}"
        return communicator


def _first_sentence(text: str) -> str:
    # What to do about it stands in the error of protocol='rdma', for those who want it.
    return text.partition(". ")[0]


def _describe(hosts: Hosts) -> str:
    count, ranks = len(hosts.groups), sum(map(len, hosts.groups))
    if count == 1:
        return f"all {ranks} ranks share the memory of one machine"
    if count < ranks:
        return f"{ranks} ranks in {count} groups that share memory"
    return f"no two of {ranks} ranks share memory" + (f" ({hosts.trouble})" if hosts.trouble else "")
