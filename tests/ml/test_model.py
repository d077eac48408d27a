"""TFModel on a real Spark session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from pyspark.errors import PySparkException
from pyspark.ml.evaluation import (
    BinaryClassificationEvaluator,
    MulticlassClassificationEvaluator,
    RegressionEvaluator,
)
from pyspark.ml.linalg import Vectors
from pyspark.sql import functions as F

from sparktf.errors import DataError, ParamError, PersistenceError
from sparktf.ml import payload
from sparktf.ml.inputs import input_columns
from sparktf.ml.model import TFModel


def dense(units: int, activation: str | None = None, loss: Any = None, size: int = 3) -> keras.Model:
    model = keras.Sequential([keras.Input((size,)), layers.Dense(units, activation=activation)])
    if loss is not None:
        model.compile(loss=loss)
    return model


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    values: np.ndarray = np.random.default_rng(0).normal(size=(200, 3)).round(3)
    return values


@pytest.fixture(scope="module")
def frame(spark: Any, rows: np.ndarray) -> Any:
    data = [(i, Vectors.dense(r), r.tolist(), *map(float, r), float(i % 2), float(r.sum())) for i, r in enumerate(rows)]
    names = ["id", "features", "array", "a", "b", "c", "label", "target"]
    return spark.createDataFrame(data, names).repartition(2).cache()


def by_id(frame: Any, column: str) -> list[Any]:
    return [row[column] for row in frame.orderBy("id").select(column).collect()]


def test_scores_are_those_of_keras_predict(frame: Any, rows: np.ndarray) -> None:
    network = dense(1, loss="mse")
    expected = network.predict(rows.astype(np.float32), verbose=0).reshape(-1)
    for params in ({}, {"featuresCol": "array"}, {"inputCols": ["a", "b", "c"]}, {"inputCols": ["array"]}):
        scored = TFModel.fromKeras(network, predictBatchSize=64, **params).transform(frame)
        np.testing.assert_allclose(by_id(scored, "prediction"), expected, rtol=1e-5, atol=1e-6)


def test_all_input_columns_stay_and_rows_keep_their_order(frame: Any) -> None:
    scored = TFModel.fromKeras(dense(2, "softmax", "sparse_categorical_crossentropy")).transform(frame)
    assert scored.columns == [*frame.columns, "prediction", "probability", "rawPrediction"]
    assert [r.id for r in scored.collect()] == [r.id for r in frame.collect()]


def test_mllibs_evaluators_work_unchanged(frame: Any) -> None:
    binary = TFModel.fromKeras(dense(1, "sigmoid", "bce")).transform(frame)
    assert 0.0 <= BinaryClassificationEvaluator().evaluate(binary) <= 1.0
    several = TFModel.fromKeras(dense(2, "softmax", "sparse_categorical_crossentropy")).transform(frame)
    for name in ("accuracy", "logLoss"):
        assert MulticlassClassificationEvaluator(metricName=name).evaluate(several) >= 0.0
    exact = dense(1, loss="mse")
    exact.set_weights([np.ones((3, 1)), np.zeros(1)])
    scored = TFModel.fromKeras(exact).transform(frame)
    assert RegressionEvaluator(labelCol="target").evaluate(scored) < 1e-5


def test_nulls_in_any_feature_give_null_predictions(spark: Any) -> None:
    data = [
        (0, Vectors.sparse(3, {1: 2.0}), [1.0, None, 2.0], 1.0),
        (1, None, None, 1.0),
        (2, Vectors.dense(1, 2, 3), [1.0, 1.0, 1.0], None),
    ]
    frame = spark.createDataFrame(data, ["id", "v", "array", "a"]).coalesce(1)
    model = TFModel.fromKeras(dense(2, "softmax", "sparse_categorical_crossentropy"))
    for column, nulls in (("v", [1]), ("array", [0, 1])):
        scored = model.copy({model.featuresCol: column}).transform(frame)
        for name in ("prediction", "probability", "rawPrediction"):
            assert [i for i, value in enumerate(by_id(scored, name)) if value is None] == nulls
    packed = TFModel.fromKeras(dense(1, size=1), inputCols=["a"]).transform(frame)
    assert by_id(packed, "prediction")[2] is None


def test_arrays_and_scalars_pack_into_one_input(frame: Any, rows: np.ndarray) -> None:
    network = dense(1, size=7)
    scored = TFModel.fromKeras(network, inputCols=["array", "a", "features"]).transform(frame)
    joined = np.concatenate([rows, rows[:, :1], rows], axis=1).astype(np.float32)
    np.testing.assert_allclose(
        by_id(scored, "prediction"), network.predict(joined, verbose=0).reshape(-1), rtol=1e-4, atol=1e-5
    )


def test_several_inputs_and_outputs_by_mapping(frame: Any, rows: np.ndarray) -> None:
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    model = keras.Model([left, right], {"sum": keras.ops.sum(left, axis=1), "right": right * 2.0})
    scored = TFModel.fromKeras(
        model, inputMapping={"right": ["b", "a"], "left": "features"}, outputMapping={"right": "twice"}
    ).transform(frame)
    np.testing.assert_allclose(by_id(scored, "twice"), 2 * rows[:, [1, 0]], rtol=1e-5)
    np.testing.assert_allclose(by_id(scored, "prediction"), rows.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_columns_with_dots_and_columns_in_structs_are_found(frame: Any) -> None:
    model = TFModel.fromKeras(dense(1))
    dotted = frame.select("id", F.col("array").alias("a.b"), F.struct("array").alias("s"))
    for name in ("a.b", "s.array"):
        assert None not in by_id(model.copy({model.featuresCol: name}).transform(dotted), "prediction")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"featuresCol": "nowhere"}, DataError, "nowhere"),
        ({"inputCols": ["a", "b"]}, DataError, "expected 3 values"),
        ({"featuresCol": "a"}, DataError, "expected 3 values"),
        ({"predictionCol": "id"}, ParamError, "'id' is in the DataFrame already"),
        ({"predictionCol": "ID"}, ParamError, "'id' is in the DataFrame already"),
        ({"outputMapping": {"no": "x"}}, ParamError, "outputs of the model"),
        ({"inputMapping": {"no": "a"}}, ParamError, "exactly the model's inputs"),
    ],
)
def test_what_cannot_work_is_said_before_the_job(
    frame: Any, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TFModel.fromKeras(dense(1), **params).transform(frame)


def test_where_spark_tells_names_by_their_case_outputs_may_differ_by_it(spark: Any, frame: Any) -> None:
    model = TFModel.fromKeras(dense(1), predictionCol="ID")
    spark.conf.set("spark.sql.caseSensitive", "true")
    try:
        assert model.transform(frame).columns == [*frame.columns, "ID"]
        with pytest.raises(ParamError, match="'id' is in the DataFrame already"):
            TFModel.fromKeras(dense(1), predictionCol="id").transform(frame)
    finally:
        spark.conf.unset("spark.sql.caseSensitive")


def test_a_row_of_a_wrong_length_fails_the_job_by_name(frame: Any) -> None:
    wrong = frame.select(F.when(F.col("id") == 7, F.array("a")).otherwise(F.col("array")).alias("features"))
    with pytest.raises(PySparkException, match=r"column 'features'.*1 values.*Expected: 3 values"):
        TFModel.fromKeras(dense(1)).transform(wrong).collect()


def test_text_goes_to_preprocessing_layers(spark: Any) -> None:
    x = keras.Input((), dtype="string")
    lookup = layers.StringLookup(vocabulary=["x", "y"])
    model = TFModel.fromKeras(keras.Model(x, keras.ops.cast(lookup(x), "float32")), featuresCol="word")
    frame = spark.createDataFrame([(0, "y"), (1, None), (2, "x")], ["id", "word"]).coalesce(1)
    assert by_id(model.transform(frame), "prediction") == [2.0, None, 1.0]


def test_classes_defined_in_the_drivers_script_reach_the_workers(frame: Any) -> None:
    # As in a notebook: a class of __main__ travels by value.
    source = (
        "import keras\n"
        "@keras.saving.register_keras_serializable('notebook')\n"
        "class Halving(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return x / 2.0\n"
    )
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(source, scope)
    x = keras.Input((3,))
    model = TFModel.fromKeras(keras.Model(x, scope["Halving"]()(keras.ops.sum(x, axis=1))))
    scored = model.transform(frame).select(F.abs(F.col("prediction") * 2 - F.col("target")).alias("error"))
    assert scored.agg(F.max("error")).first()[0] < 1e-4
    del keras.saving.get_custom_objects()["notebook>Halving"]


def test_large_models_travel_once(frame: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "_INLINE_BYTES", 0)
    model = TFModel.fromKeras(dense(1))
    inputs = input_columns(model, frame.schema)
    first = model._task(inputs, [], frame).archive
    assert model.copy()._task(inputs, [], frame).archive is first
    assert None not in by_id(model.transform(frame), "prediction")


def test_copies_share_the_archive_and_keep_their_own_params() -> None:
    model = TFModel.fromKeras(dense(1))
    other = model.copy({model.predictionCol: "p"})
    assert other._trained is model._trained
    assert other.uid == model.uid
    assert (other.getPredictionCol(), model.getPredictionCol()) == ("p", "prediction")


def test_the_drivers_model_is_loaded_once_with_its_optimizer() -> None:
    network = dense(1, loss="mse")
    network.fit(np.ones((8, 3)), np.ones(8), verbose=0)
    model = TFModel.fromKeras(network)
    assert model.model is model.copy().model
    assert model.model is not network
    assert int(model.model.optimizer.iterations) == 1
    assert repr(model).startswith(f"TFModel: uid={model.uid}, archive=")


def test_a_model_from_elsewhere_has_no_summary() -> None:
    model = TFModel.fromKeras(dense(1))
    assert not model.hasSummary
    with pytest.raises(RuntimeError, match="no training summary"):
        _ = model.summary


def test_from_keras_takes_files_and_refuses_the_rest(tmp_path: Path, frame: Any) -> None:
    network = dense(1)
    network.save(tmp_path / "m.keras")
    assert None not in by_id(TFModel.fromKeras(tmp_path / "m.keras").transform(frame), "prediction")
    with pytest.raises(PersistenceError, match="nothing there"):
        TFModel.fromKeras(tmp_path / "no.keras")
    with pytest.raises(TypeError, match="Received: 3"):
        TFModel.fromKeras(3)
    with pytest.raises(PersistenceError, match="no weights yet"):
        TFModel.fromKeras(keras.Sequential([layers.Dense(1)]))


def test_saved_models_score_by_their_signature(tmp_path: Path, frame: Any, rows: np.ndarray) -> None:
    network = dense(2)
    network.export(str(tmp_path / "saved"), verbose=False)
    model = TFModel.fromSavedModel(tmp_path / "saved", featuresCol="array")
    (name,) = [spec.name for spec in model._trained.signature.outputs]
    scored = model.copy({model.outputMapping: {name: "raw"}}).transform(frame)
    expected = network.predict(rows.astype(np.float32), verbose=0)
    np.testing.assert_allclose(by_id(scored, "raw"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ParamError, match="serving_default"):
        TFModel.fromSavedModel(tmp_path / "saved", signature="other")
    with pytest.raises(PersistenceError, match=r"holds no keras\.Model"):
        _ = model.model


def test_tables_of_vectors_are_scored_straight_from_parquet(tmp_path: Path, frame: Any, rows: np.ndarray) -> None:
    path = str(tmp_path / "vectors")
    frame.write.parquet(path)
    network = dense(1, loss="mse")
    expected = network.predict(rows.astype(np.float32), verbose=0).reshape(-1)
    for params in ({}, {"inputCols": ["a", "b", "c"]}):
        scored = TFModel.fromKeras(network, **params).transform(frame.sparkSession.read.parquet(path))
        assert scored.columns == [*frame.columns, "prediction"]
        np.testing.assert_allclose(by_id(scored, "prediction"), expected, rtol=1e-5, atol=1e-6)
