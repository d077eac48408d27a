"""What a node of an asynchronous fit does: serve a part of the variables, or train in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from sparktf.cluster.child import train_in_child
from sparktf.cluster.job import TrainJob
from sparktf.cluster.pairs import SERVER_SECONDS, Pair, connect_pairs
from sparktf.cluster.training import agree_on_partitions
from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import Spool
from sparktf.distribute.fit import RankRows
from sparktf.distribute.own_pace import plain_optimizer
from sparktf.distribute.pair import receive_bytes, send_bytes
from sparktf.distribute.served import fresh_optimizer
from sparktf.distribute.server import serve
from sparktf.distribute.table_fit import tables_of
from sparktf.distribute.table_servers import ServedTables, links_with_workers
from sparktf.transport import Communicator


def train_asynchronously(
    job: TrainJob,
    model: Any,
    specs: list[ColumnSpec],
    spool: Spool,
    communicator: Communicator,
    host: str,
    threads: int,
    report: Callable[[dict[str, Any]], None] | None,
    alive: Callable[[], None],
) -> dict[str, Any]:
    """Be a worker or a parameter server of an asynchronous fit.

    A worker trains in a child process, so that its task survives it: Spark ends all tasks of a job of which one fails.

    Parameters
    ----------
    job : TrainJob
    model : keras.Model
    specs : list of ColumnSpec
    spool : Spool
        Of a server, without rows.
    communicator : Communicator
        Of all tasks.
    host : str
        The address of this node that the others reach.
    threads : int
    report : callable or None
        Receives progress.
    alive : callable
        Called every second by a server.

    Returns
    -------
    dict
        Of a worker, what `sparktf.cluster.training.train_at_own_pace` returns, or how it was lost. Of a server, under
        ``"server"``, its report.
    """
    everyones = agree_on_partitions(specs, spool, communicator)
    rows = RankRows(everyones.training[: job.num_workers], everyones.validation[: job.num_workers])
    if communicator.rank < job.num_workers:
        told = train_in_child(job, specs, spool, communicator, host, threads, report, False, rows)
        return {"saved": None, "notices": [], **told}
    optimizer = fresh_optimizer(plain_optimizer(model))

    def exchange(payload: bytes, pair: Pair) -> list[bytes]:
        theirs = receive_bytes(communicator, pair[0])
        send_bytes(communicator, pair[0], payload)
        return [theirs, payload]

    with ExitStack() as stack:
        connected = connect_pairs(job, communicator.rank, job.workers, job.servers, exchange, host)
        workers = [stack.enter_context(pair) for pair in connected]
        stack.enter_context(_served_tables(job, model, communicator.rank, workers))
        done = serve(workers, optimizer, job.timeout, alive)
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
        service = ServedTables(model, optimizer, server, job.num_ps, job.num_workers, links, together, job.timeout)
        # They are the service's from now on.
        stack.pop_all()
    try:
        yield
    except BaseException as error:
        service.abort(f"{type(error).__name__}: {error}")
        raise
    service.join()
