"""An optimizer's state cut for servers, put together again, and sent."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.distribute.shards import plan_shards
from sparktf.distribute.slots import ITERATIONS, Slot, Values, joined, pack, sliced, unpack

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8)
DTYPES = [np.dtype(kind) for kind in ("float16", "float32", "float64", "int64", "bool", ml_dtypes.bfloat16)]


@st.composite
def states(draw: Any, shapes: list[tuple[int, ...]]) -> Values:
    """Draw what Adam, momentum, or plain SGD might hold of variables."""
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    names = draw(st.sets(st.sampled_from(["momentum", "velocity", "a/b"]), max_size=2))
    state: Values = {Slot(ITERATIONS, -1): np.array(draw(st.integers(0, 2**40)))}
    for place, shape in enumerate(shapes):
        for name in sorted(names):
            dtype = draw(st.sampled_from(DTYPES))
            state[Slot(name, place)] = (random.normal(size=shape) * 9).astype(dtype)
    return state


def assert_equal_states(ours: Values, theirs: Values) -> None:
    assert ours.keys() == theirs.keys()
    for slot, value in theirs.items():
        assert ours[slot].dtype == value.dtype, slot
        np.testing.assert_array_equal(ours[slot], value, str(slot), strict=True)


@given(st.data(), SHAPES, st.integers(1, 6), st.booleans())
def test_what_is_cut_for_servers_is_whole_again_when_joined(
    data: Any, shapes: list[tuple[int, ...]], servers: int, split: bool
) -> None:
    state = data.draw(states(shapes))
    shards = plan_shards(shapes, [4] * len(shapes), servers, split)
    parts = [sliced(state, shard) for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        # Servers know variables by their places among their own.
        assert {slot.variable for slot in part} <= {-1, *range(len(shard))}
    assert_equal_states(joined(list(zip(shards, parts, strict=True))), state)


@given(st.data(), SHAPES)
def test_what_is_packed_is_unpacked_as_it_was(data: Any, shapes: list[tuple[int, ...]]) -> None:
    state = data.draw(states(shapes))
    assert_equal_states(unpack(pack(state)), state)


def test_a_state_that_cannot_be_told_by_variable_is_none_at_all() -> None:
    assert unpack(pack({})) == {}
    shards = plan_shards([(8, 2), (3,)], [4, 4], 2, True)
    assert joined([(shard, {}) for shard in shards]) == {}


def test_views_that_are_not_contiguous_are_packed_by_their_values() -> None:
    value = np.arange(12.0).reshape(3, 4).T
    (unpacked,) = unpack(pack({Slot("momentum", 0): value})).values()
    np.testing.assert_array_equal(unpacked, value)


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_every_server_is_told_the_optimizers_own_count(servers: int) -> None:
    state: Values = {Slot(ITERATIONS, -1): np.array(7), Slot("momentum", 0): np.ones((9, 2))}
    for shard in plan_shards([(9, 2)], [8], servers, True):
        assert sliced(state, shard)[Slot(ITERATIONS, -1)] == 7
