"""Run a training job on a Spark session, from the driver."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sparktf.cluster.connect import StartWatch, check_message, remote_error, result_limit, watched_start
from sparktf.cluster.control import ControlAddress
from sparktf.cluster.control_server import ControlServer, NodeFailure
from sparktf.cluster.job import Payload, TrainJob
from sparktf.cluster.node import MODEL, REFUSED, REPORT, RESULT_SCHEMA, train_task
from sparktf.cluster.preflight import check_cluster, installed_versions, is_connect
from sparktf.distribute.fit import FitSettings
from sparktf.errors import ClusterError, DataError, NodeError, SlotsError, SparktfError, own_error

_LOG = logging.getLogger("sparktf.cluster")

# After a node's error has reached the driver, Spark ends the other tasks in about two seconds; a job that still runs
# after this many is cancelled.
_CANCEL_SECONDS = 5.0
# Spark may notice a dead task before the control connection's end has been read.
_LAST_WORDS_SECONDS = 2.0

# Spark's error for a barrier stage that is larger than the cluster.
_NO_SLOTS = "SPARK-24819"

Progress = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What comes back from a training job.

    Attributes
    ----------
    model_path : str
        The trained model, a ``.keras`` file in a directory that the caller of `run_training` owns.
    reports : list of dict
        One a rank.
    """

    model_path: str
    reports: list[dict[str, Any]]


def run_training(
    feed: Any,
    program: bytes,
    archive: Payload | None,
    settings: FitSettings,
    *,
    world_size: int,
    protocol: str,
    compression: str,
    timeout: float,
    threads: int,
    directory: str,
    on_progress: Progress,
) -> TrainingResult:
    """Train on the partitions of a DataFrame; return once all nodes are done.

    Parameters
    ----------
    feed : DataFrame
        Of `world_size` partitions, with exactly the columns of the feed.
    program : bytes
        A pickled `sparktf.cluster.job.Program`.
    archive : Payload or None
        The model, where the program's function does not make it.
    settings : FitSettings
    world_size : int
    protocol, compression : str
    timeout : float
        Seconds without progress.
    threads : int
        TensorFlow threads of a node; 0: cores by nodes.
    directory : str
        Where to put the model.
    on_progress : callable
        ``on_progress(rank, report)``, from another thread.

    Raises
    ------
    SlotsError, ClusterError
        The job cannot run on this cluster.
    NodeError
        A node failed; with its rank and traceback. sparktf's own errors are raised as they are instead.
    """
    spark = feed.sparkSession
    check_cluster(spark, world_size)
    job = TrainJob(
        job_id=uuid.uuid4().hex[:12],
        world_size=world_size,
        secret=secrets.token_bytes(32),
        control=None,
        protocol=protocol,
        compression=compression,
        timeout=timeout,
        versions=installed_versions(),
        settings=settings,
        threads=threads,
        executor_cores=0 if is_connect(spark) else _executor_cores(spark),
        program=program,
        result_limit=result_limit(spark),
        archive=archive,
    )
    path = os.path.join(directory, "trained.keras")
    tag = f"sparktf-{job.job_id}"
    with contextlib.ExitStack() as stack:
        server = watch = None
        if is_connect(spark):
            check_message(len(program) + (0 if archive is None else archive.message_bytes))
            watch = stack.enter_context(watched_start(spark, tag, world_size, timeout))
        else:
            server = stack.enter_context(_control_server(spark, job, path, on_progress, tag))
            job = replace(job, control=ControlAddress(_driver_host(spark), server.port))
        stack.enter_context(_tagged(spark, tag))
        rows = _collect(feed, job, server, watch)
        return _result(rows, job, path, server)


@contextlib.contextmanager
def _control_server(spark: Any, job: TrainJob, path: str, on_progress: Progress, tag: str) -> Iterator[ControlServer]:
    timers: list[threading.Timer] = []

    def cancel_later() -> None:
        timer = threading.Timer(_CANCEL_SECONDS, lambda: _cancel(spark, tag))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    # Ranks that wait for a hanging one are silent as well, and say within the timeout which one it is; this is for a
    # node that nobody waits for.
    silence = 1.5 * job.timeout + _CANCEL_SECONDS
    bind = spark.sparkContext.getConf().get("spark.driver.bindAddress") or _driver_host(spark)
    with ControlServer(
        bind, job.secret, job.job_id, job.world_size, path, on_progress, cancel_later, silence
    ) as server:
        try:
            yield server
        finally:
            for timer in timers:
                timer.cancel()


@contextlib.contextmanager
def _tagged(spark: Any, tag: str) -> Iterator[None]:
    """Tag this thread's Spark jobs; cancel them where the block is left by an error (Ctrl-C above all)."""
    # Not the session's own tags on classic Spark: in 4.3 the first one makes the session's JVM object unfit to be
    # serialized, and with it every MLlib model whose summary holds the session.
    tags = spark if is_connect(spark) else spark.sparkContext
    add, remove = (tags.addTag, tags.removeTag) if is_connect(spark) else (tags.addJobTag, tags.removeJobTag)
    add(tag)
    try:
        yield
    except BaseException:
        _cancel(spark, tag)
        raise
    finally:
        remove(tag)


def _cancel(spark: Any, tag: str) -> None:
    if is_connect(spark):
        spark.interruptTag(tag)
    else:
        spark.sparkContext.cancelJobsWithTag(tag)


def _collect(feed: Any, job: TrainJob, server: ControlServer | None, watch: StartWatch | None) -> list[Any]:
    task = functools.partial(train_task, job=job)
    try:
        return list(feed.mapInArrow(task, RESULT_SCHEMA, barrier=True).collect())
    except SparktfError:
        raise
    except Exception as error:
        failure = server.failure(_LAST_WORDS_SECONDS) if server is not None else None
        given_up = watch.error() if watch is not None else None
        raise given_up or (_job_error(error) if failure is None else _node_error(failure)) from error


def _job_error(error: Exception) -> Exception:
    """Return what Spark itself says of a failed job, where no node could tell the driver."""
    text = str(error)
    if _NO_SLOTS in text:
        return SlotsError(f"The cluster has fewer task slots than numWorkers needs. In Spark's words:\n{text}")
    return remote_error(text) or NodeError(f"The training job failed on the cluster:\n{text}")


def _node_error(failure: NodeFailure) -> Exception:
    if not failure.kind:
        return NodeError(
            f"Rank {failure.rank} was lost: {failure.message}. The log of its executor may say more.",
            failure.rank,
        )
    ours = own_error(failure.kind)
    if ours is NodeError:
        # Of a child process, whose own error and traceback are in the message.
        return NodeError(f"Rank {failure.rank} failed: {failure.message}", failure.rank, failure.traceback)
    if ours is not None:
        named = ours(f"rank {failure.rank}: {failure.message}")
        named.add_note(f"On rank {failure.rank}:\n{failure.traceback}")
        return named
    return NodeError(
        f"Rank {failure.rank} failed: {failure.kind.removeprefix('builtins.')}: {failure.message}\n\n"
        f"{failure.traceback}",
        failure.rank,
        failure.traceback,
    )


def _result(rows: list[Any], job: TrainJob, path: str, server: ControlServer | None) -> TrainingResult:
    import json

    if refused := [bytes(row["payload"]).decode() for row in rows if row["name"] == REFUSED]:
        raise DataError(refused[0])
    reports = {row["rank"]: json.loads(bytes(row["payload"])) for row in rows if row["name"] == REPORT}
    missing = sorted(set(range(job.world_size)) - set(reports))
    if missing and server is not None and (failure := server.failure()) is not None:
        # Living ranks lost each other: each has told so, and none of their tasks failed.
        raise _node_error(failure)
    if missing:
        raise ClusterError(f"Expected a report from {job.world_size} ranks, received none from {missing}.")
    parts = sorted((row for row in rows if row["name"] == MODEL), key=lambda row: int(row["part"]))
    if parts:
        with open(path, "wb") as file:
            for part in parts:
                file.write(part["payload"])
    elif server is None or not server.model_received:
        raise ClusterError("Expected the trained model from the chief, received none.")
    return TrainingResult(path, [reports[rank] for rank in range(job.world_size)])


def _driver_host(spark: Any) -> str:
    return str(spark.sparkContext.getConf().get("spark.driver.host"))


def _executor_cores(spark: Any) -> int:
    """Return the cores of one executor as far as the master or the configuration tells; 0 where neither does."""
    master = spark.sparkContext.master
    if master == "local":
        return 1
    if master.startswith("local["):
        # local[4], local[4,2], local[*]
        cores = master[len("local[") :].rstrip("]").split(",")[0]
        return int(cores) if cores.isdigit() else 0
    if master.startswith("local-cluster["):
        return int(master[len("local-cluster[") :].rstrip("]").split(",")[1])
    # Unset, standalone gives an executor all cores of its machine, YARN and Kubernetes give it one.
    default = "0" if master.startswith("spark://") else "1"
    return int(spark.sparkContext.getConf().get("spark.executor.cores", default))


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a private directory for the files of one job on the driver."""
    return tempfile.TemporaryDirectory(prefix="sparktf-")
