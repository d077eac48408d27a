"""Programs for runs on executors of their own; a module, as executors import what tests hand to Spark."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np


def sums_rows(args: Any, ctx: Any) -> int:
    """Sum a column over all workers."""
    mine = sum(int(batch["x"].sum()) for batch in ctx.batches(64))
    return int(ctx.communicator.all_reduce(np.array([mine]))[0])


def tells_when_it_raises(args: Any, ctx: Any) -> None:
    """Raise on rank 1; the others wait for it."""
    if ctx.rank == 1:
        raise ValueError(f"kaboom at {time.time()}")
    ctx.communicator.barrier()


def kills_its_task(args: Any, ctx: Any) -> None:
    """Kill the Spark task that this node belongs to, on rank 1."""
    if ctx.rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
