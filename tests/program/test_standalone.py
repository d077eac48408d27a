"""A fit and runs on a standalone cluster of Spark's own Master and Workers, started here by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pyspark.find_spark_home import _find_spark_home

from sparktf.java import find_java, spark_java_home

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

_START_SECONDS, _JOB_SECONDS = 60.0, 400.0
# A process holds one SparkContext, and the other tests' is local.
_DRIVER = """
import json
import os
import keras
import programs
from sparktf import TFEstimator, local_session, run
from sparktf.errors import NodeError

spark = local_session({master!r}, **{settings!r})
told = {{}}
rows = spark.range(64).selectExpr("cast(id % 8 as float) as x", "2 * (id % 8) as label")
model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(0.01), "mse")
class SeesGpus(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        open(os.path.join({seen!r}, os.environ["CUDA_VISIBLE_DEVICES"]), "w").close()

estimator = TFEstimator(model=model, inputCols=["x"], numWorkers=2, epochs=3, batchSize=8, callbacks=[SeesGpus()])
for turn in ("first", "second"):
    told[turn + " fit"] = [float(loss) for loss in estimator.fit(rows).summary.history["loss"]]
    told[turn + " run"] = run(programs.rows, spark=spark, num_workers=2, dataset=rows)
told["gpus"] = run(programs.sees_gpus, spark=spark, num_workers=2, resources={{"cpus": 1, "gpu": 1}})
try:
    run(programs.fails_on_rank, 1, spark=spark, num_workers=2)
except NodeError as error:
    told["error"] = str(error)
told["after it"] = run(programs.total, spark=spark, num_workers=2)
print("TOLD", json.dumps(told))
"""


@pytest.fixture
def master(tmp_path: Path) -> Iterator[str]:
    """Start a Master and two Workers of one core and one GPU (by name) each; give the Master's URL."""
    with ExitStack() as stack:
        start = _starter(tmp_path, stack)
        url = _said(start("master", "master.Master", [], {}), r"Starting Spark master at (spark://\S+)")
        for number, gpu in enumerate(("3", "5")):
            script = tmp_path / f"gpu-{gpu}"
            script.write_text(f'#!/bin/sh\necho \'{{"name": "gpu", "addresses": ["{gpu}"]}}\'\n')
            script.chmod(0o755)
            options = f"-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript={script}"
            arguments = ["--cores", "1", "--memory", "1g", "--work-dir", str(tmp_path / f"work-{number}"), url]
            log = start(f"worker-{number}", "worker.Worker", arguments, {"SPARK_WORKER_OPTS": options})
            _said(log, "(Successfully registered with master)")
        yield url


def _starter(directory: Path, stack: ExitStack) -> Callable[..., Path]:
    home = _find_spark_home()
    environment = {
        **os.environ,
        "JAVA_HOME": str(spark_java_home(find_java())),
        "SPARK_HOME": home,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
    }

    def start(name: str, kind: str, arguments: list[str], more: dict[str, str]) -> Path:
        log = directory / f"{name}.log"
        here = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
        process = subprocess.Popen(
            [f"{home}/bin/spark-class", f"org.apache.spark.deploy.{kind}", *here, *arguments],
            env={**environment, **more},
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait, _START_SECONDS)
        stack.callback(process.terminate)
        return log

    return start


def _said(log: Path, pattern: str) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while (found := re.search(pattern, log.read_text())) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found is not None, log.read_text()
    return found[1]


def _told_by_a_driver(master: str, spark_settings: dict[str, object], seen: Path) -> dict[str, Any]:
    settings = {
        **spark_settings,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executor.memory": "512m",
        "spark.executor.resource.gpu.amount": 1,
        "spark.task.resource.gpu.amount": 1,
    }
    script = _DRIVER.format(master=master, settings=settings, seen=str(seen))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=_JOB_SECONDS)
    found = re.search(r"^TOLD (.*)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(found[1])
    return told


def test_fits_and_runs_take_turns_on_a_standalone_cluster_each_node_with_its_gpu(
    master: str, spark_settings: dict[str, object], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    told = _told_by_a_driver(master, spark_settings, seen)
    assert len(told["first fit"]) == 3
    assert told["first fit"][-1] < told["first fit"][0]
    assert told["first fit"] == told["second fit"]
    total = 8 * sum(range(8))
    for turn in ("first", "second"):
        assert sum(found[0][1] for found in told[f"{turn} run"]) == total
        assert len({found[0][0] for found in told[f"{turn} run"]}) == 1
    assert sorted(told["gpus"]) == sorted(os.listdir(seen)) == ["3", "5"]
    assert told["error"].startswith("Rank 1 (worker 0) failed: ValueError: exploded on 1")
    assert told["after it"] == [3.0, 3.0]
