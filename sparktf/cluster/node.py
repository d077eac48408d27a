"""The barrier task of a fit: rendezvous, spool, train, and the result as rows."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from pyspark import cloudpickle

from sparktf.cluster.child import train_in_child
from sparktf.cluster.connect import check_returnable
from sparktf.cluster.control import CHUNK_BYTES, ControlClient
from sparktf.cluster.job import GRPC, Program, TrainJob
from sparktf.cluster.preflight import check_versions, installed_versions
from sparktf.cluster.spooling import RefusedRows, spool_partition
from sparktf.cluster.threads import op_threads, start_tensorflow, threads_for
from sparktf.cluster.training import archive_file, make_model, train
from sparktf.distribute.custom_objects import registered
from sparktf.errors import PeerLostError
from sparktf.transport import Communicator, connect

_LOG = logging.getLogger("sparktf.cluster")

RESULT_SCHEMA = "rank int, name string, part int, payload binary"
REPORT, MODEL, REFUSED = "report", "model", "refused"

# Ranks that spool meet this often, in seconds.
_MEET_SECONDS = 10.0
_ASKED_FOR_GRPC = "protocol='grpc' was asked for"
_FITS, _NEEDS_CHILD = b"fits", b"child"

Exchange = Callable[[bytes], list[bytes]]
Result = tuple[str, int, bytes]


def train_task(batches: Iterable[Any], job: TrainJob) -> Iterator[Any]:
    """Run one node in a barrier task; the function that `mapInArrow` calls.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
        The partition.
    job : TrainJob

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
    yield from run_node(batches, job, rank, exchange, addresses)


def run_node(
    batches: Iterable[Any], job: TrainJob, rank: int, exchange: Exchange, addresses: list[str]
) -> Iterator[Any]:
    """Run one node, wherever it is.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
    job : TrainJob
    rank : int
    exchange : callable
        The rendezvous: gives every rank what all ranks put in. Called once, before anything can fail, for a task that
        fails while another waits in Spark's barrier takes the other's executor with it.
    addresses : list of str
        Each rank's executor: equal for ranks that share one.

    Yields
    ------
    pyarrow.RecordBatch
        Of `RESULT_SCHEMA`: a report from every rank, and the model from the chief where the driver could not be told.
    """
    control = ControlClient.connect(job.control, job.secret, job.job_id, rank)
    if control.connected:
        # The model goes to the driver as a file.
        job = replace(job, result_limit=None)
    try:
        results = _run(batches, job, rank, exchange, addresses, control)
    except PeerLostError as error:
        # The driver takes it for the one that counts only where no other rank says more.
        _tell(control, error)
        if not error.reason:
            raise
        # The peer fails its own task; one error is enough for Spark.
        _LOG.info("rank %d leaves: %s", rank, error)
        results = []
    except BaseException as error:
        _tell(control, error)
        raise
    finally:
        control.close()
    yield from (_row(rank, *result) for result in results)


def _tell(control: ControlClient, error: BaseException) -> None:
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    control.error(kind, str(error), traceback.format_exc())


def _run(
    batches: Iterable[Any],
    job: TrainJob,
    rank: int,
    exchange: Exchange,
    addresses: list[str],
    control: ControlClient,
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
        try:
            return _train(batches, job, communicator, control, host, threads)
        except RefusedRows as error:
            # All ranks know it, so none of them has to fail, and Spark nothing to add.
            return [(REFUSED, 0, str(error).encode())]


def _connect(job: TrainJob, rank: int, exchange: Exchange, host: str) -> Communicator:
    return connect(
        job.transport,
        rank=rank,
        size=job.world_size,
        exchange=exchange,
        secret=job.secret,
        timeout=job.timeout,
        host=host,
    )


def _train(
    batches: Iterable[Any], job: TrainJob, communicator: Communicator, control: ControlClient, host: str, threads: int
) -> list[Result]:
    started = time.monotonic()
    available = start_tensorflow(threads, op_threads(threads, job.world_size, job.small_model))
    program: Program = cloudpickle.loads(job.program)
    chief = communicator.rank == 0
    report, interval = control.progress, min(_MEET_SECONDS, job.timeout / 4)
    with registered(program.custom_objects):
        with archive_file(None if job.archive is None else job.archive.pieces()) as path:
            model = make_model(path, program, job.settings.seed)
        specs = program.feed.specs(model)
        made = time.monotonic()
        control.alive()
        with spool_partition(batches, specs, communicator, interval, control.alive) as spool:
            fed = time.monotonic()
            # This process may have an earlier job's threads, for good. Sums over another number of threads differ in
            # their last bits, so that a fit takes its own in any case. And TensorFlow's cluster needs a fresh process.
            fits = threads == available and not job.over_grpc
            all_fit = all(answer == _FITS for answer in communicator.all_gather_bytes(_FITS if fits else _NEEDS_CHILD))
            if all_fit:
                told = train(job, program, model, specs, spool, communicator, report, chief)
            elif fits:
                # Children make a group of their own, met through the parents'; this rank joins it as it is.
                with _connect(job, communicator.rank, communicator.all_gather_bytes, host) as group:
                    told = train(job, program, model, specs, spool, group, report, chief)
            else:
                told = train_in_child(job, specs, spool, communicator, host, threads, report, chief)
        told |= {
            "protocol": GRPC if job.over_grpc else communicator.protocol,
            "protocol_reason": _ASKED_FOR_GRPC if job.over_grpc else communicator.reason,
            "start_seconds": made - started,
            "feed_seconds": fed - made,
        }
    saved = told.pop("saved")
    return [(REPORT, 0, json.dumps(told).encode()), *(_deliver(saved, job, control) if chief else [])]


def _deliver(path: str, job: TrainJob, control: ControlClient) -> list[Result]:
    """Send the trained model to the driver and remove it; return it as result rows where it cannot be sent."""
    try:
        if control.connected and control.send_model(path):
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
