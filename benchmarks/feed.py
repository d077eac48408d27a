"""From a cached DataFrame to a spool, against a barrier task that only drains the same DataFrame.

60,000 rows of array<float> of 784 and a label, one task. Two lines: the node's own work (Arrow batches checked and
spooled), and the whole way of a fit, which also numbers the rows and deals them out (a shuffle). The ratio is that of
rows per second, in interleaved rounds of one Spark session; the median round counts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparktf.data.columns import ColumnSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def drain(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield _rows(sum(batch.num_rows for batch in batches))


def spool(batches: Iterator[pa.RecordBatch], specs: list[ColumnSpec]) -> Iterator[pa.RecordBatch]:
    from sparktf.cluster.spooling import spool_partition
    from sparktf.transport import connect

    alone = connect("tcp", rank=0, size=1, exchange=lambda data: [data], secret=b"benchmark")
    with alone, spool_partition(batches, specs, alone, 10.0) as spooled:
        yield _rows(spooled.rows)


def _rows(rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([rows])], ["rows"])


def seconds(frame: DataFrame, task: Callable[..., Any]) -> float:
    start = time.perf_counter()
    frame.mapInArrow(task, "rows long", barrier=True).collect()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=784)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    from pyspark.sql import functions as F

    from sparktf import TFEstimator, local_session
    from sparktf.ml.planning import plan_feed, spread_rows

    spark = local_session("local[2]", "benchmark-feed", **{"spark.driver.memory": "4g"})
    values = F.transform(F.sequence(F.lit(1), F.lit(args.width)), lambda i: (i * 0.5 + F.col("id")).cast("float"))
    frame = spark.range(0, args.rows, 1, 1).select(values.alias("features"), (F.col("id") % 10).alias("label")).cache()
    frame.count()
    feed = plan_feed(TFEstimator(), frame.schema)
    dealt = spread_rows(frame, feed, 1)
    named = frame.select(*feed.expressions())
    specs = [ColumnSpec("x0", (args.width,), "float32", "features"), ColumnSpec("y0", (), "int64", "label", "label")]
    with_id = [*specs, ColumnSpec("id", (), "int64", "id", "id")]
    runs: dict[str, Callable[[], float]] = {
        "drain": lambda: seconds(named, drain),
        "spool": lambda: seconds(named, functools.partial(spool, specs=specs)),
        "deal out and spool": lambda: seconds(dealt, functools.partial(spool, specs=with_id)),
    }
    for run in runs.values():
        run()
    rounds = [{name: run() for name, run in runs.items()} for _ in range(args.rounds)]
    idle = statistics.median(times["drain"] for times in rounds)
    for name in ("spool", "deal out and spool"):
        ratio = statistics.median(times["drain"] / times[name] for times in rounds)
        took = statistics.median(times[name] for times in rounds)
        print(f"feed, {name}: ratio {ratio:.2f}, {args.rows / took:,.0f} rows/s (drain {args.rows / idle:,.0f} rows/s)")
    spark.stop()


if __name__ == "__main__":
    main()
