"""Asynchronous training of a program that `sparktf.run` starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import programs
import pytest

from sparktf import run
from sparktf.errors import NodeError, ParamError, PeerLostError
from sparktf.program.pairs import check_mode

pytestmark = pytest.mark.usefixtures("no_leftovers")


@pytest.mark.parametrize("max_staleness", [None, pytest.param(0, marks=pytest.mark.long)])
def test_digits_are_learned_on_a_parameter_server(spark: Any, max_staleness: int | None) -> None:
    args = {"max_staleness": max_staleness}
    chief, worker, report = run(programs.trains_asynchronously, args, spark=spark, num_workers=2, num_ps=1)
    # All end with the same weights.
    assert chief == worker
    assert chief > 0.9
    # Ten epochs of 24 batches each.
    assert report.pushes == (240, 240)
    assert report.updates == (240 if max_staleness == 0 else 480)
    assert report.lost == ()


@pytest.mark.long
def test_two_servers_share_the_variables(spark: Any) -> None:
    chief, first, second = run(programs.trains_asynchronously, {}, spark=spark, num_workers=1, num_ps=2)
    assert chief > 0.9
    assert first.updates == second.updates == sum(first.pushes) > 0


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
