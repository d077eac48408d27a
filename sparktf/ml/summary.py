"""What a fit leaves behind to look at: history, rates, and where the time went."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from sparktf.cluster.preflight import installed_versions

if TYPE_CHECKING:
    import pandas as pd

    from sparktf.cluster.launch import TrainingResult


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
        The protocol that was used, never ``"auto"``; ``"none"`` for one worker of mode "sync". In mode "async" that of
        the first worker with the first server; with ``protocol="auto"`` others may have taken another, as some share a
        machine and some do not.
    protocolReason : str
        Why that one.
    worldSize : int
        Nodes that trained: workers.
    epochs : int
        Epochs that were run; fewer than asked for where training stopped early.
    stepsPerEpoch : int
        Steps of a worker in one epoch: in mode "sync", and where maxStaleness is 0, the same on every worker; else
        those of the first that was not lost.
    versions : mapping of str to str
        Versions of Python, TensorFlow, Keras and sparktf, equal on driver and nodes up to the patch level.
    tensorboardUrl : str
        Where TensorBoard was while the fit ran, and was stopped at its end; empty where there was none.
    numPs : int
        Parameter servers of mode "async"; 0 in mode "sync".
    updates : int
        That the servers have made, each to its part of the variables; 0 in mode "sync".
    lostWorkers : tuple of int
        Ranks of workers that were lost in mode "async", without which the others went on.
    rowsNotSeen : int
        How often a row was not trained on because its worker was lost, over all epochs.
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
    tensorboardUrl: str = ""
    numPs: int = 0
    updates: int = 0
    lostWorkers: tuple[int, ...] = ()
    rowsNotSeen: int = 0

    def to_json(self) -> str:
        """Return the summary as one JSON text; NaN becomes ``null``, an infinity a string."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns = {str(name): list(self.history[name]) for name in self.history.columns}
        values["history"] = {name: [_plain(v) for v in column] for name, column in columns.items()}
        values["versions"] = dict(self.versions)
        values["lostWorkers"] = list(self.lostWorkers)
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
        kept["lostWorkers"] = tuple(kept.get("lostWorkers", ()))
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
        workers = "1 worker" if self.worldSize == 1 else f"{self.worldSize} workers"
        if self.numPs:
            workers += f" and {self.numPs} parameter server" + "s" * (self.numPs > 1)
        if self.worldSize > 1 or self.numPs:
            workers += f" over {self.protocol}"
        validation = f" and {self.validationRows:,} for validation" if self.validationRows else ""
        times = f"feed {self.feedSeconds:.1f}, compute {self.computeSeconds:.1f}"
        facts = [
            ("world", workers + (f" ({self.protocolReason})" if self.protocolReason else "")),
            ("rows", f"{self.rows:,}{validation}"),
            ("epochs", f"{self.epochs} of {self.stepsPerEpoch} steps"),
            ("rows/s", f"{self.rowsPerSecond:,.0f}"),
            ("seconds", f"{self.seconds:.1f} ({times}, communicate {self.communicateSeconds:.1f})"),
        ]
        if self.lostWorkers:
            lost = ", ".join(map(str, self.lostWorkers))
            facts.append(("lost workers", f"{lost}: {self.rowsNotSeen:,} rows not seen, over all epochs"))
        if len(self.history):
            last = self.history.iloc[-1].drop("epoch", errors="ignore")
            facts.append(("last epoch", ", ".join(f"{name} {value:.4g}" for name, value in last.items())))
        return facts


def summarize(result: TrainingResult, seconds: float) -> TrainingSummary:
    """Turn the ranks' reports into the fit's summary.

    Parameters
    ----------
    result : TrainingResult
    seconds : float
        Wall-clock seconds of the whole fit.
    """
    import pandas as pd

    # All tell the same of the whole; of asynchronous workers some may be lost.
    workers = [report for report in result.reports if "history" in report]
    chief = workers[0]
    epochs = chief["epoch_seconds"]
    # The first epoch pays for tracing.
    typical = statistics.median(epochs[1:] or epochs or [0.0])
    for notice in {notice: None for report in result.reports for notice in report["notices"]}:
        warnings.warn(notice, stacklevel=2)
    rows = sum(chief["rows"])
    servers = [report["server"] for report in result.reports if "server" in report]
    # Gradients go between workers and servers where there are such.
    exchange = next((report for report in result.reports if "server" in report), chief)
    world = len(chief["rows"])
    history = pd.DataFrame({"epoch": range(1, len(epochs) + 1), **chief["history"]})

    def slowest(seconds: Callable[[dict[str, Any]], float]) -> float:
        return max(seconds(report) for report in workers)

    lost = [rank for rank, report in enumerate(result.reports) if "lost" in report]
    seen = sum(servers[0]["rows"][rank] for rank in lost) if servers else 0
    return TrainingSummary(
        history=history,
        rows=rows,
        validationRows=sum(chief["validation_rows"]),
        rowsPerSecond=rows / typical if typical > 0 else float("nan"),
        seconds=seconds,
        feedSeconds=slowest(lambda r: r["feed_seconds"]),
        computeSeconds=slowest(lambda r: r["fit_seconds"] - r["communicate_seconds"]),
        communicateSeconds=slowest(lambda r: r["communicate_seconds"]),
        protocol=exchange["protocol"] if world > 1 or servers else "none",
        protocolReason=exchange["protocol_reason"],
        worldSize=world,
        epochs=len(epochs),
        stepsPerEpoch=chief["steps_per_epoch"],
        versions=installed_versions(),
        # It runs beside rank 0's task, which is there also where its worker is lost.
        tensorboardUrl=result.reports[0]["tensorboard"],
        numPs=len(servers),
        updates=max((server["updates"] for server in servers), default=0),
        lostWorkers=tuple(lost),
        rowsNotSeen=int(sum(chief["rows"][rank] for rank in lost) * len(epochs) - seen),
    )


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
