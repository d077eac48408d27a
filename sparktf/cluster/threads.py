"""TensorFlow's start in a process that may have used it before: its notices, and its threads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sparktf.quiet import quiet_stderr

# Of this process, once they are set: TensorFlow cannot change them after its first use. 0: not known, because
# somebody else (a scoring job) used TensorFlow here first.
_threads: int | None = None


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


def op_threads(threads: int, world_size: int, small_model: bool) -> int:
    """Return how many threads run ops, of a node that has `threads` to compute with.

    A single one works through a whole backward pass before it comes to handing over the first gradients, so that none
    would be sent meanwhile. A second one costs: small ops compute on it, on a core that may be another node's. So there
    is one only where gradients are sent in several buckets.
    """
    return threads if world_size == 1 or small_model else max(2, threads)


def start_tensorflow(threads: int, ops: int | None = None) -> int:
    """Import TensorFlow and Keras without their notices, and set TensorFlow's threads where that can still be done.

    Parameters
    ----------
    threads : int
        That compute.
    ops : int, optional
        Threads that run ops; `threads` by default. A process that was started with others keeps them: it computes the
        same with them.

    Returns
    -------
    int
        The threads that this process has; 0 where they are not known.
    """
    global _threads
    with quiet_stderr(), _without_optional_imports(), _without_garbage_collection():
        import keras  # noqa: F401  # imported here to hold its notices back
        import tensorflow as tf
    if _threads is None:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            # A step's reduce blocks one of them, when all else that the step can do is done; input has its own.
            tf.config.threading.set_inter_op_parallelism_threads(ops or threads)
            _threads = threads
        except RuntimeError:
            _threads = 0
        # Spark collects garbage after every task; going through all that TensorFlow and Keras made while they were
        # imported takes 0.2 s each time, and none of it is ever garbage.
        gc.freeze()
    return _threads


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among millions of new objects of which none is; a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _without_optional_imports() -> Iterator[None]:
    """Keep Keras from importing what it only uses to draw pictures, in notebooks and to wrap models for scikit-learn.

    Where they are installed they take almost half of the import's time. Others can import them afterwards.
    """
    optional = ("matplotlib", "sklearn", "IPython")
    held = [name for name in optional if name not in sys.modules and "keras" not in sys.modules]
    # None makes an import fail as that of a package which is not there.
    sys.modules.update(dict.fromkeys(held))  # type: ignore[arg-type]  # None is what the import system asks for
    try:
        yield
    finally:
        for name in held:
            del sys.modules[name]
