"""Fit one model by ranks that are threads, and by one process on the same global batches."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sparktf.data.batches import StepPlan
from sparktf.distribute.build import build_model
from sparktf.distribute.fit import FitReport, FitSettings, RankRows
from sparktf.distribute.lockstep import fit_rank
from sparktf.transport import Communicator
from sparktf.transport.testing import run_threads

# Keras seeds Python's and numpy's generators, which all threads share.
_MAKING = threading.Lock()

Make = Callable[[], keras.Model]


@dataclass(frozen=True)
class Task:
    """A fit: the data, how its rows lie on the ranks, and what Keras is told.

    Parameters
    ----------
    data : tuple
        ``(x, y)`` or ``(x, y, weight)`` of arrays or structures of arrays; the ranks' rows one after the other.
    rows : tuple of int
        Each rank's.
    held_out : tuple or None
        Validation data.
    held_out_rows : tuple of int
    callbacks : callable
        ``callbacks(rank)``.
    """

    data: tuple[Any, ...]
    rows: tuple[int, ...]
    batch_size: int = 4
    epochs: int = 2
    seed: int = 3
    held_out: tuple[Any, ...] | None = None
    held_out_rows: tuple[int, ...] = ()
    callbacks: Callable[[int], Sequence[Any]] = field(default=lambda rank: ())


@dataclass
class Fitted:
    """One rank's model after the fit and what it reported."""

    model: keras.Model
    report: FitReport


def fresh(make: Make) -> keras.Model:
    """Make a model with the same weights every time."""
    with _MAKING:
        keras.utils.set_random_seed(11)
        return make()


def by_ranks(make: Make, task: Task, timeout: float = 30.0) -> list[Any]:
    """Fit on all ranks; return each rank's `Fitted`, or what it raised."""

    def main(communicator: Communicator) -> Fitted:
        model, given = prepared(make, task, communicator.rank)
        settings = FitSettings(batch_size=task.batch_size, epochs=task.epochs, shuffle=False, seed=task.seed)
        report = fit_rank(model, communicator, rows_of(task), *given, settings, task.callbacks(communicator.rank))
        return Fitted(model, report)

    return run_threads("tcp", len(task.rows), main, timeout=timeout)


def prepared(make: Make, task: Task, rank: int) -> tuple[keras.Model, tuple[Any, Any]]:
    """Return a rank's model, and its training and validation data as a fit takes them."""
    model = fresh(make)
    mine = _rows(task.data, _places(task.rows)[rank])
    build_model(model, next(iter(_dataset([_rows(task.data, slice(0, 0))]))))
    held_out = None
    if task.held_out is not None:
        part = _rows(task.held_out, _places(task.held_out_rows)[rank])
        held_out = _dataset(_batches(part, task.held_out_rows[rank], task.batch_size), like=part)

    def training(order: Callable[[], np.ndarray], steps: int) -> tf.data.Dataset:
        def epoch() -> Any:
            permuted = _rows(mine, order())
            for step in range(steps):
                yield _rows(permuted, slice(step * task.batch_size, (step + 1) * task.batch_size))

        return _dataset(epoch, like=mine, steps=steps)

    return model, (training, held_out)


def rows_of(task: Task) -> RankRows:
    """Return every rank's rows."""
    return RankRows(task.rows, task.held_out_rows or (0,) * len(task.rows))


def by_one_process(make: Make, task: Task, callbacks: Sequence[Any] = ()) -> Fitted:
    """Fit as Keras does, on batches that hold each rank's batch one after the other."""
    model = fresh(make)
    plan = StepPlan(task.rows, task.batch_size)
    places = _places(task.rows)
    steps = []
    for step in range(plan.steps):
        part = slice(step * task.batch_size, (step + 1) * task.batch_size)
        ours = [np.arange(place.start, place.stop)[part] for place in places]
        steps.append(_rows(task.data, np.concatenate(ours)))
    held_out = None
    if task.held_out is not None:
        held_out = _dataset(_batches(task.held_out, sum(task.held_out_rows), task.batch_size), like=task.held_out)
    history = model.fit(
        _dataset(steps, like=task.data), epochs=task.epochs, validation_data=held_out, verbose=0, callbacks=[*callbacks]
    )
    return Fitted(model, FitReport(history=history.history))


def assert_as_one_process(make: Make, task: Task, rtol: float = 2e-5, atol: float = 2e-6) -> list[Fitted]:
    """Check the promise of synchronous training: equal ranks, and one process's weights and history."""
    ranks = by_ranks(make, task)
    assert_equal_to_one_process(ranks, make, task, rtol, atol)
    return ranks


def assert_equal_to_one_process(
    ranks: list[Any], make: Make, task: Task, rtol: float = 2e-5, atol: float = 2e-6
) -> None:
    """Check that ranks are equal, and have one process's weights and history."""
    assert_ranks_agree(ranks)
    one = by_one_process(make, task)
    before = fresh(make)
    build_model(before, next(iter(_dataset([_rows(task.data, slice(0, 0))]))))
    moved = [np.abs(v - w).max() for v, w in zip(weights(one.model), weights(before), strict=True) if v.size]
    assert max(moved) > 1e-4, "the reference has not learned anything, so that equality would say nothing"
    for name, ours, theirs in zip(
        [v.path for v in one.model.trainable_variables], weights(ranks[0].model), weights(one.model), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=name)
    assert set(ranks[0].report.history) == set(one.report.history)
    for name, values in one.report.history.items():
        np.testing.assert_allclose(ranks[0].report.history[name], values, rtol=10 * rtol, atol=10 * atol, err_msg=name)


def assert_ranks_agree(ranks: Sequence[Any]) -> None:
    """Check that no rank failed, and that all hold the same weights, state and history to the last bit."""
    for rank in ranks:
        if isinstance(rank, BaseException):
            raise rank
    for other in ranks[1:]:
        for variable, theirs in zip(ranks[0].model.weights, other.model.weights, strict=True):
            np.testing.assert_array_equal(variable.numpy(), theirs.numpy(), err_msg=variable.path)
        assert other.report.history == ranks[0].report.history


def weights(model: keras.Model) -> list[np.ndarray]:
    """Return the trainable weights."""
    return [variable.numpy() for variable in model.trainable_variables]


def _places(rows: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *rows]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _rows(data: Any, which: Any) -> Any:
    return keras.tree.map_structure(lambda array: array[which], data)


def _batches(data: Any, rows: int, batch_size: int) -> list[Any]:
    return [_rows(data, slice(start, start + batch_size)) for start in range(0, rows, batch_size)]


def _dataset(batches: Any, like: Any = None, steps: int | None = None) -> tf.data.Dataset:
    """Return a dataset of batches: a list of them, or a function that gives an epoch's."""
    pattern = batches[0] if like is None else like
    signature = keras.tree.map_structure(
        lambda array: tf.TensorSpec((None, *array.shape[1:]), tf.string if array.dtype == object else array.dtype),
        pattern,
    )
    generator = batches if callable(batches) else lambda: iter(batches)
    length = len(batches) if steps is None else steps
    dataset = tf.data.Dataset.from_generator(generator, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(length))
