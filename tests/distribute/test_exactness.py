"""The promise of synchronous training, over row counts, worlds and batch sizes."""

from __future__ import annotations

from typing import Any

import groups
import keras
import numpy as np
import tensorflow as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparktf.data.batches import StepPlan
from sparktf.distribute.reducer import GradientReducer
from sparktf.transport import Communicator
from sparktf.transport.testing import results_of_threads, run_threads

WORLDS = st.lists(st.integers(0, 23), min_size=2, max_size=4).filter(any)


def _mean_gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean squared error of a linear model; NaN without rows, as a mean of nothing is."""
    if not len(x):
        return np.full_like(weights, np.nan)
    return 2 * x.T @ (x @ weights - y) / len(x)


def _reduce(reducer: GradientReducer, share: float, gradient: np.ndarray) -> np.ndarray:
    exchange = reducer.exchange(1, [(gradient.dtype, gradient.shape)])
    (reduced,) = reducer.reduce_now(exchange, share, [gradient])
    return reduced


def _descend(rows: tuple[int, ...], batch_size: int, epochs: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Train a linear model by gradient descent: every rank's weights, and those of one process."""
    plan = StepPlan(rows, batch_size)
    rng = np.random.default_rng([*rows, batch_size])
    data = [(rng.normal(size=(n, 3)), rng.normal(size=n)) for n in rows]

    def batch(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(step * batch_size, (step + 1) * batch_size)
        return data[rank][0][part], data[rank][1][part]

    def main(communicator: Communicator) -> np.ndarray:
        reducer, weights, rank = GradientReducer(communicator), np.zeros(3), communicator.rank
        exchange = reducer.exchange(1, [(weights.dtype, weights.shape)])
        for _ in range(epochs):
            for step in range(plan.steps):
                share = plan.local_rows(step, rank) / plan.global_rows(step)
                (gradient,) = reducer.reduce_now(exchange, share, [_mean_gradient(weights, *batch(rank, step))])
                weights = weights - 0.05 * gradient
        return weights

    weights = np.zeros(3)
    for _ in range(epochs):
        for step in range(plan.steps):
            parts = [batch(rank, step) for rank in range(len(rows))]
            x, y = (np.concatenate([part[i] for part in parts]) for i in range(2))
            weights = weights - 0.05 * _mean_gradient(weights, x, y)
    return run_threads("tcp", len(rows), main), weights


@given(rows=WORLDS, batch_size=st.integers(1, 9))
@example(rows=[5, 0], batch_size=3)
@example(rows=[0, 0, 1], batch_size=4)
@settings(max_examples=150, deadline=None)
def test_each_steps_gradient_is_that_of_one_process_on_the_global_batch(rows: list[int], batch_size: int) -> None:
    ranks, alone = _descend(tuple(rows), batch_size, epochs=2)
    for rank in ranks:
        assert isinstance(rank, np.ndarray), rank
        np.testing.assert_array_equal(rank, ranks[0])
    np.testing.assert_allclose(ranks[0], alone, rtol=1e-6, atol=1e-9)


def _network() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.05), "mse", metrics=["mae"])
    return model


def _task(rows: list[int], batch_size: int) -> groups.Task:
    rng = np.random.default_rng([*rows, batch_size])
    x, y = rng.normal(size=(sum(rows), 3)).astype("float32"), rng.normal(size=sum(rows)).astype("float32")
    weight = rng.uniform(0.1, 2.0, size=sum(rows)).astype("float32")
    return groups.Task((x, y, weight), tuple(rows), batch_size)


# Every example traces one graph a rank: seconds each, so few of them, and the corners by name.
@given(rows=WORLDS, batch_size=st.integers(1, 9))
@example(rows=[7, 7], batch_size=3)
@example(rows=[10, 3], batch_size=4)
@example(rows=[0, 5], batch_size=2)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_keras_trains_over_ranks_as_one_process_does(rows: list[int], batch_size: int) -> None:
    groups.assert_as_one_process(_network, _task(rows, batch_size))


def test_two_fits_with_one_seed_are_equal_to_the_last_bit() -> None:
    task = _task([9, 6], 4)
    first, second = (groups.by_ranks(_network, task) for _ in range(2))
    groups.assert_ranks_agree([*first, *second])


def test_ranks_with_different_models_are_refused_before_the_first_update() -> None:
    def main(communicator: Communicator) -> Any:
        return _reduce(GradientReducer(communicator), 0.5, np.ones(3 + communicator.rank, "float32"))

    outcomes = run_threads("tcp", 2, main)
    assert any("same gradients on every rank" in str(outcome) for outcome in outcomes), outcomes


def test_ranks_whose_models_differ_in_a_sparse_gradient_alone_are_refused_too() -> None:
    def main(communicator: Communicator) -> Any:
        width = 3 + communicator.rank
        rows = tf.IndexedSlices(tf.ones((2, width)), tf.constant([0, 1]), tf.constant([5, width]))
        with GradientReducer(communicator) as reducer:
            return tf.function(lambda: reducer.reduce(1, [tf.ones(4), rows], tf.constant(0.5)))()

    outcomes = run_threads("tcp", 2, main)
    assert any("same gradients on every rank" in str(outcome) for outcome in outcomes), outcomes


def test_a_nan_of_a_rank_without_rows_does_not_reach_the_others() -> None:
    def main(communicator: Communicator) -> np.ndarray:
        gradient = np.full(4, np.nan if communicator.rank else 2.0, "float32")
        return np.array(_reduce(GradientReducer(communicator), 0.0 if communicator.rank else 1.0, gradient))

    for outcome in run_threads("tcp", 2, main):
        np.testing.assert_array_equal(outcome, np.full(4, 2.0, "float32"))


def test_a_wish_to_stop_reaches_all_ranks_in_the_step_after_it() -> None:
    def main(communicator: Communicator) -> list[bool]:
        reducer, seen = GradientReducer(communicator), []
        for step in range(3):
            if communicator.rank == 1 and step == 1:
                reducer.request_stop()
            _reduce(reducer, 0.5, np.ones(2, "float32"))
            seen.append(reducer.stop_agreed)
        return seen

    assert results_of_threads("tcp", 2, main) == [[False, True, True]] * 2


def test_no_buffer_is_made_after_the_first_two_steps() -> None:
    def main(communicator: Communicator) -> bool:
        reducer = GradientReducer(communicator)
        gradient = np.ones(100_000, "float32")
        places = []
        for _ in range(6):
            reduced = _reduce(reducer, 0.5, gradient)
            places.append(reduced.__array_interface__["data"][0])
        return len(set(places)) == 2

    assert results_of_threads("tcp", 2, main) == [True, True]
