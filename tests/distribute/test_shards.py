"""How variables are spread over parameter servers, and how parts lie in a message."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.distribute.shards import Layout, Slice, plan_shards, slice_shape

shapes = st.lists(st.lists(st.integers(1, 300), max_size=3).map(tuple), min_size=1, max_size=12)


@given(shapes, st.integers(1, 6), st.booleans())
def test_every_row_of_every_variable_lives_on_one_server(
    shapes: list[tuple[int, ...]], servers: int, split: bool
) -> None:
    shards = plan_shards(shapes, [4] * len(shapes), servers, split)
    assert len(shards) == servers
    for variable, shape in enumerate(shapes):
        rows = sorted(
            row for shard in shards for s in shard if s.variable == variable for row in range(s.start, s.stop)
        )
        assert rows == list(range(shape[0] if shape else 1))
        pieces = [s for shard in shards for s in shard if s.variable == variable]
        assert split or len(pieces) == 1


@given(shapes, st.integers(1, 6))
def test_no_server_gets_much_more_than_its_share(shapes: list[tuple[int, ...]], servers: int) -> None:
    shards = plan_shards(shapes, [4] * len(shapes), servers, split=True)
    loads = [sum(4 * math.prod(slice_shape(shapes[s.variable], s)) for s in shard) for shard in shards]
    fair = sum(4 * math.prod(shape) for shape in shapes) / servers
    # Beside what is left whole, one row of a variable can't be divided, and a scalar neither.
    indivisible = max(4 * math.prod(shape[1:]) for shape in shapes)
    parts = max(math.ceil(shape[0] / min(shape[0], servers)) if shape else 1 for shape in shapes) and 1
    largest_part = max(4 * math.prod(slice_shape(shapes[s.variable], s)) for shard in shards for s in shard)
    assert max(loads) <= fair + max(fair / 4, largest_part, parts * indivisible)


def test_a_large_variable_is_split_evenly_and_small_ones_are_whole() -> None:
    shards = plan_shards([(1000, 64), (64,), (64, 10), (10,)], [4] * 4, 2, split=True)
    assert [s for shard in shards for s in shard if s.variable == 0] == [Slice(0, 0, 500), Slice(0, 500, 1000)]
    assert sorted(s.variable for shard in shards for s in shard if s.variable) == [1, 2, 3]
    # The next largest went to the first server, the others to the one that then had least.
    assert [[s.variable for s in shard] for shard in shards] == [[0, 2], [0, 1, 3]]


@given(
    st.lists(
        st.tuples(st.sampled_from(["float32", "float64", "float16"]), st.lists(st.integers(0, 9), max_size=3)),
        max_size=6,
    )
)
def test_parts_lie_apart_and_aligned(parts: list[tuple[str, list[int]]]) -> None:
    layout = Layout(tuple(np.dtype(d) for d, _ in parts), tuple(tuple(s) for _, s in parts))
    views = layout.allocate()
    assert [(v.dtype.name, v.shape) for v in views] == [(d, tuple(s)) for d, s in parts]
    assert all(v.ctypes.data % 64 == 0 for v in views if v.size)
    for number, view in enumerate(views):
        view[...] = number
    assert all((view == number).all() for number, view in enumerate(views))


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_a_scalar_is_one_row(servers: int) -> None:
    shards = plan_shards([()] * 3, [4] * 3, servers, split=True)
    assert sorted(s for shard in shards for s in [(p.variable, p.start, p.stop) for p in shard]) == [
        (0, 0, 1), (1, 0, 1), (2, 0, 1)
    ]  # fmt: skip
    assert slice_shape((), Slice(0, 0, 1)) == ()
