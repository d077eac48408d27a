"""TensorBoard as a process: it is up, it is stopped, and what it says when it cannot run. All with the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparktf.cluster.tensorboard import TensorBoard
from sparktf.errors import ClusterError

ROOT = Path(__file__).parent.parent.parent
_SERVES_UNTIL_KILLED = """
import time
from sparktf.cluster.tensorboard import TensorBoard
with TensorBoard() as board:
    print(board.pid, board.url, flush=True)
    time.sleep(120)
"""


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return bytes(answer.read())


def _until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


# With a scheme as remote file systems have it, it is TensorFlow that reads.
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_it_serves_what_is_logged_and_leaves_nothing(tmp_path: Path, scheme: str, no_leftovers: Any) -> None:
    import tensorflow as tf

    log_dir = tmp_path / "made" / "for it"
    with TensorBoard(scheme + str(log_dir)) as board:
        assert board.log_dir == scheme + str(log_dir)
        with tf.summary.create_file_writer(str(log_dir / "train")).as_default():
            tf.summary.scalar("loss", 0.25, step=1)
            tf.summary.flush()
        tags = _until(lambda: json.loads(_get(board.url + "data/plugin/scalars/tags")))
        assert list(tags["train"]) == ["loss"]
        points = json.loads(_get(board.url + "data/plugin/scalars/scalars?run=train&tag=loss"))
        assert [point[1:] for point in points] == [[1, 0.25]]
        board.check()
    assert not psutil.pid_exists(board.pid)
    assert [path.name for path in log_dir.iterdir()] == ["train"]
    board.close()


def test_without_a_log_dir_it_has_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))
    with TensorBoard() as board:
        assert Path(board.log_dir).is_dir()
        assert tmp_path in Path(board.log_dir).parents
    assert not any(tmp_path.iterdir())


def test_one_that_died_is_noticed(no_leftovers: Any) -> None:
    with TensorBoard() as board:
        os.kill(board.pid, signal.SIGKILL)
        with pytest.raises(ClusterError, match=r"killed by signal 9[\s\S]*TensorBoard \S+ at http"):
            _until(board.check)


def test_one_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leftovers: Any
) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(ClusterError, match=r"pip install 'sparktf\[tensorboard\]'"), TensorBoard():
        pass


def test_an_address_that_is_not_this_machines_is_told_at_once(no_leftovers: Any) -> None:
    started = time.monotonic()
    # Of the addresses that are kept for documentation.
    with (
        pytest.raises(ClusterError, match=r"on 192\.0\.2\.1, .*exit status 1[\s\S]*Cannot assign"),
        TensorBoard(host="192.0.2.1", timeout=250),
    ):
        pass
    assert time.monotonic() - started < 120


def test_one_that_never_answers_is_given_up(no_leftovers: Any) -> None:
    board = TensorBoard(timeout=1.0)
    os.kill(board.pid, signal.SIGSTOP)
    with pytest.raises(ClusterError, match=r"answer on .* within 1 s"), board:
        pass
    # Stopped, it did not heed a polite request.
    assert not psutil.pid_exists(board.pid)


def test_a_log_dir_that_cannot_be_written_is_an_error(tmp_path: Path, no_leftovers: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ClusterError, match=r"log directory that the chief can write to, received '.*file/logs'"):
        TensorBoard(str(tmp_path / "file" / "logs"))


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    environment = {**os.environ, "SPARK_LOCAL_DIRS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", _SERVES_UNTIL_KILLED], env=environment, stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().decode().split()
        assert _get(url)
        parent.kill()
    assert _until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
