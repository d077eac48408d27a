"""Tables on the parameter servers of programs: servers without a model, which workers tell what there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import servers
import tensorflow as tf
from groups import fresh

from sparktf.distribute import ShardedEmbedding
from sparktf.distribute.table import TableShard
from sparktf.distribute.table_servers import ServedTable
from sparktf.distribute.table_wire import PUSH, SETTLE
from sparktf.errors import HandshakeError, ParamError, PeerLostError

_RANDOM = np.random.default_rng(7)
IDS = _RANDOM.integers(0, 50, size=(48, 3))
Y = (IDS % 7 == 3).sum(axis=1, keepdims=True).astype("float32")
BATCH = 4


def recommender(seed: int = 3, optimizer: Any = None, rows: int = 1000) -> keras.Model:
    table = ShardedEmbedding(rows, 4, seed=seed, name="table", optimizer=optimizer)
    return keras.Sequential(
        [keras.Input((3,), dtype="int64"), table, keras.layers.Flatten(), keras.layers.Dense(1, name="out")]
    )


def rows(model: keras.Model) -> np.ndarray:
    return np.array(model.get_layer("table").access.lookup(np.arange(60)))


def batches(worker: int, count: int = 24) -> tf.data.Dataset:
    part = slice(24 * worker, 24 * worker + count)
    return tf.data.Dataset.from_tensor_slices((IDS[part], Y[part])).batch(BATCH)


def _loop(model: keras.Model, optimizer: Any, data: tf.data.Dataset, eagerly: bool) -> None:
    """Train in a loop of one's own."""
    model.get_layer("table").follow(optimizer)

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = step if eagerly else tf.function(step, autograph=False)
    for x, y in data:
        run(x, y)
    optimizer.finalize_variable_values(model.trainable_variables)


def _fit(model: keras.Model, optimizer: Any, data: tf.data.Dataset) -> None:
    model.compile(optimizer, "mse")
    model.fit(data, verbose=0, shuffle=False)


_LOOPS: dict[str, Callable[[keras.Model, Any, tf.data.Dataset], None]] = {
    "fit": _fit,
    "traced": lambda model, optimizer, data: _loop(model, optimizer, data, eagerly=False),
    "eager": lambda model, optimizer, data: _loop(model, optimizer, data, eagerly=True),
}


def _assert_alike(trained: keras.Model, one: keras.Model) -> None:
    np.testing.assert_allclose(rows(trained), rows(one), rtol=2e-5, atol=2e-6)
    for ours, theirs in zip(trained.get_layer("out").weights, one.get_layer("out").weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("loop", "name"), [("fit", "SGD"), ("fit", "Adam"), ("traced", "Adagrad"), ("traced", "Ftrl"), ("eager", "SGD")]
)
def test_without_staleness_tables_are_those_of_one_process_and_are_saved(loop: str, name: str, tmp_path: Path) -> None:
    def optimizer() -> Any:
        return getattr(keras.optimizers, name)(0.05)

    def main(worker: int, distributed: Any) -> float:
        model = fresh(recommender)
        _LOOPS[loop](model, distributed, batches(worker).repeat(2))
        if worker == 0:
            model.save(tmp_path / "trained.keras")
        return float(np.mean(np.square(model.predict(IDS, verbose=0) - Y)))

    done = servers.train(main, optimizer, servers=2, max_staleness=0).raise_first()
    trained = keras.saving.load_model(tmp_path / "trained.keras")
    one = fresh(recommender)
    one.compile(optimizer(), "mse")
    for step in [*range(0, 24, BATCH)] * 2:
        places = np.concatenate([np.arange(start, start + BATCH) for start in (step, 24 + step)])
        one.train_on_batch(IDS[places], Y[places])
    _assert_alike(trained, one)
    assert np.abs(rows(one) - rows(fresh(recommender))).max() > 1e-2
    # All workers predict by the same rows.
    np.testing.assert_allclose(done.workers, np.mean(np.square(one.predict(IDS, verbose=0) - Y)), rtol=1e-4)


@pytest.mark.parametrize("max_staleness", [None, 2])
def test_who_saves_has_all_that_all_workers_have_pushed_at_their_own_pace(max_staleness: int | None) -> None:
    def main(worker: int, distributed: Any) -> tuple[int, np.ndarray, list[float]]:
        model = fresh(recommender)
        model.compile(distributed, "mse")
        history = model.fit(batches(worker), epochs=20, verbose=0, shuffle=False).history["loss"]
        table = model.get_layer("table").access
        return max(piece.updates for piece in table.pieces()), rows(model), history

    done = servers.train(main, lambda: keras.optimizers.Adagrad(0.3), servers=2, max_staleness=max_staleness)
    (chiefs, chief, history), (others, other, _) = done.raise_first().workers
    # Twenty epochs of six batches of each of two.
    assert chiefs == others == 240
    np.testing.assert_array_equal(chief, other)
    assert history[-1] < 0.5 * history[0]


def test_a_worker_with_fewer_batches_is_waited_for_no_longer_and_joins_in_again() -> None:
    counts = (8, 24)

    def main(worker: int, distributed: Any) -> keras.Model:
        model = fresh(recommender)
        for _ in range(2):
            _LOOPS["traced"](model, distributed, batches(worker, counts[worker]))
        # While the servers are there.
        _assert_alike(model, one)
        return model

    one = fresh(recommender)
    one.compile(keras.optimizers.Adam(0.05), "mse")
    for step in [*range(0, max(counts), BATCH)] * 2:
        starts = [24 * worker + step for worker, count in enumerate(counts) if step < count]
        places = np.concatenate([np.arange(start, start + BATCH) for start in starts])
        one.train_on_batch(IDS[places], Y[places])
    servers.train(main, lambda: keras.optimizers.Adam(0.05), max_staleness=0).raise_first()


def test_training_goes_on_from_the_chiefs_table() -> None:
    trained = fresh(recommender)
    trained.compile(keras.optimizers.SGD(0.05), "mse")
    trained.fit(IDS, Y, verbose=0)
    before = rows(trained)

    def main(worker: int, distributed: Any) -> tuple[np.ndarray, np.ndarray]:
        model = trained if worker == 0 else fresh(recommender)
        model.optimizer = None
        distributed.build(model.trainable_variables)
        first = rows(model)
        _LOOPS["traced"](model, distributed, batches(worker))
        return first, rows(model)

    done = servers.train(main, lambda: keras.optimizers.SGD(0.05), servers=2, max_staleness=0).raise_first()
    for first, last in done.workers:
        np.testing.assert_array_equal(first, before)
        assert np.abs(last - before).max() > 1e-3


def test_a_table_may_have_an_optimizer_of_its_own() -> None:
    def make() -> keras.Model:
        return recommender(optimizer=keras.optimizers.Ftrl(0.1))

    def main(worker: int, distributed: Any) -> None:
        model = fresh(make)
        _fit(model, distributed, batches(0))
        _assert_alike(model, one)

    one = fresh(make)
    # Which no table can follow.
    one.compile(keras.optimizers.RMSprop(0.01), "mse")
    one.fit(batches(0), verbose=0, shuffle=False)
    servers.train(main, lambda: keras.optimizers.RMSprop(0.01), workers=1, max_staleness=0).raise_first()


def test_a_worker_that_leaves_without_training_holds_nobody_up() -> None:
    def main(worker: int, distributed: Any) -> bool:
        if worker == 0:
            _LOOPS["fit"](fresh(recommender), distributed, batches(worker))
        return True

    done = servers.train(main, lambda: keras.optimizers.SGD(0.05), max_staleness=0, timeout=20.0).raise_first()
    assert done.servers[0].updates == 6


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: recommender(seed=4), ["'seed': 3", "'seed': 4", "give its ShardedEmbedding layers a seed"]),
        (lambda: recommender(optimizer="adagrad"), ["'optimizer': 'SGD'", "'optimizer': 'Adagrad'"]),
        (
            lambda: keras.Sequential([keras.Input((3,)), keras.layers.Rescaling([4.0] * 12), keras.layers.Dense(1)]),
            ["received tables"],
        ),
    ],
    ids=["another seed", "another optimizer", "no table"],
)
def test_workers_with_other_tables_are_refused(other: Callable[[], keras.Model], words: list[str]) -> None:
    def main(worker: int, distributed: Any) -> None:
        distributed.build(fresh(recommender if worker == 0 else other).trainable_variables)

    done = servers.train(main, lambda: keras.optimizers.SGD(0.05))
    assert isinstance(done.servers[0], HandshakeError), done
    for word in words:
        assert word in str(done.servers[0])
    assert any(isinstance(outcome, PeerLostError) for outcome in done.workers), done.workers


def test_a_table_that_cannot_follow_the_optimizer_says_so() -> None:
    def main(worker: int, distributed: Any) -> None:
        distributed.build(fresh(recommender).trainable_variables)

    done = servers.train(main, lambda: keras.optimizers.RMSprop(0.05), workers=1)
    assert isinstance(done.workers[0], ParamError), done.workers
    assert "received RMSprop" in str(done.workers[0])


def test_a_table_that_follows_another_optimizer_than_servers_were_told_says_so() -> None:
    def main(worker: int, distributed: Any) -> None:
        model = fresh(recommender)
        distributed.build(model.trainable_variables)
        layer = model.get_layer("table")
        assert isinstance(layer.access, ServedTable)
        for follows, words in (("Adam", "SGD , received Adam"), ("SGD", "'momentum': 0.0}, received SGD {'momentum'")):
            layer.follow(getattr(keras.optimizers, follows)(0.05, 0.9))
            with tf.GradientTape() as tape:
                prediction = model(IDS[:4])
            with pytest.raises(ParamError, match=words):
                tape.gradient(prediction, model.trainable_variables)

    servers.train(main, lambda: keras.optimizers.SGD(0.05), workers=1).raise_first()


@pytest.mark.parametrize("max_staleness", [None, 0])
def test_a_server_that_fails_by_itself_ends_training_with_its_words(
    monkeypatch: pytest.MonkeyPatch, max_staleness: int | None
) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("no such slot")

    monkeypatch.setattr(TableShard, "update", broken)

    def main(worker: int, distributed: Any) -> None:
        _LOOPS["traced"](fresh(recommender), distributed, batches(worker))

    done = servers.train(main, lambda: keras.optimizers.SGD(0.05), max_staleness=max_staleness)
    for outcome in done.workers:
        assert "parameter server 0" in str(outcome)
        assert "ValueError: no such slot" in str(outcome)


class _Dies(Exception):
    pass


@pytest.mark.parametrize("max_staleness", [0, None])
def test_the_others_go_on_with_the_tables_without_a_worker_that_is_lost(max_staleness: int | None) -> None:
    def main(worker: int, optimizer: Any) -> np.ndarray:
        model = fresh(recommender)
        (_until_it_dies if worker == 2 else _LOOPS["traced"])(model, optimizer, batches(worker % 2))
        return rows(model)

    done = servers.train(
        main, lambda: keras.optimizers.SGD(0.05), workers=3, servers=2, max_staleness=max_staleness, timeout=20.0
    )
    first, second, third = done.workers
    assert isinstance(third, _Dies)
    np.testing.assert_array_equal(first, second)
    assert [report.lost for report in done.servers] == [(2,), (2,)]


def _until_it_dies(model: keras.Model, optimizer: Any, data: tf.data.Dataset) -> None:
    model.compile(optimizer, "mse")

    def die(batch: int, logs: Any) -> None:
        if batch == 2:
            raise _Dies

    note = keras.callbacks.LambdaCallback(on_train_batch_end=die)
    model.fit(data, verbose=0, shuffle=False, callbacks=[note])


def test_a_worker_trains_on_where_another_was_lost_with_one_of_two_servers_updated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask, victims = ServedTable._ask, set()

    def dying(table: ServedTable, server: int, kind: int, count: int = 0, rate: float = 0.0) -> Any:
        if table in victims and server == 1 and kind == PUSH and table._clocks[1] == 4:
            # Else its end may overtake what it has sent to the first server.
            ask(table, 0, SETTLE).recv(np.zeros(1, np.int64))
            raise _Dies
        return ask(table, server, kind, count, rate)

    monkeypatch.setattr(ServedTable, "_ask", dying)

    def main(worker: int, optimizer: Any) -> list[int]:
        model = fresh(recommender)
        optimizer.build(model.trainable_variables)
        table = model.get_layer("table").access
        if worker == 1:
            victims.add(table)
            _LOOPS["eager"](model, optimizer, batches(1))
        # Two steps: at its end long before the other's fifth.
        for _ in range(2):
            _LOOPS["traced"](model, optimizer, batches(0, 8))
        return table._clocks

    done = servers.train(main, lambda: keras.optimizers.SGD(0.05), workers=2, servers=2, max_staleness=0, timeout=20.0)
    assert isinstance(done.workers[1], _Dies)
    assert done.workers[0] == [7, 6]
