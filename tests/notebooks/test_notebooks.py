"""The notebooks run from top to bottom, reach the results they tell of, and are stored clean."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the notebooks extra is not installed")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

_MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|work|tmp|usr|opt|var|mnt|Users|private)/|[A-Z]:\\\\?\w|site-packages"
)


def code_cells(path: Path) -> list[Any]:
    """Return the notebook's cells of code."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def outputs(path: Path) -> list[Any]:
    """Return the outputs of all cells, in order."""
    return [output for cell in code_cells(path) for output in cell.outputs]


def texts(output: Any) -> list[str]:
    """Return what a reader sees of an output as text; pictures are left out."""
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [text for kind, text in data.items() if not kind.startswith("image/")]


def test_there_is_a_notebook_to_test() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStoredOutputs:
    def test_come_from_one_run_from_top_to_bottom(self, path: Path) -> None:
        counts = [cell.execution_count for cell in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))

    def test_hold_a_picture_and_a_table(self, path: Path) -> None:
        kinds = {kind for output in outputs(path) for kind in output.get("data", {})}
        assert {"image/png", "text/html"} <= kinds

    def test_hold_no_error_and_no_standard_error(self, path: Path) -> None:
        assert not [o for o in outputs(path) if o.output_type == "error" or o.get("name") == "stderr"]

    def test_name_no_place_of_the_machine_they_were_made_on(self, path: Path) -> None:
        found = [text for output in outputs(path) for text in texts(output) if _MACHINE_PATH.search(text)]
        assert not found

    def test_carry_the_kernel_name_that_every_machine_has(self, path: Path) -> None:
        assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


def executed(name: str, directory: Path) -> tuple[Any, Any]:
    """Run a notebook in a kernel of its own; return it, and the value of its last cell."""
    (path,) = [p for p in NOTEBOOKS if p.stem == name]
    notebook = nbformat.read(path, as_version=4)
    # A working directory of its own: nothing of a run stays in the repository.
    resources = {"metadata": {"path": str(directory)}}
    nbclient.NotebookClient(notebook, timeout=570, kernel_name="python3", resources=resources).execute()
    (result,) = [o for o in notebook.cells[-1].outputs if o.output_type == "execute_result"]
    return notebook, ast.literal_eval(result.data["text/plain"])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_programs_nodes_speak_below_the_cell_that_starts_them(tmp_path: Path) -> None:
    notebook, accuracy = executed("program_in_a_notebook", tmp_path)
    assert accuracy > 0.9
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith("nodes = run(main")]
    assert {output.name for output in cell.outputs} == {"stdout"}
    said = "".join(output.text for output in cell.outputs)
    for node in ("rank 0 (chief)", "rank 1 (worker 0)"):
        assert f"[{node}] epoch 12  loss 0." in said


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sql_to_training_runs_and_its_network_holds_its_own_against_logistic_regression(tmp_path: Path) -> None:
    _, auc = executed("sql_to_training", tmp_path)
    # The stored run has 0.691 and 0.686; another machine's rounding may move either in the third place.
    assert auc["TFEstimator"] > 0.67
    assert auc["TFEstimator"] > auc["logistic regression"] - 0.01
