"""What is checked before a job is submitted, so that a job that cannot run fails at once."""

from __future__ import annotations

import sys
import time
from importlib import metadata
from typing import Any

from sparktf._version import __version__
from sparktf.errors import ClusterError, SlotsError, VersionError

# Executors of a session that has just started still come up.
_EXECUTORS_SECONDS = 30.0


def is_connect(spark: Any) -> bool:
    """Tell whether a session is a Spark Connect client, which has no JVM beside it."""
    return type(spark).__module__.startswith("pyspark.sql.connect")


def check_cluster(spark: Any, nodes: int, wanted: str | None = None, profile: Any = None) -> None:
    """Check that a barrier stage of `nodes` tasks can run on this session.

    Parameters
    ----------
    spark : SparkSession
        Classic or Connect. On Connect the slots are not known: Spark itself gives up after a while.
    nodes : int
    wanted : str, optional
        What the nodes are, for the message.
    profile : ResourceProfile, optional
        What each task needs beyond the session's settings.

    Raises
    ------
    ClusterError
        Dynamic allocation is on: Spark refuses barrier stages then.
    SlotsError
        The cluster has fewer task slots.
    """
    if (spark.conf.get("spark.dynamicAllocation.enabled", "false") or "false").lower() == "true":
        raise ClusterError(
            "Expected spark.dynamicAllocation.enabled=false, received true: Spark does not run barrier stages, which "
            "training needs, with dynamic allocation. Start the session without it."
        )
    if is_connect(spark):
        return
    slots = _slots(spark, profile)
    if slots < nodes and not in_this_process(spark.sparkContext.master):
        slots = _wait_for_slots(spark, nodes, profile)
    if slots < nodes:
        fix = f"numWorkers={max(slots, 1)}" if wanted is None else "fewer nodes"
        raise SlotsError(
            f"Expected {nodes} task slots, one for each of {wanted or f'numWorkers={nodes}'}; received {slots} "
            f"(master {spark.sparkContext.master!r}). Use {fix}, or give the session more executors or cores "
            "(local mode: local[N])."
        )


def in_this_process(master: str) -> bool:
    """Tell whether a master is Spark's local mode, with all tasks in the driver's own process."""
    return master == "local" or master.startswith("local[")


def _slots(spark: Any, profile: Any) -> int:
    context = spark.sparkContext._jsc.sc()
    if profile is None:
        return int(context.maxNumConcurrentTasks(context.resourceProfileManager().defaultResourceProfile()))
    # Spark knows a profile by its number only once it has been told of it.
    context.resourceProfileManager().addResourceProfile(profile._java_resource_profile)
    return int(context.maxNumConcurrentTasks(profile._java_resource_profile))


def _wait_for_slots(spark: Any, nodes: int, profile: Any) -> int:
    age = time.time() - spark.sparkContext.startTime / 1000
    deadline = time.monotonic() + max(0.0, _EXECUTORS_SECONDS - age)
    while (slots := _slots(spark, profile)) < nodes and time.monotonic() < deadline:
        time.sleep(0.2)
    return slots


def installed_versions() -> dict[str, str]:
    """Return the versions of what driver and nodes must agree on, without importing any of it."""
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "sparktf": __version__,
        "tensorflow": _version("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-rocm"),
        "keras": _version("keras"),
    }


def check_versions(drivers: dict[str, str], nodes: list[dict[str, str]]) -> None:
    """Compare the versions of all nodes with the driver's, up to the patch level.

    Raises
    ------
    VersionError
        Naming the package, both versions and the ranks.
    """
    for package, wanted in drivers.items():
        for rank, versions in enumerate(nodes):
            if _minor(versions.get(package, "none")) != _minor(wanted):
                raise VersionError(
                    f"Expected {package} {wanted}, the driver's, on every executor; received "
                    f"{versions.get(package, 'none')} on rank {rank}. Install the same version everywhere."
                )


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
