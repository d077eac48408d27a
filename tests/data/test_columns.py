"""What a column spec accepts, and how open lengths are filled."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sparktf.data.columns import ColumnSpec, is_permuted, numpy_dtype, resolve_shape
from sparktf.errors import ParamError


@pytest.mark.parametrize(
    ("shape", "size", "nesting", "expected"),
    [
        ((), 1, (1,), ()),
        ((1,), 1, (1,), (1,)),
        ((), 2, (2,), None),
        ((28, 28, 1), 784, (784,), (28, 28, 1)),
        ((28, 28, 1), 783, (783,), None),
        ((None,), 7, (7,), (7,)),
        ((None,), 0, (0,), None),
        ((None, 3), 12, (12,), (4, 3)),
        ((None, 3), 13, (13,), None),
        ((None, None, 3), 24, (2, 4, 3), (2, 4, 3)),
        ((None, None, 3), 24, (24,), None),
    ],
)
def test_a_rows_values_fill_the_open_lengths_or_do_not_fit(shape, size, nesting, expected):
    assert resolve_shape(shape, size, nesting) == expected


@pytest.mark.parametrize(
    ("shape", "nesting", "expected"),
    [
        ((28, 28, 1), (28, 28), False),
        ((28, 28, 1), (784,), False),
        ((32, 32, 3), (3, 32, 32), True),
        ((2, 3), (3, 2), True),
        ((6,), (2, 3), False),
    ],
)
def test_lengths_in_another_order_are_told_from_a_reshape(shape, nesting, expected):
    assert is_permuted(shape, nesting) is expected


def test_a_spec_survives_json():
    spec = ColumnSpec("x", (None, 3), "float32", "a, b", nullable=True)
    assert ColumnSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_shape_may_be_given_as_a_list_and_its_size_is_open_with_an_open_length():
    assert ColumnSpec("x", [2, 3], "float32", "x").shape == (2, 3)
    assert ColumnSpec("x", (2, 3), "float32", "x").size == 6
    assert ColumnSpec("x", (2, None), "float32", "x").size is None


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"shape": (0,)},
        {"shape": (2.0,)},
        {"shape": (True,)},
        {"dtype": "float31"},
        {"kind": "features"},
        {"dtype": "int64", "nullable": True},
        {"kind": "weight", "nullable": True},
    ],
)
def test_a_spec_that_cannot_work_is_refused_when_made(change):
    with pytest.raises(ParamError):
        ColumnSpec(**{"name": "x", "shape": (2,), "dtype": "float32", "source": "x", **change})


def test_dtypes_that_numpy_lacks_come_from_ml_dtypes():
    assert numpy_dtype("bfloat16").itemsize == 2
    assert numpy_dtype("string") == np.dtype(object)
