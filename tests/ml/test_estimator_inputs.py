"""What a DataFrame's columns become on their way into a model, and what is refused."""

from __future__ import annotations

import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from modes import in_both_modes
from pyspark.ml.linalg import Vectors
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from sparktf.errors import DataError, ParamError
from sparktf.ml import TFEstimator

ROWS = 24
_RANDOM = np.random.default_rng(1)
BASE = _RANDOM.integers(-3, 4, size=(ROWS, 8)).astype("float64")
# Beyond the width up to which sparse vectors travel as arrays.
WIDE = 5000

SCHEMA = (
    "id int, b byte, s short, i int, l long, f float, d double, flag boolean, m decimal(10,2), "
    "farr array<float>, darr array<double>, iarr array<int>, image array<array<array<double>>>, "
    "text string, raw binary, y double, target array<float>, w double, held boolean"
)


def _row(n: int) -> tuple[Any, ...]:
    v = BASE[n]
    whole = [int(x) for x in v]
    word = ["red", "green", "blue"][n % 3]
    return (
        *(n, *whole[:4], float(v[4]) + 0.5, float(v[5]) + 0.25, bool(whole[6] > 0), Decimal(whole[7]) / 4),
        *([float(x) for x in v[:3]], [float(x) for x in v[3:6]], whole[:2], [[[x], [x + 1]] for x in v[:2].tolist()]),
        *(f"{word} {word} car", word.encode(), float(v[0]), [float(v[1]), float(v[2])], 0.5 + n % 3, n % 4 == 0),
    )


@pytest.fixture(scope="module")
def frame(spark: Any) -> DataFrame:
    """One column of every kind."""
    plain = spark.createDataFrame([_row(n) for n in range(ROWS)], SCHEMA)
    vectors = spark.createDataFrame(
        [
            (
                n,
                Vectors.dense(BASE[n, :3]),
                Vectors.sparse(6, {0: BASE[n, 0] + 0.5, 5: BASE[n, 1] + 0.5}),
                Vectors.sparse(WIDE, {n: 1.0, WIDE - 1: float(BASE[n, 2]) + 0.5}),
            )
            for n in range(ROWS)
        ],
        ["id", "dense", "sparse", "wide"],
    )
    joined = plain.join(vectors, "id").orderBy("id").coalesce(1).cache()
    assert joined.count() == ROWS
    return joined


def estimator(model: keras.Model, **params: Any) -> TFEstimator:
    """An estimator whose one worker takes all rows in one batch, in the data's order."""
    return TFEstimator(model=model, batchSize=ROWS, shuffle=False, verbose=0, timeout=60.0, **params)


def trained(model: keras.Model, *arguments: Any, **keywords: Any) -> keras.Model:
    """A copy of the model, trained by Keras itself on arrays."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "copy.keras")
        model.save(path)
        copy = keras.saving.load_model(path)
    copy.fit(*arguments, batch_size=ROWS, shuffle=False, verbose=0, **keywords)
    return copy


def assert_equal_weights(one: keras.Model, other: keras.Model) -> None:
    for mine, theirs in zip(one.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6, err_msg=theirs.path)


@in_both_modes
def test_every_kind_of_number_reaches_its_input(frame: DataFrame, mode: dict[str, Any]) -> None:
    mapping: dict[str, Any] = {
        **{name: name for name in ("b", "s", "i", "l", "f", "d", "flag", "m", "farr", "darr", "iarr", "image")},
        **{name: name for name in ("dense", "sparse", "wide")},
        "numbers": ["b", "d", "flag"],
        "integers": ["s", "l"],
        "mixed": ["f", "darr", "dense"],
    }
    collected = frame.collect()

    def column(name: str) -> np.ndarray:
        values = [getattr(row[name], "toArray", lambda v=row[name]: v)() for row in collected]
        array = np.array(values, dtype="float32")
        return array[:, None] if array.ndim == 1 else array

    arrays = {
        name: column(columns) if isinstance(columns, str) else np.concatenate([column(c) for c in columns], 1)
        for name, columns in mapping.items()
    }
    assert arrays["image"].shape == (ROWS, 2, 2, 1)
    inputs = {name: keras.Input(array.shape[1:], name=name) for name, array in arrays.items() if name != "integers"}
    inputs["integers"] = keras.Input((2,), dtype="int32", name="integers")
    parts = [
        keras.layers.Embedding(8, 2)(keras.ops.abs(tensor)) if name == "integers" else tensor
        for name, tensor in inputs.items()
    ]
    joined = keras.layers.Concatenate()([keras.layers.Flatten()(part) for part in parts])
    model = keras.Model(inputs, keras.layers.Dense(1, name="exit")(joined))
    model.compile(keras.optimizers.SGD(0.01), "mse")

    fitted = estimator(model, inputMapping=mapping, labelCol="y", **mode).fit(frame)
    assert_equal_weights(fitted.model, trained(model, arrays, column("y")))
    assert fitted.transform(frame).select("prediction").count() == ROWS


@in_both_modes
def test_text_and_bytes_feed_models_that_begin_with_preprocessing(frame: DataFrame, mode: dict[str, Any]) -> None:
    words = keras.layers.TextVectorization(max_tokens=10, output_sequence_length=3)
    words.adapt(np.array(["red green blue car"]))
    color = keras.layers.StringLookup(vocabulary=["red", "green", "blue"], output_mode="one_hot")
    said = keras.Input((), dtype="string", name="said")
    kind = keras.Input((1,), dtype="string", name="kind")
    embedded = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(10, 4)(words(said)))
    model = keras.Model([said, kind], keras.layers.Dense(1)(keras.layers.Concatenate()([embedded, color(kind)])))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    fitted = estimator(model, inputMapping={"kind": "raw", "said": "text"}, labelCol="y", **mode).fit(frame)
    texts = np.array([_row(n)[13] for n in range(ROWS)], dtype=object)
    colors = np.array([[_row(n)[14]] for n in range(ROWS)], dtype=object)
    given = [tf.constant(texts), tf.constant(colors)]
    assert_equal_weights(fitted.model, trained(model, given, BASE[:, 0]))


@in_both_modes
@pytest.mark.parametrize("rows", [5, 1], ids=["a rank that runs out of rows", "a rank without rows"])
def test_models_that_refuse_made_up_values_idle_on_a_real_row(spark: Any, rows: int, mode: dict[str, Any]) -> None:
    # No place for any other word, an empty one neither.
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=0, output_mode="one_hot")
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    words = ["a", "b", "b", "a", "a"][:rows]
    frame = spark.createDataFrame([(word, float(word == "a")) for word in words], "features string, label double")
    est = TFEstimator(model=model, numWorkers=2, batchSize=2, epochs=2, shuffle=False, verbose=0, timeout=60.0, **mode)
    fitted = est.fit(frame.coalesce(1))
    assert fitted.summary.rows == rows
    given, labels = np.array(words, object)[:, None], np.array([float(word == "a") for word in words])
    if rows == 1:
        assert_equal_weights(fitted.model, trained(model, tf.constant(given), labels, epochs=2))


@in_both_modes
def test_labels_weights_and_held_out_rows_are_those_that_keras_is_given(frame: DataFrame, mode: dict[str, Any]) -> None:
    entry = keras.Input((3,), name="entry")
    outputs = {"value": keras.layers.Dense(1)(entry), "pair": keras.layers.Dense(2)(entry)}
    model = keras.Model(entry, outputs)
    model.compile(keras.optimizers.SGD(0.05), {"value": "mse", "pair": "mae"}, metrics={"value": ["mae"]})
    fitted = estimator(
        model,
        featuresCol="dense",
        labelMapping={"pair": "target", "value": "y"},
        weightCol="w",
        validationIndicatorCol="held",
        epochs=2,
        **mode,
    ).fit(frame)

    held = np.arange(ROWS) % 4 == 0
    x, y = BASE[:, :3].astype("float32"), {"value": BASE[:, :1], "pair": BASE[:, 1:3]}
    weight = 0.5 + np.arange(ROWS) % 3
    kept = {name: values[~held] for name, values in y.items()}
    held_out = (x[held], {name: values[held] for name, values in y.items()}, weight[held])
    one = trained(model, x[~held], kept, sample_weight=weight[~held], validation_data=held_out, epochs=2)
    assert_equal_weights(fitted.model, one)
    summary = fitted.summary
    assert (summary.rows, summary.validationRows) == (18, 6)
    for name, values in one.history.history.items():
        np.testing.assert_allclose(summary.history[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("form", ["list", "dict"])
def test_labels_reach_their_outputs_where_some_have_no_loss(frame: DataFrame, form: str) -> None:
    entry = keras.Input((3,), name="entry")
    value, aux, kind = (keras.layers.Dense(1, name=name)(entry) for name in ("value", "aux", "kind"))
    outputs: Any = {"value": value, "aux": aux, "kind": kind} if form == "dict" else [value, aux, kind]
    losses: Any = {"value": "mse", "kind": "mae"} if form == "dict" else ["mse", None, "mae"]
    metrics: Any = {"kind": ["mse"]} if form == "dict" else [None, None, ["mse"]]
    model = keras.Model(entry, outputs)
    model.compile(keras.optimizers.SGD(0.05), losses, metrics=metrics)
    mapping = {"kind": "y", "value": "w"}
    fitted = estimator(model, featuresCol="dense", labelMapping=mapping, epochs=2).fit(frame)

    x, y = BASE[:, :3].astype("float32"), BASE[:, :1]
    weight = 0.5 + np.arange(ROWS)[:, None] % 3
    whole: Any = {"value": weight, "aux": y, "kind": y} if form == "dict" else [weight, y, y]
    one = trained(model, x, whole, epochs=2)
    assert_equal_weights(fitted.model, one)
    for name, values in one.history.history.items():
        np.testing.assert_allclose(fitted.summary.history[name], values, rtol=1e-4, err_msg=name)
    with pytest.raises(ParamError, match=r"received none for kind \(a loss\)"):
        estimator(model, featuresCol="dense", labelMapping={"value": "w", "aux": "y"}).fit(frame)
    one_layer = keras.Model(entry, outputs)
    one_layer.compile("sgd", "mse")
    with pytest.raises(ParamError, match="a model with losses on 3 outputs"):
        estimator(one_layer, featuresCol="dense", labelCol="y").fit(frame)
    model.compile("sgd", losses, metrics=[["mae"], ["mae"], []] if form == "list" else {"aux": ["mae"]})
    with pytest.raises(ParamError, match=r"received none for aux \(a metric\)"):
        estimator(model, featuresCol="dense", labelMapping=mapping).fit(frame)


@in_both_modes
def test_indexed_labels_of_mllib_train_a_classifier_and_columns_may_have_dots(
    frame: DataFrame, mode: dict[str, Any]
) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
    # As StringIndexer gives them: doubles.
    label = (F.col("y") > 0).cast("double")
    renamed = frame.select(F.struct("dense").alias("nested"), label.alias("the.label"))
    fitted = estimator(model, featuresCol="nested.dense", labelCol="the.label", **mode).fit(renamed)
    assert_equal_weights(fitted.model, trained(model, BASE[:, :3].astype("float32"), (BASE[:, 0] > 0).astype("int64")))


# Refused before a job starts ---------------------------------------------------------------------------------------


def regression(size: int = 3) -> keras.Model:
    model = keras.Sequential([keras.Input((size,), name="entry"), keras.layers.Dense(1, name="exit")])
    model.compile("sgd", "mse")
    return model


def two_inputs() -> keras.Model:
    left, right = keras.Input((1,), name="left"), keras.Input((1,), name="right")
    model = keras.Model([left, right], keras.layers.Dense(1)(keras.layers.Concatenate()([left, right])))
    model.compile("sgd", "mse")
    return model


def two_outputs() -> keras.Model:
    entry = keras.Input((3,), name="entry")
    model = keras.Model(entry, {"a": keras.layers.Dense(1)(entry), "b": keras.layers.Dense(1)(entry)})
    model.compile("sgd", {"a": "mse", "b": "mse"})
    return model


REFUSED: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "a features column that is not there": (regression, {"featuresCol": "nowhere"}, ["featuresCol", "nowhere"]),
    "a label column that is not there": (regression, {"featuresCol": "dense", "labelCol": "z"}, ["labelCol", "'z'"]),
    "a weight column that is not there": (
        regression,
        {"featuresCol": "dense", "labelCol": "y", "weightCol": "z"},
        ["weightCol", "'z'"],
    ),
    "text as a weight": (
        regression,
        {"featuresCol": "dense", "labelCol": "y", "weightCol": "text"},
        ["weightCol", "'text'", "string"],
    ),
    "an array as a weight": (
        regression,
        {"featuresCol": "dense", "labelCol": "y", "weightCol": "dense"},
        ["weightCol", "'dense'", "vector"],
    ),
    "too few packed columns": (regression, {"inputCols": ["b", "s"], "labelCol": "y"}, ["3", "2", "b", "s"]),
    "text for an input of numbers": (regression, {"featuresCol": "text", "labelCol": "y"}, ["text", "float32"]),
    "text as a label": (regression, {"featuresCol": "dense", "labelCol": "text"}, ["text", "StringIndexer"]),
    "a flag that is not boolean": (
        regression,
        {"featuresCol": "dense", "labelCol": "y", "validationIndicatorCol": "i"},
        ["validationIndicatorCol", "boolean", "int"],
    ),
    "two inputs and no mapping": (two_inputs, {"featuresCol": "d", "labelCol": "y"}, ["inputMapping", "left", "right"]),
    "a mapping of other inputs": (
        two_inputs,
        {"inputMapping": {"left": "d", "wrong": "f"}, "labelCol": "y"},
        ["left", "right", "wrong"],
    ),
    "a mapping of other outputs": (
        regression,
        {"featuresCol": "dense", "labelMapping": {"wrong": "y"}},
        ["labelMapping", "exit", "wrong"],
    ),
    "two outputs and one label": (two_outputs, {"featuresCol": "dense", "labelCol": "y"}, ["labelMapping", "a", "b"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_schema_shows_to_be_wrong_fails_before_a_job(case: str, frame: DataFrame) -> None:
    make, params, words = REFUSED[case]
    jobs = frame.sparkSession.sparkContext.statusTracker().getJobIdsForGroup(None)
    with pytest.raises((DataError, ParamError)) as caught:
        estimator(make(), **params).fit(frame)
    for word in words:
        assert word in str(caught.value)
    assert frame.sparkSession.sparkContext.statusTracker().getJobIdsForGroup(None) == jobs


def test_a_vector_whose_metadata_tells_its_size_is_checked_before_a_job(frame: DataFrame) -> None:
    from pyspark.ml.feature import VectorAssembler

    assembled = VectorAssembler(inputCols=["d", "f"], outputCol="two").transform(frame)
    with pytest.raises(DataError, match=r"expected 3 values a row.*received 2"):
        estimator(regression(), featuresCol="two", labelCol="y").fit(assembled)


# Refused by the node that sees the rows ----------------------------------------------------------------------------


SPOILED: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "a row of another length": (
        {"featuresCol": "farr"},
        "farr",
        "if(id = 5, slice(farr, 1, 2), farr)",
        ["'farr'", "row 5", "2 values", "Expected: 3"],
    ),
    "null vectors among packed columns": (
        {"inputCols": ["i", "dense"]},
        "dense",
        "if(id % 8 != 0, dense, null)",
        ["'i, dense'", "feature", "3 nulls"],
    ),
    "NaN in packed features": (
        {"inputCols": ["d", "f", "i"]},
        "d",
        "if(id % 12 = 0, double('NaN'), d)",
        ["d, f, i", "feature", "2 NaN"],
    ),
    "NaN and nulls in labels": (
        {"featuresCol": "farr"},
        "y",
        "case id when 2 then double('NaN') when 3 then null else y end",
        ["'y'", "label", "1 null", "1 NaN"],
    ),
}


@in_both_modes
@pytest.mark.parametrize("case", SPOILED)
def test_what_only_the_rows_show_is_an_error_that_names_column_and_count(
    case: str, frame: DataFrame, mode: dict[str, Any]
) -> None:
    params, column, expression, words = SPOILED[case]
    model = regression(4 if column == "dense" else 3)
    with pytest.raises(DataError) as caught:
        estimator(model, labelCol="y", **params, **mode).fit(frame.withColumn(column, F.expr(expression)))
    for word in words:
        assert word in str(caught.value)


@in_both_modes
def test_nulls_and_nan_are_counted_over_all_workers_and_columns(
    frame: DataFrame, no_leftovers: Any, mode: dict[str, Any]
) -> None:
    spoiled = frame.withColumn("d", F.expr("if(id % 4 = 0, null, d)")).withColumn(
        "y", F.expr("if(id % 5 = 0, double('NaN'), y)")
    )
    three = {"labelCol": "y", "numWorkers": 3, **mode}
    with pytest.raises(DataError) as caught:
        estimator(regression(), inputCols=["f", "d", "i"], **three).fit(spoiled)
    features, labels = str(caught.value).splitlines()
    assert f"holds 6 nulls in the {ROWS} rows of the DataFrame: 6 in 'd'" in features
    assert f"column 'y' (label) holds 5 NaN in the {ROWS} rows of the DataFrame" in labels
    assert estimator(regression(), featuresCol="farr", **three).fit(frame).summary.rows == ROWS


@in_both_modes
def test_a_dataframe_without_rows_is_an_error(frame: DataFrame, mode: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="Expected rows to train on"):
        estimator(regression(), featuresCol="farr", labelCol="y", numWorkers=1, **mode).fit(frame.where("id < 0"))


def test_fractions_packed_for_a_model_of_integers_are_refused_and_not_cut_off(spark: Any) -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((2,), dtype="int32"), keras.layers.Embedding(9, 2), keras.layers.Flatten()]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    rows = spark.createDataFrame([(1.0, 2.0, 0.0), (3.0, 4.5, 1.0)], "a double, b double, label double")
    estimator = TFEstimator(model=model, inputCols=["a", "b"], verbose=0)
    with pytest.raises(DataError):
        estimator.fit(rows)
    assert estimator.fit(rows.where("b = 2")).transform(rows.where("b = 2")).count() == 1
