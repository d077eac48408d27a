"""How workers and parameter servers find each other: a communicator for every pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from sparktf.cluster.job import Job
from sparktf.transport import Communicator, connect

# A server waits for a worker's next push as long as that computes, or reads its rows. One that dies is heard of at
# once, and the server itself ends training in which others wait and nothing goes on.
SERVER_SECONDS = 7 * 24 * 3600.0

# (worker, server), by rank.
Pair = tuple[int, int]
# Gives both of a pair what each put in, the worker's first; both call it.
PairExchange = Callable[[bytes, Pair], list[bytes]]


def connect_pairs(
    job: Job,
    rank: int,
    workers: Sequence[int],
    servers: Sequence[int],
    exchange: PairExchange,
    host: str,
    protocol: str,
) -> list[Communicator]:
    """Connect a worker with every parameter server, or a server with every worker; all of them call this.

    Everyone goes through its pairs in the order of (worker, server), so that nobody waits in a circle.

    Parameters
    ----------
    job : Job
    rank : int
        This node's, one of the two.
    workers, servers : sequence of int
        Their ranks.
    exchange : callable
    host : str
        The address of this node that the others reach.
    protocol : str
        One of the transport's.

    Returns
    -------
    list of Communicator
        On a worker by server, on a server by worker; the worker is rank 0 of the pair. They belong to the caller.
    """
    pairs = [(worker, rank) for worker in workers] if rank in servers else [(rank, server) for server in servers]
    with ExitStack() as stack:
        connected = [
            stack.enter_context(_connect(job, pair, pair.index(rank), exchange, host, protocol)) for pair in pairs
        ]
        stack.pop_all()
    return connected


def _connect(job: Job, pair: Pair, side: int, exchange: PairExchange, host: str, protocol: str) -> Communicator:
    return connect(
        protocol,
        rank=side,
        size=2,
        exchange=lambda payload: exchange(payload, pair),
        secret=job.secret,
        timeout=SERVER_SECONDS if side else job.timeout,
        host=host,
    )
