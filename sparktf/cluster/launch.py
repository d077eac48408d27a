"""Run a training job on a Spark session, from the driver."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import uuid
from dataclasses import dataclass
from typing import Any

from sparktf.cluster.connect import result_limit
from sparktf.cluster.job import Payload, TrainJob
from sparktf.cluster.node import MODEL, REFUSED, REPORT, train_task
from sparktf.cluster.preflight import check_cluster, installed_versions, is_connect
from sparktf.cluster.submit import Outcome, Progress, executor_cores, node_error, submit
from sparktf.distribute.fit import FitSettings
from sparktf.errors import ClusterError, DataError


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
    gradient_bytes: int,
    directory: str,
    on_progress: Progress,
    log_dir: str | None = None,
    tensorboard: bool = False,
    num_ps: int = 0,
    max_staleness: int | None = None,
) -> TrainingResult:
    """Train on the partitions of a DataFrame; return once all nodes are done.

    Parameters
    ----------
    feed : DataFrame
        Of `world_size` partitions, with exactly the columns of the feed; those of parameter servers are empty.
    program : bytes
        A pickled `sparktf.cluster.job.Program`.
    archive : Payload or None
        The model, where the program's function does not make it.
    settings : FitSettings
    world_size : int
        Nodes, parameter servers included.
    protocol, compression : str
    timeout : float
        Seconds without progress.
    threads : int
        TensorFlow threads of a node; 0: cores by nodes.
    gradient_bytes : int
        Of all gradients of one step; 0 where that is not known yet.
    directory : str
        Where to put the model.
    on_progress : callable
        ``on_progress(rank, report)``, from another thread.
    log_dir : str, optional
        Where the chief logs for TensorBoard.
    tensorboard : bool
        Run the server beside the chief.
    num_ps : int
        Parameter servers; 0: workers train in lockstep.
    max_staleness : int or None

    Raises
    ------
    SlotsError, ClusterError
        The job cannot run on this cluster.
    NodeError
        A node failed; with its rank and traceback. sparktf's own errors are raised as they are instead.
    """
    spark = feed.sparkSession
    check_nodes(spark, world_size - num_ps, num_ps)
    job = TrainJob(
        job_id=uuid.uuid4().hex[:12],
        world_size=world_size,
        secret=secrets.token_bytes(32),
        protocol=protocol,
        compression=compression,
        timeout=timeout,
        versions=installed_versions(),
        settings=settings,
        threads=threads,
        executor_cores=0 if is_connect(spark) else executor_cores(spark),
        program=program,
        result_limit=result_limit(spark),
        archive=archive,
        log_dir=log_dir,
        tensorboard=tensorboard,
        gradient_bytes=gradient_bytes,
        num_ps=num_ps,
        max_staleness=max_staleness,
    )
    path = os.path.join(directory, "trained.keras")
    outcome = submit(
        feed,
        train_task,
        job,
        message_bytes=len(program) + (0 if archive is None else archive.message_bytes),
        # One of them sends it.
        file_paths=dict.fromkeys(range(job.num_workers if num_ps else 1), path),
        on_progress=on_progress,
    )
    return _result(outcome, job, path)


def check_nodes(spark: Any, num_workers: int, num_ps: int) -> None:
    """Check that this session can run so many workers and parameter servers at once.

    Raises
    ------
    SlotsError, ClusterError
    """
    nodes = num_workers + num_ps
    check_cluster(spark, nodes, f"{nodes} nodes (numWorkers={num_workers}, numPs={num_ps})" if num_ps else None)


def _result(outcome: Outcome, job: TrainJob, path: str) -> TrainingResult:
    rows = outcome.rows
    if refused := [bytes(row["payload"]).decode() for row in rows if row["name"] == REFUSED]:
        raise DataError(refused[0])
    reports = {row["rank"]: json.loads(bytes(row["payload"])) for row in rows if row["name"] == REPORT}
    missing = sorted(set(range(job.world_size)) - set(reports))
    if missing and outcome.failure is not None:
        raise node_error(outcome.failure)
    if missing:
        raise ClusterError(f"Expected a report from {job.world_size} ranks, received none from {missing}.")
    parts = sorted((row for row in rows if row["name"] == MODEL), key=lambda row: int(row["part"]))
    if parts:
        with open(path, "wb") as file:
            for part in parts:
                file.write(part["payload"])
    elif not outcome.received:
        if outcome.failure is not None:
            # Its file did not arrive here, whatever the node believes: the driver's disk is full, say.
            raise node_error(outcome.failure)
        lost = [f"worker {rank}: {told['lost']}" for rank, told in sorted(reports.items()) if "lost" in told]
        raise ClusterError(
            f"Expected the trained model from a worker, received none. Lost: {', '.join(lost) or 'none'}."
        )
    return TrainingResult(path, [reports[rank] for rank in range(job.world_size)])


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a private directory for the files of one job on the driver."""
    return tempfile.TemporaryDirectory(prefix="sparktf-")
