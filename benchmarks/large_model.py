"""A model over 2 GiB all the way: fitted, saved, loaded, scored with; not a part of ``make bench``.

By default an embedding of 8,800,000 x 64 float32 (2.1 GiB) on one worker of ``local[2]``, whose JVM has 2 GiB. It takes
some minutes. Prints for each step what it took, and the largest memory of all processes together while it ran.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import psutil

if TYPE_CHECKING:
    import keras

WIDTH = 64
ROWS = 2_000


def resident_bytes() -> int:
    """Memory of this process and its children; pages that forked workers share count once for each."""
    this = psutil.Process()
    total = 0
    for process in [this, *this.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


@contextmanager
def step(name: str) -> Iterator[None]:
    """Time a block and watch the memory while it runs."""
    done, peak = threading.Event(), [resident_bytes()]

    def watch() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        print(f"{name}: {seconds:.1f} s, {peak[0] / 2**30:.1f} GiB at most", flush=True)


def network(words: int) -> keras.Model:
    """Return the model; begun with zeros, for random numbers of that size take TensorFlow three times their memory."""
    import keras

    layers = keras.layers
    embedding = layers.Embedding(words, WIDTH, embeddings_initializer="zeros")
    model = keras.Sequential([keras.Input((4,)), embedding, layers.Flatten(), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=8_800_000)
    args = parser.parse_args()
    from pyspark.sql import functions as F

    from sparktf import TFEstimator, TFModel, local_session

    spark = local_session("local[2]", "benchmark-large-model")
    ids = F.array(*[(F.rand(i) * args.words).cast("int") for i in range(4)])
    # One partition: each scoring task loads the model.
    frame = spark.range(ROWS).coalesce(1).select(ids.alias("features"), F.rand(9).alias("label")).cache()
    with step("fit"):
        fitted = TFEstimator(modelFn=partial(network, args.words), batchSize=100, verbose=0).fit(frame)
    print(f"archive: {fitted._trained.archive.size:,} bytes", flush=True)
    with step("transform"):
        ours = [row.prediction for row in fitted.transform(frame).select("prediction").collect()]
    with tempfile.TemporaryDirectory() as directory:
        with step("save"):
            fitted.save(os.path.join(directory, "model"))
        del fitted
        with step("load"):
            loaded = TFModel.load(os.path.join(directory, "model"))
    with step("transform of the loaded model"):
        theirs = [row.prediction for row in loaded.transform(frame).select("prediction").collect()]
    spark.stop()
    equal = ours == theirs and len(set(ours)) > ROWS / 2
    print(f"predictions of {ROWS:,} rows {'equal' if equal else 'DIFFER'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
