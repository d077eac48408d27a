"""Asynchronous fits on Spark: what is lost, killed, stopped or refused, and what a model is afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import StandardScaler, VectorAssembler
from pyspark.sql import DataFrame

from sparktf.errors import NodeError, ParamError, SlotsError, TransportTimeoutError
from sparktf.ml import TFEstimator

PROMISED_SECONDS = 10.0
ROWS = 120


@pytest.fixture(scope="module")
def frame(spark: Any) -> DataFrame:
    values = np.random.default_rng(3).normal(size=(ROWS, 2))
    rows = [(float(a), float(b), float(a - b > 0), n % 4 == 0) for n, (a, b) in enumerate(values)]
    created = spark.createDataFrame(rows, "a double, b double, label double, held boolean").repartition(2).cache()
    assert created.count() == ROWS
    return created


def classifier(optimizer: Any = "adam") -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [keras.Input((2,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(1, "sigmoid")]
    model = keras.Sequential(layers)
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
    return model


def estimator(**params: Any) -> TFEstimator:
    usual = {"inputCols": ["a", "b"], "batchSize": 8, "epochs": 3, "mode": "async", "numWorkers": 2, "verbose": 0}
    return TFEstimator(**{**usual, "timeout": 60.0, **params})


def test_a_pipeline_trains_on_two_servers_is_saved_and_trains_on(
    frame: DataFrame, tmp_path: Path, no_leftovers: Any
) -> None:
    assembled = VectorAssembler(inputCols=["a", "b"], outputCol="pair")
    scaled = StandardScaler(inputCol="pair", outputCol="scaled")
    model = classifier(keras.optimizers.Adam(0.05))
    stages = [assembled, scaled, estimator(model=model, inputCols=None, featuresCol="scaled", numPs=2, epochs=8)]
    fitted = Pipeline(stages=stages).fit(frame)
    assert fitted.transform(frame).where("prediction = label").count() > 0.9 * ROWS
    fitted.save(str(tmp_path / "model"))
    loaded = PipelineModel.load(str(tmp_path / "model")).stages[-1]
    summary = loaded.summary
    assert (summary.worldSize, summary.numPs, summary.lostWorkers, summary.rowsNotSeen) == (2, 2, (), 0)
    # Eight batches of each worker in each epoch.
    assert summary.updates == int(loaded.model.optimizer.iterations) == 8 * 2 * 8
    assert "2 workers and 2 parameter servers" in repr(summary)
    moments = [v.numpy() for v in loaded.model.optimizer.variables if v.shape.rank]
    assert len(moments) == 8
    assert all(np.abs(moment).max() > 0 for moment in moments)
    further = estimator(model=loaded.model, epochs=1, numWorkers=1).fit(frame)
    assert int(further.model.optimizer.iterations) == summary.updates + 15


class Break(keras.callbacks.Callback):
    """Break one worker at the beginning of its second epoch."""

    def __init__(self, worker: int, how: str) -> None:
        super().__init__()
        self.worker = worker
        self.how = how

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1 and self.model._sparktf.communicator.rank == self.worker:
            if self.how == "raise":
                raise RuntimeError(f"kaboom at {time.time()}")
            os.kill(os.getpid(), getattr(signal, self.how))


@pytest.mark.parametrize("worker", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_worker_does_not_end_the_fit_and_the_summary_tells_what_it_missed(
    frame: DataFrame, worker: int, no_leftovers: Any
) -> None:
    est = estimator(
        model=classifier(),
        callbacks=[Break(worker, "SIGKILL")],
        validationIndicatorCol="held",
        epochs=4,
        maxStaleness=None if worker else 3,
        # It runs beside the chief's task, which outlives the chief.
        tensorboard=worker == 0,
    )
    fitted = est.fit(frame)
    summary = fitted.summary
    assert summary.lostWorkers == (worker,)
    assert bool(summary.tensorboardUrl) == (worker == 0)
    # Of 90 rows it had seen its share, about a half, once in four epochs.
    share, rest = divmod(summary.rowsNotSeen, 3)
    assert rest == 0
    assert 40 < share < 50
    assert list(summary.history.epoch) == [1, 2, 3, 4]
    assert np.isfinite(summary.history.to_numpy()).all()
    assert f"{worker}: {summary.rowsNotSeen} rows not seen" in repr(summary)
    assert fitted.transform(frame).where("prediction is not null").count() == ROWS


def test_an_exception_on_a_worker_ends_the_fit_with_its_traceback(frame: DataFrame, no_leftovers: Any) -> None:
    with pytest.raises(NodeError, match="kaboom") as caught:
        estimator(model=classifier(), callbacks=[Break(1, "raise")]).fit(frame)
    raised = float(str(caught.value).split("kaboom at ")[1].split()[0])
    assert time.time() - raised < PROMISED_SECONDS
    assert caught.value.rank == 1


@pytest.mark.long
def test_a_stopped_worker_is_named_after_the_timeout(frame: DataFrame, no_leftovers: Any) -> None:
    with pytest.raises(TransportTimeoutError, match="worker 1"):
        estimator(model=classifier(), callbacks=[Break(1, "SIGSTOP")], timeout=25.0).fit(frame)


class Slow(keras.callbacks.Callback):
    """Gives a server time to be broken, and tells that training is under way."""

    def __init__(self, trains: Path) -> None:
        super().__init__()
        self.trains = trains

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.trains.touch()
        time.sleep(0.1)


def _breaking_server(trains: Path, path: str, how: int) -> Callable[[], keras.Model]:
    """Return a modelFn that breaks the node of rank 2, which is a server, once workers train."""

    def make() -> keras.Model:
        from pyspark import TaskContext

        # A worker's own process has none.
        context = TaskContext.get()
        if context is not None and context.partitionId() == 2:

            def end() -> None:
                deadline = time.monotonic() + 120
                while not trains.exists() and time.monotonic() < deadline:
                    time.sleep(0.1)
                Path(path).write_text(str(time.time()))
                os.kill(os.getpid(), how)

            threading.Thread(target=end, daemon=True).start()
        return classifier()

    return make


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_server_that_ends_or_hangs_is_an_error_that_names_it(
    frame: DataFrame, tmp_path: Path, how: signal.Signals, no_leftovers: Any
) -> None:
    trains, when = tmp_path / "trains", tmp_path / "when"
    timeout = 60.0 if how == signal.SIGKILL else 12.0
    est = estimator(
        inputCols=["a", "b"],
        modelFn=_breaking_server(trains, str(when), how),
        callbacks=[Slow(trains)],
        epochs=500,
        timeout=timeout,
    )
    with pytest.raises((NodeError, TransportTimeoutError), match=r"Rank 2 was lost|parameter server 0"):
        est.fit(frame)
    allowed = PROMISED_SECONDS if how == signal.SIGKILL else PROMISED_SECONDS + 1.5 * timeout + 5
    assert time.time() - float(when.read_text()) < allowed


def test_what_cannot_be_trained_asynchronously_is_refused_before_a_job(frame: DataFrame) -> None:
    def refused(match: str, **params: Any) -> None:
        with pytest.raises(ParamError, match=match):
            estimator(**{"model": classifier(), **params}).fit(frame)

    refused("use_ema", model=classifier(keras.optimizers.Adam(use_ema=True)))
    refused("gradient_accumulation_steps", model=classifier(keras.optimizers.SGD(gradient_accumulation_steps=2)))
    refused("grpc", protocol="grpc")
    single = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid", use_bias=False)])
    single.compile(keras.optimizers.Adam(clipnorm=1.0), "binary_crossentropy")
    refused("Take fewer servers", numPs=2, model=single)
    with pytest.raises(SlotsError, match=r"5 nodes \(numWorkers=2, numPs=3\); received 4 .* Use fewer nodes"):
        estimator(model=classifier(), numPs=3).fit(frame)
