"""What a fit shows while it runs, on a real terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
from typing import Any

import pytest

from sparktf.ml.progress import ProgressPrinter

REPORTS: list[dict[str, Any]] = [
    {"epoch": 1, "step": 1, "steps": 2},
    {"epoch": 1, "step": 2, "steps": 2},
    {"epoch": 1, "logs": {"loss": 0.25}, "seconds": 1.5},
]


def told(printer: ProgressPrinter) -> None:
    for report in REPORTS:
        printer(0, report)
        printer(1, report)


def on_a_terminal(verbose: str | int) -> str:
    """Return what a terminal is sent."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb") as screen, os.fdopen(theirs, "w") as terminal:
        told(ProgressPrinter(verbose, 10, terminal))
        terminal.write("\0")
        terminal.flush()
        sent = b""
        while not sent.endswith(b"\0"):
            sent += os.read(screen.fileno(), 1000)
    return sent[:-1].decode().replace("\r\n", "\n")


@pytest.mark.parametrize("verbose", ["auto", 1])
def test_on_a_terminal_one_line_moves_while_an_epoch_runs_and_stays_with_its_metrics(verbose: str | int) -> None:
    first, second, end = on_a_terminal(verbose).removeprefix("\r").split("\r")
    assert first == f"epoch  1/10 [{'=' * 12}{' ' * 12}] 1/2\033[K"
    assert second == f"epoch  1/10 [{'=' * 24}] 2/2\033[K"
    assert end == "epoch  1/10  1.5 s  loss 0.2500\033[K\n"


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_elsewhere_there_is_one_line_an_epoch(verbose: str | int) -> None:
    stream = io.StringIO()
    told(ProgressPrinter(verbose, 10, stream))
    assert stream.getvalue() == "epoch  1/10  1.5 s  loss 0.2500\n"


def test_a_quiet_fit_shows_nothing() -> None:
    assert on_a_terminal(0) == ""
