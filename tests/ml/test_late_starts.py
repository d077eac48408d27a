"""Fits whose nodes, or their child processes, start further apart than the timeout, as on a machine that swaps."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import keras
import pytest

from sparktf.ml import TFEstimator

TIMEOUT, LATE = 6.0, 11.0


def _slow_to_start(note: str, in_child: bool) -> keras.callbacks.Callback:
    main = sys.modules["__main__"].__spec__
    if in_child == (main is not None and main.name == "sparktf.cluster.child"):
        try:
            os.close(os.open(note, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return keras.callbacks.Callback()
        time.sleep(LATE)
    return keras.callbacks.Callback()


class SlowToStart(keras.callbacks.Callback):
    """Takes its time to be unpickled in the first child, or task, that does so, as slow a start as any other."""

    def __init__(self, note: Path, in_child: bool) -> None:
        super().__init__()
        self._note, self._in_child = str(note), in_child

    def __reduce__(self) -> Any:
        return _slow_to_start, (self._note, self._in_child)


@pytest.mark.long
@pytest.mark.parametrize(
    ("params", "in_child"),
    [({"mode": "async"}, True), ({"threadsPerWorker": 5}, True), ({}, False)],
    ids=["async", "threads of its own", "in the task"],
)
def test_a_fit_waits_for_a_node_that_starts_late(
    spark: Any, tmp_path: Path, params: dict[str, Any], in_child: bool, no_leftovers: Any
) -> None:
    rows = [(float(n % 7), float(n % 3)) for n in range(40)]
    frame = spark.createDataFrame(rows, "x double, label double").repartition(2)
    usual = {"inputCols": ["x"], "numWorkers": 2, "epochs": 2, "verbose": 0}
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    # Workers have threads of an earlier fit now, which are others than five.
    TFEstimator(model=model, threadsPerWorker=2, **usual).fit(frame)
    note = tmp_path / "late"
    began = time.monotonic()
    slow = TFEstimator(model=model, callbacks=[SlowToStart(note, in_child)], timeout=TIMEOUT, **usual, **params).fit(
        frame
    )
    assert note.exists()
    assert time.monotonic() - began > LATE
    assert slow.summary.rows == 40
    assert len(slow.summary.history) == 2
