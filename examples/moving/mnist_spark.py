"""MNIST fed by Spark: what ran under ``InputMode.SPARK``.

The generator around ``DataFeed.next_batch`` has become `ctx.dataset`; ``TFCluster.run``, ``train`` and ``shutdown`` one
call. Every row goes to one worker, once an epoch, and what has been read is kept on the nodes' disks for the next one.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sparktf.program.context import Context


def main_fun(args: argparse.Namespace, ctx: Context) -> float:
    """Train on this node; return the last epoch's accuracy."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            layers.Input((784,), name="image"),
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax", name="probability"),
        ]
    )
    optimizer = ctx.distributed_optimizer(keras.optimizers.Adam(3e-3))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])

    rows = ctx.dataset(args.batch_size, shuffle=True, seed=7, drop_remainder=True)
    batches = rows.map(lambda row: (row["image"], row["label"]))
    history = model.fit(batches, epochs=args.epochs, shuffle=False, verbose=2 if ctx.is_chief else 0)
    ctx.export(model, args.export_dir, overwrite=True)
    return float(history.history["accuracy"][-1])


def train(spark: SparkSession, args: argparse.Namespace) -> list[Any]:
    """Return each worker's accuracy; the model is in ``args.export_dir`` then."""
    from digits import digits

    from sparktf import run

    return run(main_fun, args, spark=spark, num_workers=args.cluster_size, dataset=digits(spark))


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64, help="rows of a worker in a step")
    parser.add_argument("--cluster_size", type=int, default=2, help="workers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--export_dir", default="mnist_export")
    arguments = parser.parse_args()
    session = local_session(f"local[{arguments.cluster_size}]")
    print(f"accuracy {train(session, arguments)[0]:.3f}")
