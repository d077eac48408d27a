"""Model selection of Spark ML over estimators, with fits that run at the same time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from modes import in_both_modes
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator
from pyspark.ml.feature import StandardScaler, VectorAssembler
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder, TrainValidationSplit
from pyspark.sql import DataFrame

from sparktf.errors import PersistenceError
from sparktf.ml import TFEstimator, TFModel


@pytest.fixture(scope="module")
def frame(spark: Any) -> DataFrame:
    values = np.random.default_rng(3).normal(size=(60, 2))
    rows = [(float(a), float(b), float(a + b > 0)) for a, b in values]
    created = spark.createDataFrame(rows, "a double, b double, label double").repartition(2)
    assembled = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(created).cache()
    assert assembled.count() == 60
    return assembled


def small(rate: float) -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.SGD(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def maker(rate: float) -> Callable[[], keras.Model]:
    return lambda: small(rate)


def estimator(**params: Any) -> TFEstimator:
    return TFEstimator(**{"batchSize": 8, "epochs": 3, "verbose": 0, "timeout": 60.0, **params})


@in_both_modes
def test_cross_validation_with_fits_side_by_side_chooses_as_one_after_the_other(
    frame: DataFrame, mode: dict[str, Any]
) -> None:
    # Two fits at a time, each of two nodes: both workers, or a worker and its server.
    workers = 1 if mode["mode"] == "async" else 2
    est = estimator(numWorkers=workers, **mode)
    grid = ParamGridBuilder().addGrid(est.model, [small(0.0001), small(0.5)]).build()
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")

    def validated(parallelism: int) -> Any:
        return CrossValidator(
            estimator=est,
            estimatorParamMaps=grid,
            evaluator=evaluator,
            numFolds=2,
            seed=1,
            parallelism=parallelism,
            collectSubModels=True,
        ).fit(frame)

    beside, after = validated(2), validated(1)
    assert beside.avgMetrics == after.avgMetrics
    assert beside.avgMetrics[1] > 0.85
    assert isinstance(beside.bestModel, TFModel)
    np.testing.assert_array_equal(beside.bestModel.model.get_weights()[0], after.bestModel.model.get_weights()[0])
    subs = [sub for fold in beside.subModels for sub in fold]
    assert len(subs) == 4
    assert all(isinstance(sub, TFModel) for sub in subs)
    assert {(sub.summary.worldSize, sub.summary.numPs) for sub in subs} == {(workers, 2 - workers)}


@pytest.mark.long
def test_a_search_over_models_is_saved_with_its_grid_and_loaded_to_search_again(
    frame: DataFrame, tmp_path: Path
) -> None:
    est = estimator(epochs=1)
    models = [small(0.0001), small(0.5)]
    search = CrossValidator(
        estimator=est,
        estimatorParamMaps=ParamGridBuilder().addGrid(est.model, models).build(),
        evaluator=MulticlassClassificationEvaluator(metricName="accuracy"),
        numFolds=2,
        seed=1,
        parallelism=2,
    )
    found = search.fit(frame)
    found.save(f"{tmp_path}/found")
    found.write().overwrite().save(f"{tmp_path}/found")
    again = CrossValidatorModel.load(f"{tmp_path}/found")
    assert again.avgMetrics == found.avgMetrics
    assert again.transform(frame).collect() == found.transform(frame).collect()

    search.save(f"{tmp_path}/search")
    loaded = CrossValidator.load(f"{tmp_path}/search")
    theirs = loaded.getEstimator()
    points = [theirs.copy(point) for point in loaded.getEstimatorParamMaps()]
    for point, model in zip(points, models, strict=True):
        assert point.getModel().optimizer.learning_rate == model.optimizer.learning_rate
        np.testing.assert_array_equal(point.getModel().get_weights()[0], model.get_weights()[0])
    assert loaded.fit(frame).avgMetrics == found.avgMetrics


@pytest.mark.parametrize("name", ["modelFn", "callbacks"])
def test_a_search_over_python_code_says_why_it_is_not_saved(name: str, tmp_path: Path, spark: Any) -> None:
    est = estimator()
    values = {"modelFn": [maker(0.1)], "callbacks": [[keras.callbacks.TerminateOnNaN()]]}[name]
    grid = ParamGridBuilder().addGrid(est.getParam(name), values).build()
    search = CrossValidator(
        estimator=est, estimatorParamMaps=grid, evaluator=MulticlassClassificationEvaluator(), numFolds=2
    )
    with pytest.raises(PersistenceError, match=f"cannot be saved with {name}: that is Python code"):
        search.save(f"{tmp_path}/search")


@pytest.mark.long
@in_both_modes
def test_functions_stand_in_a_grid_and_stages_in_a_pipeline_that_is_split(
    frame: DataFrame, mode: dict[str, Any]
) -> None:
    scaler = StandardScaler(inputCol="features", outputCol="scaled", withMean=True)
    est = estimator(featuresCol="scaled", **mode)
    grid = ParamGridBuilder().addGrid(est.modelFn, [maker(0.0001), maker(0.5)]).addGrid(est.epochs, [1, 4]).build()
    split = TrainValidationSplit(
        estimator=Pipeline(stages=[scaler, est]),
        estimatorParamMaps=grid,
        evaluator=BinaryClassificationEvaluator(),
        trainRatio=0.7,
        seed=1,
        parallelism=2,
    ).fit(frame)
    assert len(split.validationMetrics) == 4
    best = split.bestModel.stages[-1]
    assert best.summary.history["epoch"].max() in (1, 4)
    assert max(split.validationMetrics) > 0.9
    assert split.transform(frame).where("prediction = label").count() > 45


@in_both_modes
def test_param_maps_and_copies_fit_with_their_own_values(frame: DataFrame, mode: dict[str, Any]) -> None:
    est = estimator(model=small(0.5), **mode)
    maps = [{est.epochs: 1, est.predictionCol: "first"}, {est.epochs: 2, est.predictionCol: "second"}]
    first, second = est.fit(frame, maps)
    assert (len(first.summary.history), len(second.summary.history)) == (1, 2)
    both = second.transform(first.transform(frame).drop("probability", "rawPrediction"))
    assert {"first", "second"} <= set(both.columns)
    assert est.getEpochs() == 3
