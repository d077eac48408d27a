"""Runs on Spark Connect, whose driver the nodes cannot reach."""

from __future__ import annotations

from typing import Any

import pytest
from programs import dies_beside_its_servers, fails_on_rank, returns_much, rows, total

from sparktf import run
from sparktf.errors import ClusterError, DataError, NodeError, ParamError


def test_nodes_are_fed_find_each_other_and_return(spark: Any) -> None:
    found = run(rows, spark=spark, num_workers=2, dataset=spark.range(101).selectExpr("id as x"))
    assert sum(part[0][1] for part in found) == sum(range(101))
    assert run(total, spark=spark, num_workers=2, num_ps=1) == [3.0, 3.0, -1.0]


def test_partitions_are_read_as_they_are_and_a_wrong_number_of_them_is_told_of(spark: Any) -> None:
    frame = spark.range(0, 101, 1, 2).selectExpr("id as x")
    assert run(rows, spark=spark, num_workers=2, dataset=frame, repartition=False) == [
        [(13, sum(range(50)))],
        [(13, sum(range(50, 101)))],
    ]
    with pytest.raises(ParamError, match="1 partitions, one for each worker, received one of 2"):
        run(rows, spark=spark, num_workers=1, dataset=frame, repartition=False)
    with pytest.raises(ParamError, match="SPARK-24820"):
        run(rows, spark=spark, num_workers=2, dataset=spark.range(0, 9, 1, 4).coalesce(2), repartition=False)


def test_large_results_come_in_pieces_and_too_large_ones_are_refused(spark: Any) -> None:
    (found,) = run(returns_much, [10_000_000], spark=spark)
    assert found.nbytes == 10_000_000
    with pytest.raises((ClusterError, NodeError), match="maxResultSize"):
        run(returns_much, [40_000_000], spark=spark)


def test_a_nodes_error_is_told_in_sparks_words(spark: Any) -> None:
    with pytest.raises(NodeError, match="ValueError: exploded on 0"):
        run(fails_on_rank, 0, spark=spark)


def test_nulls_are_refused(spark: Any) -> None:
    with pytest.raises(DataError, match="1 null in the 3 rows"):
        run(rows, spark=spark, num_workers=2, dataset=spark.sql("select explode(array(1, null, 3)) as x"))


def test_a_worker_that_was_lost_is_told_of_at_the_end(spark: Any, caplog: pytest.LogCaptureFixture) -> None:
    chief, worker, report = run(dies_beside_its_servers, 1, spark=spark, num_workers=2, num_ps=1)
    assert "Rank 1 (worker 0) was lost" in caplog.text
    assert (chief, worker, report.lost) == (0, None, (1,))
