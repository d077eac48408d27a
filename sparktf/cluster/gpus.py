"""A node's GPUs: those that Spark gave to its task, and no other node's."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sparktf.errors import ClusterError
from sparktf.transport import Communicator


def task_gpus() -> list[str]:
    """Return the addresses of the GPUs that Spark gave to this task, none outside of one."""
    from pyspark import TaskContext

    context = TaskContext.get()
    resources = {} if context is None else context.resources()
    return list(resources["gpu"].addresses) if "gpu" in resources else []


def visible_gpus(addresses: Sequence[str]) -> dict[str, str]:
    """Return what a child's environment needs to see these GPUs only; nothing where Spark gives out none."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(addresses)} if addresses else {}


def check_gpus(communicator: Communicator, host: str) -> bool:
    """Check that no GPU of a host was given to two nodes; all ranks call this.

    Parameters
    ----------
    communicator : Communicator
    host : str
        This node's.

    Returns
    -------
    bool
        Any node has GPUs.

    Raises
    ------
    ClusterError
        Naming the GPU, the host and both ranks.
    """
    nodes = [json.loads(p) for p in communicator.all_gather_bytes(json.dumps([host, task_gpus()]).encode())]
    if (shared := shared_gpu(nodes)) is not None:
        address, where, first, second = shared
        raise ClusterError(
            f"Expected every node to have GPUs of its own; received GPU {address} of host {where} for ranks "
            f"{first} and {second}. A task must have whole GPUs (spark.task.resource.gpu.amount of 1 or more), "
            "and executors on one host different ones (spark.worker.resource.gpu.discoveryScript)."
        )
    return any(addresses for _, addresses in nodes)


def shared_gpu(nodes: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, str, int, int] | None:
    """Find a GPU that two nodes were given.

    Parameters
    ----------
    nodes : sequence of (str, sequence of str)
        Each rank's host and the addresses of its GPUs.

    Returns
    -------
    (str, str, int, int) or None
        Its address, its host and the two ranks.
    """
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, addresses) in enumerate(nodes):
        for address in addresses:
            if (owner := owners.setdefault((host, address), rank)) != rank:
                return address, host, owner, rank
    return None
