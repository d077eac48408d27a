"""The layer in one process, under Keras alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from sparktf.distribute import ShardedEmbedding
from sparktf.distribute.sparse_optimizers import sparse_optimizer_of
from sparktf.distribute.table import TableShard
from sparktf.errors import ParamError

ROWS, DIM = 12, 3
ALL = np.arange(ROWS)


def _model(layer: keras.layers.Layer, optimizer: Any, twice: bool = False) -> keras.Model:
    """Return a model that looks up two ids at once, or each of two inputs by the one layer."""
    ids = keras.Input((2,), dtype="int64")
    if twice:
        first = keras.layers.Flatten()(layer(ids[:, :1]))
        hidden = keras.layers.concatenate([first, keras.layers.Flatten()(layer(ids[:, 1:]))])
    else:
        hidden = keras.layers.Flatten()(layer(ids))
    dense = keras.layers.Dense(1, kernel_initializer=keras.initializers.RandomNormal(seed=5))
    model = keras.Model(ids, dense(hidden))
    model.compile(optimizer, "mse")
    return model


def _like(layer: ShardedEmbedding) -> keras.layers.Embedding:
    """Return Keras's own layer with the same rows."""
    return keras.layers.Embedding(
        ROWS, DIM, embeddings_initializer=lambda shape, dtype=None: layer.spec.new_rows(np.arange(ROWS))
    )


class _Dense(keras.layers.Layer):
    """Keras's layer with a dense gradient: under optimizers with state, Keras takes repeated ids one by one."""

    def __init__(self, like: ShardedEmbedding) -> None:
        super().__init__()
        self.kernel = self.add_weight(shape=(ROWS, DIM))
        self.kernel.assign(like.spec.new_rows(ALL))

    def call(self, ids: Any) -> Any:
        return keras.ops.matmul(keras.ops.one_hot(ids, ROWS), self.kernel)


def _data(rows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    # Every batch of 12 names every row, so that optimizers with state have nothing to leave out.
    x = np.concatenate([np.stack([rng.permutation(ROWS), rng.integers(0, ROWS, ROWS)], 1) for _ in range(rows // ROWS)])
    return x, rng.normal(size=rows).astype("float32")


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "like"),
    [
        (lambda: keras.optimizers.SGD(0.3), _like),
        (lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5), momentum=0.9), _like),
        (lambda: keras.optimizers.Adam(0.05), _Dense),
    ],
    ids=["sgd", "momentum and a schedule", "adam"],
)
def test_it_trains_as_keras_own_layer(optimizer: Any, like: Any, twice: bool) -> None:
    ours = ShardedEmbedding(ROWS, DIM, seed=4)
    theirs = like(ours)
    x, y = _data()
    histories = []
    for layer in (ours, theirs):
        model = _model(layer, optimizer(), twice)
        histories.append(model.fit(x, y, batch_size=12, epochs=3, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(histories[0], histories[1], rtol=2e-5)
    table, reference = ours.access.lookup(ALL), theirs.get_weights()[0]
    assert np.abs(reference - ours.spec.new_rows(ALL)).max() > 1e-2
    np.testing.assert_allclose(table, reference, rtol=2e-5, atol=2e-6)


def test_it_follows_a_learning_rate_that_a_callback_sets() -> None:
    ours = ShardedEmbedding(ROWS, DIM, seed=4)
    theirs = _like(ours)
    x, y = _data()
    for layer in (ours, theirs):
        halve = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        model = _model(layer, keras.optimizers.SGD(0.4))
        model.fit(x, y, batch_size=12, epochs=3, shuffle=False, callbacks=[halve], verbose=0)
    np.testing.assert_allclose(ours.access.lookup(ALL), theirs.get_weights()[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_training_loop_of_ones_own_trains_it_once_it_follows(eagerly: bool) -> None:
    layer = ShardedEmbedding(ROWS, DIM, seed=4)
    optimizer = keras.optimizers.SGD(0.5)
    layer.build()

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(tf.constant([1, 1, 5])))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables, strict=True)
        )

    run = step if eagerly else tf.function(step, autograph=False)
    with pytest.raises(ParamError, match="follow"):
        run()
    layer.follow(optimizer)
    run()
    moved = layer.access.lookup(ALL) - layer.spec.new_rows(ALL)
    np.testing.assert_allclose(moved[:, 0], -0.5 * np.bincount([1, 1, 5], minlength=ROWS), atol=1e-6)


def test_an_optimizer_of_its_own_leaves_the_models_to_the_rest() -> None:
    own = keras.optimizers.SGD(keras.optimizers.schedules.PiecewiseConstantDecay([1], [1.0, 0.0]))
    layer = ShardedEmbedding(ROWS, DIM, seed=4, optimizer=own)
    x, y = _data(12)
    model = _model(layer, keras.optimizers.RMSprop(0.1))
    tables = [layer.access.lookup(ALL).copy()]
    for _ in range(3):
        model.fit(x, y, batch_size=12, verbose=0)
        tables.append(layer.access.lookup(ALL).copy())
    moved = [bool((a != b).any()) for a, b in itertools.pairwise(tables)]
    # Its own schedule goes by its own steps: 0 and 1 at full rate.
    assert moved == [True, True, False]
    assert len(model.optimizer.variables) < 5 + len(model.trainable_variables)


def test_a_frozen_layer_keeps_its_rows() -> None:
    layer = ShardedEmbedding(ROWS, DIM, seed=4)
    layer.trainable = False
    x, y = _data()
    _model(layer, keras.optimizers.Adam(0.1)).fit(x, y, verbose=0)
    np.testing.assert_array_equal(layer.access.lookup(ALL), layer.spec.new_rows(ALL))


def test_a_saved_model_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    x, y = _data()
    straight = _model(ShardedEmbedding(ROWS, DIM, seed=4, name="table"), keras.optimizers.Adam(0.05))
    straight.fit(x[:, ::-1] // 2, y, batch_size=6, shuffle=False, verbose=0)
    straight.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), straight.predict(x, verbose=0))
    for model in (straight, loaded):
        model.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    np.testing.assert_array_equal(
        loaded.get_layer("table").access.lookup(ALL), straight.get_layer("table").access.lookup(ALL)
    )


def test_a_saved_model_holds_only_rows_that_were_trained(tmp_path: Path) -> None:
    ids = keras.Input((1,), dtype="int64")
    model = keras.Model(ids, keras.layers.Flatten()(ShardedEmbedding(10**9, 16, seed=1, name="table")(ids)))
    model.compile(keras.optimizers.Adagrad(0.1), "mse")
    model.save(tmp_path / "new.keras")
    assert (tmp_path / "new.keras").stat().st_size < 100_000
    loaded = keras.saving.load_model(tmp_path / "new.keras")
    asked = np.array([[0], [10**9 - 1]])
    np.testing.assert_array_equal(loaded.predict(asked, verbose=0), model.predict(asked, verbose=0))


def test_hashing_takes_numbers_and_texts_of_any_size() -> None:
    layer = ShardedEmbedding(ROWS, DIM, seed=4, hashing=True)
    texts = tf.constant(["-5", "9223372036854775807", "a", "b", ""])
    found = layer(texts).numpy()
    assert found.shape == (5, DIM)
    np.testing.assert_array_equal(layer(tf.constant([-5, 2**63 - 1], tf.int64)).numpy(), found[:2])
    # Of a thousand ids all rows get their part.
    assert len(np.unique(layer(tf.range(1000)).numpy()[:, 0])) == ROWS


@pytest.mark.parametrize(("shape", "rank"), [((), 0), ((4,), 1), ((2, 3, 1), 3), ((0, 2), 2)])
def test_ids_may_have_any_shape(shape: tuple[int, ...], rank: int) -> None:
    layer = ShardedEmbedding(ROWS, DIM, seed=4)
    ids = np.arange(int(np.prod(shape))).reshape(shape) % ROWS
    found = layer(tf.constant(ids, tf.int32)).numpy()
    assert found.ndim == rank + 1
    np.testing.assert_array_equal(found, layer.spec.new_rows(ids.reshape(-1)).reshape(*shape, DIM))


def test_texts_without_hashing_are_refused() -> None:
    with pytest.raises(ParamError, match="hashing=True"):
        ShardedEmbedding(ROWS, DIM)(tf.constant(["a"]))


def test_an_id_that_is_not_in_the_table_is_told() -> None:
    model = _model(ShardedEmbedding(ROWS, DIM, name="items"), "sgd")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"layer 'items': expected ids from 0 to 11, received 12"):
        model.predict(np.array([[1, 12]]), verbose=0)


def test_rows_are_cast_to_what_the_policy_computes_in() -> None:
    layer = ShardedEmbedding(ROWS, DIM, seed=4, dtype="mixed_bfloat16")
    model = _model(layer, keras.optimizers.SGD(0.5))
    x, y = _data()
    model.fit(x, y, batch_size=12, verbose=0)
    assert layer(tf.constant([1])).dtype == tf.bfloat16
    table = layer.access.lookup(ALL)
    assert table.dtype == np.float32
    assert (table != layer.spec.new_rows(ALL)).any()


def test_seeds_are_drawn_as_keras_draws_them() -> None:
    def drawn() -> list[int]:
        keras.utils.set_random_seed(8)
        return [ShardedEmbedding(ROWS, DIM).spec.seed for _ in range(2)]

    assert drawn() == drawn()
    assert len(set(drawn())) == 2


@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (3, -1), (2.5, 3)])
def test_sizes_that_are_none_are_refused(rows: Any, dim: Any) -> None:
    with pytest.raises(ParamError, match="expected an integer of at least 1"):
        ShardedEmbedding(rows, dim)


@pytest.mark.parametrize(("rows", "sections"), [(0, 1), (1, 1), (400, 2)])
def test_a_table_too_large_for_the_weights_is_mapped_from_files(
    rows: int, sections: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparktf.distribute.table_saving.PACKED_BYTES", -1)
    # Several pieces and, as after a fit over ranks, several sections.
    monkeypatch.setattr("sparktf.distribute.table._PIECE_BYTES", 600)
    ids = keras.Input((1,), dtype="int64")
    layer = ShardedEmbedding(1000, DIM, seed=4, name="table", optimizer=keras.optimizers.Adam(0.1))
    model = keras.Model(ids, keras.layers.Flatten()(layer(ids)))
    model.compile("sgd", "mse")
    parts = [TableShard(layer.spec, part, 2) for part in range(2)]
    rng = np.random.default_rng(0)
    touched = rng.permutation(1000)[:rows]
    for part in parts:
        part.use(sparse_optimizer_of(keras.optimizers.Adam(0.1)))
        mine = touched[touched % 2 == part.part]
        part.update(mine, rng.normal(size=(len(mine), DIM)).astype("float32"), 0.1)
    layer.access.load(piece for part in parts for piece in part.pieces())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    table = loaded.get_layer("table").access
    assert all(isinstance(state.rows, np.memmap) for state in table._stored if rows)
    assert len(table._stored) == sections
    asked = rng.permutation(1000)[:, None]
    np.testing.assert_array_equal(loaded.predict(asked, verbose=0), model.predict(asked, verbose=0))
    for one in (model, loaded):
        one.fit(asked, np.ones((1000, DIM)), batch_size=250, shuffle=False, verbose=0)
    np.testing.assert_array_equal(loaded.predict(asked, verbose=0), model.predict(asked, verbose=0))


def test_weights_alone_of_such_a_table_are_refused_when_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparktf.distribute.table_saving.PACKED_BYTES", -1)
    model = _model(ShardedEmbedding(ROWS, DIM, seed=4, name="table"), "sgd")
    model.fit(*_data(), verbose=0)
    model.save_weights(tmp_path / "some.weights.h5")
    model.load_weights(tmp_path / "some.weights.h5")
    with pytest.raises(tf.errors.OpError, match=r"layer 'table': expected a saved model with the files of its table"):
        model.predict(_data()[0], verbose=0)
