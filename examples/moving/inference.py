"""Inference by TensorFlow programs that know nothing of each other: what ran under ``TFParallel.run``.

Each node loads the model that ``mnist_spark.py`` has exported, scores its share of the TFRecord files that
``mnist_files.py`` writes, and writes a file of predictions. For rows of a DataFrame there is `TFModel.transform`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sparktf.program.context import Context


def main_fun(args: argparse.Namespace, ctx: Context) -> tuple[int, int]:
    """Score on this node; return its numbers of rows and of right predictions."""
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature([784], tf.float32), "label": tf.io.FixedLenFeature([], tf.int64)}
    model = tf.saved_model.load(args.export_dir)
    files = ctx.shard(sorted(tf.io.gfile.glob(f"{args.images_labels}/part-*")))
    rows = right = 0
    with tf.io.gfile.GFile(f"{args.output}/part-{ctx.rank:05d}", "w") as output:
        for records in tf.data.TFRecordDataset(files).batch(args.batch_size):
            batch = tf.io.parse_example(records, features)
            predicted = tf.argmax(model.serve(batch["image"]), axis=1)
            output.write("".join(f"{label} {digit}\n" for label, digit in zip(batch["label"], predicted, strict=True)))
            rows += len(predicted)
            right += int(tf.reduce_sum(tf.cast(predicted == batch["label"], tf.int64)))
    return rows, right


def score(spark: SparkSession, args: argparse.Namespace) -> list[Any]:
    """Return each node's numbers of rows and of right predictions; the predictions are in ``args.output`` then."""
    import os

    from sparktf import run

    os.makedirs(args.output, exist_ok=True)
    return run(main_fun, args, spark=spark, num_workers=args.cluster_size, cluster=False)


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--cluster_size", type=int, default=2, help="nodes")
    parser.add_argument("--export_dir", default="mnist_export", help="of mnist_spark.py")
    parser.add_argument("--images_labels", default="mnist_tfrecords", help="of mnist_files.py")
    parser.add_argument("--output", default="mnist_predictions")
    arguments = parser.parse_args()
    session = local_session(f"local[{arguments.cluster_size}]")
    counts = score(session, arguments)
    rows, right = (sum(count) for count in zip(*counts, strict=True))
    print(f"{rows:,} rows, accuracy {right / rows:.3f}")
