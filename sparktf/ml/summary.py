"""What a fit leaves behind to look at: history, rates, and where the time went."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class TrainingSummary:
    """The record of one fit.

    Parameters
    ----------
    history : pandas.DataFrame
        One row an epoch: ``epoch`` (from 1), then metrics and ``val_`` metrics in Keras's order; NaN where a
        metric was not computed in an epoch.
    rows : int
        Training rows of all workers.
    validationRows : int
        Validation rows of all workers.
    rowsPerSecond : float
        Training rows of all workers per second of an epoch's training: the median over the epochs after the
        first, which pays for tracing; the first epoch's where there is only one. Validation is not counted.
    seconds : float
        Wall-clock seconds of the whole fit, as the driver saw them.
    feedSeconds, computeSeconds, communicateSeconds : float
        Seconds the slowest rank spent in moving rows to its spool, in training and validation without the
        exchange, and in the exchange of gradients and metrics (waiting for other ranks included).
    protocol : str
        The protocol that was used, never ``"auto"``; ``"none"`` for one worker.
    protocolReason : str
        Why that one.
    worldSize : int
        Nodes that trained.
    epochs : int
        Epochs that were run; fewer than asked for where training stopped early.
    stepsPerEpoch : int
        Optimizer steps in one epoch, the same on every worker.
    versions : mapping of str to str
        Versions of Python, TensorFlow, Keras and sparktf, equal on driver and nodes up to the patch level.
    """

    history: pd.DataFrame
    rows: int
    validationRows: int
    rowsPerSecond: float
    seconds: float
    feedSeconds: float
    computeSeconds: float
    communicateSeconds: float
    protocol: str
    worldSize: int
    epochs: int
    stepsPerEpoch: int
    protocolReason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the summary as one JSON text; NaN becomes ``null``, an infinity a string."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns = {str(name): list(self.history[name]) for name in self.history.columns}
        values["history"] = {name: [_plain(v) for v in column] for name, column in columns.items()}
        values["versions"] = dict(self.versions)
        return json.dumps({name: _plain(value) for name, value in values.items()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the summary that :meth:`to_json` wrote; fields of later versions are ignored."""
        import pandas as pd

        values = json.loads(text)
        columns = values.pop("history")
        known = {f.name for f in dataclasses.fields(cls)} - {"history"}
        kept = {name: _number(value) for name, value in values.items() if name in known}
        floats = {name: [_number(v) for v in column] for name, column in columns.items()}
        return cls(history=pd.DataFrame(floats), **kept)

    def __repr__(self) -> str:
        """Return a few lines for people, with the last epoch's metrics."""
        lines = [f"{name}: {value}" for name, value in self._facts()]
        return "TrainingSummary\n  " + "\n  ".join(lines)

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the facts, then the history."""
        facts = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return f"<table>{facts}</table>{self.history.to_html(index=False)}"

    def _facts(self) -> list[tuple[str, str]]:
        workers = "1 worker" if self.worldSize == 1 else f"{self.worldSize} workers over {self.protocol}"
        validation = f" and {self.validationRows:,} for validation" if self.validationRows else ""
        times = f"feed {self.feedSeconds:.1f}, compute {self.computeSeconds:.1f}"
        facts = [
            ("world", workers + (f" ({self.protocolReason})" if self.protocolReason else "")),
            ("rows", f"{self.rows:,}{validation}"),
            ("epochs", f"{self.epochs} of {self.stepsPerEpoch} steps"),
            ("rows/s", f"{self.rowsPerSecond:,.0f}"),
            ("seconds", f"{self.seconds:.1f} ({times}, communicate {self.communicateSeconds:.1f})"),
        ]
        if len(self.history):
            last = self.history.iloc[-1].drop("epoch", errors="ignore")
            facts.append(("last epoch", ", ".join(f"{name} {value:.4g}" for name, value in last.items())))
        return facts


def _plain(value: Any) -> Any:
    """Return a value JSON can hold: numpy scalars become Python's, NaN null, infinities strings."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _number(value: Any) -> Any:
    """Undo :func:`_plain`."""
    if value is None:
        return math.nan
    return float(value) if value in ("inf", "-inf") else value
