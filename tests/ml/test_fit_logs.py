"""What a fit logs for TensorBoard, and the server beside its chief, through real fits."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from modes import in_both_modes
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sparktf.cluster.fit_logs import FitLogs
from sparktf.cluster.job import TrainJob
from sparktf.distribute.fit import FitSettings
from sparktf.errors import ClusterError
from sparktf.ml import TFEstimator

SECONDS = 60.0


class Screen(io.StringIO):
    """Standard output: takes down what TensorBoard serves as soon as its URL is printed, then writes a file."""

    def __init__(self, done: Path) -> None:
        super().__init__()
        self._done = done
        self.tags: dict[str, Any] = {}

    def write(self, text: str) -> int:
        if text.startswith("TensorBoard: "):
            deadline = time.monotonic() + SECONDS
            while not self.tags and time.monotonic() < deadline:
                self.tags = json.loads(_get(text.split()[1] + "data/plugin/scalars/tags"))
                time.sleep(0.1)
            self._done.touch()
        return super().write(text)


class WaitAtEnd(keras.callbacks.Callback):
    """Does not end a fit before there is a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, logs: Any = None) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)


class KillServer(keras.callbacks.Callback):
    """Kills the TensorBoard of its fit before the second epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            # The fit may run in a child process of the one that has the server.
            (server,) = [*_servers(psutil.Process()), *_servers(psutil.Process().parent())]
            server.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + SECONDS
            while server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                time.sleep(0.05)


def _servers(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        # Others come and go meanwhile.
        with contextlib.suppress(psutil.Error):
            if "tensorboard.main" in child.cmdline():
                found.append(child)
    return found


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def rows(spark: Any) -> DataFrame:
    return spark.range(60).select(F.rand(1).alias("a"), F.rand(2).alias("b"), F.rand(3).alias("label")).cache()


def _estimator(**params: Any) -> TFEstimator:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    common = {"model": model, "inputCols": ["a", "b"], "numWorkers": 2, "epochs": 2, "verbose": 0}
    return TFEstimator(**{**common, **params})


# Over grpc, nodes are child processes of those that run the server.
@pytest.mark.parametrize(
    ("protocol", "log_dir"), [("auto", "logs"), pytest.param("grpc", None, marks=pytest.mark.long)]
)
def test_the_server_shows_a_fit_while_it_runs_and_is_stopped(
    rows: DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
    log_dir: str | None,
    no_leftovers: Any,
) -> None:
    screen = Screen(tmp_path / "seen")
    monkeypatch.setattr("sys.stdout", screen)
    where = None if log_dir is None else tmp_path / log_dir
    waiting = [WaitAtEnd(tmp_path / "seen")]
    fitted = _estimator(tensorboard=True, logDir=where, callbacks=waiting, protocol=protocol, verbose=2).fit(rows)
    assert "epoch_loss" in screen.tags["train"]
    url = fitted.summary.tensorboardUrl
    assert screen.getvalue().splitlines()[0] == f"TensorBoard: {url}"
    with pytest.raises(OSError, match="refused"):
        _get(url)
    assert where is None or [path.name for path in where.iterdir()] == ["train"]


@in_both_modes
def test_without_the_server_the_chief_alone_logs(
    rows: DataFrame, tmp_path: Path, mode: dict[str, Any], no_leftovers: Any
) -> None:
    held_out = rows.withColumn("held", F.col("a") < 0.3)
    fitted = _estimator(logDir=tmp_path / "logs", validationIndicatorCol="held", **mode).fit(held_out)
    assert fitted.summary.tensorboardUrl == ""
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["train", "validation"]
    assert len(list((tmp_path / "logs" / "train").iterdir())) == 1


def test_logging_changes_nothing_in_the_model(rows: DataFrame, tmp_path: Path) -> None:
    estimator = _estimator()
    plain, logged = estimator.fit(rows), estimator.copy({estimator.logDir: str(tmp_path)}).fit(rows)
    for ours, theirs in zip(plain.model.get_weights(), logged.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@in_both_modes
def test_a_tensorboard_callback_of_the_users_takes_the_place_of_ours(
    rows: DataFrame, tmp_path: Path, mode: dict[str, Any]
) -> None:
    theirs = keras.callbacks.TensorBoard(str(tmp_path / "theirs"))
    _estimator(logDir=tmp_path / "ours", callbacks=[theirs], **mode).fit(rows)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["train"]
    assert not any((tmp_path / "ours").iterdir())


@in_both_modes
def test_a_fit_outlives_its_server_and_says_so(rows: DataFrame, mode: dict[str, Any], no_leftovers: Any) -> None:
    estimator = _estimator(tensorboard=True, numWorkers=1, callbacks=[KillServer()], epochs=3, **mode)
    with pytest.warns(UserWarning, match="went on without TensorBoard.*killed by signal 9"):
        fitted = estimator.fit(rows)
    assert len(fitted.summary.history) == 3


def test_a_log_dir_that_cannot_be_written_ends_a_fit_before_it_trains(rows: DataFrame, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="rank 0: Expected a log directory that the chief can write to"):
        _estimator(logDir=tmp_path / "file" / "logs").fit(rows)


@pytest.fixture
def job() -> TrainJob:
    return TrainJob(
        job_id="job",
        world_size=2,
        secret=bytes(32),
        control=None,
        protocol="tcp",
        compression="none",
        timeout=300.0,
        versions={},
        settings=FitSettings(batch_size=2, epochs=1, shuffle=False, seed=0),
        threads=1,
        executor_cores=0,
        program=b"",
        tensorboard=True,
    )


def test_a_server_that_does_not_come_up_is_an_error(job: TrainJob, no_leftovers: Any) -> None:
    # An address for documentation, which no machine has.
    with FitLogs(job, (), 0, "192.0.2.1") as logs, pytest.raises(ClusterError, match="Cannot assign"):
        logs.announce(lambda report: None)


def test_other_ranks_have_no_server(job: TrainJob) -> None:
    with FitLogs(job, (), 1, "127.0.0.1") as logs:
        report = print
        assert logs.announce(report) is report
        assert not _servers(psutil.Process())


def test_the_server_looks_where_the_users_callback_logs(job: TrainJob, tmp_path: Path, no_leftovers: Any) -> None:
    theirs = keras.callbacks.TensorBoard(str(tmp_path))
    with FitLogs(job, [theirs], 0, "127.0.0.1") as logs:
        assert logs.job.log_dir == str(tmp_path)
