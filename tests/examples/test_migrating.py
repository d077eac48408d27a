"""docs/migrating.md names nothing of sparktf that does not exist."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktf import TFEstimator, TFModel, run
from sparktf.program.context import Context
from sparktf.program.handle import RunHandle

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
OBJECTS = {"run": run, "ctx": Context, "RunHandle": RunHandle, "TFEstimator": TFEstimator, "TFModel": TFModel}


def pieces(page: str) -> Iterator[str]:
    """Yield the code of a page that is about sparktf: of a table's rows all but the first cell."""
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "tensorflowonspark" not in block:
            yield block
    for line in re.sub(r"```.*?```", "", page, flags=re.DOTALL).splitlines():
        text = " ".join(re.split(r"(?<!\\)\|", line)[2:]) if line.startswith("|") else line
        yield from re.findall(r"`([^`]+)`", text)


def used(code: str) -> Iterator[tuple[str, list[str]]]:
    """Yield what code uses of sparktf: a dotted name, and the names of the arguments that a call gives it."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    arguments = {id(call.func): [keyword.arg for keyword in call.keywords if keyword.arg] for call in calls}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            if name in OBJECTS or re.match(rf"({'|'.join(OBJECTS)}|sparktf)\.", name):
                yield name, arguments.get(id(node), [])


def problem(name: str, arguments: list[str]) -> str | None:
    """Return what is wrong with a use; None where it is right."""
    root, *path = name.split(".")
    found: Any = OBJECTS.get(root)
    if root == "sparktf":
        return None if _found(name) else f"{name} does not exist"
    for part in path:
        if not hasattr(found, part):
            return None if part in _set_in_init(found) else f"{name} does not exist"
        found = inspect.getattr_static(found, part)
        found = getattr(found, "__func__", found)
    known = inspect.signature(found).parameters if callable(found) else {}
    missing = [argument for argument in arguments if argument not in known]
    return f"{name} has no {', '.join(missing)}" if missing else None


def _found(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _set_in_init(kind: Any) -> set[str]:
    source = inspect.getsource(kind.__init__) if inspect.isclass(kind) else ""
    return set(re.findall(r"\bself\.(\w+)", source))


def test_the_page_names_only_what_exists() -> None:
    uses = [use for code in pieces(PAGE.read_text()) for use in used(code)]
    assert len(uses) > 60
    assert [found for name, arguments in uses if (found := problem(name, arguments))] == []


def test_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target


@pytest.mark.parametrize(
    "code",
    [
        "run(main, workers=2)",
        "ctx.get_data_feed()",
        "ctx.dataset(64, suffle=True)",
        "TFEstimator(cluster_size=2)",
        "TFModel.setOutputs",
        "RunHandle.cancel",
        "sparktf.errors.NodeFault",
        "sparktf.data.records.TFRecordDataSource",
    ],
)
def test_a_name_that_does_not_exist_is_found(code: str) -> None:
    assert any(problem(name, arguments) for name, arguments in used(code))
