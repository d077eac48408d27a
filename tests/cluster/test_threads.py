"""TensorFlow's start in a worker, in processes of their own: it can be started only once in each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparktf.cluster.threads import op_threads, threads_for


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_a_worker_starts_tensorflow_in_silence_and_keeps_its_first_threads() -> None:
    run = _run(
        "from sparktf.cluster.threads import start_tensorflow\n"
        "print(start_tensorflow(3), start_tensorflow(5))\n"
        "import tensorflow as tf\n"
        "print(tf.config.threading.get_intra_op_parallelism_threads())\n"
        "import gc, matplotlib, sys; print('matplotlib' in sys.modules, gc.isenabled())\n"
    )
    assert run.stdout.split() == ["3", "3", "3", "True", "True"], run.stderr
    assert run.stderr == ""


def test_threads_of_a_tensorflow_that_others_started_are_not_known() -> None:
    run = _run(
        "import tensorflow as tf; tf.constant(1) + 1\n"
        "from sparktf.cluster.threads import start_tensorflow; print(start_tensorflow(3))\n"
    )
    assert run.stdout.split() == ["0"], run.stderr


@pytest.mark.parametrize(("wanted", "cores", "nodes", "threads"), [(5, 2, 1, 5), (0, 1, 1, 1), (0, 1, 4, 1)])
def test_threads_are_the_ones_asked_for_or_a_share_of_the_executors_cores(
    wanted: int, cores: int, nodes: int, threads: int
) -> None:
    assert threads_for(wanted, cores, nodes) == threads


def test_a_lone_computing_thread_has_one_beside_it_where_gradients_go_in_several_buckets() -> None:
    assert [op_threads(1, 2, small) for small in (False, True)] == [2, 1]
    assert [op_threads(threads, 2, False) for threads in (2, 4)] == [2, 4]
    assert op_threads(1, 1, False) == 1
