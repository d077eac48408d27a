"""The main job on digits, as `make demo` runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "mnist_pipeline.py"


@pytest.mark.long
def test_the_demo_ends_with_its_accuracy_in_two_minutes_and_says_nothing_else(spark_conf_dir: str) -> None:
    environment = {**os.environ, "SPARK_CONF_DIR": spark_conf_dir}
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(DEMO)], env=environment, capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(r"accuracy (0\.\d{3})", done.stdout.splitlines()[-1])
    assert found
    assert float(found[1]) >= 0.93
    assert seconds < 120
