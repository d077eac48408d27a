"""What a DataFrame's schema says about the columns a model is to be fed with; checked before a job starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import types as T

from sparktf.errors import DataError

NUMBER, TEXT = "number", "text"


@dataclass(frozen=True)
class ColumnType:
    """What the schema tells of one column.

    Parameters
    ----------
    column : str
        Its name in the DataFrame.
    kind : {"number", "text"}
        ``"text"`` is string or binary.
    depth : int
        Array levels around one value: 0 a scalar, 1 an array or an MLlib vector.
    integral : bool
        Values are integers (bool is not).
    size : int or None
        Values in a row where the schema tells: 1 for a scalar, the length of a vector whose metadata has it.
    vector : bool
        An MLlib vector.
    sql : str
        The column's name as Spark SQL reads it.
    """

    column: str
    kind: str
    depth: int
    integral: bool
    size: int | None
    vector: bool = False
    sql: str = ""


def column_type(schema: T.StructType, column: str, use: str) -> ColumnType:
    """Look a column up and say what it holds.

    Parameters
    ----------
    schema : StructType
    column : str
        A name, or a path into structs (``"a.b"``).
    use : str
        What the column is to be used for, for messages: ``"featuresCol"``.

    Raises
    ------
    DataError
        There is no such column, or its type is one that no tensor has.
    """
    field = _find(schema, column)
    if field is None:
        raise DataError(
            f"{use}: expected a column of the DataFrame, received {column!r}. It has: {', '.join(schema.names)}"
        )
    kind = field.dataType
    if _is_vector(kind):
        size = field.metadata.get("ml_attr", {}).get("num_attrs")
        size = int(size) if size is not None else None
        return ColumnType(column, NUMBER, 1, False, size, vector=True, sql=sql_name(schema, column))
    depth, element = 0, kind
    while isinstance(element, T.ArrayType):
        depth, element = depth + 1, element.elementType
    if isinstance(element, T.StringType | T.BinaryType):
        return ColumnType(column, TEXT, depth, False, 1 if depth == 0 else None, sql=sql_name(schema, column))
    if not isinstance(element, T.NumericType | T.BooleanType):
        raise DataError(
            f"{use}: expected column {column!r} to hold numbers, booleans, strings, arrays of them or MLlib vectors; "
            f"received {kind.simpleString()}. Convert it in Spark first (for a date or timestamp: cast it to double or "
            "take its parts)."
        )
    integral = isinstance(element, T.IntegralType)
    return ColumnType(column, NUMBER, depth, integral, 1 if depth == 0 else None, sql=sql_name(schema, column))


def type_name(schema: T.StructType, column: str) -> str:
    """Return a column's type as people know it from Spark: ``"array<double>"``."""
    return str(_find(schema, column).dataType.simpleString())


def check_flag(schema: T.StructType, column: str, use: str) -> None:
    """Check that a column is boolean.

    Raises
    ------
    DataError
    """
    field = _find(schema, column)
    if field is None or not isinstance(field.dataType, T.BooleanType):
        received = "no such column" if field is None else field.dataType.simpleString()
        raise DataError(f"{use}: expected column {column!r} to be boolean, received {received}.")


def check_size(columns: Sequence[ColumnType], wanted: int | None, shape: Any, use: str) -> None:
    """Compare the values that columns give a row, where the schema tells, with what the model's input takes.

    Raises
    ------
    DataError
    """
    sizes = [c.size for c in columns]
    if wanted is None or any(size is None for size in sizes):
        return
    total = sum(size for size in sizes if size is not None)
    if total != wanted:
        names = ", ".join(repr(c.column) for c in columns)
        raise DataError(
            f"{use}: expected {wanted} values a row for the model's input of shape {shape}, received {total} "
            f"from {names}. Give other columns, or a model with another input shape."
        )


def sql_name(schema: T.StructType, name: str) -> str:
    """Return a column's name as Spark SQL reads it: a top-level column in backticks, else a path into structs."""
    return "`" + name.replace("`", "``") + "`" if name in schema.names else name


def _find(schema: T.StructType, path: str) -> Any:
    # A column whose own name holds dots comes first.
    if path in schema.names:
        return schema[path]
    field: Any = None
    current: Any = schema
    for part in path.split("."):
        if not isinstance(current, T.StructType) or part not in current.names:
            return None
        field = current[part]
        current = field.dataType
    return field


def _is_vector(kind: Any) -> bool:
    # By name: classic Spark and Connect each have a class of their own for MLlib's vectors.
    return isinstance(kind, T.UserDefinedType) and type(kind).__name__ == "VectorUDT"
