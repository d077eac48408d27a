"""TensorFlowOnSpark's side of `benchmarks/run.py`: a node that takes all that Spark feeds it, and does nothing with it.

Prints ``{"rows", "seconds", "whole"}``: seconds from the first row's arrival on the node to the last one's, and from
the start of the cluster to the end of its shutdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any


def drain(args: argparse.Namespace, ctx: Any) -> None:
    feed = ctx.get_data_feed()
    # One row, so that the clock starts when there is something to take.
    rows = len(feed.next_batch(1))
    started = ended = time.perf_counter()
    while not feed.should_stop():
        taken = len(feed.next_batch(args.batch))
        if taken:
            rows, ended = rows + taken, time.perf_counter()
    with open(args.answer, "w") as file:
        json.dump({"rows": rows, "seconds": ended - started}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--answer", default="answer.json", help="a file that the node writes")
    args = parser.parse_args()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F
    from tensorflowonspark import TFCluster

    spark = SparkSession.builder.master("local[1]").config("spark.driver.memory", "4g").getOrCreate()
    values = F.transform(F.sequence(F.lit(1), F.lit(args.width)), lambda i: (i * 0.5 + F.col("id")).cast("float"))
    frame = spark.range(0, args.rows, 1, 1).select(values.alias("features")).cache()
    frame.count()
    started = time.perf_counter()
    cluster = TFCluster.run(spark.sparkContext, drain, args, 1, 0, input_mode=TFCluster.InputMode.SPARK)
    # As its own TFEstimator feeds a DataFrame.
    cluster.train(frame.rdd, num_epochs=1)
    cluster.shutdown()
    whole = time.perf_counter() - started
    spark.stop()
    with open(args.answer) as file:
        print(json.dumps({**json.load(file), "whole": whole}))


if __name__ == "__main__":
    main()
