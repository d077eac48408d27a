"""What callbacks of a fit report."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparktf.distribute.callbacks import progress_callback


def test_a_screen_is_told_of_no_more_numbers_than_it_can_show() -> None:
    reports: list[dict[str, Any]] = []
    callback = progress_callback(reports.append, steps=1)
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": 0.5, "of_classes": np.ones(1_000_000, np.float32)})
    (report,) = reports
    assert len(report["logs"]) == 1000
    assert report["logs"]["loss"] == 0.5
