"""Train a small network on real digits with Keras's ``fit``."""

from __future__ import annotations

import keras
from sklearn.datasets import load_digits

from sparktf import run

EPOCHS = 8


def main(args, ctx):
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    training, held_out = slice(300 + ctx.rank, None, ctx.num_workers), slice(300)

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    optimizer = ctx.distributed_optimizer(keras.optimizers.Adam(5e-3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])

    model.fit(images[training], labels[training], batch_size=32, epochs=EPOCHS, verbose=2)
    return model.evaluate(images[held_out], labels[held_out], verbose=0, return_dict=True)["accuracy"]


if __name__ == "__main__":
    accuracy = run(main, num_workers=2)[0]
    print(f"accuracy {accuracy:.3f}")
