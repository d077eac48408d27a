"""The barrier task of a node: rendezvous, what the node does (for a fit: spool and train), and the result as rows."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pyspark import cloudpickle

from sparktf.cluster.child_process import train_in_child
from sparktf.cluster.connect import check_returnable
from sparktf.cluster.control import CHUNK_BYTES, ControlClient
from sparktf.cluster.fit_logs import FitLogs
from sparktf.cluster.gpus import check_gpus
from sparktf.cluster.job import GRPC, Job, Program, TrainJob
from sparktf.cluster.preflight import check_versions, installed_versions
from sparktf.cluster.readiness import GettingReady, gather_when_ready
from sparktf.cluster.serving import train_asynchronously
from sparktf.cluster.spooled import SpooledNode
from sparktf.cluster.spooling import RefusedRows, spool_partition
from sparktf.cluster.threads import op_threads, start_tensorflow, threads_for
from sparktf.cluster.training import archive_file, make_model, train
from sparktf.cluster.watchdog import Watchdog
from sparktf.distribute.custom_objects import registered
from sparktf.errors import PeerLostError
from sparktf.transport import Communicator, connect

_LOG = logging.getLogger("sparktf.cluster")

RESULT_SCHEMA = "rank int, name string, part int, payload binary"
REPORT, MODEL, REFUSED = "report", "model", "refused"

# Timeouts without a word of progress after which a node ends where the driver cannot do that: as long as the driver
# waits. Ranks that wait for another say within the timeout for which.
_SILENCE = 1.5
_ASKED_FOR_GRPC = "protocol='grpc' was asked for"
_FITS, _NEEDS_CHILD = b"fits", b"child"

Exchange = Callable[[bytes], list[bytes]]
Result = tuple[str, int, bytes]
AnyJob = TypeVar("AnyJob", bound=Job)
# From the partition, the job, the tasks' communicator, the control connection, this node's host and its threads to the
# rows of the result.
Work = Callable[[Iterable[Any], AnyJob, Communicator, ControlClient, str, int], list[Result]]


def train_task(batches: Iterable[Any], job: TrainJob) -> Iterator[Any]:
    """Train, as one node of a fit; the function that `mapInArrow` calls.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
        The partition.
    job : TrainJob

    Yields
    ------
    pyarrow.RecordBatch
        Of `RESULT_SCHEMA`: a report from every rank, and the model from the chief where the driver could not be told.
    """
    yield from barrier_task(batches, job, _train)


def barrier_task(batches: Iterable[Any], job: AnyJob, work: Work[AnyJob]) -> Iterator[Any]:
    """Run one node in the barrier task that calls this.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
        The partition.
    job : Job
    work : callable
        What the node does, once all have met.

    Yields
    ------
    pyarrow.RecordBatch
        Of `RESULT_SCHEMA`.
    """
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()

    def exchange(payload: bytes) -> list[bytes]:
        # Spark's all-gather takes text.
        return [bytes.fromhex(part) for part in context.allGather(payload.hex())]

    addresses = [info.address for info in context.getTaskInfos()]
    rank = context.partitionId()
    yield from run_node(batches, job, rank, exchange, addresses, work)


def run_node(
    batches: Iterable[Any], job: AnyJob, rank: int, exchange: Exchange, addresses: list[str], work: Work[AnyJob]
) -> Iterator[Any]:
    """Run one node, wherever it is.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
    job : Job
    rank : int
    exchange : callable
        The rendezvous: gives every rank what all ranks put in. Called once, before anything can fail, for a task that
        fails while another waits in Spark's barrier takes the other's executor with it.
    addresses : list of str
        Each rank's executor: equal for ranks that share one.
    work : callable

    Yields
    ------
    pyarrow.RecordBatch
        Of `RESULT_SCHEMA`: what `work` returned.
    """
    control = ControlClient.connect(job.control, job.secret, job.job_id, rank)
    watchdog: AbstractContextManager[Any] = nullcontext()
    if control.connected:
        # What is large goes to the driver as a file.
        job = replace(job, result_limit=None)
    else:
        watchdog = Watchdog(rank, control, _SILENCE * job.timeout, job.timeout)
    try:
        with watchdog:
            results = _run(batches, job, rank, exchange, addresses, control, work)
    except PeerLostError as error:
        # The driver takes it for the one that counts only where no other rank says more.
        _tell(control, error)
        if not error.reason:
            raise
        # The peer fails its own task; one error is enough for Spark.
        _LOG.info("rank %d leaves: %s", rank, error)
        results = []
    except Exception as error:
        _tell(control, error)
        if not control.connected:
            raise
        # The driver raises it; Spark would only add its own stack to the screen.
        _LOG.info("rank %d failed", rank, exc_info=True)
        results = []
    finally:
        control.close()
    yield from (_row(rank, *result) for result in results)


def _tell(control: ControlClient, error: BaseException) -> None:
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    # Of a program's own process, where the task only heard of it.
    control.error(kind, str(error), getattr(error, "remote_traceback", "") or traceback.format_exc())


def _run(
    batches: Iterable[Any],
    job: AnyJob,
    rank: int,
    exchange: Exchange,
    addresses: list[str],
    control: ControlClient,
    work: Work[AnyJob],
) -> list[Result]:
    peers: list[dict[str, str]] = []

    def meet(payload: bytes) -> list[bytes]:
        mine = json.dumps(installed_versions()).encode()
        everyones = exchange(len(mine).to_bytes(4, "big") + mine + payload)
        lengths = [int.from_bytes(part[:4], "big") for part in everyones]
        peers.extend(json.loads(part[4 : 4 + n]) for part, n in zip(everyones, lengths, strict=True))
        return [part[4 + n :] for part, n in zip(everyones, lengths, strict=True)]

    # On one machine, whatever its name resolves to.
    host = addresses[rank].rsplit(":", 1)[0] if len(set(addresses)) > 1 else "127.0.0.1"
    with _connect(job, rank, meet, host) as communicator:
        check_versions(dict(job.versions), peers)
        threads = threads_for(job.threads, job.executor_cores, addresses.count(addresses[rank]))
        return work(batches, job, communicator, control, host, threads)


def _connect(job: Job, rank: int, exchange: Exchange, host: str) -> Communicator:
    return connect(
        job.transport,
        rank=rank,
        size=job.world_size,
        exchange=exchange,
        secret=job.secret,
        timeout=job.timeout,
        host=host,
        settings=job.transport_settings,
    )


def _train(
    batches: Iterable[Any], job: TrainJob, communicator: Communicator, control: ControlClient, host: str, threads: int
) -> list[Result]:
    try:
        return _train_on_rows(batches, job, communicator, control, host, threads)
    except RefusedRows as error:
        # All ranks know it, so none of them has to fail, and Spark nothing to add.
        return [(REFUSED, 0, str(error).encode())]


def _train_on_rows(
    batches: Iterable[Any], job: TrainJob, communicator: Communicator, control: ControlClient, host: str, threads: int
) -> list[Result]:
    started = time.monotonic()
    on_gpus = check_gpus(communicator, host)
    if on_gpus:
        # This process only looks at the model: what TensorFlow takes of a GPU's memory it keeps, and Spark reuses this
        # process. The child sees the task's.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with GettingReady(communicator, job.timeout, control.alive) as getting_ready:
        available = start_tensorflow(threads, op_threads(threads, job.world_size, job.small_model))
        program: Program = cloudpickle.loads(job.program)
        with registered(program.custom_objects), FitLogs(job, program.callbacks, communicator.rank) as logs:
            job = logs.job
            with archive_file(None if job.archive is None else job.archive.pieces()) as path:
                model = make_model(path, program, job.settings.seed)
            specs = program.feed.specs(model)
            made = time.monotonic()
            control.alive()
            with spool_partition(batches, specs, communicator, getting_ready, control.alive) as spool:
                fed = time.monotonic()
                node = SpooledNode(specs, spool, communicator, host, threads, logs.announce(control.progress))
                if job.num_ps:
                    told = train_asynchronously(job, model, node)
                else:
                    fits = threads == available and not job.over_grpc and not on_gpus
                    told = _train_in_lockstep(job, program, model, node, fits)
    told["notices"] += logs.notices
    told |= {
        "tensorboard": logs.url,
        "protocol": GRPC if job.over_grpc else told.get("protocol", communicator.protocol),
        "protocol_reason": _ASKED_FOR_GRPC if job.over_grpc else told.get("protocol_reason", communicator.reason),
        "start_seconds": made - started,
        "feed_seconds": fed - made,
    }
    saved = told.pop("saved")
    return [(REPORT, 0, json.dumps(told).encode()), *(_deliver(saved, job, control) if saved else [])]


def _train_in_lockstep(job: TrainJob, program: Program, model: Any, node: SpooledNode, fits: bool) -> dict[str, Any]:
    """Train in this process where that can be, else in a child.

    This process may have an earlier job's threads, for good. Sums over another number of threads differ in their last
    bits, so that a fit takes its own in any case. And TensorFlow's cluster needs a fresh process.

    Parameters
    ----------
    fits : bool
        This process has the threads that the fit takes, and may train.
    """
    communicator, chief = node.communicator, node.rank == 0
    if all(answer == _FITS for answer in communicator.all_gather_bytes(_FITS if fits else _NEEDS_CHILD)):
        return train(job, program, model, node.specs, node.spool, communicator, node.report, chief)
    if fits:
        # Children make a group of their own, met through the parents'; this rank joins it as it is.
        exchange = partial(gather_when_ready, communicator, alive=node.alive)
        with _connect(job, node.rank, exchange, node.host) as group:
            return train(job, program, model, node.specs, node.spool, group, node.report, chief)
    return train_in_child(job, node, chief)


def _deliver(path: str, job: TrainJob, control: ControlClient) -> list[Result]:
    """Send the trained model to the driver and remove it; return it as result rows where it cannot be sent."""
    try:
        if control.connected:
            with open(path, "rb") as file:
                if control.send_file(file):
                    return []
        check_returnable(os.path.getsize(path), job.result_limit)
        parts: list[Result] = []
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                parts.append((MODEL, len(parts), chunk))
        return parts
    finally:
        shutil.rmtree(os.path.dirname(path))


def _row(rank: int, name: str, part: int, payload: bytes) -> Any:
    import pyarrow as pa

    columns = {
        "rank": pa.array([rank], pa.int32()),
        "name": pa.array([name], pa.string()),
        "part": pa.array([part], pa.int32()),
        "payload": pa.array([payload], pa.binary()),
    }
    return pa.RecordBatch.from_pydict(columns)
