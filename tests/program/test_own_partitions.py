"""DataFrames whose partitions go to the workers as they are: an early stop leaves the rest unread."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pyarrow as pa
import pytest

from sparktf import run
from sparktf.errors import ParamError

pytestmark = pytest.mark.usefixtures("no_leftovers")

# Of what a partition makes: batches of 4 MiB, in all thirty times what a worker takes at a time (64 MiB); a worker that
# is to come to the end has a shorter one. Spark makes some thirty batches ahead of what is taken.
_BATCHES, _SHORT, _ROWS, _FLOATS = 480, 48, 64, 16 << 10
_SOME = 120


@pytest.fixture
def small_batches(spark: Any) -> Iterator[None]:
    """Have Spark hand over rows as they are made, so that it keeps few that nobody has asked for."""
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(name)
    spark.conf.set(name, _ROWS)
    yield
    spark.conf.set(name, before)


def _made(batches: Iterable[pa.RecordBatch], log: str) -> Iterator[pa.RecordBatch]:
    """Make rows for each of the ids, and note in a file that they have been read."""
    floats = pa.array(np.zeros(_ROWS * _FLOATS, np.float32))
    wide = pa.ListArray.from_arrays(pa.array(np.arange(_ROWS + 1, dtype=np.int32) * _FLOATS), floats)
    for batch in batches:
        for number in batch.column(0).to_pylist():
            with open(log, "a") as file:
                file.write(f"{number // _BATCHES}\n")
            yield pa.RecordBatch.from_pydict({"x": pa.array([number] * _ROWS), "wide": wide})


def _frame(spark: Any, log: Path, second: int = _BATCHES) -> Any:
    """Return a DataFrame of two partitions, the second of so many batches, that notes what is read of it."""
    ids = spark.range(0, 2 * _BATCHES, 1, 2).where(f"id < {_BATCHES + second}")
    return ids.mapInArrow(functools.partial(_made, log=str(log)), "x bigint, wide array<float>")


def _read(log: Path) -> list[int]:
    """Return how many batches have been read of each partition."""
    numbers = log.read_text().split()
    return [numbers.count("0"), numbers.count("1")]


@pytest.mark.usefixtures("small_batches")
def test_a_stream_that_is_left_early_leaves_the_rest_of_the_data_unread(spark: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    sums = run(programs.streams_a_little, spark=spark, num_workers=2, dataset=_frame(spark, log), repartition=False)
    # The first ten rows of each partition.
    assert sums == [0, 10 * _BATCHES]
    assert all(0 < read < _SOME for read in _read(log)), _read(log)


@pytest.mark.usefixtures("small_batches")
def test_a_worker_that_leaves_leaves_its_rest_unread_while_the_other_goes_on(spark: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    frame = _frame(spark, log, second=_SHORT)
    rows = run(programs.one_leaves, True, spark=spark, num_workers=2, dataset=frame, repartition=False)
    assert rows == [10, _SHORT * _ROWS]
    first, second = _read(log)
    assert first < _SOME
    assert second == _SHORT


def test_every_row_comes_once_in_as_many_batches_from_uneven_partitions(spark: Any) -> None:
    frame = spark.range(0, 20, 1, 2).where("id < 15").selectExpr("id as x")
    results = run(programs.takes_batches, False, spark=spark, num_workers=2, dataset=frame, repartition=False)
    assert results == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], [[10, 11, 12, 13], [14], []]]


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (lambda spark: spark.range(0, 10, 1, 3), {}, "2 partitions, one for each worker, received one of 3"),
        (lambda spark: spark.range(0, 10, 1, 1), {}, "received one of 1"),
        (lambda spark: spark.range(10), {"num_ps": 1}, "workers alone, received 1 DataFrames and 1 other nodes"),
        (lambda spark: {"a": spark.range(1), "b": spark.range(1)}, {}, "received 2 DataFrames"),
        (lambda spark: None, {}, "received 0 DataFrames"),
    ],
)
def test_partitions_that_do_not_fit_are_refused_at_once(
    spark: Any, frame: Any, options: dict[str, Any], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(ParamError, match=re.escape(message)):
        run(programs.who, spark=spark, num_workers=2, dataset=frame(spark), repartition=False, **options)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        # What comes of a shuffle is known only when that has been done.
        (lambda spark: spark.range(10).repartition(3), "received one of 3"),
        (lambda spark: spark.range(0, 10, 1, 4).coalesce(2), "SPARK-24820"),
    ],
)
def test_partitions_that_spark_refuses_or_makes_on_the_way_are_told_of(spark: Any, frame: Any, message: str) -> None:
    with pytest.raises(ParamError, match=message):
        run(programs.who, spark=spark, num_workers=2, dataset=frame(spark), repartition=False)
