"""README's program, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.long
def test_the_shortest_program_of_readme_learns_and_shows_each_epoch(spark_conf_dir: str, tmp_path: Path) -> None:
    program = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    (tmp_path / "shortest.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "shortest.py"],
        cwd=tmp_path,
        env={**os.environ, "SPARK_CONF_DIR": spark_conf_dir},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"epoch (\d)/5 ", done.stdout) == ["1", "2", "3", "4", "5"]
    # The labels' standard deviation is 0.22.
    assert 0 < float(done.stdout.splitlines()[-1]) < 0.1
