"""A driver on Spark Connect that is interrupted: nodes are no children of it, and hear of it from the server alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# A client of the tests' own server, whose token is in the environment.
_DRIVER = """
import sys
import programs
from pyspark.sql import SparkSession
from sparktf import run
spark = SparkSession.builder.remote(sys.argv[1]).getOrCreate()
try:
    run(programs.notes_its_pid, sys.argv[2], spark=spark, num_workers=2)
except KeyboardInterrupt:
    print("interrupted, then", spark.range(3).count(), "rows", flush=True)
"""
_START_SECONDS, _END_SECONDS = 120.0, 30.0


@pytest.fixture
def driver(spark: Any, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a driver whose nodes run; give it and its nodes' process ids."""
    command = [sys.executable, "-c", _DRIVER, f"sc://{spark.client._builder.endpoint}", str(tmp_path)]
    # What tells pyspark that the server is this process's own.
    ours = ("SPARK_LOCAL_REMOTE", "SPARK_CONNECT_MODE_ENABLED", "SPARK_REMOTE")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in ours},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while len(found := list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        nodes = [int(file.read_text()) for file in found]
        assert len(nodes) == 2
        yield process, nodes
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + _END_SECONDS
    while (alive := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive


def test_nodes_end_when_their_client_is_interrupted_which_goes_on(
    spark: Any, driver: tuple[subprocess.Popen[str], list[int]]
) -> None:
    process, nodes = driver
    process.send_signal(signal.SIGINT)
    assert _gone(nodes)
    said, _ = process.communicate(timeout=_START_SECONDS)
    assert "interrupted, then 3 rows" in said, said
    # The server's other clients have lost nothing.
    assert spark.range(10).count() == 10
