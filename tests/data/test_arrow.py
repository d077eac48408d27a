"""Arrow columns come out flat and whole, and what a tensor cannot hold is named with its totals."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from sparktf.data.arrow import ColumnReader
from sparktf.data.blocks import Bytes, Dense, Vectors
from sparktf.data.columns import ColumnSpec
from sparktf.errors import DataError

VECTOR = pa.struct(
    [
        ("type", pa.int8()),
        ("size", pa.int32()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)


def dense(*values):
    return {"type": 1, "size": None, "indices": None, "values": list(values)}


def sparse(size, entries):
    return {"type": 0, "size": size, "indices": list(entries), "values": list(entries.values())}


def spec(shape=(), dtype="float32", **more):
    return ColumnSpec("x", shape, dtype, "user_x", **more)


def read(array, wanted):
    reader = ColumnReader(wanted)
    block = reader.read(array)
    reader.check()
    return block


def test_a_list_of_floats_is_flattened_without_a_copy():
    array = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    values = read(array, spec((2,))).values
    assert values.ctypes.data == array.values.buffers()[1].address
    assert not values.flags.writeable


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.int16()),
        pa.list_(pa.uint8(), 2),
        pa.list_(pa.decimal128(10, 2)),
        pa.list_(pa.float16()),
        pa.list_(pa.list_(pa.int64()), 2),
    ],
)
def test_slices_of_every_list_type_are_read_from_their_offset(kind):
    number = Decimal if pa.types.is_decimal(kind.value_type) else np.float16
    number = number if not pa.types.is_integer(kind.value_type) else int
    if pa.types.is_list(kind.value_type):
        rows = [[[i], [i + 1]] for i in range(6)]
    else:
        rows = [[number(i), number(i + 1)] for i in range(6)]
    array = pa.array(rows, kind).slice(2, 3)
    assert read(array, spec((2,))).values.tolist() == [2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.int32(), pa.float16(), pa.float64(), pa.bool_(), pa.decimal128(21, 1)]
)
def test_scalars_of_every_numeric_type_are_read(kind):
    array = pa.array([0, 1, 1, 0]).cast(kind).slice(1)
    assert read(array, spec((1,))).values.tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_strings_become_lengths_and_bytes(kind):
    array = pa.array(["left out", "grün", "", "日本"]).cast(kind).slice(1)
    block = read(array, spec(dtype="string"))
    assert isinstance(block, Bytes)
    assert block.lengths.tolist() == [5, 0, 6]
    assert block.data.tobytes().decode() == "grün日本"


def test_vectors_keep_their_sparse_parts_and_dense_rows_have_no_indices():
    block = read(
        pa.array([dense(9, 9, 9), sparse(3, {1: 5.0}), dense(1, 2, 3), sparse(3, {})], VECTOR).slice(1),
        spec((3,)),
    )
    assert isinstance(block, Vectors)
    assert block.value_lengths.tolist() == [1, 3, 0]
    assert block.index_lengths.tolist() == [1, 0, 0]
    assert block.values.tolist() == [5, 1, 2, 3]
    assert block.indices.tolist() == [1]


def test_a_sparse_index_beyond_its_size_is_an_error():
    with pytest.raises(DataError, match=r"user_x.*index 3"):
        read(pa.array([sparse(3, {3: 1.0})], VECTOR), spec((3,)))


def test_nulls_and_nan_are_counted_over_all_batches_and_raised_once():
    reader = ColumnReader(spec((2,)))
    kind = pa.list_(pa.float32())
    reader.read(pa.array([[1, 2], [float("nan"), 1]], kind))
    reader.read(pa.array([None, [1, None], [float("nan"), float("nan")]], kind))
    reader.read(pa.array([[float("inf"), float("-inf")]], kind))
    with pytest.raises(DataError, match=r"'user_x' \(feature\) holds 2 nulls and 3 NaN in the 6 rows"):
        reader.check()


@pytest.mark.parametrize("kind", ["feature", "label", "weight"])
def test_nan_is_an_error_whatever_the_column_is_for(kind):
    with pytest.raises(DataError, match=f"{kind}.*1 NaN"):
        read(pa.array([0.0, float("nan")]), spec(kind=kind))


def test_nulls_in_vectors_scalars_strings_and_inner_lists_are_counted():
    for array, wanted, nulls in [
        (pa.array([dense(1), None], VECTOR), spec((1,)), 1),
        (pa.array([1, None, None]), spec(), 2),
        (pa.array(["a", None]), spec(dtype="string"), 1),
        (pa.array([[[1], None], [[1], [2]]]), spec((2,)), 1),
        (pa.nulls(3), spec(), 3),
        (pa.nulls(3), spec(dtype="string"), 3),
    ]:
        with pytest.raises(DataError, match=f"{nulls} null"):
            read(array, wanted)


def test_infinities_are_values():
    assert read(pa.array([np.inf, -np.inf]), spec()).values.tolist() == [np.inf, -np.inf]


def test_negative_weights_are_counted_and_zero_is_a_weight():
    read(pa.array([0, 1]), spec(kind="weight"))
    with pytest.raises(DataError, match=r"weight\) holds 2 negative values in the 3 rows"):
        read(pa.array([-1, 1, -2]), spec(kind="weight"))


@pytest.mark.parametrize(
    ("values", "dtype", "unfit"),
    [
        ([1.0, 1.5, float("inf")], "int64", 2),
        ([2.0**31, 2.0**31 - 1, -(2.0**31)], "int32", 1),
        ([2.0**63, 0.0], "int64", 1),
        ([-1, 255, 256], "uint8", 2),
        ([0, 1, 2], "bool", 1),
    ],
)
def test_values_that_an_integer_or_bool_tensor_cannot_hold_are_counted(values, dtype, unfit):
    with pytest.raises(DataError, match=f"{unfit} values that {dtype} cannot hold"):
        read(pa.array(values), spec(dtype=dtype))


def test_whole_floats_are_labels():
    assert isinstance(read(pa.array([0.0, 9.0]), spec(dtype="int64", kind="label")), Dense)
    assert isinstance(read(pa.array([0.0, 1.0]), spec(dtype="bool")), Dense)


def test_a_wrong_length_names_column_row_length_and_shape():
    reader = ColumnReader(spec((2, 2)))
    reader.read(pa.array([[1, 2, 3, 4]] * 5))
    with pytest.raises(DataError, match=r"user_x.*row 6 .*holds 3 values\. Expected: 4 values.*\(2, 2\)"):
        reader.read(pa.array([[1, 2, 3, 4], [1, 2, 3]]))


def test_a_length_left_open_is_that_of_the_first_row():
    reader = ColumnReader(spec((None, 2)))
    reader.read(pa.array([], pa.list_(pa.int64())))
    assert reader.spec.shape == (None, 2)
    reader.read(pa.array([[1, 2, 3, 4]]))
    assert reader.spec.shape == (2, 2)
    with pytest.raises(DataError, match=r"row 1 .*holds 6 values"):
        reader.read(pa.array([[1, 2, 3, 4, 5, 6]]))


def test_nested_arrays_have_to_be_rectangular():
    with pytest.raises(DataError, match=r"row 1 .*of 1 values at depth 2\. Expected: 2"):
        read(pa.array([[[1, 2], [3, 4]], [[1], [2, 3, 4]]]), spec((4,)))


def test_nested_arrays_in_another_order_of_lengths_are_refused():
    with pytest.raises(DataError, match=r"nested as \(2, 3\).*\(3, 2\)"):
        read(pa.array([[[1, 2, 3], [4, 5, 6]]]), spec((3, 2)))


def test_nested_arrays_keep_their_lengths_over_batches():
    reader = ColumnReader(spec((6,)))
    reader.read(pa.array([[[1, 2, 3], [4, 5, 6]]]))
    with pytest.raises(DataError, match=r"nested as \(3, 2\)"):
        reader.read(pa.array([[[1, 2], [3, 4], [5, 6]]]))


def test_a_scalar_does_not_fit_a_longer_shape():
    with pytest.raises(DataError, match=r"row 0 .*holds 1 values\. Expected: 3"):
        read(pa.array([1.0]), spec((3,)))


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (pa.array([dt.date(2020, 1, 1)]), spec()),
        (pa.array([dt.datetime(2020, 1, 1)]), spec()),
        (pa.array(["1"]), spec()),
        (pa.array([["1"]]), spec((1,))),
        (pa.array([1]), spec(dtype="string")),
        (pa.array([dense(1)], VECTOR), spec((1,), dtype="string")),
        (pa.array([{"a": 1}]), spec()),
        (pa.array([1]), spec(dtype="bool", kind="validation")),
    ],
)
def test_types_that_do_not_fit_are_refused_with_both_types(array, wanted):
    with pytest.raises(DataError, match=r"user_x.*expected\. Received: "):
        read(array, wanted)


def test_nulls_of_a_nullable_column_become_nan_false_or_empty():
    values = read(pa.array([1, None]), spec(nullable=True)).values
    np.testing.assert_array_equal(values, [1, np.nan])
    values = read(pa.array([[1.0, None], None, [2.0, 3.0]]), spec((2,), nullable=True)).values
    np.testing.assert_array_equal(values, [1, np.nan, np.nan, np.nan, 2, 3])
    assert read(pa.array([True, None]), spec(dtype="bool", nullable=True)).values.tolist() == [True, False]
    block = read(pa.array([["a", "b"], None, ["c", None]]), spec((2,), dtype="string", nullable=True))
    assert block.lengths.tolist() == [1, 1, 0, 0, 1, 0]


def test_faults_of_packed_columns_are_told_by_column() -> None:
    spec = ColumnSpec("x", (3,), "float32", "a, b, c", parts=("a", "b", "c"))
    reader = ColumnReader(spec)
    rows = [[1.0, None, 3.0], [1.0, 2.0, float("nan")], [1.0, None, 3.0]]
    reader.read(pa.array(rows, pa.list_(pa.float32())))
    reader.read(pa.array([[None, 2.0, 3.0]], pa.list_(pa.float32())))
    with pytest.raises(DataError, match=r"3 nulls and 1 NaN in the 4 rows.*: 1 in 'a', 2 in 'b', 1 in 'c'"):
        reader.check()
