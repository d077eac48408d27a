"""What each program under examples/programs changes of its single-machine original, and the page that shows it.

Run as a script it puts the present diffs into docs/programs.md.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "examples" / "programs"
PAGE = ROOT / "docs" / "programs.md"

NAMES = sorted(path.stem.removesuffix("_single") for path in PROGRAMS.glob("*_single.py"))

# In the page: a line that names the program, then the block with its diff.
_SHOWN = re.compile(r"(<!-- diff of (\w+) -->\n```diff\n)(.*?)(```\n)", re.DOTALL)


def diff(name: str) -> list[str]:
    """Return what a program changes of its original, as lines of a unified diff; an empty line parts two places."""
    before, after = ((PROGRAMS / f"{name}{kind}.py").read_text().splitlines() for kind in ("_single", ""))
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[3:]
    return ["" if line.startswith("@@") else line for line in lines if line not in ("+", "-")]


def changed_lines(name: str) -> list[str]:
    """Return the lines that were added or removed, but for empty ones."""
    return [line for line in diff(name) if line]


def shown_diffs(page: str) -> dict[str, str]:
    """Return the diffs that a page shows, by program."""
    return {name: text for _, name, text, _ in _SHOWN.findall(page)}


def with_present_diffs(page: str) -> str:
    """Return a page with each diff as it is now."""
    return _SHOWN.sub(lambda found: f"{found[1]}{as_text(diff(found[2]))}{found[4]}", page)


def as_text(lines: list[str]) -> str:
    """Return lines as the text of a block."""
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(with_present_diffs(PAGE.read_text()))
