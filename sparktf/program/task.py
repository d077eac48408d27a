"""The barrier task of a run: the child's surroundings, and what it returned on its way to the driver."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from io import BufferedRandom
from typing import Any

from sparktf.cluster.connect import check_returnable
from sparktf.cluster.control import CHUNK_BYTES, ControlClient
from sparktf.cluster.fit_logs import executor_host
from sparktf.cluster.gpus import check_gpus, task_gpus, visible_gpus
from sparktf.cluster.leash import job_environment
from sparktf.cluster.node import Result, barrier_task
from sparktf.cluster.scratch import local_directory
from sparktf.cluster.tensorboard import TensorBoard
from sparktf.program.feeder import Feeder, Partition
from sparktf.program.feeds import check_partitions
from sparktf.program.job import ProgramJob
from sparktf.program.node import Node
from sparktf.program.process import ChildProcess
from sparktf.transport import Communicator

RESULT, DIGEST, LOST = "result", "digest", "lost"
_TENSORBOARD_SECONDS = 60.0


def program_task(batches: Iterable[Any], job: ProgramJob) -> Iterator[Any]:
    """Run one node of a program; the function that `mapInArrow` calls.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
        The partition.
    job : ProgramJob

    Yields
    ------
    pyarrow.RecordBatch
        What main returned, pickled; or, of what is large, the digest of the file that the driver has; or how the node's
        process was lost, where the others went on without it.

    Raises
    ------
    ParamError
        There are more or fewer tasks than nodes.
    """
    from pyspark import BarrierTaskContext

    # Before the tasks meet: all of them see the same, and none of them waits for another.
    check_partitions(len(BarrierTaskContext.get().getTaskInfos()), job.world_size)
    yield from barrier_task(batches, job, supervise)


def supervise(
    batches: Iterable[Any],
    job: ProgramJob,
    communicator: Communicator,
    control: ControlClient,
    host: str,
    threads: int,
) -> list[Result]:
    """Run the child and all that it needs, until every node of the run is done.

    Raises
    ------
    NodeError
        The program failed here, ended without a word, or hangs.
    PeerLostError
        It failed on another rank.
    ClusterError
        Spark gave one GPU to several nodes, or TensorBoard does not start.
    """
    check_gpus(communicator, host)
    with contextlib.ExitStack() as stack:
        tensorboard = None
        if job.tensorboard and communicator.rank == 0:
            # The other ranks wait as long as the timeout says.
            started = TensorBoard(job.log_dir, executor_host(), min(_TENSORBOARD_SECONDS, job.timeout / 2))
            tensorboard = stack.enter_context(contextlib.closing(started))
        result = stack.enter_context(tempfile.TemporaryFile(dir=local_directory()))
        child = stack.enter_context(ChildProcess("sparktf.program.child", result, _environment()))
        feeder = stack.enter_context(
            Feeder(Partition(batches, job.feeds), communicator.rank, job.roles.compute_ranks, bool(job.feeds))
        )
        node = Node(job, communicator, control, child, feeder, tensorboard)
        node.tell_job(host, threads, job.log_dir if tensorboard is None else tensorboard.log_dir)
        if tensorboard is not None:
            # Meanwhile the child imports TensorFlow.
            control.progress({"tensorboard": tensorboard.wait()})
        node.run()
        if node.lost is not None:
            # It may have been lost while it wrote its result.
            return [(LOST, 0, node.lost.encode())]
        return _deliver(result, job, control)


def _environment() -> dict[str, str]:
    environment = {**job_environment(), **visible_gpus(task_gpus()), "PYTHONUNBUFFERED": "1"}
    environment.pop("TF_CONFIG", None)
    return environment


def _deliver(result: BufferedRandom, job: ProgramJob, control: ControlClient) -> list[Result]:
    """Return what main returned as rows of the result; what is large goes to the driver as a file.

    The file's digest goes by Spark's channel, so that the driver unpickles nothing but what this task has sent.
    """
    size = result.seek(0, os.SEEK_END)
    result.seek(0)
    if size <= CHUNK_BYTES:
        return [(RESULT, 0, result.read())]
    if control.connected:
        digest = hashlib.file_digest(result, "sha256").hexdigest()
        result.seek(0)
        if control.send_file(result):
            return [(DIGEST, 0, json.dumps({"sha256": digest, "bytes": size}).encode())]
        result.seek(0)
    check_returnable(size, job.result_limit, "a result of main", "return less (ctx.export writes models)")
    chunks = iter(lambda: result.read(CHUNK_BYTES), b"")
    return [(RESULT, part, chunk) for part, chunk in enumerate(chunks)]
