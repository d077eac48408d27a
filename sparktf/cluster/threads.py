"""TensorFlow's threads in a process that may have used TensorFlow before."""

from __future__ import annotations

import os
import sys

# Of this process, once they are set: TensorFlow cannot change them after its first use.
_current: int | None = None


def quiet_tensorflow() -> None:
    """Keep TensorFlow's start-up notices off the screen; before it is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_DEPRECATION_WARNINGS", "0")


def threads_for(wanted: int, executor_cores: int, nodes_on_executor: int) -> int:
    """Return the threads of a node.

    Parameters
    ----------
    wanted : int
        What the user said; 0 for a fair share of the cores.
    executor_cores : int
        Of one executor; 0 where not known.
    nodes_on_executor : int
    """
    if wanted > 0:
        return wanted
    machine = len(os.sched_getaffinity(0))
    return max(1, min(executor_cores or machine, machine) // max(1, nodes_on_executor))


def fits_this_process(threads: int, exact: bool) -> bool:
    """Tell whether a node of so many threads can run in this process.

    Parameters
    ----------
    threads : int
    exact : bool
        The user asked for this number; else another one that the process already has will do.
    """
    if _current is None:
        # Somebody else's TensorFlow may be running here: then its threads are not known.
        return "tensorflow" not in sys.modules or not exact or _set(threads)
    return _current == threads or not exact


def use_threads(threads: int) -> None:
    """Set TensorFlow's threads in this process where that can still be done."""
    if _current is None:
        _set(threads)


def _set(threads: int) -> bool:
    global _current
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # One more than the computing ones: a step's reduce waits inside an op, and the input goes on beside it.
        tf.config.threading.set_inter_op_parallelism_threads(threads + 1)
    except RuntimeError:
        return False
    _current = threads
    return True
