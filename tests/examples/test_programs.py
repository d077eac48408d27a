"""Programs of every kind run on a cluster with less than ten changed lines, and learn what their originals learn."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffs import NAMES, PAGE, PROGRAMS, as_text, changed_lines, diff, shown_diffs

pytest.importorskip("sklearn", reason="the test extra is not installed")


def run_here(name: str) -> dict[str, Any]:
    """Run a program as a script in this process, on its Spark session; return its global names."""
    return runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_a_program_differs_from_its_original_by_less_than_ten_lines(name: str) -> None:
    assert 0 < len(changed_lines(name)) < 10


def test_the_page_shows_each_difference_as_it_is() -> None:
    # Bring it up to date with: python tests/examples/diffs.py
    assert shown_diffs(PAGE.read_text()) == {name: as_text(diff(name)) for name in NAMES}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_an_original_runs_alone(name: str) -> None:
    # In a process of its own: some set up TensorFlow for a whole process, and none knows of Spark.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, f"{name}_single.py"]
    done = subprocess.run(command, cwd=PROGRAMS, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r"^(?:best .*: )?accuracy ([\d.]+)$", done.stdout, re.MULTILINE)
    assert float(accuracy) > 0.87


class TestOnSpark:
    @pytest.fixture(autouse=True)
    def _on_spark(self, spark: Any, no_leftovers: Any) -> None:
        """Give each program the session of all tests."""

    def test_trials_run_independently_on_every_worker(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = run_here("trials")
        assert sorted(rate for _, rate in found["trials"]) == sorted(found["RATES"])
        # Each worker took every second one.
        printed = capsys.readouterr().out
        assert "[rank 0 (chief)] learning rate 0.0003" in printed
        assert "[rank 1 (worker 0)] learning rate 0.001" in printed
        assert found["accuracy"] > 0.87

    def test_keras_fit_learns_over_two_workers(self) -> None:
        assert run_here("keras_fit")["accuracy"] > 0.87

    @pytest.mark.long
    def test_a_loop_under_multi_worker_mirrored_strategy_takes_the_steps_of_its_original(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run_here("mirrored_loop")["accuracy"] > 0.87
        printed = capsys.readouterr()
        losses = [re.findall(rf"\[{rank}\] epoch \d+: loss ([\d.]+)", printed.out) for rank in ("rank 0.*", "rank 1.*")]
        # Both report the sum over both, so each epoch's loss is the same.
        assert losses[0] == losses[1]
        assert len(losses[0]) == 12
        # TensorFlow's own chatter stays in its processes.
        told = [line for line in printed.err.splitlines() if line.startswith("[rank")]
        assert len(told) == 1
        assert "sparktf.transport: protocol 'auto' is" in told[0]

    @pytest.mark.long
    def test_parameter_servers_train_asynchronously_under_a_coordinator_on_the_chief(self) -> None:
        found = run_here("parameter_servers")
        assert found["accuracy"] > 0.9

    @pytest.mark.long
    def test_a_model_split_over_two_nodes_learns_what_it_learns_on_one_machine(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run_here("split_model")["accuracy"] > 0.87
        assert devices(capsys.readouterr().out) == ["chief/0", "worker/0"]

    @pytest.mark.long
    def test_groups_of_nodes_that_share_a_model_learn_as_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_here("split_model_groups")["accuracy"] > 0.87
        assert devices(capsys.readouterr().out) == ["chief/0", "worker/0", "worker/1", "worker/2"]


def test_a_program_of_several_files_needs_nothing_else_in_local_mode(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_of_it.py").write_text("def answer():\n    return 42\n")
    (tmp_path / "other_half.py").write_text(
        "import half_of_it\n"
        "from sparktf import run\n"
        "def main(args, ctx):\n"
        "    return half_of_it.answer()\n"
        "results = run(main)\n"
    )
    # As Python itself does for a script's own directory.
    monkeypatch.syspath_prepend(str(tmp_path))
    assert runpy.run_path(str(tmp_path / "other_half.py"), run_name="__main__")["results"] == [42]


def devices(printed: str) -> list[str]:
    """Return where a program says that its weights are."""
    (line,) = re.findall(r"weights on .*", printed)
    return [f"{job}/{task}" for job, task in re.findall(r"/job:(\w+)/replica:0/task:(\d+)", line)]
