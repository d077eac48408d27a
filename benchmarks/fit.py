"""TFEstimator against plain Keras on the same data in memory, and two workers against one.

Three lines:

- one worker, MLP 784-128-10, batch 128: rows per second of the epochs after the first, by those of ``keras.Model.fit``
  on numpy arrays in a process of its own with the same threads; interleaved rounds, median round.
- two workers with one thread each against one worker with one thread, small CNN: rows per second of the epochs after
  the first.
- a second small fit (10,000 x 20) right after the first: seconds beyond those of plain ``keras.Model.fit`` of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame, SparkSession

with quiet_stderr():
    import keras
    import tensorflow as tf

ROWS, EPOCHS = 60_000, 5


def digits(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((rows, 784), dtype=np.float32), rng.integers(0, 10, rows)


def table(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.random((rows, 20), dtype=np.float32)
    return x, x.sum(axis=1)


def mlp() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((784,)), keras.layers.Dense(128, "relu"), keras.layers.Dense(10, "softmax")], name="mlp"
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def cnn() -> keras.Model:
    layers = [
        keras.Input((784,)),
        keras.layers.Reshape((28, 28, 1)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(10, "softmax"),
    ]
    model = keras.Sequential(layers, name="cnn")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def regression() -> keras.Model:
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(1)], name="small")
    model.compile("adam", "mse")
    return model


class _Epochs(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def plain(what: str, threads: int) -> dict[str, float]:
    """Fit without Spark, in this process; the figures of a second fit, when all is warm."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    rows, batch, epochs = (ROWS, 128, EPOCHS) if what == "mlp" else (10_000, 32, 1)
    x, y = digits(rows) if what == "mlp" else table(rows)
    took = 0.0
    for _ in range(1 if what == "mlp" else 2):
        model, epochs_seen = (mlp() if what == "mlp" else regression()), _Epochs()
        started = time.perf_counter()
        model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, callbacks=[epochs_seen])
        took = time.perf_counter() - started
    return {
        "rows_per_second": rows / statistics.median(epochs_seen.seconds[1:] or epochs_seen.seconds),
        "seconds": took,
    }


def plain_elsewhere(what: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--plain", what, "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def frame_of(spark: SparkSession, x: np.ndarray, y: np.ndarray) -> DataFrame:
    import pyarrow as pa

    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1]).cast(pa.list_(pa.float32()))
    frame = spark.createDataFrame(pa.table({"features": flat, "label": pa.array(y)})).repartition(2).cache()
    frame.count()
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", choices=["mlp", "small"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args.plain, args.threads)))
        return
    from sparktf import TFEstimator, local_session

    spark = local_session("local[2]", "benchmark-fit", **{"spark.driver.memory": "6g"})
    frame = frame_of(spark, *digits(ROWS))
    common = {"verbose": 0, "epochs": EPOCHS, "batchSize": 128}

    rounds = []
    for _ in range(args.rounds):
        ours = TFEstimator(model=mlp(), threadsPerWorker=2, **common).fit(frame).summary.rowsPerSecond
        rounds.append((ours, plain_elsewhere("mlp", 2)["rows_per_second"]))
    ratio = statistics.median(ours / keras_alone for ours, keras_alone in rounds)
    ours, alone = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"fit, one worker, MLP: ratio {ratio:.2f}, {ours:,.0f} rows/s (keras.fit {alone:,.0f} rows/s)", flush=True)

    small = frame.limit(10_000).repartition(2).cache()
    small.count()
    pairs = []
    for _ in range(args.rounds):
        speeds = [
            TFEstimator(model=cnn(), numWorkers=n, threadsPerWorker=1, **common).fit(small).summary.rowsPerSecond
            for n in (1, 2)
        ]
        pairs.append(speeds)
    ratio = statistics.median(two / one for one, two in pairs)
    one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"fit, two workers, CNN: ratio {ratio:.2f}, {two:,.0f} rows/s (one worker {one:,.0f} rows/s)", flush=True)

    narrow = frame_of(spark, *table(10_000))
    estimator = TFEstimator(model=regression(), verbose=0)
    estimator.fit(narrow)
    beyond = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        estimator.fit(narrow)
        again = time.perf_counter() - started
        beyond.append(again - plain_elsewhere("small", 2)["seconds"])
    print(f"fit, second small fit: {statistics.median(beyond):.1f} s more than keras.fit")
    spark.stop()


if __name__ == "__main__":
    main()
