"""A worker's scratch directory: gone with the block, and with the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sparktf.cluster import scratch
from sparktf.cluster.scratch import scratch_directory

_HOLDS_ONE = """
import time
from sparktf.cluster.scratch import scratch_directory
with scratch_directory("held-") as directory:
    open(f"{directory}/file", "w").close()
    print(directory, flush=True)
    time.sleep(60)
"""

_FORKS = """
import os, signal, time
from sparktf.cluster.scratch import scratch_directory
with scratch_directory("held-") as directory:
    forked = os.fork()
    if not forked:
        time.sleep(60)
        os._exit(0)
print(os.path.exists(directory))
os.kill(forked, signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))
    return tmp_path


def shells_of(directory: str) -> list[psutil.Process]:
    """Return this process's children that watch over a directory; it has others, as Spark's JVM."""
    return [child for child in psutil.Process().children() if directory in words(child)]


def words(process: psutil.Process) -> list[str]:
    # One of the others may end meanwhile.
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_it_is_private_in_sparks_local_directories_and_gone_when_the_block_ends(local: Path) -> None:
    with scratch_directory("some-") as directory:
        assert os.path.dirname(directory) == str(local)
        assert os.stat(directory).st_mode & 0o777 == 0o700
        (Path(directory) / "within").mkdir()
        (Path(directory) / "within" / "file").write_text("text")
        assert shells_of(directory)
    assert not list(local.iterdir())
    assert not shells_of(directory)


def test_it_is_gone_when_the_block_fails(local: Path) -> None:
    with pytest.raises(ValueError, match="within"), scratch_directory("some-"):
        raise ValueError("within")
    assert not list(local.iterdir())


def test_it_is_gone_when_its_process_is_killed(local: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS_ONE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        assert (directory / "file").exists()
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(local.iterdir())


def test_it_is_gone_at_once_though_a_forked_process_holds_the_shells_pipe(local: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True, timeout=20)
    assert done.stdout == "False\n", done.stderr
    assert not list(local.iterdir())


def test_it_is_gone_though_the_shell_that_watches_was_killed(local: Path) -> None:
    with scratch_directory("some-") as directory:
        (shell,) = shells_of(directory)
        shell.kill()
    assert not list(local.iterdir())


def test_one_that_cannot_be_made_is_an_error_that_names_it(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "local_directory", lambda: str(local / "none"))
    refused = pytest.raises(OSError, match=r"cannot make the directory '.*/none/some-\w+': .*No such file")
    with refused, scratch_directory("some-"):
        raise AssertionError("it was made")
