"""Whose failure it is that ends a run: that of the node that failed first, whoever hears of it first."""

from __future__ import annotations

import os
import select
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sparktf.cluster.control import ControlClient
from sparktf.errors import NodeError, PeerLostError
from sparktf.program.feeder import Feeder, Partition
from sparktf.program.job import ProgramJob
from sparktf.program.node import Node
from sparktf.program.process import ChildProcess
from sparktf.program.roles import Roles
from sparktf.transport import Communicator
from sparktf.transport.testing import run_threads

# A module's text; it runs as a child does, with its ends of the socket pairs as arguments.
_FAILS = """
import json, socket, sys, time
from sparktf.program import wire
from sparktf.transport.framing import send_frame
sock = socket.socket(fileno=int(sys.argv[1]))
told = {"kind": "builtins.ValueError", "message": "exploded", "traceback": "", "peer": None, "reason": ""}
send_frame(sock, wire.PROGRESS, json.dumps({"step": 1}).encode(), 5)
send_frame(sock, wire.ERROR, json.dumps(told).encode(), 5)
"""
_WAITS = "import time\ntime.sleep(100)\n"


def _job() -> ProgramJob:
    return ProgramJob(
        job_id="job",
        world_size=2,
        secret=bytes(32),
        protocol="tcp",
        compression="none",
        timeout=30.0,
        versions={},
        threads=1,
        executor_cores=0,
        program=b"",
        roles=Roles(2),
        feeds={},
    )


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [(_FAILS, NodeError, "ValueError: exploded"), (_WAITS, PeerLostError, "PeerLostError: rank 1 failed")],
)
def test_a_childs_own_error_counts_where_another_node_has_left_for_it(
    tmp_path: Path, text: str, kind: type[Exception], message: str
) -> None:
    (tmp_path / "child.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}

    def main(communicator: Communicator) -> Any:
        job = _job()
        if communicator.rank == 0:
            communicator.barrier()
            return communicator.abort("PeerLostError: rank 1 failed")
        with tempfile.TemporaryFile() as result, ChildProcess("child", result, environment) as child:
            if text == _FAILS:
                assert select.select([child.frames], [], [], 30)[0]
                child._process.wait(30)
            feeder = Feeder(Partition([], {}), 1, job.roles.compute_ranks, fed=False)
            node = Node(job, communicator, ControlClient.connect(None, job.secret, job.job_id, 1), child, feeder)
            communicator.barrier()
            # As if this task had come to the board before it has listened to its child.
            node._listen = lambda seconds: None  # type: ignore[method-assign]
            return node.run()

    raised = run_threads("tcp", 2, main, timeout=30.0)[1]
    assert isinstance(raised, kind), raised
    assert message in str(raised)


# A node that has failed for another: it says so, and is gone.
_FAILS_FOR_ANOTHER = _FAILS.replace("builtins.ValueError", "sparktf.errors.PeerLostError").replace("exploded", "lost")


def test_a_child_that_has_failed_for_a_lost_peer_is_not_taken_for_the_one_that_failed(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(_FAILS_FOR_ANOTHER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}

    def main(communicator: Communicator) -> Any:
        job = _job()
        if communicator.rank == 0:
            # As long as the other listens to its child.
            return communicator.barrier()
        with tempfile.TemporaryFile() as result, ChildProcess("child", result, environment) as child:
            child._process.wait(30)
            feeder = Feeder(Partition([], {}), 1, job.roles.compute_ranks, fed=False)
            node = Node(job, communicator, ControlClient.connect(None, job.secret, job.job_id, 1), child, feeder)
            try:
                return node.run()
            finally:
                communicator.barrier()

    raised = run_threads("tcp", 2, main, timeout=30.0)[1]
    assert isinstance(raised, PeerLostError), raised
    assert "lost" in str(raised)
