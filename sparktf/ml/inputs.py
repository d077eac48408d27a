"""From a DataFrame's columns to a model's inputs: which feeds which, and how it leaves the JVM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.ml.functions import vector_to_array
from pyspark.sql import functions as F
from pyspark.sql import types as T

from sparktf.data.columns import STRING
from sparktf.errors import DataError, ParamError
from sparktf.ml.schema import TEXT, ColumnType, check_size, column_type
from sparktf.ml.signature import ModelSignature, TensorSpec

if TYPE_CHECKING:
    from pyspark.sql import Column

PACKED_TYPES = {
    "float64": "double",
    "string": "string",
    "bool": "boolean",
    "int8": "tinyint",
    "uint8": "smallint",
    "int16": "smallint",
    "uint16": "int",
    "int32": "int",
    "uint32": "bigint",
    "int64": "bigint",
    "uint64": "bigint",
}


@dataclass(frozen=True)
class ModelInput:
    """One input of the model and the columns that feed it.

    Parameters
    ----------
    spec : TensorSpec
        What the model wants.
    columns : tuple of str
        One column, or several scalar columns that are packed into one array in this order.
    """

    spec: TensorSpec
    columns: tuple[str, ...]

    @property
    def source(self) -> str:
        """The columns, for messages."""
        return ", ".join(self.columns)


def choose_inputs(
    signature: ModelSignature,
    features: str,
    columns: Sequence[str] | None,
    mapping: Mapping[str, str | list[str]] | None,
) -> list[ModelInput]:
    """Decide which columns feed which input, in the model's order of inputs.

    Parameters
    ----------
    signature : ModelSignature
    features : str
        featuresCol, for a model with one input.
    columns : sequence of str or None
        inputCols, in place of featuresCol.
    mapping : mapping or None
        inputMapping, ``{model input: column or list of columns}``.

    Raises
    ------
    ParamError
        The mapping does not name exactly the model's inputs, or the model has several inputs and no mapping.
    """
    names = [spec.name for spec in signature.inputs]
    if mapping is not None:
        if set(mapping) != set(names):
            raise ParamError(
                f"inputMapping: expected exactly the model's inputs, {', '.join(names)}. Received: {', '.join(mapping)}"
            )
        chosen = [mapping[name] for name in names]
        return [
            ModelInput(spec, (item,) if isinstance(item, str) else tuple(item))
            for spec, item in zip(signature.inputs, chosen, strict=True)
        ]
    if len(names) > 1:
        raise ParamError(
            f"the model has {len(names)} inputs, {', '.join(names)}. Expected: an inputMapping that gives "
            "each of them a column. Received: none"
        )
    return [ModelInput(signature.inputs[0], tuple(columns) if columns else (features,))]


def feed_expression(schema: T.StructType, item: ModelInput) -> Column:
    """Return the expression that brings a model input's columns out of the JVM as one Arrow column.

    Vectors become arrays (a vector as it is takes Spark five to ten times as long to serialize), several
    columns are packed into one array, other columns go as they are. Nulls stay nulls.

    Raises
    ------
    DataError
        A column is missing, or has a type or a length that the model cannot take.
    """
    use = f"input {item.spec.name!r}"
    kinds = [column_type(schema, name, use) for name in item.columns]
    for kind in kinds:
        if (kind.kind == TEXT) != (item.spec.dtype == STRING):
            received = "text" if kind.kind == TEXT else "numbers"
            raise DataError(
                f"{use}: expected values for a tensor of {item.spec.dtype}, received {received} from column "
                f"{kind.column!r}. Encode it in Spark first, or start the model with a preprocessing layer"
            )
    check_size(kinds, _size(item.spec.shape), item.spec.shape, use)
    return _packed(item, kinds) if len(kinds) > 1 else _single(item, kinds[0])


def _single(item: ModelInput, kind: ColumnType) -> Column:
    column = F.col(kind.sql)
    if not kind.vector:
        return column
    element = "float32" if item.spec.dtype in ("float16", "bfloat16", "float32") else "float64"
    return F.when(column.isNotNull(), vector_to_array(column, element))


def _packed(item: ModelInput, kinds: Sequence[ColumnType]) -> Column:
    element = PACKED_TYPES.get(item.spec.dtype, "float")
    if all(kind.depth == 0 for kind in kinds):
        return F.array(*[F.col(kind.sql).cast(element) for kind in kinds])
    parts = []
    for kind in kinds:
        column = _single(item, kind)
        parts.append(F.array(column.cast(element)) if kind.depth == 0 else column.cast(f"array<{element}>"))
    # concat is null where a part is null, which is what the row's prediction then is.
    return F.concat(*parts)


def _size(shape: Sequence[int | None]) -> int | None:
    known = [length for length in shape if length is not None]
    return math.prod(known) if len(known) == len(shape) else None
