"""Which models an estimator trains, what it leaves alone, and what a fitted model is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from modes import in_both_modes
from pyspark import cloudpickle
from pyspark.errors import PythonException
from pyspark.sql import DataFrame

from sparktf.errors import ParamError
from sparktf.ml import TFEstimator, TFModel, payload

_RANDOM = np.random.default_rng(2)
X = _RANDOM.normal(size=(50, 4)).astype("float32")
Y = (X[:, 0] - X[:, 1] > 0).astype("float64")


@pytest.fixture(scope="module")
def frame(spark: Any) -> DataFrame:
    rows = [([float(v) for v in x], float(y), n % 5 == 0) for n, (x, y) in enumerate(zip(X, Y, strict=True))]
    created = spark.createDataFrame(rows, "features array<float>, label double, held boolean").repartition(3).cache()
    assert created.count() == 50
    return created


@pytest.fixture
def shipped_by_value() -> Iterator[None]:
    """Let this module's classes travel as those of a script or a notebook do."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def classifier(*layers: Any, **compiled: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(**{"optimizer": keras.optimizers.Adam(0.05), "loss": "binary_crossentropy", **compiled})
    return model


def estimator(**params: Any) -> TFEstimator:
    return TFEstimator(**{"batchSize": 8, "verbose": 0, "timeout": 60.0, **params})


@in_both_modes
def test_a_model_that_was_never_built_is_built_from_the_rows(
    frame: DataFrame, tmp_path: Path, mode: dict[str, Any]
) -> None:
    layers = [keras.layers.Dense(8, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(1, "sigmoid")]
    model = keras.Sequential(layers)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    # Two rows on three workers: one of them knows the number of features from the others alone.
    few = frame.limit(2)
    first, again = (estimator(model=model, numWorkers=3, seed=5, **mode).fit(few) for _ in range(2))
    assert not model.built
    assert not model.weights
    assert first.model.input_shape == (None, 4)
    for one, two in zip(first.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    scored = first.transform(few).select("prediction", "probability").collect()
    assert {row.prediction for row in scored} <= {0.0, 1.0}

    path = str(tmp_path / "unbuilt")
    estimator(model=model, inputCols=["a", "b"], seed=5).save(path)
    pairs = frame.selectExpr("features[0] as a", "features[1] as b", "label")
    assert TFEstimator.load(path).fit(pairs).model.input_shape == (None, 2)


class Unregistered(keras.Model):
    """Keras finds neither a registration of it nor, on a node, its module."""

    def call(self, x: Any) -> Any:
        return keras.ops.sum(x, axis=1, keepdims=True)


def test_a_class_that_nodes_cannot_find_is_named(frame: DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unregistered, "__module__", "__main__")
    model = Unregistered()
    model.compile("sgd", "mse")
    with pytest.raises(ParamError, match=r"Could not locate class .*register_keras_serializable.*modelFn"):
        estimator(model=model).fit(frame)


@pytest.mark.long
def test_what_a_library_of_the_drivers_alone_has_registered_harms_no_model_without_it(
    frame: DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leftovers: Any
) -> None:
    (tmp_path / "only_the_drivers.py").write_text(
        "import keras\n\n"
        "@keras.saving.register_keras_serializable('drivers')\n"
        "class Own(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("only_the_drivers").Own
    try:
        fitted = estimator(model=classifier(), inputCols=["features"]).fit(frame)
        assert fitted.transform(frame).count() == 50
        # A model that needs it says what nodes lack.
        needy = classifier(own())
        with pytest.raises(ParamError, match=r"'Own' from the module 'only_the_drivers'.*addArtifacts"):
            estimator(model=needy, inputCols=["features"]).fit(frame)
        with pytest.raises(PythonException, match=r"'Own' from the module 'only_the_drivers'.*addArtifacts"):
            TFModel.fromKeras(needy, inputCols=["features"]).transform(frame).collect()
    finally:
        del keras.saving.get_custom_objects()["drivers>Own"]


@pytest.mark.long
def test_a_model_travels_in_several_broadcast_pieces(
    frame: DataFrame, monkeypatch: pytest.MonkeyPatch, no_leftovers: Any
) -> None:
    monkeypatch.setattr(payload, "_INLINE_BYTES", 0)
    monkeypatch.setattr(payload, "_PIECE_BYTES", 5000)
    model = classifier(keras.layers.Dense(16))
    usual = estimator(model=model).fit(frame)
    sent = payload.payload_for(usual._trained.archive, frame.sparkSession)
    assert isinstance(sent, payload.Broadcasts)
    assert len(sent.variables) == -(-usual._trained.archive.size // 5000) > 1
    scored = [row.prediction for row in usual.transform(frame).select("prediction").collect()]
    assert scored == [float(p > 0.5) for p in usual.model.predict(collected(frame), verbose=0)[:, 0]]
    # In a child process as well, which gets the pieces from its parent.
    threads = estimator(model=model, threadsPerWorker=3).fit(frame)
    np.testing.assert_allclose(threads.summary.history.loss, usual.summary.history.loss, rtol=1e-5)


def collected(frame: DataFrame) -> np.ndarray:
    return np.array([row.features for row in frame.select("features").collect()], "float32")


@in_both_modes
def test_one_seed_makes_bit_identical_fits_and_leaves_the_given_model_alone(
    frame: DataFrame, mode: dict[str, Any]
) -> None:
    model = classifier(
        keras.layers.Dense(8), keras.layers.Dropout(0.4), metrics=["accuracy", keras.metrics.AUC(name="auc")]
    )
    before, state = model.get_weights(), [v.numpy() for v in model.optimizer.variables]
    est = estimator(model=model, numWorkers=2, epochs=3, seed=5, validationIndicatorCol="held", **mode)
    first, again, other = est.fit(frame), est.fit(frame), est.fit(frame, {est.seed: 6})
    for one, two in zip(first.model.weights, again.model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    assert any(
        not np.array_equal(one.numpy(), two.numpy())
        for one, two in zip(first.model.weights, other.model.weights, strict=True)
    )
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(state, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, two.numpy())
    assert type(first.model) is keras.Sequential
    assert type(first.model.optimizer) is keras.optimizers.Adam
    assert first.uid == est.uid

    history, summary = first.summary.history, first.summary
    assert list(history["epoch"]) == [1, 2, 3]
    assert {"loss", "accuracy", "auc", "val_loss", "val_accuracy", "val_auc"} == set(history.columns) - {"epoch"}
    assert history.equals(again.summary.history)
    assert np.isfinite(history.to_numpy()).all()
    assert (summary.rows, summary.validationRows, summary.worldSize, summary.protocol) == (40, 10, 2, "shm")
    assert (summary.epochs, summary.stepsPerEpoch) == (3, 3)
    assert summary.rowsPerSecond > 0
    # One process over the held-out rows says what the two of them said together.
    held = np.arange(50) % 5 == 0
    seen = first.model.evaluate(X[held], Y[held], verbose=0, return_dict=True)
    np.testing.assert_allclose([history[f"val_{name}"].iloc[-1] for name in seen], [*seen.values()], rtol=1e-4)


@keras.saving.register_keras_serializable("notebook")
class Scale(keras.layers.Layer):
    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor


@keras.saving.register_keras_serializable("notebook")
class Gap(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.square(keras.ops.reshape(y_true, (-1, 1)) - y_pred), axis=-1)


@keras.saving.register_keras_serializable("notebook")
class Network(keras.Model):
    """With a step of its own, and not built before it sees data."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = Scale()
        self.head = keras.layers.Dense(1, activation="sigmoid")

    def call(self, inputs: Any) -> Any:
        return self.head(self.scale(inputs))

    def train_step(self, data: Any) -> Any:
        logs = super().train_step(data)
        return {**logs, "rows": keras.ops.cast(keras.ops.shape(data[1])[0], "float32")}


def make_network() -> keras.Model:
    network = Network()
    network.compile(keras.optimizers.Adam(0.05), Gap(), metrics=["mae"])
    return network


@in_both_modes
def test_what_a_notebook_defines_trains_scores_and_trains_on(
    frame: DataFrame, shipped_by_value: None, tmp_path: Path, mode: dict[str, Any]
) -> None:
    fitted = estimator(modelFn=make_network, numWorkers=2, epochs=2, **mode).fit(frame)
    assert type(fitted.model) is Network
    assert {"loss", "mae", "rows"} <= set(fitted.summary.history.columns)
    assert fitted.transform(frame).where("prediction between 0 and 1").count() == 50
    steps = int(fitted.model.optimizer.iterations.numpy())
    assert steps == 2 * 4
    further = estimator(model=fitted.model, numWorkers=1, batchSize=50, **mode).fit(frame)
    assert int(further.model.optimizer.iterations.numpy()) == steps + 1
    assert not np.array_equal(further.model.scale.factor.numpy(), fitted.model.scale.factor.numpy())
    fitted.save(f"file://{tmp_path}/network")
    loaded = TFModel.load(f"file://{tmp_path}/network")
    np.testing.assert_array_equal(loaded.model.scale.factor.numpy(), fitted.model.scale.factor.numpy())


@in_both_modes
def test_lambda_layers_train_and_score(frame: DataFrame, mode: dict[str, Any]) -> None:
    fitted = estimator(model=classifier(keras.layers.Lambda(lambda t: t * 2.0)), **mode).fit(frame)
    assert all(row.probability.size == 2 for row in fitted.transform(frame).collect())
    assert float(fitted.model.layers[0](np.ones(1))[0]) == 2.0


@in_both_modes
def test_fewer_rows_than_workers_train_as_one_worker_does(frame: DataFrame, mode: dict[str, Any]) -> None:
    few = frame.limit(2).coalesce(1).cache()
    model = classifier(keras.layers.Dense(3), metrics=["mae"])
    many = estimator(model=model, numWorkers=3, epochs=2, shuffle=False, **mode).fit(few)
    one = estimator(model=model, numWorkers=1, epochs=2, shuffle=False).fit(few)
    assert many.summary.rows == one.summary.rows == 2
    for ours, theirs in zip(many.model.weights, one.model.weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(many.summary.history.to_numpy(), one.summary.history.to_numpy(), rtol=1e-4)


@in_both_modes
def test_callbacks_run_as_copies_and_those_that_write_only_on_the_chief(
    frame: DataFrame, tmp_path: Path, mode: dict[str, Any]
) -> None:
    stopping = keras.callbacks.EarlyStopping(monitor="loss", patience=0, min_delta=10.0, restore_best_weights=True)
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    model = classifier(optimizer=keras.optimizers.SGD(0.1))
    fitted = estimator(model=model, numWorkers=2, epochs=9, callbacks=[stopping, log, checkpoint], **mode).fit(frame)
    # The first epoch is the best one; the second does not come near to being better by ten.
    assert len(fitted.summary.history) == 2
    assert stopping.best_weights is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.keras", "2.keras", "log.csv"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    best = keras.saving.load_model(tmp_path / "1.keras")
    np.testing.assert_array_equal(best.get_weights()[0], fitted.model.get_weights()[0])


def test_models_that_cannot_be_trained_are_refused_before_a_job(frame: DataFrame) -> None:
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(ParamError, match=r"compile"):
        estimator(model=plain).fit(frame)
    with pytest.raises(ParamError, match="received neither"):
        estimator().fit(frame)
    with pytest.raises(ParamError, match="received both"):
        estimator(model=classifier(), modelFn=make_network).fit(frame)
    weighted = keras.losses.BinaryCrossentropy(reduction="mean_with_sample_weight")
    with pytest.raises(ParamError, match="mean_with_sample_weight"):
        estimator(model=classifier(loss=weighted), numWorkers=2).fit(frame)


def test_a_function_that_makes_something_else_is_an_error_that_says_so(frame: DataFrame) -> None:
    with pytest.raises(ParamError, match="modelFn to return a compiled"):
        estimator(modelFn=lambda: "a model").fit(frame)


def test_a_function_whose_model_cannot_be_saved_is_refused_before_it_trains(frame: DataFrame, tmp_path: Path) -> None:
    def make() -> keras.Model:
        class Scaled(keras.Model):
            def __init__(self, scale: Any) -> None:
                super().__init__()
                self.scale, self.head = scale, keras.layers.Dense(2, activation="softmax")

            def call(self, inputs: Any) -> Any:
                return self.head(inputs * self.scale())

        model = Scaled(lambda: 2.0)
        model.compile("sgd", "sparse_categorical_crossentropy")
        return model

    trained = tmp_path / "trained"
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: trained.touch())
    with pytest.raises(ParamError, match="modelFn to return a model that Keras can save"):
        estimator(modelFn=make, callbacks=[note]).fit(frame)
    assert not trained.exists()
