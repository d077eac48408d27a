"""From an estimator's Params and a DataFrame to the feed of a fit, and its rows spread over the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import types as T

from sparktf.cluster.dealing import deal_out, row_id
from sparktf.cluster.schema import TEXT, ColumnType, check_flag, column_type, type_name
from sparktf.errors import ParamError
from sparktf.ml.feed import ID, Feed
from sparktf.ml.inputs import FeedColumn, input_columns
from sparktf.ml.params import _TFEstimatorParams

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


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
    if weight is not None and (weight.depth or weight.kind == TEXT):
        raise ParamError(
            f"weightCol: expected one number a row, received column {weight.column!r} of type "
            f"{type_name(schema, weight.column)}."
        )
    flag = _optional(params, schema, "validationIndicatorCol")
    if flag is not None:
        check_flag(schema, flag.column, "validationIndicatorCol")
    return Feed(
        inputs,
        tuple(FeedColumn(f"y{i}", t, (column_type(schema, c, use),)) for i, (t, c, use) in enumerate(labels)),
        weight,
        flag,
    )


def spread_rows(dataset: DataFrame, feed: Feed, workers: int, num_ps: int = 0) -> DataFrame:
    """Select the feed's columns, number the rows and deal them out to the workers; parameter servers get none."""
    return deal_out(dataset.select(*feed.expressions(), row_id(ID)), ID, workers, workers + num_ps)


def _optional(params: _TFEstimatorParams, schema: T.StructType, name: str) -> ColumnType | None:
    value = params._get(params.getParam(name))
    return column_type(schema, value, name) if value else None
