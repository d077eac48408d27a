"""Gradients that are sent bucket after bucket while the backward pass runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import groups
import keras
import numpy as np
import pytest
import tensorflow as tf

from sparktf.distribute import buckets
from sparktf.distribute.exchange import GradientExchange
from sparktf.distribute.reducer import GradientReducer
from sparktf.distribute.slices import SlicesExchange
from sparktf.errors import PeerLostError
from sparktf.transport import Communicator
from sparktf.transport.testing import results_of_threads, run_threads


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "FIRST_BYTES", 100)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 400)


def _data(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(rows, 6)).astype("float32"), rng.normal(size=(rows, 2)).astype("float32")


def _deep(optimizer: Any = None) -> keras.Model:
    layers = [keras.Input((6,)), *(keras.layers.Dense(12, "tanh") for _ in range(4)), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse")
    return model


@pytest.mark.parametrize("rows", [(8, 8), (9, 0, 5)])
def test_a_model_of_many_buckets_is_trained_as_by_one_process(rows: tuple[int, ...]) -> None:
    groups.assert_as_one_process(_deep, groups.Task(_data(sum(rows)), rows, epochs=3))


def test_several_steps_in_one_execution_keep_their_buckets_apart() -> None:
    def make() -> keras.Model:
        model = _deep()
        model.compile("adam", "mse", steps_per_execution=3)
        return model

    groups.assert_as_one_process(make, groups.Task(_data(24), (13, 11), epochs=2))


def _steps(communicator: Communicator, count: int, gradients: Any) -> tuple[list[list[np.ndarray]], list[Any]]:
    """Reduce in a traced step, `count` times; return the results and the exchanges."""
    with GradientReducer(communicator) as reducer:
        step = tf.function(lambda share: reducer.reduce(1, gradients(), share))
        results = [[part.numpy() for part in step(tf.constant(0.5))] for _ in range(count)]
        return results, list(reducer._exchanges.values())


def test_buckets_are_summed_each_in_its_place() -> None:
    def main(communicator: Communicator) -> Any:
        def gradients() -> list[tf.Tensor]:
            return [tf.fill([20 + i, 3], float(i + communicator.rank)) for i in range(6)]

        return _steps(communicator, 3, gradients)

    for results, (exchange,) in results_of_threads("tcp", 2, main):
        assert len(exchange.buckets) == 4
        for step in results:
            assert [part.shape for part in step] == [(20 + i, 3) for i in range(6)]
            assert all((part == i + 0.5).all() for i, part in enumerate(step))


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_nothing_is_allocated_or_registered_after_the_first_step(protocol: str) -> None:
    def main(communicator: Communicator) -> list[int]:
        counts = []
        with GradientReducer(communicator) as reducer:
            step = tf.function(lambda: reducer.reduce(1, [tf.ones(1000), tf.ones(2000)], tf.constant(0.5)))
            for _ in range(6):
                step()
                counts.append(communicator.stats.registrations)
        return counts

    for counts in results_of_threads(protocol, 2, main):
        assert len(set(counts)) == 1


def test_sums_of_half_precision_are_narrowed_into_the_same_two_buffers_every_step() -> None:
    def main(communicator: Communicator) -> tuple[list[int], list[Any]]:
        gradient = tf.fill((7, 33), tf.constant(1.0 + communicator.rank, tf.bfloat16))
        places, values = [], []
        with GradientReducer(communicator) as reducer:
            exchange = reducer.exchange(1, [(np.dtype(gradient.dtype.as_numpy_dtype), (7, 33))])
            for _ in range(6):
                (summed,) = reducer.reduce_now(exchange, 0.5, [gradient.numpy()])
                places.append(summed.__array_interface__["data"][0])
                values.append((summed.dtype.name, summed.shape, float(summed.min()), float(summed.max())))
        return places, values

    for places, values in results_of_threads("tcp", 2, main):
        assert places == places[:2] * 3
        assert places[0] != places[1]
        assert set(values) == {("bfloat16", (7, 33), 1.5, 1.5)}


def test_tensorflow_reads_the_sums_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []
    results = GradientExchange.results

    def noted(self: GradientExchange) -> Any:
        summed, stop = results(self)
        lent.extend(part.__array_interface__["data"][0] for part in summed)
        return summed, stop

    monkeypatch.setattr(GradientExchange, "results", noted)

    def main(communicator: Communicator) -> list[int]:
        with GradientReducer(communicator) as reducer:
            step = tf.function(lambda: reducer.reduce(1, [tf.ones(1001), tf.ones((7, 33))], tf.constant(0.5)))
            # dlpack, unlike numpy(), never copies.
            return [np.from_dlpack(part).__array_interface__["data"][0] for part in map(_dlpack, step())]

    for places in results_of_threads("tcp", 2, main):
        assert set(places) <= set(lent)


class _dlpack:
    """A tensor as numpy takes it without a copy."""

    def __init__(self, tensor: tf.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return tf.experimental.dlpack.to_dlpack(self._tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_an_error_in_the_sending_thread_ends_the_step_with_its_own_words() -> None:
    def main(communicator: Communicator) -> Any:
        if communicator.rank == 1:
            communicator.barrier()
            raise ValueError("on purpose")
        communicator.barrier()
        with GradientReducer(communicator) as reducer:
            step = tf.function(lambda: reducer.reduce(1, [tf.ones(1000), tf.ones(2000)], tf.constant(0.5)))
            with pytest.raises(tf.errors.OpError):
                step()
            return reducer.failure

    failure, _ = run_threads("tcp", 2, main)
    assert isinstance(failure, PeerLostError)
    assert "on purpose" in str(failure)


def _reductions(make_optimizer: Any) -> int:
    def make() -> keras.Model:
        return _deep(make_optimizer())

    begun: list[int] = []
    begin = GradientExchange.begin

    def counted(self: GradientExchange) -> None:
        # One of a single number is ranks' decision to skip a step.
        begun.extend([1] if len(self.buckets) > 1 else [])
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientExchange, "begin", counted)
        groups.assert_as_one_process(make, groups.Task(_data(48), (24, 24), epochs=2))
    return len(begun)


def _accumulating(steps: int | None) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.01, gradient_accumulation_steps=steps)


def _scaled(steps: int | None) -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(_accumulating(steps), initial_scale=1024.0)


@pytest.mark.parametrize("optimizer", [_accumulating, _scaled])
def test_gradients_that_are_accumulated_are_reduced_once_an_update(optimizer: Any) -> None:
    # 12 steps on 2 ranks, and 3 updates of 4 steps.
    assert _reductions(lambda: optimizer(None)) == 24
    assert _reductions(lambda: optimizer(4)) == 6


@pytest.mark.parametrize("optimizer", [_accumulating, pytest.param(_scaled, marks=pytest.mark.long)])
def test_what_was_accumulated_when_a_fit_ended_is_neither_lost_nor_counted_twice(
    tmp_path: Path, optimizer: Any
) -> None:
    def make() -> keras.Model:
        return _deep(optimizer(5))

    def loaded() -> keras.Model:
        return keras.saving.load_model(tmp_path / "chief.keras")

    task = groups.Task(_data(24), (12, 12), epochs=1)
    groups.by_ranks(make, task)[0].model.save(tmp_path / "chief.keras")
    # Three steps were taken, and the update comes after two more.
    resumed = groups.by_ranks(loaded, task)
    groups.assert_ranks_agree(resumed)
    alone = groups.by_one_process(make, task).model
    groups.by_one_process(lambda: alone, task)
    for ours, theirs in zip(resumed[0].model.variables, alone.variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6)


def test_slices_of_any_number_are_joined_into_buffers_that_grow_to_the_largest() -> None:
    def main(communicator: Communicator) -> list[int]:
        exchange, allocations = SlicesExchange(communicator), []
        for step in (5, 40, 40, 3, 17, 40, 40):
            rows = step + communicator.rank
            values, indices = exchange.join(0.5, [np.full((rows, 4), 2.0 + communicator.rank), np.arange(rows)])
            assert values.tolist() == [[1.0] * 4] * step + [[1.5] * 4] * (step + 1)
            assert indices.tolist() == [*range(step), *range(step + 1)]
            allocations.append(exchange.allocations)
        return allocations

    for allocations in results_of_threads("tcp", 2, main):
        # By the third step both turns have seen the largest number.
        assert len(set(allocations[2:])) == 1


def test_sparse_gradients_stay_sparse_and_send_what_they_hold() -> None:
    rows = 100_000

    def main(communicator: Communicator) -> tuple[Any, int]:
        with GradientReducer(communicator) as reducer:

            def gradients() -> list[tf.IndexedSlices]:
                values = tf.fill([3, 8], 1.0 + communicator.rank)
                return [tf.IndexedSlices(values, tf.constant([5, 5, rows - 1]), tf.constant([rows, 8]))]

            (reduced,) = tf.function(lambda: reducer.reduce(1, gradients(), tf.constant(0.5)))()
            return reduced, communicator.stats.bytes_sent

    for reduced, sent in results_of_threads("tcp", 2, main):
        assert isinstance(reduced, tf.IndexedSlices)
        assert reduced.values.numpy().tolist() == [[0.5] * 8] * 3 + [[1.0] * 8] * 3
        assert reduced.indices.numpy().tolist() == [5, 5, rows - 1] * 2
        # The whole table has 3.2 MB.
        assert sent < 2000


def test_a_rank_without_rows_leaves_its_slices_out() -> None:
    def main(communicator: Communicator) -> Any:
        values = np.full((3, 2), np.nan if communicator.rank else 1.0)
        joined = SlicesExchange(communicator).join(float(communicator.rank == 0), [values, np.arange(3)])
        return [part.tolist() for part in joined]

    assert results_of_threads("tcp", 2, main) == [[[[1.0, 1.0]] * 3, [0, 1, 2]]] * 2


def test_gradients_travel_as_bfloat16_where_asked_for() -> None:
    def main(communicator: Communicator) -> tuple[np.ndarray, int]:
        gradient = np.random.default_rng(communicator.rank).random(200_000, np.float32)
        with GradientReducer(communicator, "bf16") as reducer:
            exchange = reducer.exchange(1, [(gradient.dtype, gradient.shape)])
            exchange.agree()
            before = communicator.stats.bytes_sent
            (reduced,) = reducer.reduce_now(exchange, 0.5, [gradient])
            return reduced.copy(), communicator.stats.bytes_sent - before

    (first, sent), (second, _) = run_threads("tcp", 2, main)
    whole = sum(0.5 * np.random.default_rng(rank).random(200_000, np.float32) for rank in range(2))
    assert first.tobytes() == second.tobytes()
    np.testing.assert_allclose(first, whole, rtol=2**-7)
    # Half of each rank's 800,000 bytes twice around, and half as wide.
    assert sent < 420_000


class Towers(keras.Model):
    """Several equal layers, each updated by an application of its own of the one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = [keras.layers.Dense(2, use_bias=False) for _ in range(5)]

    def call(self, x: Any) -> Any:
        return sum(tower(x) for tower in self.towers)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            losses = [self.compute_loss(x, y * (i + 1.0), tower(x)) for i, tower in enumerate(self.towers)]
        for loss, tower in zip(losses, self.towers, strict=True):
            self.optimizer.apply(tape.gradient(loss, tower.trainable_variables), tower.trainable_variables)
        return {"loss": sum(losses)}


def test_sets_of_variables_of_equal_shapes_are_not_confused_within_a_step() -> None:
    def make() -> keras.Model:
        model = Towers()
        model(np.zeros((1, 6), "float32"))
        optimizer = keras.optimizers.SGD(0.05)
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, "mse")
        return model

    groups.assert_as_one_process(make, groups.Task(_data(24), (13, 11), epochs=2))


def test_two_optimizers_of_several_buckets_take_turns_in_one_order() -> None:
    def main(communicator: Communicator) -> list[list[float]]:
        with GradientReducer(communicator) as reducer:

            def both(x: tf.Tensor) -> list[tf.Tensor]:
                first = reducer.reduce(1, [tf.fill([300 + i], x) for i in range(4)], tf.constant(0.5))
                second = reducer.reduce(2, [tf.fill([400 + i], 2 * x) for i in range(4)], tf.constant(0.5))
                return [*first, *second]

            step = tf.function(both)
            results = [step(tf.constant(float(step_number))) for step_number in range(5)]
            return [[float(part[-1]) for part in result] for result in results[-2:]]

    assert results_of_threads("tcp", 2, main) == [[[3.0] * 4 + [6.0] * 4, [4.0] * 4 + [8.0] * 4]] * 2


class Late(Towers):
    """Its own step keeps its optimizer from being built before the first one."""

    def train_step(self, data: Any) -> Any:
        return keras.Model.train_step(self, data)


def test_an_accumulating_optimizer_that_is_built_in_the_first_step_trains_too() -> None:
    def make() -> keras.Model:
        model = Late()
        model(np.zeros((1, 6), "float32"))
        model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=2), "mse")
        return model

    groups.assert_ranks_agree(groups.by_ranks(make, groups.Task(_data(16), (8, 8), epochs=2)))


def test_a_users_error_between_two_buckets_ends_all_ranks_at_once() -> None:
    def slow(gradient: np.ndarray) -> np.ndarray:
        time.sleep(8.0)
        return gradient

    def broken(gradient: np.ndarray) -> np.ndarray:
        time.sleep(0.3)
        raise ValueError("on purpose")

    def main(communicator: Communicator) -> float:
        def step(reducer: GradientReducer) -> list[tf.Tensor]:
            # The bucket that leaves first, of the last gradient, waits for the slow rank.
            first, last = tf.ones(1000), tf.ones(1001)
            if communicator.rank == 0:
                last = tf.numpy_function(slow, [last], tf.float32)
            else:
                first = tf.numpy_function(broken, [first], tf.float32)
            gradients = [tf.ensure_shape(first, [1000]), tf.ensure_shape(last, [1001])]
            return reducer.reduce(1, gradients, tf.constant(0.5))

        began = time.monotonic()
        with GradientReducer(communicator) as reducer:
            try:
                tf.function(lambda: step(reducer))()
            finally:
                ended.append((communicator.rank, time.monotonic() - began))

    ended: list[tuple[int, float]] = []
    outcomes = run_threads("tcp", 2, main)
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert dict(ended)[1] < 4.0
