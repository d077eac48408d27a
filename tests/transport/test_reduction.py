import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.errors import ParamError
from sparktf.transport.reduction import check_array, check_op, chunk_bounds, shard_bounds


@given(length=st.integers(0, 500), size=st.integers(1, 20))
def test_shards_are_those_of_array_split(length, size):
    whole = np.arange(length)
    shards = [whole[start:stop].tolist() for start, stop in shard_bounds(length, size)]
    assert shards == [part.tolist() for part in np.array_split(whole, size)]


@given(start=st.integers(0, 50), length=st.integers(0, 300), longest=st.integers(1, 64))
def test_chunks_cover_a_range_once_and_in_order(start, length, longest):
    chunks = list(chunk_bounds(start, start + length, longest))
    assert [at for begin, end in chunks for at in range(begin, end)] == list(range(start, start + length))
    assert all(end - begin <= longest for begin, end in chunks)


def test_errors_name_what_was_given_and_what_is_known():
    with pytest.raises(ParamError, match=r"float32.*Received: complex128"):
        check_array(np.ones(2, complex), written=False)
    with pytest.raises(ParamError, match="Received: list"):
        check_array([1.0], written=False)
    with pytest.raises(ParamError, match=r"sum, mean, max, min.*'product'"):
        check_op("product", np.dtype("float32"))
