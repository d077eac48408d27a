"""Which columns fill which of a model's inputs, and how they leave the JVM: alike for training and for scoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparktf.cluster.schema import TEXT, ColumnType, check_size, column_type
from sparktf.data.columns import STRING
from sparktf.errors import DataError, ParamError
from sparktf.ml.signature import TensorSpec

if TYPE_CHECKING:
    from pyspark.sql import Column
    from pyspark.sql import types as T

    from sparktf.ml.model_params import _TFModelParams

# Spark's type for the elements of a packed array, by the model's dtype. Integers are packed as wide as they come, for
# a cast in the JVM would cut off silently what the node refuses by name.
_PACKED_TYPES = {
    "float64": "double",
    "string": "string",
    **dict.fromkeys(("float16", "bfloat16", "float32"), "float"),
}

# Vectors of this many values may leave the JVM as they are, so that sparse ones stay sparse; narrower ones leave as
# arrays, which Spark serializes five to ten times as fast.
_WIDE = 4096


@dataclass(frozen=True)
class FeedColumn:
    """One tensor and the DataFrame's columns that fill it.

    Parameters
    ----------
    name : str
        The column's name in the feed.
    target : str or None
        The model's input or output; None where the model has one and nobody named it.
    columns : tuple of ColumnType
        Several are packed into one array, in this order.
    tensor : TensorSpec or None
        What they fill, where the driver has the model.
    """

    name: str
    target: str | None
    columns: tuple[ColumnType, ...]
    tensor: TensorSpec | None = None

    @property
    def source(self) -> str:
        """The user's columns, for messages."""
        return ", ".join(c.column for c in self.columns)

    @property
    def parts(self) -> tuple[str, ...]:
        """The user's columns where each is one value of the row."""
        return tuple(c.column for c in self.columns) if all(c.depth == 0 for c in self.columns) else ()

    def expression(self, *, sparse: bool) -> Column:
        """Return what to select in the JVM: a lone column as it is, several packed into one array.

        Nulls stay nulls, inside an array or in its place.

        Parameters
        ----------
        sparse : bool
            Leave wide MLlib vectors as they are; else every vector becomes an array.
        """
        from pyspark.sql import functions as F

        if len(self.columns) == 1:
            column = self.columns[0]
            if not column.vector or (sparse and self._width() >= _WIDE):
                return F.col(column.sql)
            return _as_array(column, "float" if self._fits_float() else "double")
        element = self._packed_element()
        if all(c.depth == 0 for c in self.columns):
            return F.array(*[F.col(c.sql).cast(element) for c in self.columns])
        return F.concat(*[_as_array(c, element) for c in self.columns])

    def _fits_float(self) -> bool:
        return self.tensor is None or self.tensor.dtype in ("float16", "bfloat16", "float32")

    def _packed_element(self) -> str:
        kinds = {c.kind for c in self.columns}
        if len(kinds) > 1:
            raise DataError(
                f"Expected columns of one kind to pack into one input, received text beside numbers: {self.source}."
            )
        integral = all(c.integral for c in self.columns)
        if self.tensor is not None:
            return _PACKED_TYPES.get(self.tensor.dtype, "bigint" if integral else "double")
        if kinds == {TEXT}:
            return "string"
        # float holds integers up to 2**24 exactly; ids beyond that come as columns of integers alone.
        return "bigint" if integral else "float"

    def _width(self) -> int:
        """Return the values in a row as far as schema or model tell; 0 where neither does."""
        if self.columns[0].size is not None or self.tensor is None:
            return self.columns[0].size or 0
        return math.prod(d or 1 for d in self.tensor.shape)


def input_columns(params: _TFModelParams, schema: T.StructType) -> tuple[FeedColumn, ...]:
    """Look up the columns that feed a model's inputs.

    Parameters
    ----------
    params : TFEstimator or TFModel
        Of which inputMapping, inputCols or featuresCol count, in this order.
    schema : StructType

    Raises
    ------
    DataError
        A column is missing or has a type that cannot be fed.
    """
    mapping = params.getInputMapping()
    packed: Sequence[str] | None = params._get(params.inputCols)
    chosen: list[tuple[str | None, Sequence[str], str]]
    if mapping is not None:
        chosen = [
            (target, [columns] if isinstance(columns, str) else columns, f"inputMapping[{target!r}]")
            for target, columns in mapping.items()
        ]
    elif packed:
        chosen = [(None, packed, "inputCols")]
    else:
        chosen = [(None, [params.getFeaturesCol()], "featuresCol")]
    return tuple(
        FeedColumn(f"x{i}", target, tuple(column_type(schema, c, use) for c in columns))
        for i, (target, columns, use) in enumerate(chosen)
    )


def pair(columns: Sequence[FeedColumn], tensors: Sequence[TensorSpec]) -> list[tuple[FeedColumn, TensorSpec | None]]:
    """Pair columns with the model's inputs, in the model's order.

    Parameters
    ----------
    columns : sequence of FeedColumn
    tensors : sequence of TensorSpec
        The model's inputs; none where it does not tell them.

    Raises
    ------
    ParamError
        The mapping does not name exactly the model's inputs, or the model has several inputs and no mapping.
    """
    if not tensors:
        return [(c, None) for c in columns]
    names = ", ".join(t.name for t in tensors)
    if len(columns) == 1 and columns[0].target is None:
        if len(tensors) > 1:
            raise ParamError(
                f"Expected inputMapping for a model with {len(tensors)} inputs ({names}), received only "
                f"{columns[0].source!r}."
            )
        return [(columns[0], tensors[0])]
    by_target = {c.target: c for c in columns}
    if set(by_target) != {t.name for t in tensors}:
        raise ParamError(
            f"inputMapping: expected exactly the model's inputs, {names}; received {', '.join(map(str, by_target))}."
        )
    return [(by_target[t.name], t) for t in tensors]


def fill_inputs(columns: Sequence[FeedColumn], tensors: Sequence[TensorSpec]) -> tuple[FeedColumn, ...]:
    """Return the columns in the model's order, with what each fills; checked as far as the schema tells.

    Raises
    ------
    ParamError
        As `pair`.
    DataError
        Columns hold text for numbers or numbers for text, or another number of values than an input takes.
    """
    pairs = pair(columns, tensors)
    for column, tensor in pairs:
        if tensor is not None:
            check_kind(column, tensor)
    for column, tensor in pairs:
        if tensor is not None:
            check_size(column.columns, _size(tensor.shape), tensor.shape, f"input {tensor.name!r}")
    return tuple(replace(column, tensor=tensor) for column, tensor in pairs)


def check_kind(column: FeedColumn, tensor: TensorSpec) -> None:
    """Check that text meets a string tensor, and numbers another one.

    Raises
    ------
    DataError
    """
    for part in column.columns:
        if (part.kind == TEXT) != (tensor.dtype == STRING):
            received = "text" if part.kind == TEXT else "numbers"
            raise DataError(
                f"input {tensor.name!r}: expected values for a tensor of {tensor.dtype}, received {received} from "
                f"{part.column!r}. Encode text in Spark (StringIndexer), or start the model with a preprocessing layer."
            )


def _size(shape: Sequence[int | None]) -> int | None:
    known = [length for length in shape if length is not None]
    return math.prod(known) if len(known) == len(shape) else None


def _as_array(column: ColumnType, element: str) -> Column:
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions as F

    given = F.col(column.sql)
    if column.vector:
        # vector_to_array fails on a null.
        values = vector_to_array(given, "float64" if element == "double" else "float32")
        return F.when(given.isNotNull(), values.cast(f"array<{element}>"))
    return F.array(given.cast(element)) if column.depth == 0 else given.cast(f"array<{element}>")
