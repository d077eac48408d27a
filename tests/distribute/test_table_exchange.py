"""Tables over several ranks: as one process trains them, whatever ranks do beside their steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import groups
import keras
import numpy as np
import pytest
import tensorflow as tf

from sparktf.distribute import ShardedEmbedding
from sparktf.distribute.mean import gradient_mean
from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.sparse_optimizers import sparse_optimizer
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import LocalTable
from sparktf.distribute.table_exchange import TableGroup
from sparktf.distribute.table_fit import tables_of
from sparktf.distribute.table_meeting import connect_everyone
from sparktf.distribute.table_rows import RowInitializer, TableSpec
from sparktf.distribute.table_service import SyncedShard
from sparktf.errors import DataError, HandshakeError, ParamError, PeerLostError, SparktfError, TransportTimeoutError
from sparktf.transport import Communicator
from sparktf.transport.testing import results_of_threads, run_threads

USERS, ITEMS, DIM = 40, 17, 4
SGD = {"momentum": 0.0}


def _embedding(rows: int, name: str, ours: bool) -> keras.layers.Layer:
    layer = ShardedEmbedding(rows, DIM, seed=rows, name=name)
    if ours:
        return layer
    return keras.layers.Embedding(
        rows, DIM, embeddings_initializer=lambda shape, dtype=None: layer.spec.new_rows(np.arange(rows)), name=name
    )


def _make(optimizer: Callable[[], Any], ours: bool = True, **compiled: Any) -> Callable[[], keras.Model]:
    """Return the function that makes a recommender: a user, two items, of one table."""

    def make() -> keras.Model:
        user, items = keras.Input((1,), dtype="int64"), keras.Input((2,), dtype="int64")
        users, table = _embedding(USERS, "users", ours), _embedding(ITEMS, "items", ours)
        parts = [users(user), table(items[:, :1]), table(items[:, 1:])]
        hidden = keras.layers.Flatten()(keras.layers.concatenate(parts))
        model = keras.Model([user, items], keras.layers.Dense(1)(hidden))
        model.compile(optimizer(), "mse", **compiled)
        return model

    return make


def _sgd() -> Any:
    return keras.optimizers.SGD(0.3)


def _task(rows: tuple[int, ...], **more: Any) -> groups.Task:
    rng = np.random.default_rng([*rows])

    def some(count: int) -> tuple[Any, ...]:
        x = rng.integers(0, USERS, (count, 1)), rng.integers(0, ITEMS, (count, 2))
        return x, rng.normal(size=count).astype("float32")

    held_out = more.pop("held_out_rows", ())
    extra = {"held_out": some(sum(held_out)), "held_out_rows": held_out} if held_out else {}
    return groups.Task(some(sum(rows)), rows, **extra, **more)


def _table(model: keras.Model, name: str) -> np.ndarray:
    layer = model.get_layer(name)
    return np.array(layer.access.lookup(np.arange(layer.spec.rows)))


@pytest.mark.parametrize(
    ("rows", "held_out"),
    [((9, 6), ()), ((10, 3, 0), (0, 1, 11)), ((5, 1), (9, 0))],
    ids=["ragged", "a rank without rows, another with most to validate", "a rank that runs out"],
)
def test_ranks_train_as_keras_own_embedding_on_one_process(rows: tuple[int, ...], held_out: tuple[int, ...]) -> None:
    task = _task(rows, held_out_rows=held_out)
    ranks = groups.by_ranks(_make(_sgd), task)
    groups.assert_ranks_agree(ranks)
    assert all(0 < rank.report.communicate_seconds < rank.report.seconds for rank in ranks)
    one = groups.by_one_process(_make(_sgd, ours=False), task)
    for name in ("users", "items"):
        reference = one.model.get_layer(name).get_weights()[0]
        assert np.abs(reference - _table(_make(_sgd)(), name)).max() > 1e-3
        np.testing.assert_allclose(_table(ranks[0].model, name), reference, rtol=2e-5, atol=2e-6, err_msg=name)
    assert set(ranks[0].report.history) == set(one.report.history)
    for name, values in one.report.history.items():
        np.testing.assert_allclose(ranks[0].report.history[name], values, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(0.05),
        lambda: keras.optimizers.Adagrad(keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)),
        lambda: keras.optimizers.Ftrl(0.3),
    ],
    ids=["adam", "adagrad and a schedule", "ftrl"],
)
def test_optimizers_with_state_train_as_in_one_process(optimizer: Callable[[], Any]) -> None:
    make, task = _make(optimizer), _task((9, 6))
    ranks = groups.assert_as_one_process(make, task)
    one = groups.by_one_process(make, task)
    for name in ("users", "items"):
        np.testing.assert_allclose(_table(ranks[0].model, name), _table(one.model, name), rtol=2e-4, atol=2e-6)


def test_several_steps_an_execution_are_several_updates() -> None:
    task = _task((12, 9))
    plain, batched = (groups.by_ranks(_make(_sgd, **compiled), task) for compiled in ({}, {"steps_per_execution": 2}))
    groups.assert_ranks_agree([*plain, *batched])
    np.testing.assert_array_equal(_table(plain[0].model, "users"), _table(batched[0].model, "users"))


def test_two_fits_are_equal_to_the_last_bit() -> None:
    task = _task((9, 6))
    first, second = (groups.by_ranks(_make(lambda: keras.optimizers.Adam(0.1)), task) for _ in range(2))
    for name in ("users", "items"):
        np.testing.assert_array_equal(_table(first[0].model, name), _table(second[0].model, name))


def test_training_goes_on_from_a_trained_model_over_other_ranks() -> None:
    task, make = _task((8, 8)), _make(lambda: keras.optimizers.Adam(0.1))
    straight = groups.by_ranks(make, groups.Task(task.data, (8, 8), epochs=4))[0].model
    halfway = groups.by_ranks(make, groups.Task(task.data, (8, 8), epochs=2))[0].model
    resumed = groups.by_ranks(lambda: _copy(halfway), groups.Task(task.data, (8, 8), epochs=2))[0].model
    for name in ("users", "items"):
        np.testing.assert_allclose(_table(resumed, name), _table(straight, name), rtol=1e-4, atol=1e-6)


def _copy(model: keras.Model) -> keras.Model:
    """Return the model that a rank loads: of the same rows, slots and steps."""
    copied = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    copied.optimizer.build(copied.trainable_variables)
    copied.set_weights(model.get_weights())
    copied.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    for layer, trained in zip(tables_of(copied), tables_of(model), strict=True):
        layer.access.load(trained.access.pieces())
    return copied


def test_the_chief_predicts_and_saves_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "halfway.keras"
    seen: list[Any] = []

    class _Looks(keras.callbacks.Callback):
        sparktf_chief_only = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1 and not seen:
                asked = [np.arange(USERS)[:, None], np.zeros((USERS, 2), "int64")]
                seen.append(self.model.predict(asked, verbose=0))
                self.model.save(path)

    task = _task((12, 12))
    looked = groups.by_ranks(_make(_sgd), groups.Task(task.data, (12, 12), callbacks=lambda rank: [_Looks()]))
    groups.assert_ranks_agree(looked)
    undisturbed = groups.by_ranks(_make(_sgd), task)
    np.testing.assert_array_equal(_table(looked[0].model, "users"), _table(undisturbed[0].model, "users"))
    saved = keras.saving.load_model(path)
    asked = [np.arange(USERS)[:, None], np.zeros((USERS, 2), "int64")]
    np.testing.assert_allclose(saved.predict(asked, verbose=0), seen[0], rtol=1e-6)
    assert not np.array_equal(_table(saved, "users"), _table(looked[0].model, "users"))


def test_a_large_table_is_collected_in_files_and_saved_in_the_middle_of_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _task((12, 12))
    plain = groups.by_ranks(_make(lambda: keras.optimizers.Adam(0.1)), task)[0].model
    for module in ("table_fit", "table_saving"):
        monkeypatch.setattr(f"sparktf.distribute.{module}.PACKED_BYTES", -1)
    saves = [keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")]
    fitted = groups.by_ranks(
        _make(lambda: keras.optimizers.Adam(0.1)), groups.Task(task.data, (12, 12), callbacks=lambda rank: saves)
    )
    groups.assert_ranks_agree(fitted)
    mapped = fitted[0].model
    saved = keras.saving.load_model(tmp_path / "2.keras")
    for name in ("users", "items"):
        assert all(isinstance(state.rows, np.memmap) for state in mapped.get_layer(name).access._stored)
        for model in (mapped, saved):
            np.testing.assert_array_equal(_table(model, name), _table(plain, name))


def test_a_rank_that_is_not_the_chief_says_that_it_has_only_its_part() -> None:
    ranks = groups.by_ranks(_make(_sgd), _task((4, 4)))
    with pytest.raises(ParamError, match="layer 'users': expected the whole table, received part 1 of 2"):
        _table(ranks[1].model, "users")


def test_weights_that_are_put_back_without_the_table_are_refused() -> None:
    def stops(rank: int) -> list[Any]:
        return [keras.callbacks.EarlyStopping("loss", restore_best_weights=True)]

    task = _task((4, 4))
    outcomes = groups.by_ranks(_make(_sgd), groups.Task(task.data, (4, 4), callbacks=stops))
    assert all(isinstance(o, ParamError) and "restore_best_weights" in str(o) for o in outcomes), outcomes


def test_an_id_that_is_not_in_the_table_ends_the_fit_with_its_name() -> None:
    task = _task((8, 8))
    task.data[0][0][13] = USERS + 5
    mine, theirs = reversed(groups.by_ranks(_make(_sgd), task))
    assert isinstance(mine, DataError), mine
    assert f"layer 'users': expected ids from 0 to {USERS - 1}, received {USERS + 5}" in str(mine)
    assert isinstance(theirs, PeerLostError), theirs
    assert f"received {USERS + 5}" in str(theirs)


def test_ranks_with_different_tables_are_refused() -> None:
    def main(communicator: Communicator) -> Any:
        with TableGroup(communicator, [_new_table(seed=communicator.rank)]):
            return None

    outcomes = run_threads("tcp", 2, main)
    assert all(isinstance(o, HandshakeError) and "give its ShardedEmbedding" in str(o) for o in outcomes)


@pytest.mark.parametrize("loop", ["fit", "traced", "eager"])
def test_programs_train_their_tables_by_the_mean_of_all_gradients(loop: str, tmp_path: Path) -> None:
    task = _task((8, 8))

    def main(communicator: Communicator) -> Any:
        with ExitStack() as closing:
            model = groups.fresh(_make(_sgd))
            reducer = closing.enter_context(GradientReducer(communicator))
            optimizer = gradient_mean(keras.optimizers.SGD(0.3), communicator, reducer, closing)
            model.compile(optimizer, "mse")
            part = slice(8 * communicator.rank, 8 * communicator.rank + 8)
            (user, items), y = (keras.tree.map_structure(lambda a: a[part], d) for d in task.data)
            batches = tf.data.Dataset.from_tensor_slices(((user, items), y)).batch(4, drop_remainder=True)
            if loop == "fit":
                model.fit(batches, epochs=2, verbose=0)
            else:
                _train(model, optimizer, batches.repeat(2), eagerly=loop == "eager")
            if communicator.rank == 0:
                # The others serve until all have left.
                model.save(tmp_path / "trained.keras")
        return True

    assert results_of_threads("tcp", 2, main) == [True, True]
    one = groups.by_one_process(_make(_sgd, ours=False), task)
    trained = keras.saving.load_model(tmp_path / "trained.keras")
    for name in ("users", "items"):
        reference = one.model.get_layer(name).get_weights()[0]
        np.testing.assert_allclose(_table(trained, name), reference, rtol=2e-5, atol=2e-6, err_msg=name)


def _train(model: keras.Model, optimizer: Any, batches: Any, eagerly: bool) -> None:
    """Train in a loop of one's own."""
    for layer in tables_of(model):
        layer.follow(optimizer)

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)[:, 0] - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    run = step if eagerly else tf.function(step, autograph=False)
    for x, y in batches:
        run(x, tf.cast(y, tf.float32))


def _new_table(rows: int = 1000, seed: int = 0) -> LocalTable:
    return LocalTable(TableSpec(rows, 8, seed, RowInitializer("RandomUniform", -1.0, 1.0)), "table")


def _stepping(table: Any, ids: np.ndarray, steps: int) -> None:
    table.use(sparse_optimizer("SGD", SGD))
    for _ in range(steps):
        rows = table.lookup(ids)
        table.push(ids, rows, 0.5, 0.1)
        table.commit()


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_bytes_grow_with_the_rows_touched_not_with_the_table_and_no_memory_is_new_after_a_while(protocol: str) -> None:
    def moved(table_rows: int, touched: int, ranks: int) -> list[Any]:
        def main(communicator: Communicator) -> tuple[float, int]:
            with TableGroup(communicator, [_new_table(table_rows)]) as group:
                # Every rank has rows of its own, of all owners.
                ids = np.arange(touched) * ranks * ranks + communicator.rank * ranks + np.arange(touched) % ranks
                _stepping(group.tables[0], ids, 4)
                before, allocated = group.moved_bytes, group.tables[0]._buffers.allocations
                _stepping(group.tables[0], ids, 10)
                return (group.moved_bytes - before) / 10, group.tables[0]._buffers.allocations - allocated

        return run_threads(protocol, ranks, main)

    small, large = moved(10**4, 90, 2), moved(10**8, 90, 2)
    assert [o[1] for o in small + large] == [0] * 4
    assert small == large
    # An id out and a row back, an id and a gradient out, for half of the rows; and two requests of 40 bytes.
    rows = 90 / 2 * (4 + 4 + 2 * 8 * 4)
    assert small[0][0] == rows + 2 * 40
    assert moved(10**4, 180, 2)[0][0] == pytest.approx(2 * small[0][0], rel=0.1)
    # Of three ranks each asks for two thirds of its rows, by 160 bytes more of requests.
    assert moved(10**4, 90, 3)[0][0] <= 90 * 2 / 3 * (4 + 4 + 2 * 8 * 4) + 400


def test_the_chief_sets_rows_everywhere() -> None:
    def main(communicator: Communicator) -> np.ndarray:
        with TableGroup(communicator, [_new_table(100)]) as group:
            (table,) = group.tables
            _stepping(table, np.arange(10), 2)
            if communicator.rank == 0:
                ids = np.array([3, 4, 50])
                table.load([TableState(ids, np.full((3, 8), 7.0, np.float32))])
            communicator.barrier()
            return np.array(table.lookup(np.arange(100)))

    expected = _new_table(100).spec.new_rows(np.arange(100))
    expected[[3, 4, 50]] = 7.0
    for rows in results_of_threads("tcp", 3, main):
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize(("chief_pushes", "rate"), [(False, 0.5), (True, 0.25)])
def test_the_rate_of_an_update_is_that_of_the_lowest_rank_that_has_pushed(chief_pushes: bool, rate: float) -> None:
    spec, ids, ones = _new_table().spec, np.arange(4), np.ones((4, 8), np.float32)
    shared = SyncedShard(TableShard(spec), 3, 1.0)
    shared.shard.use(sparse_optimizer("SGD", SGD))
    if chief_pushes:
        shared.push(0, ids, 0 * ones, 0.25)
    shared.push(1, ids, ones, 0.5)
    shared.push(2, ids, 0 * ones, 0.75)
    shared.leave(0)
    found = shared.lookup(ids, 1, np.empty((4, 8), np.float32))
    np.testing.assert_allclose(found, spec.new_rows(ids) - rate, rtol=1e-6)


def test_a_rank_that_does_not_push_is_named() -> None:
    done = threading.Event()

    def main(communicator: Communicator) -> Any:
        with TableGroup(communicator, [_new_table()]) as group:
            if communicator.rank == 1:
                done.wait(20)
                return None
            try:
                _stepping(group.tables[0], np.arange(0, 10, 2), 2)
            finally:
                done.set()

    waited, _ = run_threads("tcp", 2, main, timeout=4.0)
    assert isinstance(waited, TransportTimeoutError), waited
    assert "gradients of ranks [1] for update 1" in str(waited)


def _named(error: Any, lost: int) -> bool:
    """Return whether an error names the lost rank, or a rank that has ended because it had lost that one."""
    if not isinstance(error, PeerLostError) or f"lost rank {error.peer}, which" not in str(error):
        return False
    return error.peer == lost or f"lost rank {lost}, which" in error.reason


@pytest.mark.parametrize("leaves", ["fails", "vanishes"])
@pytest.mark.parametrize(("ranks", "lost"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_lost_rank_ends_the_others_with_its_name(leaves: str, ranks: int, lost: int) -> None:
    def main(communicator: Communicator) -> Any:
        with TableGroup(communicator, [_new_table()]) as group:
            if communicator.rank == lost:
                if leaves == "fails":
                    raise SparktfError("kaboom")
                for link in [*group._asking.values(), *group._service._links.values()]:
                    link.communicator._wake()  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            _stepping(group.tables[0], np.arange(9), 3)

    outcomes = run_threads("tcp", ranks, main)
    for outcome in outcomes[:lost] + outcomes[lost + 1 :]:
        assert _named(outcome, lost), outcome
        assert leaves == "vanishes" or "kaboom" in str(outcome)


@pytest.mark.parametrize(("ranks", "late"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_rank_that_does_not_answer_in_time_is_named(ranks: int, late: int) -> None:
    asked = threading.Event()

    def main(communicator: Communicator) -> Any:
        with TableGroup(communicator, [_new_table()]) as group:
            if communicator.rank == late:
                # Nobody is told of its rows.
                with group.shards[0]._news:
                    communicator.barrier()
                    asked.wait(30)
                return
            communicator.barrier()
            if communicator.rank == 1 - late % 2:
                try:
                    group.tables[0].lookup(np.arange(9))
                finally:
                    asked.set()

    waited = run_threads("tcp", ranks, main, timeout=3.0)[1 - late % 2]
    assert isinstance(waited, TransportTimeoutError), waited
    assert f"waiting for rank {late}, which has rows" in str(waited)


def test_a_rank_that_cannot_be_told_of_the_end_keeps_no_other_from_being_told() -> None:
    closed = threading.Event()

    def main(communicator: Communicator) -> Any:
        group = TableGroup(communicator, [_new_table()])
        if communicator.rank != 0:
            closed.wait(30)
            group.abort("the test ends")
            return None
        links = [group._asking[1], group._asking[2]]
        links[0].abort("it breaks")
        before = links[1].stats.bytes_sent
        try:
            with pytest.raises(PeerLostError, match="lost rank 1, which has rows of sharded tables: it breaks") as told:
                group.close()
        finally:
            closed.set()
        assert told.value.peer == 1
        assert all(link.communicator._released for link in links)  # type: ignore[attr-defined]
        assert not any(thread.is_alive() for thread in group._service._threads.values())
        return links[1].stats.bytes_sent - before

    # A request has five numbers.
    assert results_of_threads("tcp", 3, main)[0] == 40


def test_ranks_that_cannot_meet_leave_nothing_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(communicator: Communicator) -> Any:
        all_gather = communicator.all_gather_bytes

        def broken(data: bytes) -> list[bytes]:
            all_gather(data)
            raise SparktfError("kaboom")

        monkeypatch.setattr(communicator, "all_gather_bytes", broken)
        connect_everyone(communicator)

    # What is left running would be found after the test.
    for outcome in run_threads("tcp", 3, main):
        assert isinstance(outcome, SparktfError), outcome
        assert "kaboom" in str(outcome)
