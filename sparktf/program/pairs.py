"""What a program's asynchronous training asks for: its servers, and a mode."""

from __future__ import annotations

from typing import Any

from sparktf.cluster.pairs import Pair, connect_pairs
from sparktf.errors import ParamError
from sparktf.program.job import ProgramJob
from sparktf.program.link import TaskLink
from sparktf.program.roles import PS
from sparktf.transport import Communicator


def connect_servers(job: ProgramJob, link: TaskLink, rank: int, host: str) -> list[Communicator]:
    """Connect a worker with every parameter server of a run, or a server with every worker; see `connect_pairs`.

    Parameters
    ----------
    job : ProgramJob
    link : TaskLink
    rank : int
        This node's.
    host : str
        The address of this node that the others reach.

    Returns
    -------
    list of Communicator
        On a worker by server, on a server by worker; the worker is rank 0 of the pair.

    Raises
    ------
    ParamError
        The run has no servers, or this node is neither a worker nor one of them.
    """
    roles = job.roles
    servers = range(roles.num_workers, roles.num_workers + roles.num_ps)
    if not servers:
        raise ParamError("Expected parameter servers in the run, received num_ps=0: run(main, ..., num_ps=1).")
    serving = roles.job_name(rank) == PS
    if not serving and rank not in roles.compute_ranks:
        raise ParamError(f"Expected the chief, a worker or a parameter server, received a {roles.job_name(rank)}.")

    def exchange(payload: bytes, pair: Pair) -> list[bytes]:
        return link.exchange(payload, pair, f"pair {pair[0]} {pair[1]}")

    return connect_pairs(job, rank, roles.compute_ranks, servers, exchange, host, job.data_transport)


def check_mode(mode: str, max_staleness: Any) -> None:
    """Check how an optimizer is to be distributed.

    Raises
    ------
    ParamError
    """
    if mode not in ("sync", "async"):
        raise ParamError(f"mode: expected 'sync' or 'async', received {mode!r}.")
    if max_staleness is None:
        return
    if isinstance(max_staleness, bool) or not isinstance(max_staleness, int) or max_staleness < 0:
        raise ParamError(f"max_staleness: expected an integer of at least 0, or None, received {max_staleness!r}.")
    if mode == "sync":
        raise ParamError(f"max_staleness: only for mode='async', received {max_staleness} with mode='sync'.")
