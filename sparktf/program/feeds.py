"""From the DataFrames of a run to the partitions of its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from pyspark.sql import types as T

from sparktf.cluster.dealing import deal_out, row_id
from sparktf.cluster.preflight import is_connect
from sparktf.cluster.schema import TEXT, ColumnType, column_type
from sparktf.data.columns import STRING, ColumnSpec
from sparktf.errors import DataError, NodeError, ParamError
from sparktf.program.feeder import ROW_ID
from sparktf.program.roles import Roles

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# Spark's error for a barrier stage in which partitions are joined.
_NOT_IN_A_BARRIER = "SPARK-24820"

_DTYPES = {
    T.BooleanType: "bool",
    T.ByteType: "int8",
    T.ShortType: "int16",
    T.IntegerType: "int32",
    T.LongType: "int64",
    T.FloatType: "float32",
    T.DoubleType: "float64",
    T.DecimalType: "float64",
}


def named(dataset: Any) -> dict[str, Any]:
    """Return a run's DataFrames by name; a single one is called ``"data"``.

    Raises
    ------
    ParamError
        It is neither a DataFrame nor a dict of them.
    """
    if dataset is None:
        return {}
    frames = dict(dataset) if isinstance(dataset, Mapping) else {"data": dataset}
    for name, frame in frames.items():
        if not isinstance(name, str) or not hasattr(frame, "mapInArrow"):
            raise ParamError(
                f"dataset: expected a DataFrame, or a dict of DataFrames by name, received {type(frame).__name__} "
                f"({name!r})."
            )
    return frames


def column_specs(schema: T.StructType, use: str) -> tuple[ColumnSpec, ...]:
    """Say how each column of a DataFrame becomes a tensor of a program: in its own dtype.

    Parameters
    ----------
    schema : StructType
    use : str
        What the DataFrame is, for messages.

    Raises
    ------
    DataError
        A column's type is one that no tensor has, or two columns have one name.
    """
    if not schema.names:
        raise DataError(f"{use}: expected columns, received a DataFrame without any.")
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{use}: expected a name of its own for every column, received {', '.join(twice)} twice.")
    return tuple(_spec(schema, name, use) for name in schema.names)


def _spec(schema: T.StructType, name: str, use: str) -> ColumnSpec:
    column = column_type(schema, name, use)
    shape: tuple[int | None, ...] = (None,) * column.depth
    if column.vector and column.size:
        shape = (column.size,)
    return ColumnSpec(name, shape, _dtype(schema[name].dataType, column), name, "value")


def _dtype(kind: Any, column: ColumnType) -> str:
    if column.kind == TEXT:
        return STRING
    if column.vector:
        return "float64"
    while isinstance(kind, T.ArrayType):
        kind = kind.elementType
    return _DTYPES[type(kind)]


def partitions(spark: Any, frames: Mapping[str, DataFrame], roles: Roles, repartition: bool = True) -> DataFrame:
    """Return a DataFrame of one partition a node: the rows dealt out evenly to the workers, none to other nodes.

    Each row carries its number, so that nodes can put their rows in the data's own order.

    Parameters
    ----------
    spark : SparkSession
    frames : mapping of str to DataFrame
    roles : Roles
    repartition : bool
        False: give every worker the partition that it has, without a shuffle, which would read all of the data.

    Raises
    ------
    ParamError
        The partitions cannot be given out as they are.
    """
    from pyspark.sql import functions as F

    if not repartition:
        return _as_they_are(frames, roles)
    if not frames:
        rowless: DataFrame = spark.range(0, roles.world_size, 1, roles.world_size)
        return rowless
    plain = [_plainly_named(frame) for frame in frames.values()]
    if len(plain) == 1:
        rows = plain[0].select(*_columns(plain[0].schema), row_id(ROW_ID))
    else:
        rows = reduce(lambda some, more: some.unionByName(more, allowMissingColumns=True), _structs(plain))
        rows = rows.select(*[F.col(_struct_name(place)) for place in range(len(plain))], F.col(ROW_ID))
    return deal_out(rows, ROW_ID, roles.num_workers, roles.world_size)


def _as_they_are(frames: Mapping[str, DataFrame], roles: Roles) -> DataFrame:
    if len(frames) != 1 or roles.world_size != roles.num_workers:
        others = roles.world_size - roles.num_workers
        raise ParamError(
            f"repartition=False: expected a run of one DataFrame and of workers alone, received {len(frames)} "
            f"DataFrames and {others} other nodes. Leave it out, and the rows are dealt out to the workers."
        )
    (frame,) = frames.values()
    if (count := _partition_count(frame)) is not None:
        check_partitions(count, roles.num_workers)
    plain = _plainly_named(frame)
    return plain.select(*_columns(plain.schema), row_id(ROW_ID))


def _partition_count(frame: DataFrame) -> int | None:
    """Return the number of a DataFrame's partitions; None where only running it would tell."""
    if is_connect(frame.sparkSession):
        return None
    query: Any = frame._jdf.queryExecution()
    if query.executedPlan().getClass().getSimpleName() == "AdaptiveSparkPlanExec":
        # Spark decides on the way.
        return None
    return int(query.toRdd().getNumPartitions())


def check_partitions(count: int, workers: int) -> None:
    """Check that there is a partition for every worker, where they are given out as they are.

    Raises
    ------
    ParamError
    """
    if count != workers:
        raise ParamError(
            f"repartition=False: expected a DataFrame of {workers} partitions, one for each worker, received one of "
            f"{count}. Use num_workers={count}, write the data as so many partitions, or leave repartition=False out."
        )


def plan_error(error: NodeError) -> ParamError | None:
    """Return what is wrong with partitions that Spark does not run as they are; None where it says nothing of that."""
    if _NOT_IN_A_BARRIER not in str(error):
        return None
    return ParamError(
        "repartition=False: expected a DataFrame whose partitions are read one by one, received one that joins them "
        f"(coalesce, union, limit), which Spark does not run together ({_NOT_IN_A_BARRIER}). Leave it out, or write "
        "the data as so many partitions first."
    )


def _plainly_named(frame: DataFrame) -> DataFrame:
    # Spark does not find every name again (backticks), nor tell "x" from "X"; nodes know columns by their order.
    return frame.toDF(*[f"_sparktf_column_{place}" for place in range(len(frame.columns))])


def _structs(frames: Sequence[DataFrame]) -> list[DataFrame]:
    from pyspark.sql import functions as F

    return [
        frame.select(F.struct(*_columns(frame.schema)).alias(_struct_name(place)), row_id(ROW_ID))
        for place, frame in enumerate(frames)
    ]


def _struct_name(place: int) -> str:
    return f"_sparktf_feed_{place}"


def _columns(schema: T.StructType) -> list[Column]:
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions as F

    columns = []
    for field in schema.fields:
        column = F.col(field.name)
        if column_type(schema, field.name, "dataset").vector:
            column = F.when(column.isNotNull(), vector_to_array(column))
        elif isinstance(field.dataType, T.DecimalType):
            column = column.cast("double")
        columns.append(column.alias(field.name))
    return columns
