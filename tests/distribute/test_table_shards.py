"""Rows of a table: the same wherever and whenever they are made, updated as Keras's optimizers would."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktf.distribute.sparse_optimizers import sparse_optimizer, sparse_optimizer_of
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import Buffers, LocalTable, summed
from sparktf.distribute.table_rows import RowInitializer, TableSpec
from sparktf.errors import DataError, ParamError

UNIFORM = RowInitializer("RandomUniform", -0.05, 0.05)
SPEC = TableSpec(23, 3, 7, UNIFORM)

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "nesterov": lambda: keras.optimizers.SGD(0.1, momentum=0.8, nesterov=True),
    "clipped": lambda: keras.optimizers.SGD(0.1, clipvalue=0.5),
    "adagrad": lambda: keras.optimizers.Adagrad(0.3),
    "adam": lambda: keras.optimizers.Adam(0.05, beta_1=0.8),
    "ftrl": lambda: keras.optimizers.Ftrl(
        0.2,
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.02,
        l2_shrinkage_regularization_strength=0.005,
        beta=0.1,
    ),
}


def _filled(part: int = 0, parts: int = 1, optimizer: str = "adagrad", updates: int = 3) -> TableShard:
    """Return a shard after updates by ids; every part gets those that are its own."""
    shard = TableShard(SPEC, part, parts)
    shard.use(sparse_optimizer_of(OPTIMIZERS[optimizer]()))
    rng = np.random.default_rng(1)
    for _ in range(updates):
        ids = rng.permutation(SPEC.rows)[:9]
        gradients = rng.normal(size=(9, SPEC.dim)).astype("float32")
        mine = ids % parts == part
        shard.update(ids[mine], gradients[mine], 0.1)
    return shard


@given(seed=st.integers(-(2**63), 2**63 - 1), ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_a_new_row_depends_on_the_seed_and_its_id_alone(seed: int, ids: list[int]) -> None:
    spec = TableSpec(2**41, 5, seed, UNIFORM)
    together = spec.new_rows(np.array(ids))
    for row, one in zip(together, ids, strict=True):
        np.testing.assert_array_equal(row, spec.new_rows(np.array([one]))[0])


@pytest.mark.parametrize(
    ("initial", "mean", "deviation"),
    [(UNIFORM, 0.0, 0.1 / np.sqrt(12)), (RowInitializer("RandomNormal", 1.0, 0.2), 1.0, 0.2)],
)
def test_new_rows_are_distributed_as_their_initializer_says(
    initial: RowInitializer, mean: float, deviation: float
) -> None:
    rows = TableSpec(5000, 16, 3, initial).new_rows(np.arange(5000))
    assert rows.dtype == np.float32
    # Four standard errors of 80,000 numbers.
    assert abs(rows.mean() - mean) < 4 * deviation / np.sqrt(rows.size)
    assert abs(rows.std() / deviation - 1) < 0.02
    # Neither elements of a row, nor rows, nor tables of another seed resemble each other.
    others = TableSpec(5000, 16, 4, initial).new_rows(np.arange(5000))
    for a, b in [(rows[:, 0], rows[:, 1]), (rows[1:, 0], rows[:-1, 0]), (rows[:, 2], others[:, 2])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@pytest.mark.parametrize(("kind", "value"), [("Zeros", 0.0), ("Ones", 1.0), ("Constant", 2.5)])
def test_new_rows_may_be_constant(kind: str, value: float) -> None:
    initial = RowInitializer.of(kind, {"value": 2.5})
    np.testing.assert_array_equal(TableSpec(4, 2, 0, initial).new_rows(np.arange(3)), np.full((3, 2), value))


def test_an_initializer_that_cannot_be_computed_by_row_is_refused_with_those_that_can() -> None:
    with pytest.raises(ParamError, match=r"one of RandomUniform, RandomNormal.*received Orthogonal"):
        RowInitializer.of("Orthogonal", {})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_table_hold_what_the_whole_one_does(optimizer: str, parts: int) -> None:
    whole = _filled(optimizer=optimizer)
    shards = [_filled(part, parts, optimizer) for part in range(parts)]
    ids = np.arange(SPEC.rows)
    for part, shard in enumerate(shards):
        mine = ids[ids % parts == part]
        np.testing.assert_array_equal(shard.lookup(mine), whole.lookup(mine))
    joined = TableState.joined([shard.state() for shard in shards], SPEC.dim)
    state = whole.state()
    np.testing.assert_array_equal(joined.ids, state.ids)
    np.testing.assert_array_equal(joined.rows, state.rows)
    assert set(joined.slots) == set(state.slots) == set(sparse_optimizer_of(OPTIMIZERS[optimizer]()).slots)
    for name, slot in state.slots.items():
        np.testing.assert_array_equal(joined.slots[name], slot)


@st.composite
def _training(draw: Any) -> tuple[str, list[np.ndarray], np.ndarray]:
    """Return an optimizer, a gradient of all rows for each of some steps, and the rows."""
    kind = draw(st.sampled_from(sorted(OPTIMIZERS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    steps = [scale * rng.normal(size=(4, 3)).astype("float32") for _ in range(draw(st.integers(1, 6)))]
    return kind, steps, rng.normal(size=(4, 3)).astype("float32")


@given(training=_training())
@settings(max_examples=60, deadline=None)
def test_rows_that_every_step_touches_go_as_under_keras(training: tuple[str, list[np.ndarray], np.ndarray]) -> None:
    kind, steps, rows = training
    dense = OPTIMIZERS[kind]()
    variable = keras.Variable(rows)
    sparse = sparse_optimizer_of(dense)
    values = rows.copy()
    slots = {name: np.full_like(rows, start) for name, start in sparse.slots.items()}
    for number, gradient in enumerate(steps, 1):
        dense.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        sparse.update(values, gradient, slots, float(dense.learning_rate), number)
        np.testing.assert_allclose(values, variable.numpy(), rtol=2e-5, atol=2e-6)


def test_rows_that_no_step_touches_stay_as_they_are() -> None:
    shard = _filled(optimizer="adam")
    before = shard.lookup(np.arange(SPEC.rows))
    shard.update(np.array([4]), np.ones((1, 3), "float32"), 0.1)
    changed = np.flatnonzero((shard.lookup(np.arange(SPEC.rows)) != before).any(axis=1))
    assert changed.tolist() == [4]


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (lambda: keras.optimizers.RMSprop(0.1), "one of SGD, Adagrad, Adam, Ftrl.*received RMSprop"),
        (lambda: keras.optimizers.AdamW(0.1), "received AdamW"),
        (lambda: keras.optimizers.Adam(0.1, amsgrad=True), "amsgrad"),
        (lambda: keras.optimizers.SGD(0.1, weight_decay=0.1), "weight_decay"),
        (lambda: keras.optimizers.SGD(0.1, clipnorm=1.0), "clipnorm"),
        (lambda: keras.optimizers.SGD(0.1, global_clipnorm=1.0), "global_clipnorm"),
        (lambda: keras.optimizers.SGD(0.1, use_ema=True), "use_ema"),
        (lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "gradient_accumulation_steps"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mixed_bfloat16"),
    ],
)
def test_optimizers_that_rows_cannot_follow_are_refused_by_name(optimizer: Any, named: str) -> None:
    with pytest.raises(ParamError, match=named):
        sparse_optimizer_of(optimizer())


@pytest.mark.parametrize("parts", [1, 2])
def test_training_goes_on_from_a_state_as_if_it_had_not_stopped(parts: int) -> None:
    straight, resumed = _filled(optimizer="adam", updates=3), TableShard(SPEC)
    pieces = [_filled(part, parts, "adam").state() for part in range(parts)]
    resumed.load(pieces)
    resumed.use(sparse_optimizer_of(OPTIMIZERS["adam"]()))
    for shard in (straight, resumed):
        shard.update(np.array([2, 20]), np.ones((2, 3), "float32"), 0.1)
    np.testing.assert_array_equal(straight.lookup(np.arange(23)), resumed.lookup(np.arange(23)))
    assert straight.updates == resumed.updates == 4


def test_another_optimizer_begins_with_slots_of_its_own() -> None:
    shard = _filled(optimizer="adam")
    rows = shard.lookup(np.arange(23))
    shard.use(sparse_optimizer("Adagrad", keras.optimizers.Adagrad(0.1).get_config()))
    np.testing.assert_array_equal(shard.lookup(np.arange(23)), rows)
    assert shard.updates == 0
    np.testing.assert_array_equal(shard.state().slots["accumulator"], np.full((shard.held, 3), np.float32(0.1)))


def test_a_state_is_read_and_searched_without_the_table() -> None:
    shard = _filled()
    table = LocalTable(SPEC, "reads")
    table.load([shard.state()])
    ids = np.random.default_rng(0).permutation(23)
    np.testing.assert_array_equal(table.lookup(ids), shard.lookup(ids))
    assert table.lookup(np.zeros(0, np.int64)).shape == (0, 3)


def test_rows_that_are_set_between_two_pieces_are_told_as_they_are_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparktf.distribute.table.piece_rows", lambda dim, slots: 4)
    shard = _filled(updates=9)
    assert shard.held > 12
    pieces = shard.pieces()
    next(pieces)
    ids = shard.state().ids[[5, 9]]
    values = np.arange(6, dtype="float32").reshape(2, 3)
    shard.load([TableState(ids, values)])
    found = TableState.joined(list(pieces), SPEC.dim)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.rows, values)
    np.testing.assert_array_equal(found.slots["accumulator"], np.full((2, 3), np.float32(0.1)))


def test_a_state_of_another_table_is_refused() -> None:
    table = LocalTable(TableSpec(10, 3, 0, UNIFORM), "small")
    with pytest.raises(ParamError, match=r"table of 10 rows of 3, received ids up to 2\d"):
        table.load([_filled().state()])


def test_rows_take_memory_when_they_are_updated() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    # 25.6 GB of rows, and as much of slots, would not fit here.
    shard = TableShard(TableSpec(100_000_000, 64, 0, UNIFORM), part=0, parts=10)
    shard.use(sparse_optimizer_of(OPTIMIZERS["adagrad"]()))
    shard.update(np.arange(0, 1000, 10), np.ones((100, 64), "float32"), 0.1)
    assert process.memory_info().rss - before < 64 << 20
    assert shard.held == 100


@pytest.mark.parametrize("wrong", [-1, 23])
def test_an_id_that_the_table_does_not_have_is_named(wrong: int) -> None:
    with pytest.raises(DataError, match=f"layer 'items': expected ids from 0 to 22, received {wrong}"):
        LocalTable(SPEC, "items").lookup(np.array([3, wrong]))


def test_gradients_of_several_pushes_are_added_up_by_row() -> None:
    first = np.array([5, 1]), np.full((2, 2), 1.0, np.float32)
    second = np.array([1, 9, 0]), np.full((3, 2), 10.0, np.float32)
    ids, total = summed([first, second], 2)
    assert ids.tolist() == [0, 1, 5, 9]
    assert total[:, 0].tolist() == [10.0, 11.0, 1.0, 10.0]


def test_gradients_that_count_for_nothing_are_not_looked_at() -> None:
    table = LocalTable(SPEC, "idle")
    table.use(sparse_optimizer_of(OPTIMIZERS["sgd"]()))
    before = table.lookup(np.arange(23)).copy()
    table.push(np.array([3]), np.full((1, 3), np.nan, "float32"), 0.0, 0.1)
    table.commit()
    np.testing.assert_array_equal(table.lookup(np.arange(23)), before)
    assert table.updates == 1


def test_memory_is_used_again_once_nobody_refers_to_it() -> None:
    buffers = Buffers()
    places = set()
    for rows in itertools.chain([100] * 5, range(100, 120)):
        taken = buffers.take(rows, 8)
        assert taken.shape == (rows, 8)
        places.add(taken.__array_interface__["data"][0])
        del taken
    assert (buffers.allocations, len(places)) == (1, 1)
    held = [buffers.take(10, 8) for _ in range(3)]
    assert len({a.__array_interface__["data"][0] for a in held}) == 3
