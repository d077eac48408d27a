"""How gradients are cut into buckets, as arithmetic."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparktf.distribute.buckets import ALIGN_BYTES, gradient_bytes, plan_buckets, sum_dtype

DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)])
GRADIENTS = st.lists(st.tuples(DTYPES, st.integers(0, 3000)), max_size=12)


@given(gradients=GRADIENTS, first=st.integers(1, 5000), most=st.integers(1, 20_000))
def test_every_gradient_has_one_place_of_its_own_on_a_boundary(
    gradients: list[tuple[np.dtype, int]], first: int, most: int
) -> None:
    buckets = plan_buckets(gradients, first, most)
    places = [(bucket, place) for bucket in buckets for place in bucket.places]
    assert sorted(place.gradient for _, place in places) == list(range(len(gradients)))
    for bucket in buckets:
        ends = [0, *(place.stop for place in bucket.places)]
        for end, place in zip(ends, bucket.places, strict=False):
            assert end <= place.start
            assert place.start * bucket.dtype.itemsize % ALIGN_BYTES == 0
        assert ends[-1] <= bucket.size
    for bucket, place in places:
        dtype, elements = gradients[place.gradient]
        assert place.stop - place.start == elements
        assert bucket.dtype == sum_dtype(dtype)


@given(gradients=GRADIENTS, first=st.integers(1, 5000), more=st.integers(0, 20_000))
def test_a_bucket_takes_no_more_once_it_is_full(gradients: list[tuple[np.dtype, int]], first: int, more: int) -> None:
    for number, bucket in enumerate(plan_buckets(gradients, first, first + more)):
        before_last = bucket.places[-1].start if bucket.places else 0
        assert before_last * bucket.dtype.itemsize < first + more * bool(number)


def test_the_last_variables_gradients_leave_first_in_a_small_bucket() -> None:
    buckets = plan_buckets([(np.dtype(np.float32), 1000)] * 5, 4000, 8000)
    assert [[place.gradient for place in bucket.places] for bucket in buckets] == [[4], [3, 2], [1, 0]]


def test_a_model_without_dense_gradients_has_one_bucket_for_the_wish_to_stop() -> None:
    (bucket,) = plan_buckets([], 1, 1)
    assert (bucket.places, bucket.size) == ((), 0)


def test_the_size_of_a_models_gradients_is_known_once_it_is_built() -> None:
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])
    assert gradient_bytes(None) == gradient_bytes(model) == 0
    model.build((None, 3))
    assert gradient_bytes(model) == 4 * (3 * 4 + 4 + 2 * 4)
