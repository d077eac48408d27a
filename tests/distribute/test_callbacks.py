"""What callbacks of a fit report."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from sparktf.distribute.callbacks import callbacks_of_rank, progress_callback


def test_a_screen_is_told_of_no_more_numbers_than_it_can_show() -> None:
    reports: list[dict[str, Any]] = []
    callback = progress_callback(reports.append, steps=1)
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": 0.5, "of_classes": np.ones(1_000_000, np.float32)})
    (report,) = reports
    assert len(report["logs"]) == 1000
    assert report["logs"]["loss"] == 0.5


def test_what_writes_and_what_is_marked_runs_on_the_chief_alone() -> None:
    marked, plain = keras.callbacks.LambdaCallback(), keras.callbacks.LambdaCallback()
    marked.sparktf_chief_only = True
    callbacks = keras.callbacks
    everywhere = [plain, callbacks.EarlyStopping(), callbacks.ReduceLROnPlateau(), callbacks.TerminateOnNaN()]
    chiefs = [
        marked,
        callbacks.ModelCheckpoint("m.keras"),
        callbacks.BackupAndRestore("backup"),
        callbacks.CSVLogger("log.csv"),
        callbacks.TensorBoard("logs"),
        callbacks.RemoteMonitor(),
    ]
    assert callbacks_of_rank([*chiefs, *everywhere], 0) == [*chiefs, *everywhere]
    assert callbacks_of_rank([*chiefs, *everywhere], 1) == everywhere
