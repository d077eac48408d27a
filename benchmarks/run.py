"""How soon a program runs, and how fast Spark feeds it, against TensorFlowOnSpark 2.2.5.

The start: seconds from `sparktf.run` to the first line of `main`, in a session that has run one before, beside those of
a bare import of TensorFlow. The feed: 60,000 rows of array<float> of 784, cached, to one node that does nothing with
them. Ours from main's first line to the last batch; TensorFlowOnSpark's from the first row's arrival to the last one's.
Interleaved rounds, each in another order; medians, ratios within a round.

TensorFlowOnSpark comes from an environment of its own (``benchmarks/peers/tfos``), which is made when it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.environment import make_environment

from sparktf.java import find_java, spark_java_home

TFOS = Path(__file__).parent / "peers" / "tfos"
BATCH = 1000
IMPORT = "import time; start = time.perf_counter(); import tensorflow; print(time.perf_counter() - start)"


def first_line(called: float, ctx: Any) -> float:
    return time.time() - called


def drain(args: dict[str, Any], ctx: Any) -> tuple[int, float]:
    started = time.perf_counter()
    if args["way"] == "dataset":
        rows = sum(batch["features"].shape[0] for batch in ctx.dataset(BATCH))
    else:
        rows = sum(len(batch["features"]) for batch in ctx.batches(BATCH, stream=args["way"] == "stream"))
    return rows, time.perf_counter() - started


def start_seconds(spark: Any) -> float:
    from sparktf import run

    # One machine, one clock: the node reads what the driver read.
    return run(first_line, time.time(), spark=spark)[0]


def import_seconds() -> float:
    python = [sys.executable, "-c", IMPORT]
    return float(subprocess.run(python, check=True, capture_output=True, text=True).stdout)


def ours(spark: Any, frame: Any, way: str) -> tuple[float, float]:
    """Return our rows per second, and the seconds of the whole run."""
    from sparktf import run

    started = time.perf_counter()
    ((rows, seconds),) = run(drain, {"way": way}, spark=spark, dataset=frame)
    return rows / seconds, time.perf_counter() - started


def theirs(python: Path, rows: int, width: int) -> tuple[float, float]:
    """Return TensorFlowOnSpark's rows per second, and its seconds from start to shutdown."""
    command = [str(python), str(TFOS / "drain.py"), f"--rows={rows}", f"--width={width}", f"--batch={BATCH}"]
    environment = {**os.environ, "JAVA_HOME": str(spark_java_home(find_java())), "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"TensorFlowOnSpark failed:\n{done.stderr[-4000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    return told["rows"] / told["seconds"], told["whole"]


def measure_start(spark: Any, rounds: int) -> None:
    pairs = [(start_seconds(spark), import_seconds()) for _ in range(rounds)]
    start, bare = (statistics.median(values) for values in zip(*pairs, strict=True))
    beyond = statistics.median(start - bare for start, bare in pairs)
    print(f"start: {start:.1f} s to main's first line, import of TensorFlow {bare:.1f} s, beyond it {beyond:.2f} s")


def measure_feed(spark: Any, rows: int, width: int, rounds: int) -> None:
    from pyspark.sql import functions as F

    values = F.transform(F.sequence(F.lit(1), F.lit(width)), lambda i: (i * 0.5 + F.col("id")).cast("float"))
    frame = spark.range(0, rows, 1, 1).select(values.alias("features")).cache()
    frame.count()
    python = make_environment(TFOS, "tensorflowonspark", "TensorFlowOnSpark and TensorFlow, 1 GB")
    contenders: dict[str, Any] = {
        way: lambda way=way: ours(spark, frame, way) for way in ("batches", "stream", "dataset")
    }
    if python is not None:
        contenders["TensorFlowOnSpark"] = lambda: theirs(python, rows, width)
    results = [{name: contenders[name]() for name in _turned(list(contenders), turn)} for turn in range(rounds)]
    for name in contenders:
        rate, whole = (statistics.median(values) for values in zip(*(told[name] for told in results), strict=True))
        line = f"feed, {name}: {rate:,.0f} rows/s (whole run {whole:.1f} s)"
        if python is not None and name != "TensorFlowOnSpark":
            ratio = statistics.median(told[name][0] / told["TensorFlowOnSpark"][0] for told in results)
            line += f", {ratio:.1f} times TensorFlowOnSpark's rate"
        print(line, flush=True)


def _turned(names: list[str], turn: int) -> list[str]:
    # Right after TensorFlowOnSpark's half a minute a drain may be slower; no contender always comes then.
    return [*names[turn % len(names) :], *names[: turn % len(names)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=784)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from sparktf import local_session

    spark = local_session("local[1]", "benchmark-run", **{"spark.driver.memory": "4g"})
    start_seconds(spark)
    measure_start(spark, args.rounds)
    measure_feed(spark, args.rows, args.width, args.rounds)
    spark.stop()


if __name__ == "__main__":
    main()
