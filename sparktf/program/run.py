"""``sparktf.run``: start a function as a TensorFlow node in every task of a barrier stage."""

from __future__ import annotations

import os
import secrets
import sys
import uuid
from collections.abc import Callable
from typing import Any

from sparktf.cluster.connect import result_limit
from sparktf.cluster.pickling import pickled
from sparktf.cluster.preflight import check_cluster, installed_versions, is_connect
from sparktf.cluster.submit import executor_cores
from sparktf.errors import ParamError
from sparktf.program import feeds
from sparktf.program.handle import RunHandle
from sparktf.program.job import ProgramJob
from sparktf.program.resources import resource_profile
from sparktf.program.roles import Roles
from sparktf.program.sources import sources_of
from sparktf.transport.registry import check_timeout, protocols

Main = Callable[[Any, Any], Any]


def run(
    main: Main,
    args: Any = None,
    *,
    spark: Any = None,
    num_workers: int = 1,
    num_ps: int = 0,
    evaluator: bool = False,
    dataset: Any = None,
    repartition: bool = True,
    protocol: str = "auto",
    compression: str = "none",
    threads_per_worker: int = 0,
    resources: Any = None,
    tensorboard: bool = False,
    log_dir: str | None = None,
    timeout: float = 300.0,
    cluster: bool = True,
    wait: bool = True,
) -> Any:
    """Run ``main(args, ctx)`` as a TensorFlow node in every task of a barrier stage, each in a fresh process.

    Parameters
    ----------
    main : callable
        ``main(args, ctx)``; `ctx` is a `sparktf.program.context.Context`. It and `args` are pickled, so that functions
        of a script or notebook will do; what it returns comes back. Modules that it imports are found in local mode;
        on a cluster ship them with Spark (``--py-files``, ``spark.addArtifacts(..., pyfile=True)``).
    args : object
        Whatever the program wants, such as an ``argparse.Namespace``.
    spark : SparkSession, optional
        The active session by default; a local one where there is none.
    num_workers : int
        Nodes that compute, the chief (rank 0) among them.
    num_ps : int
        Parameter servers beside them. They run `main` as well, serve (``ctx.serve()`` or ``tf.distribute.Server(...)
        .join()``), and are stopped when the workers are done.
    evaluator : bool
        One more node, which is no part of the cluster; it has `timeout` seconds after the workers are done.
    dataset : DataFrame or dict of DataFrame, optional
        To be fed to the workers (``ctx.dataset``, ``ctx.batches``), several by name. None: the program reads its data
        itself (``ctx.shard``).
    repartition : bool
        False: each worker reads a partition of the DataFrame as it is, of which there must be as many as workers.
        Nothing is shuffled, so that a program that leaves ``ctx.batches(..., stream=True)`` early leaves the rest of
        the data unread; shares are as large as the partitions. Else the rows are dealt out evenly first.
    protocol : {"auto", "tcp", "shm", "rdma", "grpc"}
        Of ``ctx.communicator``, ``ctx.distributed_optimizer`` and the way to parameter servers; ``"grpc"``: gradients
        go over TensorFlow's own ring, which takes the process's one TensorFlow cluster, and servers are reached as by
        ``"auto"``. What a program does with ``tf.distribute`` by itself always goes over TensorFlow's gRPC.
    compression : {"none", "bf16"}
        Of gradients between machines.
    threads_per_worker : int
        TensorFlow threads of a node; 0: the executor's cores divided by the nodes on it.
    resources : mapping of str to number, or pyspark.resource.ResourceProfile, optional
        What each node needs beyond the session's settings: ``{"cpus": 4, "gpu": 1}``. Not in local mode.
    tensorboard : bool
        Run TensorBoard beside the chief for the time of the run; its address is printed (the ``tensorboard`` extra).
    log_dir : str, optional
        ``ctx.log_dir``, and what TensorBoard shows.
    timeout : float
        Seconds without progress, a week at most: no node uses its processor, prints or asks for anything. No limit on
        the length of a run.
    cluster : bool
        False: every node is on its own, for inference or trials in parallel; no TF_CONFIG, no communicator.
    wait : bool
        False: return a `RunHandle` at once.

    Returns
    -------
    list
        What `main` returned on each node, by rank; None for nodes that were stopped, and for workers that were lost
        while they trained on parameter servers, of each of which a logged warning tells. With ``wait=False`` a
        `RunHandle`.

    Raises
    ------
    ParamError
        An argument has a value that cannot work, or `main` or `args` cannot be pickled.
    DataError
        The DataFrame holds what no tensor holds.
    SlotsError, ClusterError
        The cluster cannot run so many nodes at once.
    NodeError
        `main` raised on a node: with its rank and its traceback. sparktf's own errors are raised as they are.
    """
    roles = Roles(num_workers, num_ps, evaluator)
    _check(main, protocol, compression, timeout, cluster, roles)
    session = spark if spark is not None else _session(roles.world_size)
    profile = resource_profile(session, resources)
    check_cluster(session, roles.world_size, wanted=_describe(roles), profile=profile)
    frames = feeds.named(dataset)
    program = pickled((main, args), {"main": main, "args": args})
    job = ProgramJob(
        job_id=uuid.uuid4().hex[:12],
        world_size=roles.world_size,
        secret=secrets.token_bytes(32),
        protocol="rdma" if protocol == "grpc_rdma" else protocol,
        compression=compression,
        timeout=float(timeout),
        versions=installed_versions(),
        threads=threads_per_worker,
        executor_cores=0 if is_connect(session) else executor_cores(session),
        result_limit=result_limit(session),
        program=program,
        roles=roles,
        feeds={name: feeds.column_specs(frame.schema, f"dataset {name!r}") for name, frame in frames.items()},
        cluster=cluster,
        tensorboard=tensorboard,
        log_dir=log_dir,
        search_path=_search_path(session),
        sources=sources_of(program),
    )
    handle = RunHandle(session, feeds.partitions(session, frames, roles, repartition), job, profile)
    if not wait:
        return handle.start()
    return handle.run()


def _check(main: Any, protocol: str, compression: str, timeout: float, cluster: bool, roles: Roles) -> None:
    if not callable(main):
        raise ParamError(f"main: expected a function main(args, ctx), received {type(main).__name__}.")
    known = [*protocols(), "grpc", "grpc_rdma"]
    if protocol not in known:
        raise ParamError(f"protocol: expected one of {', '.join(known)}, received {protocol!r}.")
    if compression not in ("none", "bf16"):
        raise ParamError(f"compression: expected 'none' or 'bf16', received {compression!r}.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise ParamError(f"timeout: expected a number of seconds, received {timeout!r}.")
    check_timeout(timeout)
    if not cluster and (roles.num_ps or roles.evaluator):
        raise ParamError("cluster=False: expected workers alone, received num_ps or evaluator beside them.")


def _session(nodes: int) -> Any:
    from sparktf.session import local_session

    return local_session(f"local[{nodes}]")


def _search_path(spark: Any) -> tuple[str, ...]:
    # On the driver's own machine a program of several files is found as it is; elsewhere Spark has to ship them.
    here = not is_connect(spark) and spark.sparkContext.master.startswith("local")
    return tuple(map(os.path.abspath, sys.path)) if here else ()


def _describe(roles: Roles) -> str:
    parts = [f"num_workers={roles.num_workers}"]
    parts += [f"num_ps={roles.num_ps}"] if roles.num_ps else []
    parts += ["evaluator=True"] if roles.evaluator else []
    return f"{roles.world_size} nodes ({', '.join(parts)})"
