"""MNIST from TFRecord files, which Spark writes and the nodes read themselves: what ran under ``InputMode.TENSORFLOW``.

``dfutil.saveAsTFRecords`` has become a format of Spark's own writer, without a Hadoop jar; `ctx.shard` gives each
worker its files. Spark takes no part in the training's input.
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
    import tensorflow as tf
    from keras import layers

    features = {"image": tf.io.FixedLenFeature([784], tf.float32), "label": tf.io.FixedLenFeature([], tf.int64)}

    def parsed(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.io.parse_example(records, features)
        return batch["image"], batch["label"]

    files = ctx.shard(sorted(tf.io.gfile.glob(f"{args.images_labels}/part-*")))
    records = tf.data.TFRecordDataset(files).shuffle(5000, seed=7).repeat()
    batches = records.batch(args.batch_size).map(parsed).prefetch(2)

    keras.utils.set_random_seed(7)
    model = keras.Sequential([layers.Input((784,)), layers.Dense(128, "relu"), layers.Dense(10, "softmax")])
    optimizer = ctx.distributed_optimizer(keras.optimizers.Adam(3e-3))
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    # Files differ in their number of rows; all workers must take the same number of steps.
    steps = args.rows // (ctx.num_workers * args.batch_size)
    verbose = 2 if ctx.is_chief else 0
    history = model.fit(batches, epochs=args.epochs, steps_per_epoch=steps, shuffle=False, verbose=verbose)
    return float(history.history["accuracy"][-1])


def write(spark: SparkSession, directory: str) -> int:
    """Write the digits as TFRecord files; return how many there are."""
    from digits import digits

    from sparktf.data.datasource import TFRecordDataSource

    spark.dataSource.register(TFRecordDataSource)
    rows = digits(spark)
    rows.write.format("tfrecord").mode("overwrite").save(directory)
    return rows.count()


def train(spark: SparkSession, args: argparse.Namespace) -> list[Any]:
    """Return each worker's accuracy."""
    from sparktf import run

    return run(main_fun, args, spark=spark, num_workers=args.cluster_size)


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64, help="rows of a worker in a step")
    parser.add_argument("--cluster_size", type=int, default=2, help="workers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images_labels", default="mnist_tfrecords", help="a directory for the TFRecord files")
    arguments = parser.parse_args()
    session = local_session(f"local[{arguments.cluster_size}]")
    arguments.rows = write(session, arguments.images_labels)
    print(f"accuracy {train(session, arguments)[0]:.3f}")
