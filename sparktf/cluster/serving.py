"""What a node of an asynchronous fit does: serve a part of the variables, or train in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from sparktf.cluster.child_process import train_in_child
from sparktf.cluster.job import TrainJob
from sparktf.cluster.pairs import SERVER_SECONDS, Pair, connect_pairs
from sparktf.cluster.readiness import gather_when_ready
from sparktf.cluster.spooled import SpooledNode
from sparktf.cluster.training import agree_on_partitions
from sparktf.distribute.fit import RankRows
from sparktf.distribute.own_pace import plain_optimizer
from sparktf.distribute.pair import receive_bytes, send_bytes
from sparktf.distribute.served import fresh_optimizer
from sparktf.distribute.server import serve
from sparktf.distribute.table_fit import tables_of
from sparktf.distribute.table_servers import links_with_workers, served_model_tables
from sparktf.transport import Communicator


def train_asynchronously(
    job: TrainJob,
    model: Any,
    node: SpooledNode,
) -> dict[str, Any]:
    """Be a worker or a parameter server of an asynchronous fit.

    A worker trains in a child process, so that its task survives it: Spark ends all tasks of a job of which one fails.

    Parameters
    ----------
    job : TrainJob
    model : keras.Model
    node : SpooledNode

    Returns
    -------
    dict
        Of a worker, what `sparktf.cluster.training.train_at_own_pace` returns, or how it was lost. Of a server, under
        ``"server"``, its report.
    """
    communicator = node.communicator
    everyones = agree_on_partitions(node.specs, node.spool, communicator)
    rows = RankRows(everyones.training[: job.num_workers], everyones.validation[: job.num_workers])
    if node.rank < job.num_workers:
        told = train_in_child(job, node, False, rows)
        return {"saved": None, "notices": [], **told}
    optimizer = fresh_optimizer(plain_optimizer(model))

    def exchange(payload: bytes, pair: Pair) -> list[bytes]:
        theirs = receive_bytes(communicator, pair[0])
        send_bytes(communicator, pair[0], payload)
        return [theirs, payload]

    # Workers' children take their time to start; after this nobody waits for one.
    gather_when_ready(communicator, alive=node.alive)
    with ExitStack() as stack:
        connected = connect_pairs(job, node.rank, job.workers, job.servers, exchange, node.host, job.transport)
        workers = [stack.enter_context(pair) for pair in connected]
        stack.enter_context(_served_tables(job, model, node.rank, workers))
        done = serve(workers, optimizer, job.timeout, node.alive)
    protocol = {"protocol": workers[0].protocol, "protocol_reason": workers[0].reason}
    return {"saved": None, "notices": [], "server": asdict(done), **protocol}


@contextmanager
def _served_tables(job: TrainJob, model: Any, rank: int, workers: Sequence[Communicator]) -> Iterator[None]:
    """Serve this server's parts of a model's sharded tables, where it has such, until all workers have left."""
    if not tables_of(model):
        yield
        return
    server, together = rank - job.num_workers, job.max_staleness == 0
    links = links_with_workers(workers, SERVER_SECONDS)
    with ExitStack() as stack:
        for link in links.values():
            stack.enter_context(link)
        optimizer = plain_optimizer(model)
        service = served_model_tables(
            model, optimizer, server, job.num_ps, job.num_workers, links, together, job.timeout
        )
        # They are the service's from now on.
        stack.pop_all()
    try:
        yield
        # Workers leave tables before they leave their servers.
        service.join(job.timeout)
    except BaseException as error:
        service.abort(f"{type(error).__name__}: {error}")
        raise
