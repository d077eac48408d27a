"""How nodes end, and what of their end is seen: in good order, badly, late, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import psutil
import pytest

from sparktf import run
from sparktf.errors import ClusterError, DataError, NodeError, ParamError
from sparktf.program.output import BURST_LINES

pytestmark = pytest.mark.usefixtures("no_leftovers")

_START = 60.0


def _until(condition: Callable[[], Any], seconds: float = _START) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.long
def test_a_node_that_closed_its_output_and_does_not_end_harms_nobody(spark: Any) -> None:
    assert run(programs.ends_badly, spark=spark, num_workers=2) == [0, 1]


def test_a_node_that_died_is_seen_though_a_fork_of_it_lives(spark: Any) -> None:
    started = time.monotonic()
    with pytest.raises(NodeError, match="ended before main returned \\(exit status 7\\)"):
        run(programs.dies_and_leaves_a_fork, spark=spark)
    assert time.monotonic() - started < _START


@pytest.mark.long
def test_an_evaluator_may_wait_for_longer_than_the_timeout(spark: Any) -> None:
    results = run(programs.evaluates, 10, spark=spark, evaluator=True, timeout=8)
    assert results == ["chief False", "evaluator True"]


def test_reports_do_not_hold_a_program_up(spark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = run(programs.reports_often, 1500, spark=spark, num_workers=2)
    # A hundred would take ten, where each waited for the other node.
    assert seconds[0] < 10
    printed = capsys.readouterr().out
    shown = printed.count("[rank 0 (chief)] step ")
    left_out = sum(int(n.replace(",", "")) for n in re.findall(r"\[([\d,]+) lines left out here\]", printed))
    assert shown + left_out == 1500
    assert shown >= BURST_LINES


def test_rows_that_one_rank_asks_for_are_refused_on_that_rank(spark: Any) -> None:
    frame = spark.sql("select explode(array(1, null, 3)) as x")
    with pytest.raises(DataError, match="1 null in the 3 rows"):
        run(programs.one_reads, 1, spark=spark, num_workers=2, dataset=frame)


def test_an_error_of_ours_tells_the_place_in_the_program(spark: Any) -> None:
    with pytest.raises(ParamError, match="batch_size") as raised:
        run(programs.asks_wrongly, spark=spark, dataset=spark.range(3))
    (note,) = raised.value.__notes__
    assert "in asks_wrongly" in note
    assert "program/node.py" not in note


def test_a_handle_stops_a_run_that_has_just_begun(spark: Any) -> None:
    handle = run(programs.hangs, spark=spark, wait=False)
    handle.stop()
    assert handle.done()


def test_tensorboard_is_there_while_the_run_goes_on(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    end = tmp_path / "end"
    logs = str(tmp_path / "logs")
    handle = run(programs.shows_tensorboard, str(end), spark=spark, tensorboard=True, log_dir=logs, wait=False)
    url = _until(lambda: handle.tensorboard_url)
    assert b"TensorBoard" in _get(url)
    end.touch()
    assert handle.result(_START) == [logs]
    assert os.listdir(logs)
    assert f"TensorBoard: {url}\n" in capsys.readouterr().out
    with pytest.raises(OSError, match="refused"):
        _get(url)


def test_a_run_goes_on_without_a_tensorboard_that_died(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    end = tmp_path / "end"
    handle = run(programs.shows_tensorboard, str(end), spark=spark, tensorboard=True, wait=False, timeout=60)
    assert _until(lambda: handle.tensorboard_url)
    for process in psutil.Process().children(recursive=True):
        # Others come and go meanwhile.
        with contextlib.suppress(psutil.Error):
            if "tensorboard.main" in process.cmdline():
                process.send_signal(signal.SIGKILL)
    said: list[str] = []
    assert _until(lambda: said.append(capsys.readouterr().err) or "TensorBoard is gone, the run goes on" in said[-1])
    end.touch()
    assert len(handle.result(_START)) == 1


def test_a_tensorboard_that_cannot_start_ends_the_run(spark: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ClusterError, match="log directory that the chief can write to"):
        run(programs.who, spark=spark, num_workers=2, tensorboard=True, log_dir=str(tmp_path / "file" / "logs"))


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return bytes(answer.read())
