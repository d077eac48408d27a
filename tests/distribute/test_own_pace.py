"""Keras's ``fit`` by workers at their own pace, on parameter servers, over real sockets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from groups import Task, assert_equal_to_one_process, assert_ranks_agree, by_one_process, fresh
from paces import by_workers

from sparktf.errors import ParamError, TransportTimeoutError

_RANDOM = np.random.default_rng(5)
X = _RANDOM.normal(size=(60, 6)).astype("float32")
Y = (X @ _RANDOM.normal(size=(6, 1)) + 0.3).astype("float32")
CLASSES = (X[:, 0] + X[:, 1] > 0).astype("int64")
WEIGHTS = _RANDOM.uniform(0.2, 3.0, size=60).astype("float32")

# Rows that do not divide: a short batch on each worker, and steps in which one of them has no rows.
UNEVEN = Task((X[:19], Y[:19]), (13, 6))
HELD_OUT = replace(UNEVEN, held_out=(X[40:49], Y[40:49]), held_out_rows=(7, 2))


def mlp(optimizer: Any, **compiled: Any) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1, name="head")]
    )
    model.compile(optimizer, **{"loss": "mse", **compiled})
    return model


def classifier(*layers: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.SGD(0.2), "binary_crossentropy", metrics=["accuracy", keras.metrics.AUC(name="auc")])
    return model


def two_headed() -> keras.Model:
    inputs = keras.Input((6,))
    heads = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")}
    model = keras.Model(inputs, heads)
    model.compile(keras.optimizers.SGD(0.1), {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5})
    return model


KINDS: dict[str, tuple[Callable[[], keras.Model], Task]] = {
    "momentum": (lambda: mlp(keras.optimizers.SGD(0.1, momentum=0.9)), HELD_OUT),
    "weight decay": (lambda: mlp(keras.optimizers.AdamW(0.02, weight_decay=0.1)), UNEVEN),
    "schedule": (lambda: mlp(keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.2, 1, 0.7))), UNEVEN),
    "sums over rows": (lambda: mlp(keras.optimizers.SGD(0.02), loss=keras.losses.MeanSquaredError("sum")), UNEVEN),
    "sample weights": (lambda: mlp(keras.optimizers.SGD(0.1)), replace(UNEVEN, data=(X[:19], Y[:19], WEIGHTS[:19]))),
    "several steps in one execution": (lambda: mlp(keras.optimizers.Adam(0.02), steps_per_execution=3), UNEVEN),
    "metrics": (classifier, replace(UNEVEN, data=(X[:19], CLASSES[:19]))),
    "several outputs": (two_headed, replace(UNEVEN, data=(X[:19], {"a": Y[:19], "b": 2 * Y[:19]}))),
    "a worker without rows": (lambda: mlp(keras.optimizers.Adam(0.02)), Task((X[:9], Y[:9]), (9, 0))),
}


@pytest.mark.parametrize("name", KINDS)
def test_without_staleness_training_is_that_of_one_process_on_the_global_batch(name: str) -> None:
    make, task = KINDS[name]
    done = by_workers(make, task, servers=2, max_staleness=0).raise_first()
    assert_equal_to_one_process(done.workers, make, task)


@pytest.mark.parametrize("max_staleness", [None, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("rows", [(23, 9, 8), (40, 0, 0)])
def test_metrics_are_those_of_all_rows_whatever_the_paces(max_staleness: int | None, rows: tuple[int, ...]) -> None:
    def still() -> keras.Model:
        model = classifier()
        model.optimizer.learning_rate = 0.0
        return model

    task = Task((X[:40], CLASSES[:40]), rows, held_out=(X[40:], CLASSES[40:]), held_out_rows=(15, 0, 5))
    done = by_workers(still, task, max_staleness=max_staleness).raise_first()
    assert_ranks_agree(done.workers)
    one = fresh(still)
    expected = one.evaluate(X[:40], CLASSES[:40], verbose=0, return_dict=True)
    held_out = one.evaluate(X[40:], CLASSES[40:], verbose=0, return_dict=True)
    expected |= {f"val_{name}": value for name, value in held_out.items()}
    history = done.workers[0].report.history
    assert set(history) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(history[name], [value, value], rtol=1e-5, err_msg=name)


def test_workers_end_with_equal_weights_that_have_learned() -> None:
    make = lambda: mlp(keras.optimizers.SGD(0.02), metrics=["mae"])  # noqa: E731
    task = Task((X, Y), (30, 20, 10), epochs=15, held_out=(X, Y), held_out_rows=(20, 20, 20))
    done = by_workers(make, task, servers=2).raise_first()
    assert_ranks_agree(done.workers)
    before = fresh(make).evaluate(X, Y, verbose=0, return_dict=True)["loss"]
    assert done.workers[0].report.history["val_loss"][-1] < before / 5
    (report, _) = done.servers
    # Batches of four: 8, 5 and 3 steps.
    assert report.pushes == (15 * 8, 15 * 5, 15 * 3)
    assert report.rows == (15 * 30, 15 * 20, 15 * 10)


def test_moving_statistics_agree_after_a_fit() -> None:
    task = Task((X, CLASSES), (30, 20, 10), epochs=3)
    done = by_workers(lambda: classifier(keras.layers.BatchNormalization()), task).raise_first()
    assert_ranks_agree(done.workers)
    mean = done.workers[0].model.layers[0].moving_mean.numpy()
    assert np.abs(mean).max() > 1e-3


@pytest.mark.parametrize("optimizer", [lambda: keras.optimizers.Adam(0.05), lambda: keras.optimizers.SGD(0.1, 0.9)])
def test_the_optimizers_state_goes_on_in_a_second_fit(optimizer: Callable[[], Any]) -> None:
    task = replace(UNEVEN, epochs=2)
    first = by_workers(lambda: mlp(optimizer()), task, servers=2, max_staleness=0).raise_first()
    (saver,) = first.savers
    trained = first.workers[saver].model
    state = {v.path: v.numpy() for v in trained.optimizer.variables}
    assert any(value.ndim and np.abs(value).max() > 0 for value in state.values())

    def again() -> keras.Model:
        model = mlp(optimizer())
        model.optimizer.build(model.trainable_variables)
        model.set_weights(trained.get_weights())
        for ours, theirs in zip(model.optimizer.variables, trained.optimizer.variables, strict=True):
            ours.assign(theirs)
        return model

    second = by_workers(again, task, servers=2, max_staleness=0).raise_first()
    through = by_one_process(lambda: mlp(optimizer()), replace(task, epochs=4))
    for ours, theirs in zip(second.workers[0].model.get_weights(), through.model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
    assert int(second.workers[0].model.optimizer.iterations) == int(through.model.optimizer.iterations)


def test_one_workers_wish_to_stop_stops_all() -> None:
    class _Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 1:
                self.model.stop_training = True

    task = Task((X, Y), (30, 30), epochs=50, callbacks=lambda worker: [_Stops()] if worker else [])
    done = by_workers(lambda: mlp(keras.optimizers.SGD(0.02)), task).raise_first()
    assert_ranks_agree(done.workers)
    assert len(done.workers[0].report.history["loss"]) == 1


def test_early_stopping_restores_the_same_weights_on_all_workers() -> None:
    def stopping(worker: int) -> list[Any]:
        return [keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)]

    # It diverges.
    task = Task((X, Y), (30, 30), epochs=20, held_out=(X, Y), held_out_rows=(30, 30), callbacks=stopping)
    done = by_workers(lambda: mlp(keras.optimizers.SGD(1.5)), task).raise_first()
    assert_ranks_agree(done.workers)
    assert len(done.workers[0].report.history["loss"]) < 20


class _Failing(keras.callbacks.Callback):
    """Fails as an epoch begins."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            raise RuntimeError("it breaks")


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_go_on_without_a_worker_that_is_lost(lost: int) -> None:
    task = Task((X, Y), (20, 20, 20), epochs=4, callbacks=lambda worker: [_Failing()] if worker == lost else [])
    done = by_workers(lambda: mlp(keras.optimizers.SGD(0.02), metrics=["mae"]), task, max_staleness=2)
    assert "it breaks" in str(done.workers[lost])
    left = [fitted for worker, fitted in enumerate(done.workers) if worker != lost]
    assert_ranks_agree(left)
    assert len(left[0].report.history["mae"]) == 4
    assert done.savers == [1 if lost == 0 else 0]
    (report,) = done.servers
    assert report.lost == (lost,)
    # It had trained for one epoch.
    assert report.rows[lost] == 20
    assert sum(report.rows) == 20 + 2 * 4 * 20


class _Sleeping(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        time.sleep(7)


def test_a_worker_that_hangs_is_named_after_the_timeout() -> None:
    task = Task((X, Y), (20, 20), epochs=2, callbacks=lambda worker: [_Sleeping()] if worker else [])
    done = by_workers(lambda: mlp(keras.optimizers.SGD(0.02)), task, timeout=3.0)
    (error,) = done.servers
    assert isinstance(error, TransportTimeoutError)
    assert "worker 1" in str(error)


def test_what_servers_cannot_train_is_refused() -> None:
    ema = keras.optimizers.Adam(use_ema=True)
    done = by_workers(lambda: mlp(ema), UNEVEN)
    assert all(isinstance(outcome, ParamError) for outcome in done.workers)
    assert "use_ema" in str(done.workers[0])
