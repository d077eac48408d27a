"""Which rank does what, and how TensorFlow is told: plain arithmetic, the same on the driver and on every node."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparktf.errors import ParamError

CHIEF, WORKER, PS, EVALUATOR = "chief", "worker", "ps", "evaluator"


@dataclass(frozen=True)
class Roles:
    """The nodes of a run: the chief is rank 0, then come the other workers, parameter servers and the evaluator.

    Parameters
    ----------
    num_workers : int
        The chief is one of them.
    num_ps : int
    evaluator : bool

    Raises
    ------
    ParamError
        There is no worker, or a negative number of servers.
    """

    num_workers: int = 1
    num_ps: int = 0
    evaluator: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 1), ("num_ps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ParamError(f"{name}: expected an integer of at least {least}, received {value!r}.")

    @property
    def world_size(self) -> int:
        """The number of nodes."""
        return self.num_workers + self.num_ps + bool(self.evaluator)

    @property
    def compute_ranks(self) -> range:
        """Ranks of the chief and the other workers."""
        return range(self.num_workers)

    def job_name(self, rank: int) -> str:
        """Return the rank's role: ``"chief"``, ``"worker"``, ``"ps"`` or ``"evaluator"``."""
        return self._place(rank)[0]

    def task_index(self, rank: int) -> int:
        """Return the rank's number among those of its role, from 0."""
        return self._place(rank)[1]

    def describe(self, rank: int) -> str:
        """Return how people call a rank: ``"rank 2 (worker 1)"``; a lone chief is just ``"rank 0"``."""
        job_name, index = self._place(rank)
        if self.world_size == 1:
            return f"rank {rank}"
        return f"rank {rank} ({job_name})" if job_name in (CHIEF, EVALUATOR) else f"rank {rank} ({job_name} {index})"

    def cluster_spec(self, addresses: Sequence[str]) -> dict[str, list[str]]:
        """Return TensorFlow's cluster, by job name; the evaluator is no part of it, as TensorFlow wants it.

        Parameters
        ----------
        addresses : sequence of str
            ``"host:port"`` of every rank.
        """
        spec: dict[str, list[str]] = {}
        for rank, address in enumerate(addresses):
            job_name = self.job_name(rank)
            if job_name != EVALUATOR:
                spec.setdefault(job_name, []).append(address)
        return spec

    def tf_config(self, rank: int, addresses: Sequence[str]) -> str:
        """Return the value of TF_CONFIG for a rank (tf.distribute.cluster_resolver.TFConfigClusterResolver)."""
        task: dict[str, Any] = {"type": self.job_name(rank), "index": self.task_index(rank)}
        return json.dumps({"cluster": self.cluster_spec(addresses), "task": task})

    def _place(self, rank: int) -> tuple[str, int]:
        if rank == 0:
            return CHIEF, 0
        if rank < self.num_workers:
            return WORKER, rank - 1
        if rank < self.num_workers + self.num_ps:
            return PS, rank - self.num_workers
        return EVALUATOR, 0
