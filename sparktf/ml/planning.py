"""From an estimator's Params and a DataFrame to the feed of a fit, and its rows spread over the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import types as T

from sparktf.errors import ParamError
from sparktf.ml.feed import ID, Feed
from sparktf.ml.inputs import FeedColumn, input_columns
from sparktf.ml.params import _TFEstimatorParams
from sparktf.ml.schema import ColumnType, check_flag, column_type

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# monotonically_increasing_id: the partition in the upper bits, the row within it in the lower 33.
_ROW_BITS = 33


def plan_feed(params: _TFEstimatorParams, schema: T.StructType) -> Feed:
    """Decide which columns a fit reads.

    Parameters
    ----------
    params : TFEstimator
    schema : StructType
        The DataFrame's.

    Raises
    ------
    DataError
        A column is missing or has a type that cannot be fed.
    """
    inputs = input_columns(params, schema)
    mapping = params.getLabelMapping()
    labels = (
        [(None, params.getLabelCol(), "labelCol")]
        if mapping is None
        else [(output, column, f"labelMapping[{output!r}]") for output, column in mapping.items()]
    )
    weight = _optional(params, schema, "weightCol")
    if weight is not None and weight.depth:
        raise ParamError(f"weightCol: expected one number a row, received the array column {weight.column!r}.")
    flag = _optional(params, schema, "validationIndicatorCol")
    if flag is not None:
        check_flag(schema, flag.column, "validationIndicatorCol")
    return Feed(
        inputs,
        tuple(FeedColumn(f"y{i}", t, (column_type(schema, c, use),)) for i, (t, c, use) in enumerate(labels)),
        weight,
        flag,
    )


def spread_rows(dataset: DataFrame, feed: Feed, workers: int) -> DataFrame:
    """Select the feed's columns, number the rows and deal them out to the workers.

    Each partition's rows are dealt out in turn, starting one worker further in each partition, so that worker's shares
    differ by no more than the number of partitions whatever their sizes; the same data is always dealt out alike.
    """
    from pyspark.sql import functions as F

    numbered = dataset.select(*feed.expressions(), F.monotonically_increasing_id().alias(ID))
    row, partition = F.col(ID).bitwiseAND(F.lit((1 << _ROW_BITS) - 1)), F.shiftright(F.col(ID), _ROW_BITS)
    return numbered.repartitionById(workers, ((row + partition) % workers).cast("int"))


def _optional(params: _TFEstimatorParams, schema: T.StructType, name: str) -> ColumnType | None:
    value = params._get(params.getParam(name))
    return column_type(schema, value, name) if value else None
