"""Rows to nodes: evenly, and the same data always alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# monotonically_increasing_id: the partition in the upper bits, the row within it in the lower 33.
_ROW_BITS = 33


def row_id(name: str) -> Column:
    """Return a column that numbers a DataFrame's rows in its own order."""
    from pyspark.sql import functions as F

    return F.monotonically_increasing_id().alias(name)


def deal_out(rows: DataFrame, id_name: str, workers: int, nodes: int | None = None) -> DataFrame:
    """Give every node a partition.

    Each partition's rows are dealt out in turn, starting one worker further in each partition, so that workers' shares
    differ by no more than the number of partitions whatever their sizes.

    Parameters
    ----------
    rows : DataFrame
    id_name : str
        The column made with `row_id`.
    workers : int
        Nodes that are given rows: the first ones.
    nodes : int, optional
        Partitions; `workers` by default.
    """
    from pyspark.sql import functions as F

    row, partition = F.col(id_name).bitwiseAND(F.lit((1 << _ROW_BITS) - 1)), F.shiftright(F.col(id_name), _ROW_BITS)
    return rows.repartitionById(nodes or workers, ((row + partition) % workers).cast("int"))
