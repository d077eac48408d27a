"""One Arrow column of a batch to flat numpy values, without a Python loop over rows.

Lists flatten without a copy where Arrow has no nulls in them; MLlib vectors are read from the storage of
their user-defined type, ``struct<type: int8, size: int32, indices: list<int32>, values: list<double>>``
with type 0 for sparse and 1 for dense; strings become offsets and bytes.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparktf.data.blocks import Block, Bytes, Dense, Vectors
from sparktf.data.columns import STRING, ColumnSpec, is_permuted, resolve_shape
from sparktf.data.faults import Faults, raise_if_any
from sparktf.errors import DataError

VECTOR_FIELDS = {"type", "size", "indices", "values"}
_SPARSE = 0


def is_vector(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type is the storage of MLlib's VectorUDT."""
    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == VECTOR_FIELDS


def is_list(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type is a list of any flavour."""
    found = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(found)


class ColumnReader:
    """Reads one column of a partition, batch by batch, and keeps its totals.

    Parameters
    ----------
    spec : ColumnSpec
        What the model wants of the column.

    Attributes
    ----------
    spec : ColumnSpec
        The same, its open lengths filled after the first row.
    faults : Faults
        Nulls, NaN and the like so far.
    """

    def __init__(self, spec: ColumnSpec) -> None:
        self.spec = spec
        self.faults = Faults()
        self._nesting: tuple[int, ...] | None = None

    def read(self, array: pa.Array) -> Block | None:
        """Flatten and check one batch of the column.

        Returns
        -------
        Dense, Bytes, Vectors or None
            None once the column holds what it may not: then only counting goes on, until `check`.

        Raises
        ------
        DataError
            A type that no tensor has, or a row of a wrong length.
        """
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        block = self._vectors(array) if is_vector(array.type) else self._nested(array)
        self.faults.rows += len(array)
        return None if self.faults.any else block

    def check(self) -> None:
        """Raise what has been counted over the partition.

        Raises
        ------
        DataError
            The column holds nulls, NaN, negative weights or values outside the tensor's dtype.
        """
        raise_if_any([(self.spec, self.faults)], "this worker's partition")

    def _nested(self, array: pa.Array) -> Block | None:
        rows, valid, nullable = len(array), None, self.spec.nullable
        if nullable and array.null_count and is_list(array.type):
            valid = array.is_valid().to_numpy(zero_copy_only=False)
            array = array.drop_null()
        leaf, levels, nulls = _unnest(array)
        self._check_leaf(leaf.type)
        leaf = _plain(leaf, self.spec)
        if self.spec.parts and not nullable:
            self._locate(leaf)
        nulls += 0 if nullable else leaf.null_count
        if nulls:
            self.faults.nulls += nulls
            if self.spec.dtype != STRING:
                self.faults.count_values(_numbers(leaf.drop_null()), self.spec)
            return None
        self._check_lengths(len(array), levels)
        if leaf.null_count:
            leaf = leaf.fill_null(_filling(leaf.type))
        if self.spec.dtype == STRING:
            return _bytes(leaf if valid is None else _spread_strings(leaf, valid))
        values = _numbers(leaf)
        self.faults.count_values(values, self.spec)
        return Dense(values if valid is None else self._spread(values, rows, valid))

    def _locate(self, leaf: pa.Array) -> None:
        """Count nulls and NaN by the column that was packed at each position."""
        floating = pa.types.is_floating(leaf.type)
        if not leaf.null_count and not (floating and pc.any(pc.is_nan(leaf)).as_py()):
            return
        bad = pc.is_null(leaf, nan_is_null=True).to_numpy(zero_copy_only=False)
        self.faults.locate(np.flatnonzero(bad) % len(self.spec.parts), len(self.spec.parts))

    def _spread(self, values: np.ndarray, rows: int, valid: np.ndarray) -> np.ndarray:
        """Put NaN (or False) rows where the column is null."""
        size = self.spec.size if self.spec.size is not None else 1
        spread = np.full((rows, size), False if values.dtype.kind == "b" else np.nan, values.dtype)
        spread[valid] = values.reshape(-1, size)
        return spread.reshape(-1)

    def _vectors(self, array: pa.Array) -> Vectors | None:
        if self.spec.dtype == STRING:
            self._refuse(array.type)
        self.faults.nulls += array.null_count
        if array.null_count:
            array = array.drop_null()
        sparse = array.field("type").to_numpy(zero_copy_only=False) == _SPARSE
        values, value_lengths = _list_parts(array.field("values"))
        indices, index_lengths = _list_parts(array.field("indices"))
        self.faults.count_values(values, self.spec)
        if self.faults.nulls:
            return None
        lengths = np.where(sparse, array.field("size").fill_null(0).to_numpy(), value_lengths)
        self._check_rows(lengths.astype(np.int64), ())
        if indices.size and int(indices.max()) >= (self.spec.size or 0):
            raise DataError(
                f"column {self.spec.source!r} holds a sparse vector with index {int(indices.max())}, "
                f"beyond its size of {self.spec.size}"
            )
        return Vectors(value_lengths, index_lengths, values, indices)

    def _check_leaf(self, kind: pa.DataType) -> None:
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        text = text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        number = number or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
        fits = text if self.spec.dtype == STRING else number
        if self.spec.kind == "validation":
            fits = pa.types.is_boolean(kind)
        if not fits and not pa.types.is_null(kind):
            self._refuse(kind)

    def _refuse(self, kind: pa.DataType) -> NoReturn:
        if self.spec.kind == "validation":
            wanted = "a boolean column"
        elif self.spec.dtype == STRING:
            wanted = "strings or binary (or arrays of them)"
        else:
            wanted = "numbers, booleans, (nested) arrays of them or MLlib vectors"
        raise DataError(
            f"column {self.spec.source!r}: the model takes {self.spec.dtype} of shape {self.spec.shape}, so "
            f"{wanted} are expected. Received: {kind}. Cast or encode the column before"
        )

    def _check_lengths(self, rows: int, levels: list[np.ndarray]) -> None:
        """Check that lists are rectangular and that every row has the length the model wants."""
        if not levels:
            self._check_rows(np.ones(rows, np.int64) if self.spec.size != 1 else np.empty(0, np.int64), ())
            return
        inner = []
        for depth, lengths in enumerate(levels[1:], start=1):
            if lengths.size and not (lengths == lengths[0]).all():
                bad = int(np.argmax(lengths != lengths[0]))
                row = self.faults.rows + _row_of(bad, levels[:depth])
                raise DataError(
                    f"column {self.spec.source!r}: row {row:,} of this worker's partition (counted from 0) "
                    f"holds a nested array of {int(lengths[bad])} values at depth {depth + 1}. Expected: "
                    f"{int(lengths[0])}, the same length everywhere at one depth"
                )
            inner.append(int(lengths[0]) if lengths.size else 0)
        self._check_rows(levels[0] * prod(inner), tuple(inner))

    def _check_rows(self, lengths: np.ndarray, inner: tuple[int, ...]) -> None:
        """Check each row's number of values (int64, one a row), and the inner lengths of nested lists."""
        if not lengths.size:
            return
        nesting = (int(lengths[0]) // max(prod(inner), 1), *inner)
        shape = resolve_shape(self.spec.shape, int(lengths[0]), nesting)
        if shape is None:
            self._wrong_length(0, int(lengths[0]))
        size = prod(shape)
        if not (lengths == size).all():
            bad = int(np.argmax(lengths != size))
            self._wrong_length(bad, int(lengths[bad]), size)
        if is_permuted(shape, nesting) or self._nesting not in (None, nesting):
            raise DataError(
                f"column {self.spec.source!r}: row {self.faults.rows:,} of this worker's partition (counted "
                f"from 0) holds arrays nested as {nesting}. Expected: {self._nesting or shape}; transpose or "
                "flatten the column before"
            )
        self._nesting = nesting
        if self.spec.shape != shape:
            self.spec = replace(self.spec, shape=shape)

    def _wrong_length(self, row: int, received: int, expected: int | None = None) -> NoReturn:
        expected = self.spec.size if expected is None else expected
        wanted = f"{expected:,} values" if expected is not None else "a number of values that fits"
        raise DataError(
            f"column {self.spec.source!r}: row {self.faults.rows + row:,} of this worker's partition "
            f"(counted from 0) holds {received:,} values. Expected: {wanted}, for the model's shape "
            f"{self.spec.shape} of a row"
        )


def _list_parts(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    lengths = pc.list_value_length(array).fill_null(0).to_numpy().astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False), lengths


def _unnest(array: pa.Array) -> tuple[pa.Array, list[np.ndarray], int]:
    """Peel the lists off: the leaf values, each level's lengths (int64), and the nulls among the lists."""
    levels, nulls = [], 0
    while is_list(array.type):
        nulls += array.null_count
        if pa.types.is_fixed_size_list(array.type):
            lengths = np.full(len(array), array.type.list_size, np.int64)
        else:
            # Offsets cost a subtraction; list_value_length would do the same through a kernel.
            lengths = np.diff(array.offsets.to_numpy()).astype(np.int64)
        levels.append(lengths)
        array = array.flatten()
    return array, levels, nulls


def _row_of(element: int, levels: list[np.ndarray]) -> int:
    """Give the row that holds the nth list of a deeper level."""
    for lengths in reversed(levels):
        element = int(np.searchsorted(np.cumsum(lengths), element, side="right"))
    return element


def _plain(leaf: pa.Array, spec: ColumnSpec) -> pa.Array:
    """Cast the few types that numpy does not hold as they are."""
    if pa.types.is_null(leaf.type):
        return leaf.cast(pa.binary() if spec.dtype == STRING else pa.float64())
    # A nullable integer needs a dtype with NaN, in every batch alike: a column has one dtype in its spool.
    if pa.types.is_decimal(leaf.type) or (spec.nullable and pa.types.is_integer(leaf.type)):
        return leaf.cast(pa.float64(), safe=False)
    return leaf


def _numbers(leaf: pa.Array) -> np.ndarray:
    # Only booleans are copied: Arrow packs eight of them into a byte.
    values: np.ndarray = leaf.to_numpy(zero_copy_only=not pa.types.is_boolean(leaf.type))
    return values


def _filling(kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ""
    return b"" if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else float("nan")


def _bytes(leaf: pa.Array) -> Bytes:
    """Give offsets and bytes straight from the buffers; the array holds no nulls."""
    wide = pa.types.is_large_string(leaf.type) or pa.types.is_large_binary(leaf.type)
    _, offsets_buffer, data_buffer = leaf.buffers()
    if len(leaf) == 0 or offsets_buffer is None:
        return Bytes(np.empty(0, np.int64), np.empty(0, np.uint8))
    offsets = np.frombuffer(offsets_buffer, np.int64 if wide else np.int32)
    offsets = offsets[leaf.offset : leaf.offset + len(leaf) + 1]
    data = np.empty(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return Bytes(np.diff(offsets).astype(np.int64), data[offsets[0] : offsets[-1]])


def _spread_strings(leaf: pa.Array, valid: np.ndarray) -> pa.Array:
    """Put rows of empty strings where a column of string arrays is null."""
    rows = int(valid.sum())
    size = len(leaf) // rows if rows else 1
    places = np.full((len(valid), size), -1, np.int64)
    places[valid] = np.arange(len(leaf), dtype=np.int64).reshape(-1, size)
    flat = places.reshape(-1)
    return leaf.take(pa.array(flat, mask=flat < 0)).fill_null(_filling(leaf.type))
