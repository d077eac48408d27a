"""A child process ends with all that it has started, and tells what it uses."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sparktf.program.process import ChildProcess

# A module's text; it runs as a child does, with three descriptors as its arguments.
_FAMILY = """
import subprocess, sys, time
other = subprocess.Popen(
    [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)"], stdout=subprocess.PIPE
)
other.stdout.readline()
print(other.pid, flush=True)
time.sleep(100)
"""
# Tells the ids of a child, of what it has started and of its guard, and waits to be killed.
_PARENT = """
import os, sys, tempfile, time
from sparktf.program.process import ChildProcess
child = ChildProcess("family", tempfile.TemporaryFile(), os.environ)
while not (other := child.outputs["stdout"].read()):
    time.sleep(0.01)
print(child.pid, child._guard.pid, other.decode().strip(), flush=True)
time.sleep(100)
"""
_BUSY = "print('on', flush=True)\nwhile True: pass\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], ChildProcess]]:
    running: list[ChildProcess] = []

    def start(text: str) -> ChildProcess:
        name = f"child_{len(running)}"
        (tmp_path / f"{name}.py").write_text(text)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
        with tempfile.TemporaryFile() as result:
            running.append(ChildProcess(name, result, environment))
        return running[-1]

    yield start
    for child in running:
        child.close()


def _until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def _ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _first_line(child: ChildProcess) -> str:
    deadline = time.monotonic() + 20
    text = b""
    while not text.endswith(b"\n") and time.monotonic() < deadline:
        text += child.outputs["stdout"].read() or b""
        time.sleep(0.01)
    return text.decode().strip()


def test_what_a_child_has_started_ends_with_it(start: Callable[[str], ChildProcess]) -> None:
    child = start(_FAMILY)
    other = int(_first_line(child))
    child.close()
    assert child.status() is not None
    # Whoever adopts it may not have asked for its status yet.
    assert _until(lambda: _ended(other))


def test_a_stopped_child_ends_all_the_same(start: Callable[[str], ChildProcess]) -> None:
    child = start(_FAMILY)
    _first_line(child)
    psutil.Process(child.pid).suspend()
    assert _until(child.stopped)
    child.close()
    assert child.status() is not None


def test_processor_time_tells_a_busy_child_from_a_waiting_one(start: Callable[[str], ChildProcess]) -> None:
    busy, waiting = start(_BUSY), start(_FAMILY)
    _first_line(busy)
    _first_line(waiting)
    before = busy.cpu_seconds(), waiting.cpu_seconds()
    time.sleep(1.0)
    assert busy.cpu_seconds() - before[0] > 0.1
    assert waiting.cpu_seconds() - before[1] < 0.05


def test_closing_twice_does_no_harm(start: Callable[[str], ChildProcess]) -> None:
    child = start(_FAMILY)
    child.close()
    child.close()
    assert child.outputs == {}


def test_a_child_and_what_it_has_started_end_where_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(_FAMILY)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.kill()
    # The child itself asks for its end with its parent; this one, which does not, is in the group.
    assert _until(lambda: all(_ended(pid) for pid in pids))
