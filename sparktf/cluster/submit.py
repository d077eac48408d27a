"""Run the nodes of a job as the tasks of a barrier stage: watched by the driver, and ended where one of them fails."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparktf.cluster.connect import StartWatch, check_message, remote_error, watched_start
from sparktf.cluster.control import ControlAddress
from sparktf.cluster.control_server import ControlServer, NodeFailure
from sparktf.cluster.job import Job
from sparktf.cluster.node import RESULT_SCHEMA
from sparktf.cluster.preflight import is_connect
from sparktf.cluster.start import ClassicStartWatch
from sparktf.errors import NodeError, SlotsError, SparktfError, own_error

_LOG = logging.getLogger("sparktf.cluster")

# After a node's error has reached the driver, Spark ends the other tasks in about two seconds; a job that still runs
# after this many is cancelled.
_CANCEL_SECONDS = 5.0
# Spark may notice a dead task before the control connection's end has been read.
_LAST_WORDS_SECONDS = 2.0

# A screen may be slow; nodes themselves have left by then.
_LAST_LINES_SECONDS = 30.0

# Spark's error for a barrier stage that is larger than the cluster.
_NO_SLOTS = "SPARK-24819"

Progress = Callable[[int, dict[str, Any]], None]
NodeName = Callable[[int], str]


@dataclass(frozen=True)
class Outcome:
    """What a job's tasks returned.

    Attributes
    ----------
    rows : list of Row
        Of `RESULT_SCHEMA`.
    received : frozenset of int
        Ranks whose file has arrived.
    failure : NodeFailure or None
        Where living ranks lost each other: each has told so, and none of their tasks failed.
    """

    rows: list[Any]
    received: frozenset[int]
    failure: NodeFailure | None


def submit(
    frame: Any,
    task: Callable[..., Iterator[Any]],
    job: Job,
    *,
    message_bytes: int,
    file_paths: Mapping[int, str],
    on_progress: Progress,
    node_name: NodeName = "Rank {}".format,
    profile: Any = None,
) -> Outcome:
    """Run a job's nodes on the partitions of a DataFrame; return once all are done.

    Parameters
    ----------
    frame : DataFrame
        Of as many partitions as the job has nodes.
    task : callable
        ``task(batches, job=job)`` runs one node; a function of a module, which Spark pickles by its name.
    job : Job
        Its control address is filled in here.
    message_bytes : int
        What the job carries beside the plan; Spark Connect takes only so much.
    file_paths : mapping of int to str
        Where to write the files that ranks send.
    on_progress : callable
        ``on_progress(rank, report)``, from another thread.
    node_name : callable, optional
        How errors call a rank.
    profile : ResourceProfile, optional

    Raises
    ------
    SlotsError
        Spark found fewer task slots than nodes.
    NodeError
        A node failed; with its rank and traceback. sparktf's own errors are raised as they are instead.
    """
    spark = frame.sparkSession
    tag = f"sparktf-{job.job_id}"
    with contextlib.ExitStack() as stack:
        server = None
        watch: StartWatch | ClassicStartWatch
        if is_connect(spark):
            check_message(message_bytes)
            watch = stack.enter_context(watched_start(spark, tag, job.world_size, job.timeout))
        else:
            server = stack.enter_context(_control_server(spark, job, file_paths, on_progress, tag))
            job = replace(job, control=ControlAddress(_driver_host(spark), server.port))
            end = functools.partial(cancel, spark, tag)
            watch = ClassicStartWatch(spark, tag, job.world_size, job.timeout, server.heard_from_a_node, end)
            stack.enter_context(watch)
        stack.enter_context(_tagged(spark, tag))
        nodes = functools.partial(frame.mapInArrow, functools.partial(task, job=job), RESULT_SCHEMA, barrier=True)
        if profile is not None:
            nodes = functools.partial(nodes, profile=profile)
        rows = _collect(nodes, server, watch, node_name)
        if server is None:
            return Outcome(rows, frozenset(), None)
        # Spark's result may be faster than a node's last lines, or its file.
        server.listen_to_the_end(_LAST_LINES_SECONDS)
        received = frozenset(rank for rank in file_paths if server.received(rank))
        return Outcome(rows, received, server.failure())


@contextlib.contextmanager
def _control_server(
    spark: Any, job: Job, file_paths: Mapping[int, str], on_progress: Progress, tag: str
) -> Iterator[ControlServer]:
    timers: list[threading.Timer] = []

    def cancel_later() -> None:
        timer = threading.Timer(_CANCEL_SECONDS, lambda: cancel(spark, tag))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    # Ranks that wait for a hanging one are silent as well, and say within the timeout which one it is; this is for a
    # node that nobody waits for.
    silence = 1.5 * job.timeout + _CANCEL_SECONDS
    bind = spark.sparkContext.getConf().get("spark.driver.bindAddress") or _driver_host(spark)
    with ControlServer(
        bind, job.secret, job.job_id, job.world_size, file_paths, on_progress, cancel_later, silence
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
        cancel(spark, tag)
        raise
    finally:
        remove(tag)


def cancel(spark: Any, tag: str) -> None:
    """End a tagged job and all of its tasks."""
    if is_connect(spark):
        spark.interruptTag(tag)
    else:
        spark.sparkContext.cancelJobsWithTag(tag)


def _collect(
    nodes: Callable[[], Any],
    server: ControlServer | None,
    watch: StartWatch | ClassicStartWatch,
    node_name: NodeName,
) -> list[Any]:
    try:
        return list(nodes().collect())
    except SparktfError:
        raise
    except Exception as error:
        failure = server.failure(_LAST_WORDS_SECONDS) if server is not None else None
        given_up = watch.error()
        if failure is not None and failure.kind and given_up is None:
            # Spark's account of the same, pages of it in Java's words, tells nothing more.
            raise node_error(failure, node_name) from None
        raise given_up or (_job_error(error) if failure is None else node_error(failure, node_name)) from error


def _job_error(error: Exception) -> Exception:
    """Return what Spark itself says of a failed job, where no node could tell the driver."""
    text = str(error)
    if _NO_SLOTS in text:
        return SlotsError(f"The cluster has fewer task slots than nodes. In Spark's words:\n{text}")
    return remote_error(text) or NodeError(f"The job failed on the cluster:\n{text}")


def node_error(failure: NodeFailure, node_name: NodeName = "Rank {}".format) -> SparktfError:
    """Make the error that the driver raises of what a node has told."""
    name = node_name(failure.rank)
    if not failure.kind:
        return NodeError(
            f"{name} was lost: {failure.message}. The log of its executor may say more.",
            failure.rank,
        )
    ours = own_error(failure.kind)
    if ours is NodeError:
        # Of a child process, whose own error and traceback are in the message.
        return NodeError(f"{name} failed: {failure.message}", failure.rank, failure.traceback)
    if ours is not None:
        named = ours(f"{name[0].lower()}{name[1:]}: {failure.message}")
        named.add_note(f"On {name[0].lower()}{name[1:]}:\n{failure.traceback}")
        return named
    return NodeError(
        f"{name} failed: {failure.kind.removeprefix('builtins.')}: {failure.message}\n\n{failure.traceback}",
        failure.rank,
        failure.traceback,
    )


def _driver_host(spark: Any) -> str:
    return str(spark.sparkContext.getConf().get("spark.driver.host"))


def executor_cores(spark: Any) -> int:
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
