"""No node outlives its driver, and nothing is left of many runs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import programs
import psutil
import pytest

from sparktf import run
from sparktf.errors import NodeError

pytestmark = pytest.mark.long

_DRIVER = """
import sys
import programs
from sparktf import local_session, run
spark = local_session({master!r}, **{settings!r})
try:
    run(programs.tells_its_pid, spark=spark, num_workers=2)
except KeyboardInterrupt:
    print("interrupted, then", len(run(programs.who, spark=spark, num_workers=2)), "nodes", flush=True)
"""
_START_SECONDS, _END_SECONDS = 120.0, 30.0


@pytest.fixture(params=["local[2]", "local-cluster[2,1,1024]"])
def driver(
    request: pytest.FixtureRequest, spark_settings: dict[str, object]
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a driver whose nodes run; give it and its nodes' process ids."""
    script = _DRIVER.format(master=request.param, settings=spark_settings)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ},
        start_new_session=True,
    )
    assert process.stdout is not None
    nodes: list[int] = []
    said: list[str] = []
    deadline = time.monotonic() + _START_SECONDS
    while len(nodes) < 2 and time.monotonic() < deadline and (line := process.stdout.readline()):
        said.append(line)
        nodes += [int(pid) for pid in re.findall(r"\] pid (\d+)", line)]
    assert len(nodes) == 2, "".join(said)
    yield process, nodes
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()


def _gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + _END_SECONDS
    while (alive := [p for p in pids if psutil.pid_exists(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive


def _zombies() -> set[int]:
    """Return the processes of this one that have ended and that nobody has waited for."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def test_nodes_end_when_their_driver_is_killed(driver: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, nodes = driver
    process.kill()
    assert _gone(nodes)


@pytest.mark.parametrize("interrupt", [os.kill, os.killpg])
def test_nodes_end_when_their_driver_is_interrupted_which_runs_others_then(
    driver: tuple[subprocess.Popen[str], list[int]], interrupt: Callable[[int, int], None]
) -> None:
    process, nodes = driver
    # The driver alone, or as Ctrl-C in a terminal does it: with all that it has started.
    interrupt(process.pid, signal.SIGINT)
    assert _gone(nodes)
    said, _ = process.communicate(timeout=_START_SECONDS)
    assert "interrupted, then 2 nodes" in said, said


def test_nothing_is_left_of_twenty_runs_good_and_bad(spark: Any, no_leftovers: Any) -> None:
    # Spark's launcher leaves one to its JVM now and then.
    before = _zombies()
    for number in range(20):
        if number % 4 == 1:
            with pytest.raises(NodeError):
                run(programs.fails_on_rank, 0, spark=spark)
        elif number % 4 == 3:
            with pytest.raises(NodeError):
                run(programs.dies_on_rank, 0, spark=spark)
        else:
            frame = spark.range(50).selectExpr("id as x")
            assert run(programs.rows, spark=spark, dataset=frame) == [[(13, sum(range(50)))]]
    kinds = {kind for kind, found in no_leftovers().items() if found}
    assert not kinds & {"processes", "files"}
    # Sockets are counted when the test has ended; of zombies, those that somebody here should have waited for.
    zombies = _zombies() - before
    time.sleep(2)
    assert not zombies & _zombies()
