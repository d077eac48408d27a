"""Examples of the ways by which data comes to the nodes: files that they read, DataFrames, a stream."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="the test extra is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(spark: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs an example as a script, on the tests' Spark session, and gives what it prints."""

    def run(name: str) -> str:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.long
def test_nodes_read_their_own_tfrecord_and_parquet_files(run_example: Any, no_leftovers: Any) -> None:
    printed = run_example("read_files")
    assert {kind: float(accuracy) > 0.85 for kind, accuracy in re.findall(r"(\w+): accuracy ([\d.]+)", printed)} == {
        "tfrecord": True,
        "parquet": True,
    }
    # Both workers, for both kinds of files.
    assert len(re.findall(r"^\[rank \d .*\] trained on 3 of 6 files$", printed, re.MULTILINE)) == 4


def test_spark_feeds_several_dataframes_by_name(run_example: Any, no_leftovers: Any) -> None:
    printed = run_example("spark_feeds")
    assert float(re.findall(r"^accuracy ([\d.]+)$", printed, re.MULTILINE)[0]) > 0.9
    # Every worker knows of all validation rows, so that both tell the same.
    counts = re.findall(r"^\[rank \d .*\] validated (\d+)  accuracy (.*)$", printed, re.MULTILINE)
    assert len(counts) == 2
    assert counts[0] == counts[1]
    assert 250 < int(counts[0][0]) < 450


@pytest.mark.long
def test_a_stream_trains_on_with_the_weights_and_the_optimizer_of_the_last_micro_batch(run_example: Any) -> None:
    # Spark keeps the query's callback, its port and with it the last model as long as the session lives.
    printed = run_example("streaming")
    told = re.findall(r"^micro-batch (\d+): 375 rows, loss ([\d.]+), (\d+) steps so far$", printed, re.MULTILINE)
    assert [int(number) for number, _, _ in told] == [0, 1, 2, 3]
    # 375 rows on two workers in batches of 16, four epochs: 48 steps, counted by the optimizer itself.
    assert [int(steps) for _, _, steps in told] == [48, 96, 144, 192]
    losses = [float(loss) for _, loss, _ in told]
    assert losses[-1] < losses[0] / 2
    assert float(re.findall(r"^accuracy ([\d.]+)$", printed, re.MULTILINE)[0]) > 0.8
