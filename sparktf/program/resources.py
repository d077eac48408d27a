"""What each node needs of a cluster beyond the session's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparktf.cluster.preflight import in_this_process, is_connect
from sparktf.errors import ParamError

# Spark gives out no parts of a core. It lets tasks share a GPU, which a node's TensorFlow takes whole.
_WHOLE = ("cpus", "gpu")


def resource_profile(spark: Any, resources: Any) -> Any:
    """Return Spark's ResourceProfile for a run's tasks; None where nothing is asked for.

    Parameters
    ----------
    spark : SparkSession
    resources : mapping of str to number, ResourceProfile or None
        ``{"cpus": 4, "gpu": 1}``: of each task.

    Raises
    ------
    ParamError
        It is neither, a number is none that Spark has, or the session runs in local mode, which knows no profiles.
    """
    if resources is None:
        return None
    if not is_connect(spark) and in_this_process(spark.sparkContext.master):
        raise ParamError(
            f"resources: expected a cluster, received {resources!r} on {spark.sparkContext.master!r}: Spark's local "
            "mode knows no resource profiles. Leave resources out."
        )
    if not isinstance(resources, Mapping):
        return resources
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    requests = TaskResourceRequests()
    for name, amount in resources.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 < amount < math.inf:
            raise ParamError(f"resources[{name!r}]: expected a number above 0, received {amount!r}.")
        if name in _WHOLE and amount != int(amount):
            raise ParamError(
                f"resources[{name!r}]: expected a whole number, as no node takes a part of one, received {amount!r}."
            )
        requests = requests.cpus(int(amount)) if name == "cpus" else requests.resource(name, amount)
    return ResourceProfileBuilder().require(requests).build
