"""Runs whose nodes are in executors of their own: fed, together, and never left behind."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from failing_programs import kills_its_task, sums_rows, tells_when_it_raises

from sparktf import run
from sparktf.errors import NodeError, SlotsError

PROMISED_SECONDS = 10.0


def _executors(spark: Any) -> set[str]:
    running = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    return {running.apply(i).id() for i in range(running.size())}


def test_nodes_of_two_executors_are_fed_and_sum_up(spark: Any, no_leftovers: Any) -> None:
    frame = spark.range(1000).repartition(3).selectExpr("id as x")
    assert run(sums_rows, spark=spark, num_workers=2, dataset=frame) == [sum(range(1000))] * 2
    as_it_is = spark.range(0, 1000, 1, 2).selectExpr("id as x")
    assert run(sums_rows, spark=spark, num_workers=2, dataset=as_it_is, repartition=False) == [sum(range(1000))] * 2


def test_an_error_reaches_the_driver_in_time_and_executors_survive(spark: Any, no_leftovers: Any) -> None:
    before = _executors(spark)
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) failed: ValueError") as caught:
        run(tells_when_it_raises, spark=spark, num_workers=2)
    raised = float(re.search(r"kaboom at ([\d.]+)", str(caught.value))[1])
    assert time.time() - raised < PROMISED_SECONDS
    assert _executors(spark) == before
    assert run(sums_rows, spark=spark, num_workers=2, dataset=spark.range(10).selectExpr("id as x")) == [45, 45]


def test_a_node_dies_with_its_task(spark: Any, no_leftovers: Any) -> None:
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) was lost") as caught:
        run(kills_its_task, spark=spark, num_workers=2)
    assert caught.value.rank == 1


def test_nodes_get_what_a_resource_profile_asks_for(spark: Any) -> None:
    # Each executor has one core: two cannot be had, and that is said at once.
    started = time.monotonic()
    with pytest.raises(SlotsError, match="Expected 1 task slots"):
        run(sums_rows, spark=spark, num_workers=1, resources={"cpus": 2})
    assert time.monotonic() - started < 10
    frame = spark.range(10).selectExpr("id as x")
    assert run(sums_rows, spark=spark, num_workers=2, resources={"cpus": 1}, dataset=frame) == [45, 45]
