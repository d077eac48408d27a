"""Scoring against a UDF that does nothing: 1,000,000 rows of 20 floats, MLP 20-64-1.

Prints one line for 20 scalar columns packed into one input, and one for a single array<float> column. The ratio
is the rows per second of ``TFModel.transform`` (the prediction is computed and thrown away by the noop sink) to
those of an iterator ``arrow_udf`` that gets the same columns and returns a double, in interleaved rounds of one
Spark session; the median round counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

COLUMNS = 20


def drain(columns: list[str]) -> Column:
    from pyspark.sql.functions import arrow_udf

    def one(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        for array in batches:
            yield pa.array(np.zeros(len(array)))

    def many(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        for arrays in batches:
            yield pa.array(np.zeros(len(arrays[0])))

    return arrow_udf(one if len(columns) == 1 else many, "double")(*columns)


def seconds(frame: DataFrame) -> float:
    start = time.perf_counter()
    frame.write.format("noop").mode("overwrite").save()
    return time.perf_counter() - start


def compare(name: str, rows: int, rounds: int, noop: DataFrame, scored: DataFrame) -> None:
    both: list[Callable[[], float]] = [lambda: seconds(noop), lambda: seconds(scored)]
    for run in both:
        run()
    times = [[run() for run in both] for _ in range(rounds)]
    ratio = statistics.median(idle / busy for idle, busy in times)
    idle, busy = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"transform {name}: ratio {ratio:.2f}, {rows / busy:,.0f} rows/s (noop {rows / idle:,.0f} rows/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import keras
    from pyspark.sql import functions as F

    from sparktf import TFModel, local_session

    spark = local_session("local[2]", "benchmark-transform", **{"spark.driver.memory": "4g"})
    layers = [keras.Input((COLUMNS,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(1)]
    network = keras.Sequential(layers)
    network.compile("sgd", "mse")
    names = [f"x{i}" for i in range(COLUMNS)]
    wide = spark.range(0, args.rows, 1, 2).select(*[F.rand(i).cast("float").alias(c) for i, c in enumerate(names)])
    wide = wide.cache()
    array = wide.select(F.array(*names).alias("features")).cache()
    wide.count(), array.count()
    packed = TFModel.fromKeras(network, inputCols=names).transform(wide)
    compare("20 columns", args.rows, args.rounds, wide.select(drain(names)), packed)
    single = TFModel.fromKeras(network).transform(array)
    compare("array<float>", args.rows, args.rounds, array.select(drain(["features"])), single)
    spark.stop()


if __name__ == "__main__":
    main()
