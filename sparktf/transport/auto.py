"""The choice of ``protocol="auto"``: made together, once all ranks are connected and have told what they have."""

from __future__ import annotations

import time

from sparktf.transport import rdma, tcp
from sparktf.transport.contract import Communicator
from sparktf.transport.hosts import Hosts
from sparktf.transport.mesh import Exchange, connect_mesh
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

    RDMA where every rank has a device, else shared memory among the ranks of a machine and sockets between machines.
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
        if not troubles:
            communicator = rdma.join(rank, size, mesh, timeout, settings)
            communicator.reason = "every rank has an RDMA device with an active port"
            return communicator
        hosts = survey_hosts(mesh, rank, settings, timeout)
        if max(map(len, hosts.groups)) > 1:
            communicator = ShmCommunicator(rank, size, mesh, timeout, hosts)
        else:
            communicator = tcp.TcpCommunicator(rank, size, mesh, timeout)
        communicator.reason = f"{_describe(hosts)}, no RDMA ({_first_sentence(troubles[0])})"
        return communicator


def _first_sentence(text: str) -> str:
    # What to do about it stands in the error of protocol='rdma', for those who want it.
    return text.partition(". ")[0]


def _describe(hosts: Hosts) -> str:
    count, ranks = len(hosts.groups), sum(map(len, hosts.groups))
    if count == 1:
        return f"all {ranks} ranks share the memory of one machine"
    if count < ranks:
        return f"{ranks} ranks in {count} groups that share memory, sockets between them"
    return f"no two of {ranks} ranks share memory" + (f" ({hosts.trouble})" if hosts.trouble else "")
