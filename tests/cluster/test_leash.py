"""What a child process is started with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyspark
import pytest

from sparktf.cluster.leash import job_environment


def test_a_child_imports_the_pyspark_that_is_installed_and_not_the_zip_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Path(pyspark.__file__).parent
    within = str(installed / "python" / "lib" / "pyspark.zip")
    # What a cluster hands out lies alone, beside modules that were shipped with the job.
    alone, shipped = str(tmp_path / "pyspark" / "python" / "lib" / "pyspark.zip"), str(tmp_path / "shipped")
    monkeypatch.setattr(sys, "path", [shipped, within, alone, "", str(installed.parent)])
    assert job_environment()["PYTHONPATH"].split(os.pathsep) == [shipped, alone, str(installed.parent)]
