"""Every rank takes the same steps, every row once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.data.batches import StepPlan, epoch_order
from sparktf.errors import ParamError

plans = st.builds(
    StepPlan,
    st.lists(st.integers(0, 200), min_size=1, max_size=6).map(tuple),
    st.integers(1, 50),
)
seeds = st.integers(-(2**63), 2**63 - 1)


@given(plans)
def test_every_row_is_in_one_step_of_its_rank(plan):
    for rank, rows in enumerate(plan.rows):
        assert sum(plan.local_rows(step, rank) for step in range(plan.steps)) == rows


@given(plans)
def test_the_steps_are_those_of_the_fullest_rank_and_none_without_rows(plan):
    assert plan.steps == max(-(-rows // plan.batch_size) for rows in plan.rows)
    assert all(plan.global_rows(step) > 0 for step in range(plan.steps))
    assert plan.global_rows(plan.steps) == 0


@given(plans)
def test_a_ranks_batches_are_full_then_one_short_then_empty(plan):
    for rank in range(len(plan.rows)):
        sizes = [plan.local_rows(step, rank) for step in range(plan.steps)]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(0 < size < plan.batch_size for size in sizes) <= 1


@given(plans, st.integers(0, 10))
def test_the_global_rows_are_the_sum_over_ranks(plan, step):
    assert plan.global_rows(step) == sum(plan.local_rows(step, r) for r in range(len(plan.rows)))


@pytest.mark.parametrize(("rows", "batch_size"), [((), 1), ((-1,), 1), ((1,), 0)])
def test_a_plan_that_cannot_work_is_refused(rows, batch_size):
    with pytest.raises(ParamError):
        StepPlan(rows, batch_size)


@given(st.integers(0, 300), st.booleans(), seeds, st.integers(0, 1000), st.integers(0, 1000))
def test_an_epochs_order_holds_every_row_once_and_is_the_same_in_two_calls(rows, shuffle, seed, epoch, rank):
    order = epoch_order(rows, shuffle=shuffle, seed=seed, epoch=epoch, rank=rank)
    again = epoch_order(rows, shuffle=shuffle, seed=seed, epoch=epoch, rank=rank)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(rows))
    assert order.tolist() == again.tolist()


@given(seeds, st.integers(0, 1000), st.integers(0, 1000))
def test_the_order_differs_by_seed_epoch_and_rank(seed, epoch, rank):
    def order(seed, epoch, rank):
        return epoch_order(200, shuffle=True, seed=seed, epoch=epoch, rank=rank).tolist()

    orders = [order(seed, epoch, rank), order(seed, epoch + 1, rank), order(seed, epoch, rank + 1)]
    orders.append(order(seed + 1, epoch, rank))
    assert len({tuple(o) for o in orders}) == 4


def test_without_shuffling_the_order_is_the_datas():
    assert epoch_order(4, shuffle=False, seed=1, epoch=2, rank=3).tolist() == [0, 1, 2, 3]


def test_the_order_is_the_same_on_every_machine_and_version():
    assert epoch_order(8, shuffle=True, seed=0, epoch=0, rank=0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
