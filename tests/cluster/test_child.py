"""A node in a child process: whose failure an error is."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import psutil
import pyarrow as pa
from pyspark import cloudpickle

from sparktf.cluster.child_process import train_in_child
from sparktf.cluster.job import Program, TrainJob
from sparktf.cluster.spooled import SpooledNode
from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import SpoolWriter
from sparktf.distribute.fit import FitSettings
from sparktf.errors import NodeError, PeerLostError
from sparktf.transport import Communicator
from sparktf.transport.testing import run_threads

SPECS = [ColumnSpec("x", (1,), "float32", "x"), ColumnSpec("y", (), "float32", "y", "label")]


def model() -> keras.Model:
    made = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


def broken() -> keras.Model:
    raise RuntimeError("kaboom while the model is made")


def _after(seconds: float, made: Any) -> Any:
    time.sleep(seconds)
    return made


class StartsLate:
    """Makes a model; takes its time to be unpickled, as a child's start takes."""

    def __init__(self, seconds: float, made: Any) -> None:
        self._told = (seconds, made)

    def __reduce__(self) -> Any:
        return _after, self._told


def deserted(note: str) -> keras.Model:
    """End without a word, and leave a process that holds all that was open."""
    orphan = os.fork()
    if orphan == 0:
        time.sleep(60)
        os._exit(0)
    Path(note).write_text(str(orphan))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def _job(model_fn: Any, timeout: float = 60.0) -> TrainJob:
    # Its feed is not asked for anything before the children have met.
    program = Program(model_fn, {}, (), feed=None)  # type: ignore[arg-type]
    return TrainJob(
        job_id="job",
        world_size=2,
        secret=bytes(32),
        control=None,
        protocol="tcp",
        compression="none",
        timeout=timeout,
        versions={},
        settings=FitSettings(batch_size=2, epochs=1, shuffle=False, seed=0),
        threads=1,
        executor_cores=0,
        program=cloudpickle.dumps(program),
    )


def _in_child(job: TrainJob, communicator: Communicator, directory: Path) -> Any:
    with SpoolWriter(SPECS, str(directory)) as writer:
        writer.append(pa.record_batch({"x": pa.array([1.0], pa.float32()), "y": pa.array([1.0], pa.float32())}))
        with writer.finish() as spool:
            return train_in_child(job, SpooledNode(SPECS, spool, communicator, "127.0.0.1", 1, None), False)


def test_a_peer_lost_while_children_meet_keeps_its_own_error(tmp_path: Path) -> None:
    def main(communicator: Communicator) -> Any:
        if communicator.rank == 0:
            return _in_child(_job(model), communicator, tmp_path)
        return communicator.abort("RuntimeError: kaboom on rank 1")

    raised = run_threads("tcp", 2, main, timeout=60.0)[0]
    assert isinstance(raised, PeerLostError), raised
    assert (raised.peer, raised.reason) == (1, "RuntimeError: kaboom on rank 1")
    assert not [child for child in psutil.Process().children() if "sparktf.cluster.child" in child.cmdline()]


def test_a_childs_own_error_is_the_nodes(tmp_path: Path) -> None:
    def main(communicator: Communicator) -> Any:
        return _in_child(_job(broken), communicator, tmp_path)

    raised = run_threads("tcp", 2, main, timeout=60.0)[0]
    assert isinstance(raised, NodeError), raised
    assert raised.rank == 0
    assert str(raised).startswith("RuntimeError: kaboom while the model is made\n")


def test_children_may_start_further_apart_than_the_timeout(tmp_path: Path) -> None:
    def main(communicator: Communicator) -> Any:
        late = 8.0 if communicator.rank == 1 else 0.0
        # On both ranks, so that neither is only the other's lost peer.
        return _in_child(_job(StartsLate(late, broken), timeout=4.0), communicator, tmp_path)

    for raised in run_threads("tcp", 2, main, timeout=4.0):
        # The model is made after the children have met.
        assert isinstance(raised, NodeError), raised
        assert str(raised).startswith("RuntimeError: kaboom while the model is made\n")


def test_a_child_that_ends_is_missed_even_where_a_process_of_its_own_lives_on(tmp_path: Path) -> None:
    note = tmp_path / "orphan"

    def main(communicator: Communicator) -> Any:
        job = replace(_job(partial(deserted, str(note))), world_size=1)
        return _in_child(job, communicator, tmp_path)

    (raised,) = run_threads("tcp", 1, main, timeout=60.0)
    orphan = psutil.Process(int(note.read_text()))
    assert orphan.is_running()
    orphan.kill()
    assert isinstance(raised, NodeError), raised
    assert str(raised) == "The node's child process ended without a word (killed by signal 9)."
