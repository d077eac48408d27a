"""MNIST as it arrives: what fed a running cluster from a DStream is a Structured Streaming query here.

Each micro-batch is a run that goes on where the last one ended: the model's file holds the optimizer's state too. Nodes
hold nothing between micro-batches, so that the query may be stopped, or fail, and go on from its checkpoint. The price
is a start of TensorFlow for each, some seconds: let the trigger gather data for minutes.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from sparktf.program.context import Context


def main_fun(args: argparse.Namespace, ctx: Context) -> tuple[float, int]:
    """Train on one micro-batch; return its accuracy and the optimizer's steps since the beginning."""
    import os

    import keras
    from keras import layers

    if os.path.exists(args.model):
        model = keras.models.load_model(args.model)
    else:
        keras.utils.set_random_seed(7)
        model = keras.Sequential([layers.Input((784,)), layers.Dense(128, "relu"), layers.Dense(10, "softmax")])
        model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    ctx.distributed_optimizer(model.optimizer)
    rows = ctx.dataset(args.batch_size, shuffle=True, seed=7, drop_remainder=True)
    batches = rows.map(lambda row: (row["image"], row["label"]))
    history = model.fit(batches, shuffle=False, verbose=0)
    ctx.export(model, args.model, overwrite=True)
    return float(history.history["accuracy"][-1]), int(model.optimizer.iterations)


def train(spark: SparkSession, args: argparse.Namespace) -> list[tuple[float, int]]:
    """Train on the files of a directory, one a micro-batch, until all are read; return what the chief said of each."""
    told: list[Any] = []

    def on_batch(rows: DataFrame, number: int) -> None:
        from sparktf import run

        told.append(run(main_fun, args, spark=rows.sparkSession, num_workers=args.cluster_size, dataset=rows)[0])
        print(f"micro-batch {number}: accuracy {told[-1][0]:.3f} after {told[-1][1]} steps")

    stream = spark.readStream.schema("image array<float>, label long").option("maxFilesPerTrigger", 1)
    query = (
        stream.parquet(args.arriving)
        .writeStream.foreachBatch(on_batch)
        .option("checkpointLocation", args.checkpoint)
        .trigger(availableNow=True)
        .start()
    )
    query.awaitTermination()
    return told


def arrive(spark: SparkSession, directory: str, files: int) -> None:
    """Put the digits into a directory as if they had come one file after the other."""
    from digits import digits

    digits(spark).repartition(files).write.mode("overwrite").parquet(directory)


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a worker in a step")
    parser.add_argument("--cluster_size", type=int, default=2, help="workers")
    parser.add_argument("--directory", default="mnist_stream", help="for arriving files, checkpoint and model")
    arguments = parser.parse_args()
    arguments.arriving, arguments.checkpoint, arguments.model = (
        os.path.join(os.path.abspath(arguments.directory), name) for name in ("arriving", "checkpoint", "model.keras")
    )
    session = local_session(f"local[{arguments.cluster_size}]")
    arrive(session, arguments.arriving, files=3)
    train(session, arguments)
