"""TFEstimator against plain Keras on the same data in memory, and two workers against one.

Three lines:

- one worker, MLP 784-128-10, batch 128: rows per second of the epochs after the first, by those of ``keras.Model.fit``
  on numpy arrays in a process of its own with the same threads; interleaved rounds, median round.
- two workers with one thread each against one worker with one thread, small CNN: rows per second of the epochs after
  the first. Beside it what the machine gives: two fits of plain Keras with one thread each, at the same time and with
  nothing to do with each other, against one.
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

PARTS = ("keras", "workers", "second")
ROWS, EPOCHS = 60_000, 5
# Of the small CNN, whose epochs take half a second.
CNN_ROWS, CNN_EPOCHS = 10_000, 8


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
    make, rows, batch, epochs, fits = {
        "mlp": (mlp, ROWS, 128, EPOCHS, 1),
        "cnn": (cnn, CNN_ROWS, 128, CNN_EPOCHS, 1),
        "small": (regression, 10_000, 32, 1, 2),
    }[what]
    x, y = table(rows) if what == "small" else digits(rows)
    took = 0.0
    for _ in range(fits):
        model, epochs_seen = make(), _Epochs()
        started = time.perf_counter()
        model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, callbacks=[epochs_seen])
        took = time.perf_counter() - started
    return {
        "rows_per_second": rows / statistics.median(epochs_seen.seconds[1:] or epochs_seen.seconds),
        "seconds": took,
    }


def plain_elsewhere(what: str, threads: int, processes: int = 1) -> list[dict[str, float]]:
    """Fit without Spark in processes of their own, all at once; each one's figures."""
    command = [sys.executable, __file__, "--plain", what, "--threads", str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def frame_of(spark: SparkSession, x: np.ndarray, y: np.ndarray) -> DataFrame:
    import pyarrow as pa

    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1]).cast(pa.list_(pa.float32()))
    frame = spark.createDataFrame(pa.table({"features": flat, "label": pa.array(y)})).repartition(2).cache()
    frame.count()
    return frame


def compare_with_keras(frame: DataFrame, rounds: int) -> None:
    from sparktf import TFEstimator

    speeds = []
    for _ in range(rounds):
        estimator = TFEstimator(model=mlp(), threadsPerWorker=2, verbose=0, epochs=EPOCHS, batchSize=128)
        ours = estimator.fit(frame).summary.rowsPerSecond
        speeds.append((ours, plain_elsewhere("mlp", 2)[0]["rows_per_second"]))
    ratio = statistics.median(ours / keras_alone for ours, keras_alone in speeds)
    ours, alone = (statistics.median(column) for column in zip(*speeds, strict=True))
    print(f"fit, one worker, MLP: ratio {ratio:.2f}, {ours:,.0f} rows/s (keras.fit {alone:,.0f} rows/s)", flush=True)


def compare_workers(frame: DataFrame, rounds: int) -> None:
    from sparktf import TFEstimator

    small = frame.limit(CNN_ROWS).repartition(2).cache()
    small.count()
    speeds = []
    for _ in range(rounds):
        ours, machines = [], []
        for n in (1, 2):
            estimator = TFEstimator(
                model=cnn(), numWorkers=n, threadsPerWorker=1, verbose=0, epochs=CNN_EPOCHS, batchSize=128
            )
            ours.append(estimator.fit(small).summary.rowsPerSecond)
            machines.append(sum(told["rows_per_second"] for told in plain_elsewhere("cnn", 1, n)))
        speeds.append((*ours, *machines))
    one, two, alone, beside = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(two / one for one, two, *_ in speeds)
    bound = statistics.median(beside / alone for *_, alone, beside in speeds)
    print(f"fit, two workers, CNN: ratio {ratio:.2f}, {two:,.0f} rows/s (one worker {one:,.0f} rows/s)")
    print(f"  two separate keras.fit at once: ratio {bound:.2f}, {beside:,.0f} rows/s (one {alone:,.0f})", flush=True)


def compare_second_fit(spark: SparkSession, rounds: int) -> None:
    from sparktf import TFEstimator

    narrow = frame_of(spark, *table(10_000))
    estimator = TFEstimator(model=regression(), verbose=0)
    estimator.fit(narrow)
    beyond = []
    for _ in range(rounds):
        started = time.perf_counter()
        estimator.fit(narrow)
        again = time.perf_counter() - started
        beyond.append(again - plain_elsewhere("small", 2)[0]["seconds"])
    print(f"fit, second small fit: {statistics.median(beyond):.1f} s more than keras.fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", choices=["mlp", "cnn", "small"], help="a plain fit alone, in this process")
    parser.add_argument("--threads", type=int, default=2, help="of the plain fit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args.plain, args.threads)))
        return
    from sparktf import local_session

    spark = local_session("local[2]", "benchmark-fit", **{"spark.driver.memory": "6g"})
    frame = frame_of(spark, *digits(ROWS))
    if "keras" in args.parts:
        compare_with_keras(frame, args.rounds)
    if "workers" in args.parts:
        compare_workers(frame, args.rounds)
    if "second" in args.parts:
        compare_second_fit(spark, args.rounds)
    spark.stop()


if __name__ == "__main__":
    main()
