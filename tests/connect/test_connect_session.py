from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def _count_rows_behind_a_barrier(batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow as pa
    from pyspark import BarrierTaskContext

    BarrierTaskContext.get().barrier()
    yield pa.RecordBatch.from_pydict({"rows": [sum(batch.num_rows for batch in batches)]})


def test_the_session_is_a_connect_session(spark: Any) -> None:
    assert type(spark).__module__ == "pyspark.sql.connect.session"


def test_a_barrier_stage_runs_through_connect(spark: Any) -> None:
    answers = spark.range(10).repartition(2).mapInArrow(_count_rows_behind_a_barrier, "rows long", barrier=True)
    assert sorted(answer.rows for answer in answers.collect()) == [5, 5]
