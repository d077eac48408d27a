"""The whole way on Spark Connect: fit, transform, save, load, overwrite, in Pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler

from sparktf.errors import DataError, NodeError
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


def test_too_many_workers_fail_with_sparks_own_words_within_bounds(rows: Any) -> None:
    with pytest.raises(NodeError, match="slots"):
        _estimator(inputCols=["a", "b", "c"], numWorkers=9).fit(rows)
