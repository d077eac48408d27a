"""The whole way on Spark Connect: fit, transform, save, load, overwrite, in Pipelines."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler

from sparktf.cluster.connect import MESSAGE_BYTES
from sparktf.errors import ClusterError, DataError, NodeError, ParamError, SlotsError
from sparktf.ml import TFEstimator, TFModel


@pytest.fixture(scope="module")
def rows(spark: Any) -> Any:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    data = [(*(float(v) for v in row), int(row.sum() > 0), i % 4 == 0) for i, row in enumerate(x)]
    return spark.createDataFrame(data, "a double, b double, c double, label long, held_out boolean")


def _estimator(**params: Any) -> TFEstimator:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy", metrics=["accuracy"])
    return TFEstimator(**{"model": model, "epochs": 3, "verbose": 0, **params})


def test_a_pipeline_fits_scores_saves_and_loads(rows: Any, tmp_path: Path) -> None:
    pipeline = Pipeline(
        stages=[
            VectorAssembler(inputCols=["a", "b", "c"], outputCol="features"),
            _estimator(numWorkers=2, validationIndicatorCol="held_out"),
        ]
    )
    fitted = pipeline.fit(rows)
    summary = fitted.stages[-1].summary
    assert (summary.rows, summary.validationRows, summary.worldSize) == (90, 30, 2)
    assert list(summary.history.columns) == ["epoch", "accuracy", "loss", "val_accuracy", "val_loss"]
    path = str(tmp_path / "pipeline")
    fitted.write().overwrite().save(path)
    fitted.write().overwrite().save(path)
    loaded = PipelineModel.load(path)
    ours, theirs = (m.transform(rows).select("prediction", "probability").collect() for m in (fitted, loaded))
    assert ours == theirs
    assert {row.prediction for row in ours} == {0.0, 1.0}


def test_an_asynchronous_fit_goes_on_without_a_lost_worker(rows: Any) -> None:
    fitted = _estimator(
        inputCols=["a", "b", "c"], mode="async", numWorkers=2, callbacks=[_Killed(0)], epochs=4, timeout=60.0
    ).fit(rows)
    summary = fitted.summary
    assert (summary.worldSize, summary.numPs, list(summary.lostWorkers)) == (2, 1, [0])
    assert summary.rowsNotSeen > 0
    assert list(summary.history.epoch) == [1, 2, 3, 4]
    assert {row.prediction for row in fitted.transform(rows).collect()} == {0.0, 1.0}


class _Killed(keras.callbacks.Callback):
    """Kills one worker as its second epoch begins."""

    def __init__(self, worker: int) -> None:
        super().__init__()
        self.worker = worker

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1 and self.model._sparktf.communicator.rank == self.worker:
            os.kill(os.getpid(), signal.SIGKILL)


def test_model_and_estimator_are_saved_and_loaded_alone(rows: Any, tmp_path: Path) -> None:
    estimator = _estimator(inputCols=["a", "b", "c"])
    fitted = estimator.fit(rows)
    fitted.write().overwrite().save(str(tmp_path / "model"))
    loaded = TFModel.load(str(tmp_path / "model"))
    for ours, theirs in zip(fitted.model.get_weights(), loaded.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.summary.history.equals(fitted.summary.history)
    estimator.write().overwrite().save(str(tmp_path / "estimator"))
    again = TFEstimator.load(str(tmp_path / "estimator")).fit(rows)
    for ours, theirs in zip(fitted.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_tensorboard_runs_beside_a_chief_that_does_not_reach_the_driver(rows: Any, tmp_path: Path) -> None:
    fitted = _estimator(inputCols=["a", "b", "c"], tensorboard=True, logDir=tmp_path).fit(rows)
    assert fitted.summary.tensorboardUrl.startswith("http://")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_bad_columns_are_named_before_the_job(rows: Any) -> None:
    with pytest.raises(DataError, match="nope"):
        _estimator(featuresCol="nope").fit(rows)


def test_nulls_are_counted_over_all_workers(rows: Any) -> None:
    spoiled = rows.selectExpr("if(held_out, null, a) as a", "b", "c", "label")
    with pytest.raises(DataError, match="30 nulls in the 120 rows of the DataFrame: 30 in 'a'"):
        _estimator(inputCols=["a", "b", "c"], numWorkers=2).fit(spoiled)


class _Boom(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        raise RuntimeError("kaboom in a callback")


def test_a_nodes_own_error_reaches_the_client(rows: Any) -> None:
    with pytest.raises(NodeError, match="kaboom in a callback"):
        _estimator(inputCols=["a", "b", "c"], callbacks=[_Boom()], numWorkers=2).fit(rows)


def test_a_killed_rank_ends_the_fit_in_sparks_words_and_the_next_one_works(rows: Any) -> None:
    started = time.monotonic()
    with pytest.raises(NodeError, match="exited unexpectedly"):
        _estimator(inputCols=["a", "b", "c"], callbacks=[_Killed(1)], numWorkers=2, timeout=200.0).fit(rows)
    assert time.monotonic() - started < 60.0
    assert len(_estimator(inputCols=["a", "b", "c"], numWorkers=2).fit(rows).summary.history) == 3


@pytest.mark.parametrize("params", [{}, {"mode": "async"}], ids=["sync", "async"])
def test_a_lone_node_that_hangs_is_ended_after_the_timeout(rows: Any, params: dict[str, Any]) -> None:
    hangs = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: time.sleep(300))
    started = time.monotonic()
    with pytest.raises(NodeError, match=r"rank 0: no progress for 10 s \(timeout\)"):
        _estimator(inputCols=["a", "b", "c"], timeout=10.0, callbacks=[hangs], **params).fit(rows)
    assert time.monotonic() - started < 60.0


def test_too_many_workers_fail_with_sparks_own_words(rows: Any) -> None:
    with pytest.raises(SlotsError, match=r"In Spark's words:\n.*slots"):
        _estimator(inputCols=["a", "b", "c"], numWorkers=9).fit(rows)


def test_too_many_workers_fail_within_the_timeout(spark: Any, rows: Any) -> None:
    started = time.monotonic()
    with pytest.raises(SlotsError, match=r"9 free task slots.*no node has started within timeout=2 s"):
        _estimator(inputCols=["a", "b", "c"], numWorkers=9, timeout=2.0).fit(rows)
    assert time.monotonic() - started < 7.0, "Spark's own check takes eight seconds here"


def test_nodes_that_train_for_longer_than_the_timeout_are_left_alone(rows: Any) -> None:
    slow = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: time.sleep(2.5))
    fitted = _estimator(inputCols=["a", "b", "c"], numWorkers=2, timeout=4.0, callbacks=[slow]).fit(rows)
    assert len(fitted.summary.history) == 3


def _wide(units: int) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(), "mse")
    return model


def test_a_model_that_cannot_come_back_is_refused_before_it_goes_out(rows: Any) -> None:
    # 40 MB of weights.
    with pytest.raises(ClusterError, match=r"33,554,432 bytes, which is spark\.driver\.maxResultSize"):
        _estimator(model=_wide(2_000_000), inputCols=["a", "b", "c"]).fit(rows)


def test_a_model_whose_optimizer_makes_it_too_large_is_refused_before_it_trains(rows: Any) -> None:
    def boom(epoch: int, logs: Any) -> None:
        raise AssertionError("training began")

    # 14 MB of weights, and twice that of Adam's moments once it is built.
    late = keras.callbacks.LambdaCallback(on_epoch_begin=boom)
    with pytest.raises(ClusterError, match=r"received one of 42,\d+,\d+ bytes"):
        _estimator(model=_wide(700_000), inputCols=["a", "b", "c"], callbacks=[late]).fit(rows)


def test_a_model_just_small_enough_comes_back(rows: Any) -> None:
    fitted = _estimator(model=_wide(500_000), inputCols=["a", "b", "c"], epochs=1).fit(rows)
    assert fitted.model.count_params() == 2_500_001


def test_what_is_too_large_for_a_message_is_refused_at_once(rows: Any) -> None:
    ballast = bytes(MESSAGE_BYTES)

    def model_fn() -> keras.Model:
        assert ballast
        return _wide(1)

    with pytest.raises(ParamError, match="takes no message over 128 MiB"):
        _estimator(model=None, modelFn=model_fn, inputCols=["a", "b", "c"]).fit(rows)


def test_a_row_of_a_wrong_length_is_told_as_on_a_classic_session(rows: Any) -> None:
    odd = rows.selectExpr("if(held_out, array(a), array(a, b, c)) as features", "label")
    with pytest.raises(DataError, match=r"^column 'features': row .* holds 1 values\. Expected: 3 values"):
        _estimator(numWorkers=2).fit(odd)
