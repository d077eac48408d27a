"""Runs that wait for task slots: not without end, but as long as another run of ours has them."""

from __future__ import annotations

import threading
import time
from typing import Any

import programs
import pytest

from sparktf import run
from sparktf.errors import SlotsError

pytestmark = pytest.mark.usefixtures("no_leftovers")


def test_a_run_whose_nodes_never_come_up_ends_after_the_timeout(spark: Any) -> None:
    context = spark.sparkContext

    def hold() -> None:
        context.addJobTag("holds-the-slots")
        with pytest.raises(Exception, match="cancelled"):
            context.parallelize(range(4), 4).foreach(lambda _: time.sleep(120))

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(2)
    try:
        started = time.monotonic()
        with pytest.raises(SlotsError, match=r"Expected 2 free task slots.*within timeout=3 s"):
            run(programs.who, spark=spark, num_workers=2, timeout=3)
        assert time.monotonic() - started < 60
    finally:
        context.cancelJobsWithTag("holds-the-slots")
        holder.join()


@pytest.mark.long
def test_a_run_may_wait_for_another_of_ours_for_longer_than_the_timeout(spark: Any) -> None:
    first = run(programs.goes_on, 12, spark=spark, num_workers=3, timeout=8, wait=False)
    second = run(programs.goes_on, 0, spark=spark, num_workers=3, timeout=8, wait=False)
    assert first.result(60) == second.result(60) == ["done"] * 3


def test_runs_of_two_threads_are_fed_side_by_side(spark: Any) -> None:
    found: dict[int, Any] = {}

    def feed(number: int) -> None:
        frame = spark.range(100 * number, 100 * number + 50).selectExpr("id as x")
        found[number] = run(programs.rows, spark=spark, num_workers=2, dataset=frame)

    threads = [threading.Thread(target=feed, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number in range(2):
        # Each has its own rows, and all of them.
        assert sum(total for ((_, total),) in found[number]) == sum(range(100 * number, 100 * number + 50))
