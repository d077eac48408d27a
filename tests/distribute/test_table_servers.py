"""Tables on parameter servers: updates of one process without staleness, and learning with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from groups import Task, assert_ranks_agree, by_one_process, weights
from paces import by_workers
from servers import connected

from sparktf.distribute import ShardedEmbedding
from sparktf.distribute.pair import naming_server
from sparktf.distribute.sparse_optimizers import sparse_optimizer_of
from sparktf.distribute.table import TableShard
from sparktf.distribute.table_rows import RowInitializer, TableSpec
from sparktf.distribute.table_servers import FreeShard, leave_tables
from sparktf.distribute.table_service import SyncedShard, TableService
from sparktf.distribute.table_wire import ASKS, LEAVE, SERVES, STATE, Link, receive_pieces, request
from sparktf.errors import PeerLostError, TransportTimeoutError

_RANDOM = np.random.default_rng(7)
IDS = _RANDOM.integers(0, 50, size=(60, 3))
Y = (IDS % 7 == 3).sum(axis=1, keepdims=True).astype("float32")


def recommender(optimizer: Callable[[], Any]) -> keras.Model:
    table = ShardedEmbedding(1000, 4, seed=3, name="table")
    layers = [keras.Input((3,), dtype="int64"), table, keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer(), "mse")
    return model


def rows(model: keras.Model) -> np.ndarray:
    return np.array(model.get_layer("table").access.lookup(np.arange(60)))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_without_staleness_tables_are_those_of_one_process(name: str) -> None:
    def make() -> keras.Model:
        return recommender(lambda: getattr(keras.optimizers, name)(0.05))

    task = Task((IDS[:38], Y[:38]), (25, 13), epochs=2)
    done = by_workers(make, task, servers=2, max_staleness=0).raise_first()
    assert_ranks_agree(done.workers)
    one = by_one_process(make, task)
    (saver,) = done.savers
    trained = done.workers[saver].model
    for ours, theirs in zip(weights(trained), weights(one.model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(rows(trained), rows(one.model), rtol=2e-5, atol=2e-6)
    assert np.abs(rows(one.model) - rows(make())).max() > 1e-2


def factors(optimizer: Callable[[], Any]) -> keras.Model:
    """Return a matrix factorisation: all that it trains is in tables."""
    users, items = (keras.Input((), dtype="int64", name=name) for name in ("user", "item"))
    vectors = [ShardedEmbedding(100, 4, seed=n, name=f"table_{n}")(x) for n, x in enumerate((users, items))]
    model = keras.Model([users, items], keras.layers.Dot(1)(vectors))
    model.compile(optimizer(), "mse")
    return model


@pytest.mark.parametrize("max_staleness", [0, None])
def test_a_model_that_has_nothing_but_tables_trains_on_servers(max_staleness: int | None) -> None:
    decay = keras.optimizers.schedules.ExponentialDecay

    def make() -> keras.Model:
        return factors(lambda: keras.optimizers.SGD(decay(0.5, 4, 0.9)))

    ids, want = IDS[:, :2] % 10, (IDS[:, :1] % 10 / 10).astype("float32")
    task = Task(({"user": ids[:, 0], "item": ids[:, 1]}, want), (30, 30), epochs=4)
    done = by_workers(make, task, servers=2, max_staleness=max_staleness).raise_first()
    (saver,) = done.savers
    trained = done.workers[saver].model
    steps = 4 * -(-30 // task.batch_size) * (1 if max_staleness == 0 else 2)
    assert [report.updates for report in done.servers] == [steps] * 2
    assert int(trained.optimizer.iterations) == steps
    losses = done.workers[saver].report.history["loss"]
    assert losses[-1] < losses[0]
    if max_staleness == 0:
        one = by_one_process(make, task).model
        for name in ("table_0", "table_1"):
            ours, theirs = (np.array(m.get_layer(name).access.lookup(np.arange(10))) for m in (trained, one))
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_tables_learn_at_each_workers_own_pace() -> None:
    def make() -> keras.Model:
        return recommender(lambda: keras.optimizers.Adagrad(0.3))

    task = Task((IDS, Y), (30, 20, 10), epochs=20, held_out=(IDS, Y), held_out_rows=(20, 0, 40))
    done = by_workers(make, task, servers=2).raise_first()
    history = done.workers[0].report.history["val_loss"]
    assert history[-1] < 0.1 * np.var(Y)


class _Failing(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            raise RuntimeError("it breaks")


@pytest.mark.parametrize("max_staleness", [None, 0])
def test_tables_are_trained_on_without_a_worker_that_is_lost(max_staleness: int | None) -> None:
    def make() -> keras.Model:
        return recommender(lambda: keras.optimizers.SGD(0.05))

    task = Task((IDS, Y), (20, 20, 20), epochs=3, callbacks=lambda worker: [_Failing()] if worker == 0 else [])
    done = by_workers(make, task, max_staleness=max_staleness)
    assert "it breaks" in str(done.workers[0])
    assert done.savers == [1]
    assert len(done.workers[1].report.history["loss"]) == 3
    assert np.abs(rows(done.workers[1].model) - rows(make())).max() > 1e-2


@pytest.mark.parametrize("max_staleness", [None, 0])
def test_tables_are_trained_without_a_worker_that_is_lost_before_it_asks_for_rows(max_staleness: int | None) -> None:
    def make() -> keras.Model:
        return recommender(lambda: keras.optimizers.SGD(0.05))

    task = Task((IDS, Y), (20, 20, 20), epochs=3)
    done = by_workers(make, task, servers=2, max_staleness=max_staleness, never_there=1)
    assert "it breaks" in str(done.workers[1])
    assert [report.lost for report in done.servers] == [(1,), (1,)]
    assert done.savers == [0]
    for worker in (0, 2):
        assert len(done.workers[worker].report.history["loss"]) == 3
    assert np.abs(rows(done.workers[0].model) - rows(make())).max() > 1e-2


@pytest.mark.parametrize("max_staleness", [None, 0])
def test_a_server_that_fails_by_itself_ends_the_fit_of_all_workers_with_its_words(
    monkeypatch: pytest.MonkeyPatch, max_staleness: int | None
) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("no such slot")

    monkeypatch.setattr(TableShard, "update", broken)
    task = Task((IDS, Y), (30, 30), epochs=1)
    done = by_workers(lambda: recommender(lambda: keras.optimizers.SGD(0.05)), task, max_staleness=max_staleness)
    for outcome in done.workers:
        assert isinstance(outcome, PeerLostError), outcome
        assert "parameter server 0" in str(outcome)
        assert "ValueError: no such slot" in str(outcome)


def test_a_server_that_cannot_be_told_of_the_end_keeps_no_other_from_being_told() -> None:
    (links,), ends = connected("tcp", 1, 3, 10.0)
    links[1].abort("it breaks")
    with pytest.raises(PeerLostError, match="parameter server 1: it breaks"):
        leave_tables(links)
    assert all(link._released for link in links)
    for server in (0, 2):
        assert ends[server][0].recv(ASKS, request(-1))[0] == LEAVE
    for (end,) in ends:
        end.close()


# Of four pieces, which no connection takes without a reader.
_ROWS = 1 << 18


def _free() -> FreeShard:
    """Return a part of a table that any push updates, of which all even rows have been updated once."""
    shard = TableShard(TableSpec(_ROWS * 2, 8, 3, RowInitializer("Zeros")))
    shard.use(sparse_optimizer_of(keras.optimizers.Adagrad(0.1, initial_accumulator_value=1.0)))
    free = FreeShard(shard, 2, 10.0)
    free.push(0, 2 * np.arange(_ROWS), np.ones((_ROWS, 8), np.float32), 1.0)
    return free


class _PushedBetween(dict[str, Any]):
    """Slots that are read later than rows: a push comes in between, where it is let."""

    def __init__(self, free: FreeShard) -> None:
        super().__init__(free.shard._slots)
        self._pushing = threading.Thread(target=free.push, args=(1, np.array([2]), np.ones((1, 8), np.float32), 1.0))
        self._seen = False

    def items(self) -> Any:
        if not self._seen:
            self._seen = True
            self._pushing.start()
            self._pushing.join(1.0)
        return super().items()


def test_a_piece_of_a_state_has_rows_and_slots_of_one_moment_though_workers_push() -> None:
    free = _free()
    free.shard._slots = slots = _PushedBetween(free)
    piece = next(free.pieces(0))
    slots._pushing.join(10)
    assert piece.slots["accumulator"][1].tolist() == [2.0] * 8
    np.testing.assert_allclose(piece.rows[1], -1 / np.sqrt(2), rtol=1e-6)
    # The push has come, behind the piece.
    assert free.shard._slots["accumulator"][2].tolist() == [3.0] * 8


def test_workers_push_while_another_reads_the_state_however_slowly() -> None:
    free = _free()
    (links,), ((end,),) = connected("tcp", 1, 1, 30.0)
    service = TableService([free], {0: end})
    link = Link(links[0], SERVES, partial(naming_server, 0))
    link.send(request(STATE))
    reading = receive_pieces(link, 8)
    pieces = [next(reading)]
    # Of the last rows, an old and a new one.
    last = np.array([2 * _ROWS - 2, 2 * _ROWS - 1])
    pushing = threading.Thread(target=free.push, args=(1, last, np.ones((2, 8), np.float32), 1.0), daemon=True)
    pushing.start()
    pushing.join(10)
    assert not pushing.is_alive()
    pieces += reading
    leave_tables(links)
    service.join()
    np.testing.assert_array_equal(np.concatenate([piece.ids for piece in pieces]), 2 * np.arange(_ROWS))
    (accumulated,) = np.unique(pieces[-1].slots["accumulator"][-1])
    rate = 1 / np.sqrt(2) + (1 / np.sqrt(3) if accumulated == 3 else 0)
    np.testing.assert_allclose(pieces[-1].rows[-1], -rate, rtol=1e-6)


def test_a_service_that_ends_does_not_wait_for_pushes_that_no_longer_come(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SyncedShard(_free().shard, 2, 30.0)
    waits, waited = threading.Event(), shared.wait
    monkeypatch.setattr(shared, "wait", lambda clock: (waits.set(), waited(clock)))
    (links,), ((end,),) = connected("tcp", 1, 1, 30.0)
    service = TableService([shared], {0: end})
    Link(links[0], SERVES, partial(naming_server, 0)).send(request(STATE, clock=1))
    assert waits.wait(10)
    began = time.monotonic()
    service.abort("it breaks")
    assert time.monotonic() - began < 10
    links[0].close()


def test_a_rank_that_does_not_leave_is_named_when_the_time_to_leave_is_over() -> None:
    (links,), ((end,),) = connected("tcp", 1, 1, 30.0)
    service = TableService([_free()], {0: end})
    with pytest.raises(TransportTimeoutError, match=r"Expected rank 0 to leave the sharded tables within 0\.2 s"):
        service.join(0.2)
    leave_tables(links)
    service.join(10.0)
