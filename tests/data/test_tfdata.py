"""Batches of spooled rows reach Keras whole, in order, the same number on every rank."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import SpoolWriter
from sparktf.data.tfdata import evaluation_dataset, training_dataset
from sparktf.errors import ParamError

tf = pytest.importorskip("tensorflow")
ROWS = 10


@pytest.fixture
def spool(tmp_path):
    specs = [
        ColumnSpec("x", (2, 1), "float32", "x"),
        ColumnSpec("s", (), "string", "s"),
        ColumnSpec("h", (), "bfloat16", "h"),
        ColumnSpec("y", (), "int64", "y", "label"),
        ColumnSpec("w", (), "float32", "w", "weight"),
    ]
    batch = pa.record_batch(
        {
            "x": pa.array([[i, -i] for i in range(ROWS)], pa.list_(pa.int32())),
            "s": pa.array([f"ü{i}" for i in range(ROWS)]),
            "h": pa.array([float(i) for i in range(ROWS)]),
            "y": pa.array([float(i) for i in range(ROWS)]),
            "w": pa.array([1] * ROWS, pa.int8()),
        }
    )
    with SpoolWriter(specs, str(tmp_path)) as writer:
        writer.append(batch)
        with writer.finish() as finished:
            yield finished


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 20])
def test_batches_are_full_then_short_then_empty_in_the_order_given(spool, chunk_bytes):
    order = np.random.default_rng(0).permutation(ROWS)
    dataset = training_dataset(
        spool, lambda: order, 4, 5, features=["x"], labels=["y"], weight="w", chunk_bytes=chunk_bytes
    )
    assert dataset.cardinality() == 5
    for _ in range(2):
        batches = list(dataset.as_numpy_iterator())
        assert [x.shape for x, _, _ in batches] == [(4, 2, 1), (4, 2, 1), (2, 2, 1), (0, 2, 1), (0, 2, 1)]
        labels = np.concatenate([y for _, y, _ in batches])
        assert labels.tolist() == order.tolist()
        assert np.concatenate([x for x, _, _ in batches])[:, 0, 0].tolist() == order.tolist()


def test_the_order_is_asked_for_once_at_the_start_of_each_iteration(spool):
    asked = []

    def order():
        asked.append(len(asked))
        return np.arange(ROWS)

    dataset = training_dataset(spool, order, 4, 3, features=["x"])
    assert asked == []
    for _ in range(3):
        assert len(list(dataset)) == 3
    assert asked == [0, 1, 2]


def test_a_rank_without_rows_gives_empty_batches_of_the_same_structure(spool):
    none = np.empty(0, np.int64)
    dataset = training_dataset(spool, lambda: none, 4, 2, features=["x", "s", "h"], labels=["y"])
    batches = list(dataset)
    assert len(batches) == 2
    assert batches[0][0]["x"].shape == (0, 2, 1)
    assert batches[0][0]["s"].dtype == tf.string
    assert list(evaluation_dataset(spool, none, 4, features=["x"])) == []


def test_several_columns_come_as_a_dict_or_as_packed(spool):
    (x,) = next(iter(evaluation_dataset(spool, spool.order, 3, features=["x", "s", "h"])))
    assert x["s"].numpy().tolist() == ["ü0".encode(), "ü1".encode(), "ü2".encode()]
    assert x["h"].dtype == tf.bfloat16
    packed = evaluation_dataset(
        spool,
        spool.order,
        3,
        features=spool.columns,
        labels=["y"],
        pack=lambda columns: [columns["x"], columns["w"]],
        pack_y=lambda columns: {"out": columns["y"]},
    )
    x, y = next(iter(packed))
    assert (x[0].shape, x[1].shape, y["out"].dtype) == ((3, 2, 1), (3,), tf.int64)


def test_evaluation_gives_every_row_once_without_empty_batches(spool):
    dataset = evaluation_dataset(spool, spool.order[::-1], 4, features=["x"], labels=["y"], chunk_bytes=1)
    assert dataset.cardinality() == 3
    assert [y.tolist() for _, y in dataset.as_numpy_iterator()] == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]


def test_iterators_need_not_wait_for_tensorflows_tuner_when_they_end(spool):
    training = training_dataset(spool, lambda: np.arange(ROWS), 4, 3, features=["x"])
    evaluation = evaluation_dataset(spool, spool.order, 4, features=["x"], labels=["y"])
    for dataset in (training, evaluation, training.map(lambda x: x)):
        assert dataset.options().autotune.enabled is False


def test_one_column_may_be_both_input_and_label(spool):
    x, y = next(iter(evaluation_dataset(spool, spool.order, 4, features=["x"], labels=["x"])))
    assert np.array_equal(x, y)


def test_more_rows_than_the_steps_hold_is_an_error(spool):
    dataset = training_dataset(spool, lambda: np.arange(ROWS), 4, 2, features=["x"])
    with pytest.raises(tf.errors.OpError, match="at most 2 batches of 4 rows"):
        list(dataset)


def test_weights_without_labels_and_unknown_columns_are_refused(spool):
    with pytest.raises(ParamError, match="labels beside sample weights"):
        evaluation_dataset(spool, spool.order, 4, features=["x"], weight="w")
    with pytest.raises(ParamError, match=r"Received also: \['nope'\]"):
        evaluation_dataset(spool, spool.order, 4, features=["nope"])


def test_keras_trains_on_it_as_on_arrays_in_the_same_order(spool):
    import keras

    def trained(fit):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((2, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        fit(model)
        return model.get_weights()

    arrays = spool.take(spool.order)
    x, y = arrays["x"] / 10, arrays["y"]
    dataset = training_dataset(
        spool, lambda: spool.order, 4, 3, features=["x"], labels=["y"], pack=lambda c: c["x"] / 10
    )
    ours = trained(lambda model: model.fit(dataset, epochs=3, verbose=0, shuffle=False))
    plain = trained(lambda model: model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False))
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(one, other)
