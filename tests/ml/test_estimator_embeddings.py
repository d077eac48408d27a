"""Sharded embeddings through the estimator: trained over workers, saved, scored."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from pyspark.sql import DataFrame

from sparktf.distribute import ShardedEmbedding
from sparktf.errors import DataError, ParamError
from sparktf.ml import TFEstimator, TFModel

USERS, DIM, ROWS = 30, 4, 50
_RANDOM = np.random.default_rng(6)
USER, ITEM = _RANDOM.integers(0, USERS, ROWS), _RANDOM.integers(0, 1000, ROWS)
LABEL = _RANDOM.normal(size=ROWS).astype("float32")


@pytest.fixture(scope="module")
def frame(spark: Any) -> DataFrame:
    rows = [(int(u), f"item {i}", float(y)) for u, i, y in zip(USER, ITEM, LABEL, strict=True)]
    created = spark.createDataFrame(rows, "user long, item string, label float").repartition(3).cache()
    assert created.count() == ROWS
    return created


def recommender(ours: bool = True, optimizer: Any = None) -> keras.Model:
    """Return a model of two tables: users by number, items by their names' hash."""
    users = ShardedEmbedding(USERS, DIM, seed=1, name="users")
    items = ShardedEmbedding(64, DIM, seed=2, hashing=True, name="items")
    user, item = keras.Input((), dtype="int64", name="user"), keras.Input((), dtype="string", name="item")
    if not ours:
        # As Keras has it: numbers, which the caller takes from the hash.
        item = keras.Input((), dtype="int64", name="item")
        users, items = (
            keras.layers.Embedding(s.spec.rows, DIM, embeddings_initializer=_rows_of(s), name=s.name)
            for s in (users, items)
        )
    hidden = keras.layers.concatenate([users(user), items(item)])
    dense = keras.layers.Dense(1, kernel_initializer=keras.initializers.RandomNormal(seed=3))
    model = keras.Model({"user": user, "item": item}, dense(hidden))
    model.compile(optimizer or keras.optimizers.SGD(0.5), "mse")
    return model


def _rows_of(layer: ShardedEmbedding) -> Any:
    return lambda shape, dtype=None: layer.spec.new_rows(np.arange(layer.spec.rows))


def _inputs() -> dict[str, np.ndarray]:
    return {"user": USER, "item": np.array([f"item {i}" for i in ITEM], object)}


def estimator(**params: Any) -> TFEstimator:
    settings = {"inputMapping": {"user": "user", "item": "item"}, "batchSize": ROWS, "verbose": 0, "timeout": 60.0}
    return TFEstimator(**{**settings, **params})


ON_SERVERS = {"mode": "async", "maxStaleness": 0, "numPs": 2}
in_both_modes = pytest.mark.parametrize(
    "mode", [pytest.param({}, id="sync"), pytest.param(ON_SERVERS, id="async", marks=pytest.mark.long)]
)


@pytest.mark.parametrize(
    ("workers", "mode"),
    [
        pytest.param(1, {}, id="alone", marks=pytest.mark.long),
        pytest.param(3, {}, id="sync"),
        pytest.param(2, ON_SERVERS, id="async"),
    ],
)
def test_a_fit_is_that_of_keras_own_embedding_on_one_process(
    frame: DataFrame, workers: int, mode: dict[str, Any], tmp_path: Path
) -> None:
    # One batch of all rows: their order, which a shuffle changes, does not count.
    fitted = estimator(model=recommender(), numWorkers=workers, epochs=4, **mode).fit(frame)
    reference = recommender(ours=False)
    hashed = tf.strings.to_hash_bucket_fast([f"item {i}" for i in ITEM], 64).numpy()
    inputs = {"user": USER, "item": hashed}
    history = reference.fit(inputs, LABEL, batch_size=ROWS, epochs=4, verbose=0).history["loss"]
    np.testing.assert_allclose(fitted.summary.history["loss"], history, rtol=1e-5)
    assert history[-1] < 0.97 * history[0]
    for name in ("users", "items"):
        layer = fitted.model.get_layer(name)
        rows = layer.access.lookup(np.arange(layer.spec.rows))
        np.testing.assert_allclose(rows, reference.get_layer(name).get_weights()[0], rtol=2e-5, atol=2e-6)

    # Scored by workers, from a saved stage as well.
    expected = np.sort(reference.predict(inputs, verbose=0)[:, 0])
    fitted.save(str(tmp_path / "saved"))
    for model in (fitted, TFModel.load(str(tmp_path / "saved"))):
        scored = sorted(row.prediction for row in model.transform(frame).select("prediction").collect())
        np.testing.assert_allclose(scored, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@in_both_modes
def test_a_second_fit_goes_on_where_the_first_has_ended(frame: DataFrame, mode: dict[str, Any]) -> None:
    straight = estimator(model=recommender(optimizer=keras.optimizers.Adam(0.1)), numWorkers=2, epochs=4).fit(frame)
    half = estimator(model=recommender(optimizer=keras.optimizers.Adam(0.1)), numWorkers=2, epochs=2, **mode)
    second = half.copy({half.model: half.fit(frame).model}).fit(frame)
    inputs = _inputs()
    predicted = [model.model.predict(inputs, verbose=0) for model in (straight, second)]
    np.testing.assert_allclose(predicted[1], predicted[0], rtol=1e-4, atol=1e-5)


@in_both_modes
def test_an_id_that_is_not_in_the_table_is_an_error_of_the_data(frame: DataFrame, mode: dict[str, Any]) -> None:
    wrong = frame.selectExpr("user + 5 as user", "item", "label")
    with pytest.raises(DataError, match=rf"layer 'users': expected ids from 0 to {USERS - 1}, received 3\d"):
        estimator(model=recommender(), numWorkers=2, **mode).fit(wrong)


def _killed_while_it_makes_its_model(path: Path) -> Callable[[], keras.Model]:
    """Return a modelFn that kills worker 1 when it has met the servers and has not yet connected for their tables."""

    def make() -> keras.Model:
        from pyspark import TaskContext

        # A worker's task makes the model, too; the child that trains has no context, but that parent.
        context = TaskContext.get()
        if context is not None and context.partitionId() == 1:
            (path / str(os.getpid())).touch()
        elif (path / str(os.getppid())).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return recommender()

    return make


@pytest.mark.long
def test_a_worker_that_is_killed_before_it_connects_to_tables_does_not_end_the_fit(
    frame: DataFrame, tmp_path: Path, no_leftovers: Any
) -> None:
    est = estimator(modelFn=_killed_while_it_makes_its_model(tmp_path), mode="async", numWorkers=2, numPs=2, epochs=3)
    fitted = est.fit(frame)
    summary = fitted.summary
    assert summary.lostWorkers == (1,)
    # Its share, about a half, in each epoch.
    share, rest = divmod(summary.rowsNotSeen, 3)
    assert rest == 0
    assert 20 < share < 30
    assert list(summary.history.epoch) == [1, 2, 3]
    trained = fitted.model.get_layer("users").access.lookup(np.arange(USERS))
    assert np.abs(trained - recommender().get_layer("users").access.lookup(np.arange(USERS))).max() > 1e-3


def test_an_optimizer_that_tables_cannot_follow_is_refused_before_a_job(frame: DataFrame) -> None:
    with pytest.raises(ParamError, match="Lion"):
        estimator(model=recommender(optimizer=keras.optimizers.Lion(0.1)), numWorkers=2).fit(frame)


def test_a_large_table_is_scored_from_files_that_workers_map(
    frame: DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recommender(optimizer=keras.optimizers.Adagrad(0.5))
    inputs = {name: tf.constant(column.tolist()) for name, column in _inputs().items()}
    model.fit(inputs, tf.constant(LABEL), batch_size=ROWS, verbose=0)
    expected = np.sort(model.predict(inputs, verbose=0)[:, 0])
    # Only where the model is written: who reads goes by what is there.
    monkeypatch.setattr("sparktf.distribute.table_saving.PACKED_BYTES", -1)
    stage = TFModel.fromKeras(model, inputMapping={"user": "user", "item": "item"})
    stage.save(str(tmp_path / "saved"))
    for scoring in (stage, TFModel.load(str(tmp_path / "saved"))):
        with zipfile.ZipFile(scoring._trained.archive.path) as archive:
            assert any(name.endswith("0.rows") and name.startswith("assets/") for name in archive.namelist())
        scored = sorted(row.prediction for row in scoring.transform(frame).select("prediction").collect())
        np.testing.assert_allclose(scored, expected, rtol=1e-4, atol=1e-5)
