"""A fit's progress, live on the driver's screen."""

from __future__ import annotations

import sys
import threading
from typing import Any, TextIO

_WIDTH = 24


class ProgressPrinter:
    """Prints what the chief reports. Called from other threads.

    Parameters
    ----------
    verbose : {"auto", 0, 1, 2}
        0: nothing. 1: a line that moves while an epoch runs, on a terminal. 2: one line an epoch. ``"auto"``: 1 on a
        terminal, else 2.
    epochs : int
        Epochs asked for.
    stream : text stream, optional
        Standard output by default.
    """

    def __init__(self, verbose: str | int, epochs: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        terminal = self._stream.isatty()
        self._verbose = (1 if terminal else 2) if verbose == "auto" else int(verbose)
        self._moving = self._verbose == 1 and terminal
        self._epochs = epochs
        self._lock = threading.Lock()

    def __call__(self, rank: int, report: dict[str, Any]) -> None:
        """Print a report of `sparktf.distribute.callbacks.progress_callback`, or ``{"tensorboard": url}``."""
        # Every rank reports, so that the driver knows it alive; the chief speaks for all.
        if self._verbose == 0 or rank != 0:
            return
        with self._lock:
            if "tensorboard" in report:
                self._write(f"TensorBoard: {report['tensorboard']}\n")
            elif "step" in report:
                self._step(report)
            elif "logs" in report:
                self._epoch(report)

    def _step(self, report: dict[str, Any]) -> None:
        if not self._moving:
            return
        done = int(_WIDTH * report["step"] / report["steps"])
        bar = "=" * done + " " * (_WIDTH - done)
        self._write(f"\r{self._head(report)} [{bar}] {report['step']}/{report['steps']}\033[K")

    def _epoch(self, report: dict[str, Any]) -> None:
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in report["logs"].items())
        start, end = ("\r", "\033[K\n") if self._moving else ("", "\n")
        self._write(f"{start}{self._head(report)}  {report['seconds']:.1f} s  {metrics}{end}")

    def _head(self, report: dict[str, Any]) -> str:
        return f"epoch {report['epoch']:>{len(str(self._epochs))}}/{self._epochs}"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
