"""Functions that are in no file, as those of a notebook's cells, work on nodes as they do here."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktf import run
from sparktf.errors import NodeError
from sparktf.program.sources import lend_sources, sources_of

pytestmark = pytest.mark.usefixtures("no_leftovers")

_CELLS = {
    "<cell 1>": """
def halve_or_triple(number):
    import tensorflow as tf

    @tf.function
    def next_one(value):
        if value % 2 == 0:
            return value // 2
        return 3 * value + 1

    return int(next_one(tf.constant(number)))
""",
    "<cell 2>": """
def main(args, ctx):
    raise ValueError(f"found {halve_or_triple(args)}")  # seen in the traceback
""",
}


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Define a program in cells, as a notebook's kernel does."""
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    for name, text in _CELLS.items():
        monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(keepends=True), name))
        exec(compile(text, name, "exec"), notebook.__dict__)
    return notebook.__dict__["main"]


def test_a_function_of_a_cell_is_translated_by_tensorflow_on_a_node_and_shown_by_its_errors(
    spark: Any, main: Any
) -> None:
    with pytest.raises(NodeError, match="ValueError: found 22") as raised:
        run(main, 7, spark=spark)
    assert "# seen in the traceback" in raised.value.remote_traceback


def test_only_the_files_of_what_is_pickled_travel(main: Any) -> None:
    from pyspark import cloudpickle

    assert sources_of(cloudpickle.dumps(main)) == _CELLS
    assert sources_of(cloudpickle.dumps(lend_sources)) == {}


def test_a_file_that_a_node_has_stays_its_own(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here.py", tmp_path / "elsewhere.py"
    here.write_text("1\n")
    lend_sources({str(here): "2\n", str(elsewhere): "3\n"})
    assert linecache.getlines(str(here)) == ["1\n"]
    assert linecache.getlines(str(elsewhere)) == ["3\n"]
