"""Rows to nodes, through Spark."""

from __future__ import annotations

from typing import Any

import pytest
from pyspark.sql import functions as F

from sparktf.cluster.dealing import deal_out, row_id


@pytest.mark.parametrize(
    ("sizes", "workers", "nodes"),
    [((97, 0, 1, 2), 3, 3), ((40,), 4, 5), ((1, 0), 3, 3), ((5, 5, 5), 2, 3)],
    ids=["skewed and empty partitions", "one partition and a server", "fewer rows than workers", "small ones"],
)
def test_every_row_goes_to_one_worker_and_shares_differ_by_the_number_of_partitions_at_most(
    spark: Any, sizes: tuple[int, ...], workers: int, nodes: int
) -> None:
    partitions = spark.sparkContext.parallelize(range(len(sizes)), len(sizes))
    rows = partitions.flatMap(lambda p: [(p, row) for row in range(sizes[p])]).toDF("partition int, row int")
    assert rows.rdd.glom().map(len).collect() == list(sizes)
    dealt = deal_out(rows.withColumn("id", row_id("id")), "id", workers, nodes)
    assert dealt.rdd.getNumPartitions() == nodes
    found = dealt.withColumn("node", F.spark_partition_id()).collect()
    assert sorted((r.partition, r.row) for r in found) == [
        (p, row) for p, size in enumerate(sizes) for row in range(size)
    ]
    shares = [sum(r.node == node for r in found) for node in range(nodes)]
    assert shares[workers:] == [0] * (nodes - workers)
    assert max(shares[:workers]) - min(shares[:workers]) <= len(sizes)
