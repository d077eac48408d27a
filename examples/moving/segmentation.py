"""Segmentation with a small U-Net on images made by the nodes: a program that reads its data itself.

What ran under ``InputMode.TENSORFLOW`` with ``MultiWorkerMirroredStrategy``, under which Keras 3's ``fit`` fails: the
strategy's scope has become `ctx.distributed_optimizer`, and ``dataset.shard`` is `ctx.shard`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sparktf.program.context import Context


def main_fun(args: argparse.Namespace, ctx: Context) -> float:
    """Train on this node; return the discs' intersection over union in images that no worker has seen."""
    import keras
    import numpy as np
    from keras import layers

    def picture(number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a 32 x 32 image of noise with a brighter disc in it, and its mask."""
        random = np.random.default_rng(number)
        (row, column), radius = random.uniform(8, 24, 2), random.uniform(4, 8)
        down, across = np.mgrid[:32, :32]
        disc = ((down - row) ** 2 + (across - column) ** 2 < radius**2)[..., None]
        return (random.uniform(0, 0.7, (32, 32, 1)) + 0.4 * disc).astype("float32"), disc.astype("float32")

    def pictures(numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        images, masks = zip(*map(picture, numbers), strict=True)
        return np.stack(images), np.stack(masks)

    def unet() -> keras.Model:
        image = layers.Input((32, 32, 1))
        kept, x = [], image
        for filters in (8, 16):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
            kept.append(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
        for filters, skipped in ((16, kept[1]), (8, kept[0])):
            x = layers.Conv2DTranspose(filters, 3, strides=2, padding="same", activation="relu")(x)
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.Concatenate()([x, skipped]))
        return keras.Model(image, layers.Conv2D(1, 1, activation="sigmoid")(x))

    keras.utils.set_random_seed(7)
    model = unet()
    optimizer = ctx.distributed_optimizer(keras.optimizers.Adam(1e-2))
    model.compile(optimizer, "binary_crossentropy", metrics=["binary_accuracy"])
    # Shares of one size, so that all workers take the same number of steps.
    images, masks = pictures(ctx.shard(range(args.images // ctx.num_workers * ctx.num_workers)))
    model.fit(images, masks, batch_size=args.batch_size, epochs=args.epochs, verbose=2 if ctx.is_chief else 0)
    ctx.export(model, args.export_dir, overwrite=True)

    images, masks = pictures(list(range(args.images, args.images + 64)))
    found, there = model.predict(images, verbose=0) > 0.5, masks > 0.5
    return float(np.sum(found & there) / np.sum(found | there))


def train(spark: SparkSession, args: argparse.Namespace) -> list[Any]:
    """Return the intersection over union by worker; the model is in ``args.export_dir`` then."""
    from sparktf import run

    return run(main_fun, args, spark=spark, num_workers=args.cluster_size)


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16, help="images of a worker in a step")
    parser.add_argument("--cluster_size", type=int, default=2, help="workers")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--export_dir", default="segmentation_export")
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    session = local_session(f"local[{arguments.cluster_size}]")
    print(f"intersection over union {train(session, arguments)[0]:.3f}")
