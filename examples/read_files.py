"""Train on two nodes from files that each node reads itself: TFRecord by tf.data, Parquet by pyarrow.

Spark starts the nodes and does not touch the data. The files may be on S3 or HDFS just as well: give their URI
(``s3://...``; ``fsspec+hdfs://...`` with hdfs-native installed).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparktf import run
from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf
    from pyarrow.fs import FileSystem

    from sparktf.program.context import Context

FILES, BATCH = 6, 32


def write_files(directory: Path) -> None:
    """Write 1,500 real digits as TFRecord files and once more as Parquet files, of a few hundred rows each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import load_digits

    with quiet_stderr():
        import tensorflow as tf

    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    for kind in ("tfrecord", "parquet"):
        (directory / kind).mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(1500), FILES)):
        with tf.io.TFRecordWriter(str(directory / "tfrecord" / f"{number}.tfrecord")) as writer:
            for row in rows:
                image = tf.train.Feature(float_list=tf.train.FloatList(value=images[row]))
                label = tf.train.Feature(int64_list=tf.train.Int64List(value=[labels[row]]))
                features = tf.train.Features(feature={"image": image, "label": label})
                writer.write(tf.train.Example(features=features).SerializeToString())
        table = pa.table({"image": list(images[rows]), "label": labels[rows]})
        pq.write_table(table, directory / "parquet" / f"{number}.parquet")


def from_tfrecords(system: FileSystem, paths: list[str]) -> tf.data.Dataset:
    """Return batches of what TFRecord files hold, on whatever file system."""
    import tensorflow as tf

    from sparktf.data.tfdata_example import record_dataset

    features = {"image": tf.io.FixedLenFeature((64,), tf.float32), "label": tf.io.FixedLenFeature((), tf.int64)}
    records = record_dataset(system, paths).shuffle(1000, seed=7).repeat().batch(BATCH)
    columns = records.map(lambda batch: tf.io.parse_example(batch, features))
    return columns.map(lambda batch: (batch["image"], batch["label"]))


def from_parquet(system: FileSystem, paths: list[str]) -> tf.data.Dataset:
    """Return batches of what Parquet files hold; pyarrow opens them, on whatever file system."""
    import pyarrow.parquet as pq
    import tensorflow as tf

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for path in paths:
            with system.open_input_file(path) as file:
                for chunk in pq.ParquetFile(file).iter_batches(columns=["image", "label"]):
                    image = chunk.column("image").flatten().to_numpy().reshape(-1, 64)
                    yield image, chunk.column("label").to_numpy()

    signature = (tf.TensorSpec((None, 64), tf.float32), tf.TensorSpec((None,), tf.int64))
    # Whole chunks go to TensorFlow, which cuts them into batches: row by row would take many times as long.
    return tf.data.Dataset.from_generator(chunks, output_signature=signature).repeat().rebatch(BATCH)


def main(args: argparse.Namespace, ctx: Context) -> dict[str, Any]:
    import keras
    from pyarrow.fs import FileSelector, FileSystem
    from sklearn.datasets import load_digits

    system, directory = FileSystem.from_uri(args.uri)
    paths = sorted(file.path for file in system.get_file_info(FileSelector(directory)) if file.is_file)
    mine = ctx.shard(paths)
    batches = from_tfrecords(system, mine) if args.format == "tfrecord" else from_parquet(system, mine)

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(ctx.distributed_optimizer(keras.optimizers.Adam(5e-3)), loss, metrics=["accuracy"])
    # Files differ in their rows, so workers agree on a number of steps.
    steps = 1500 // BATCH // ctx.num_workers
    model.fit(batches, epochs=args.epochs, steps_per_epoch=steps, shuffle=False, verbose=0)

    images, labels = (rows[1500:] for rows in load_digits(return_X_y=True))
    accuracy = model.evaluate(images / 16, labels, verbose=0, return_dict=True)["accuracy"]
    print(f"trained on {len(mine)} of {len(paths)} files")
    return {"files": mine, "accuracy": accuracy}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch))
        for kind in ("tfrecord", "parquet"):
            task = argparse.Namespace(format=kind, uri=(Path(scratch) / kind).as_uri(), epochs=8)
            print(f"{kind}: accuracy {run(main, task, num_workers=2)[0]['accuracy']:.3f}")
