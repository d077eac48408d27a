"""Examples with tables of embeddings, and of asynchronous training: each runs as a script, and learns something."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(spark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs an example as a script, on the tests' Spark session, and gives its last line."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()[-1]

    return run


def test_the_recommender_knows_more_than_the_mean_rating(run_example: Any) -> None:
    sizes = ("--users", "200", "--items", "100", "--ratings", "10000", "--epochs", "4")
    last = run_example("recommender", *sizes)
    found = re.fullmatch(r"rmse (\d\.\d\d) \(mean rating (\d\.\d\d)\)", last)
    assert found, last
    error, of_the_mean = map(float, found.groups())
    # Each rating has noise of 0.4 and is rounded to halves.
    assert 0.4 < error < 0.75 * of_the_mean


@pytest.mark.long
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_wide_and_deep_foresees_clicks(run_example: Any, mode: str) -> None:
    last = run_example("wide_and_deep", "--mode", mode, "--rows", "6000", "--batch_size", "64", "--epochs", "3")
    found = re.fullmatch(r"auc (\d\.\d{3})", last)
    assert found, last
    # Guessing has 0.5; who knows the chance of every row cannot have 1.
    assert 0.7 < float(found[1]) < 0.9


@pytest.mark.long
def test_wide_deep_moved_from_tensorflowonspark_learns_on_a_parameter_server(run_example: Any, tmp_path: Path) -> None:
    model = tmp_path / "wide_deep.keras"
    last = run_example("moving/wide_deep", "--rows", "5000", "--epochs", "3", "--model", str(model))
    found = re.fullmatch(r"auc (\d\.\d{3})", last)
    assert found, last
    assert 0.7 < float(found[1]) < 0.95
    assert model.is_file()
