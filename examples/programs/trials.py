"""Try several learning rates for a small network on real digits."""

from __future__ import annotations

import keras
from sklearn.datasets import load_digits

from sparktf import run

RATES = [3e-4, 1e-3, 3e-3, 1e-2]


def trial(rate):
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])

    model.fit(images[300:], labels[300:], epochs=4, verbose=0)
    accuracy = model.evaluate(images[:300], labels[:300], verbose=0, return_dict=True)["accuracy"]
    print(f"learning rate {rate:g}: accuracy {accuracy:.3f}")
    return accuracy, rate


def main(rates, ctx):
    return [trial(rate) for rate in ctx.shard(rates)]


if __name__ == "__main__":
    trials = [trial for share in run(main, RATES, num_workers=2, cluster=False) for trial in share]
    accuracy, rate = max(trials)
    print(f"best learning rate {rate:g}: accuracy {accuracy:.3f}")
