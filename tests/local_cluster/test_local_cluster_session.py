from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyspark


def _executor_and_directory(batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow as pa
    from pyspark import BarrierTaskContext

    BarrierTaskContext.get().barrier()
    rows = sum(batch.num_rows for batch in batches)
    yield pa.RecordBatch.from_pydict({"parent": [os.getppid()], "directory": [os.getcwd()], "rows": [rows]})


def test_a_barrier_stage_runs_on_executors_in_processes_of_their_own(spark: Any) -> None:
    frame = spark.range(10).repartition(2)
    schema = "parent long, directory string, rows long"
    answers = frame.mapInArrow(_executor_and_directory, schema, barrier=True).collect()
    assert sum(answer.rows for answer in answers) == 10
    assert len({answer.parent for answer in answers}) == 2


def test_executors_write_nothing_into_the_installed_spark(spark: Any) -> None:
    frame = spark.range(2).repartition(2)
    schema = "parent long, directory string, rows long"
    answers = frame.mapInArrow(_executor_and_directory, schema, barrier=True).collect()
    installed = Path(pyspark.__file__).parent
    assert not any(Path(answer.directory).is_relative_to(installed) for answer in answers)
    assert not (installed / "work").exists()
