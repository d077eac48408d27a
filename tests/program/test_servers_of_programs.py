"""Asynchronous training of a program that `sparktf.run` starts."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest

from sparktf import TFModel, run
from sparktf.errors import NodeError, ParamError, PeerLostError, TransportError
from sparktf.program.pairs import check_mode

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.mark.parametrize("max_staleness", [None, pytest.param(0, marks=pytest.mark.long)])
def test_digits_are_learned_on_a_parameter_server(spark: Any, max_staleness: int | None) -> None:
    # A high rate costs accuracy where gradients are stale.
    args = {"max_staleness": max_staleness, "rate": 2e-3}
    chief, worker, report = run(programs.trains_asynchronously, args, spark=spark, num_workers=2, num_ps=1)
    # All end with the same weights.
    assert chief == worker
    assert chief > 0.92
    # Ten epochs of 24 batches each.
    assert report.pushes == (240, 240)
    assert report.updates == (240 if max_staleness == 0 else 480)
    assert report.lost == ()


@pytest.mark.long
def test_two_servers_share_the_variables(spark: Any) -> None:
    chief, first, second = run(programs.trains_asynchronously, {}, spark=spark, num_workers=1, num_ps=2)
    assert chief > 0.92
    assert first.updates == second.updates == sum(first.pushes) > 0


@pytest.mark.long
@pytest.mark.parametrize("max_staleness", [None, 0])
def test_tables_on_servers_are_trained_exported_and_scored(
    spark: Any, tmp_path: Path, max_staleness: int | None
) -> None:
    words, likes = ["a", "b", "c", "d", "e"], {"a", "d"}
    pairs = [[one, other] for one in words for other in words]
    want = [float(sum(word in likes for word in pair)) for pair in pairs]
    rows = [(pair, y) for pair, y in zip(pairs, want, strict=True) for _ in range(4)]
    frame = spark.createDataFrame(rows, "words array<string>, y float")
    path = str(tmp_path / "trained.keras")
    args = {"max_staleness": max_staleness, "epochs": 12, "path": path, "words": pairs}
    chief, worker, *servers = run(programs.trains_a_table, args, spark=spark, num_workers=2, num_ps=2, dataset=frame)
    # Twelve epochs of five batches of each worker.
    steps = 60 if max_staleness == 0 else 120
    assert [report.updates for report in servers] == [steps] * 2
    assert chief[0] == worker[0] == steps
    assert chief[1] == worker[1]
    np.testing.assert_allclose(chief[1], want, atol=0.3)
    model = TFModel.fromKeras(path, inputCols=["words"])
    scored = model.transform(spark.createDataFrame([(pair,) for pair in pairs], "words array<string>"))
    predictions = {tuple(row.words): row.prediction for row in scored.collect()}
    np.testing.assert_allclose([predictions[tuple(pair)] for pair in pairs], chief[1], rtol=1e-5)


def test_servers_are_reached_by_the_protocol_that_was_asked_for(spark: Any) -> None:
    first, second, _ = run(programs.protocols_of_servers, spark=spark, num_workers=2, num_ps=1, protocol="shm")
    assert first == second == ["shm"]


def test_asynchronous_training_without_servers_is_refused(spark: Any) -> None:
    with pytest.raises(ParamError, match="num_ps=0"):
        run(programs.asks_for_async, {"mode": "async"}, spark=spark)


@pytest.mark.parametrize(
    ("mode", "max_staleness", "words"),
    [
        ("asynchronous", None, "'sync' or 'async'"),
        ("async", -1, "at least 0"),
        ("sync", 1, "only for mode='async'"),
    ],
)
def test_what_cannot_work_is_refused(mode: str, max_staleness: Any, words: str) -> None:
    with pytest.raises(ParamError, match=words):
        check_mode(mode, max_staleness)


def test_a_killed_server_ends_the_run_within_ten_seconds(spark: Any, tmp_path: Path) -> None:
    with pytest.raises((NodeError, PeerLostError), match=r"ps 0|parameter server 0"):
        run(programs.server_dies, str(tmp_path / "died"), spark=spark, num_workers=1, num_ps=1)
    assert time.time() - float((tmp_path / "died").read_text()) < 10


_LOST = r"Rank {0} \(worker {1}\) was lost: .*killed by signal 9.* its result is None"


def _breaks(path: Path, rank: int, how: str, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "how": how, "when": str(path / "when"), **more}


def _seconds_since(path: Path) -> float:
    return time.time() - float((path / "when").read_text())


def test_a_killed_worker_does_not_end_the_run_and_a_warning_names_it(
    spark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    args = _breaks(tmp_path, 1, "SIGKILL")
    chief, worker, report = run(programs.breaks_in_training, args, spark=spark, num_workers=2, num_ps=1)
    assert re.search(_LOST.format(1, 0), caplog.text)
    assert chief > 0.92
    assert worker is None
    assert report.lost == (1,)
    # All of the chief's ten epochs of 24 batches, and one of the other's, of which a push may have been under way.
    assert report.pushes[0] == 240
    assert 23 <= report.pushes[1] <= 24
    # At once, not only at the end.
    assert "[rank 1 (worker 0)] lost (killed by signal 9, perhaps for its memory); the others go on" in (
        capsys.readouterr().err
    )


@pytest.mark.long
@pytest.mark.parametrize("num_ps", [1, 2])
def test_workers_that_are_left_end_with_the_same_weights(spark: Any, tmp_path: Path, num_ps: int) -> None:
    workers = 4 - num_ps
    args = _breaks(tmp_path, 1, "SIGKILL")
    results = run(programs.breaks_in_training, args, spark=spark, num_workers=workers, num_ps=num_ps)
    left = [result for rank, result in enumerate(results[:workers]) if rank != 1]
    assert results[1] is None
    assert len(set(left)) == 1
    assert left[0] > 0.92
    assert all(report.lost == (1,) for report in results[workers:])


@pytest.mark.long
def test_a_killed_chief_ends_the_run_within_ten_seconds(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"Rank 0 \(chief\) failed: .*killed by signal 9"):
        run(programs.breaks_in_training, _breaks(tmp_path, 0, "SIGKILL"), spark=spark, num_workers=2, num_ps=1)
    assert _seconds_since(tmp_path) < 10


@pytest.mark.long
@pytest.mark.parametrize("how", ["raise what is not JSON", "raise what nobody catches"])
def test_a_worker_that_raises_ends_the_run_with_its_traceback(spark: Any, tmp_path: Path, how: str) -> None:
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) failed: .*exploded") as caught:
        run(programs.breaks_in_training, _breaks(tmp_path, 1, how), spark=spark, num_workers=2, num_ps=1)
    assert _seconds_since(tmp_path) < 10
    assert "in breaks_in_training" in str(caught.value)


@pytest.mark.long
def test_a_worker_that_ends_by_itself_without_a_word_ends_the_run(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) failed: .*exit status 0"):
        run(programs.breaks_in_training, _breaks(tmp_path, 1, "exit"), spark=spark, num_workers=2, num_ps=1)


@pytest.mark.long
def test_a_stopped_worker_that_others_wait_for_is_named_after_the_timeout(spark: Any, tmp_path: Path) -> None:
    args = _breaks(tmp_path, 1, "SIGSTOP")
    with pytest.raises(TransportError, match="worker 1 within 20 s"):
        run(programs.breaks_in_training, args, spark=spark, num_workers=2, num_ps=1, timeout=20)


@pytest.mark.long
def test_a_lost_worker_that_others_wait_for_by_themselves_is_an_error_that_names_it(spark: Any, tmp_path: Path) -> None:
    # In a barrier of theirs, where servers are not asked.
    args = _breaks(tmp_path, 1, "SIGKILL", meet=True)
    with pytest.raises(PeerLostError, match="lost rank 1"):
        run(programs.breaks_in_training, args, spark=spark, num_workers=2, num_ps=1)


@pytest.mark.long
def test_a_worker_killed_before_it_has_met_its_servers_ends_the_run(spark: Any) -> None:
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) failed: .*killed by signal 9"):
        run(programs.dies_before_training, 1, spark=spark, num_workers=2, num_ps=1)
