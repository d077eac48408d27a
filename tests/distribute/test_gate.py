"""The gate of a parameter server: what is applied when, and who may go on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktf.distribute.gate import Gate, Push
from sparktf.distribute.pair import LARGE_BYTES, lanes_for
from sparktf.errors import TransportTimeoutError


class Simulated:
    """Workers that push when the gate lets them, one event at a time; it counts apart from the gate."""

    def __init__(self, workers: int, max_staleness: int | None) -> None:
        self.applied: list[tuple[int, ...]] = []
        self.counts = [0] * workers
        self.training = set(range(workers))
        self.lanes = lanes_for(max_staleness, LARGE_BYTES)
        self.begun = [0] * workers
        self.gate = Gate(workers, max_staleness, self._apply, timeout=60.0, lanes=self.lanes)

    def _apply(self, pushes: Sequence[Push]) -> None:
        self.applied.append(tuple(worker for worker, _ in pushes))
        for worker in self.applied[-1]:
            self.counts[worker] += 1

    def may_push(self, worker: int) -> bool:
        # Lanes take turns: the next must have its answer.
        return worker in self.training and self.gate.passed((worker, self.begun[worker] % self.lanes), 0)

    def may_finish(self, worker: int) -> bool:
        return worker in self.training and all(self.gate.passed((worker, lane), 0) for lane in range(self.lanes))

    def push(self, worker: int) -> None:
        lane = self.begun[worker] % self.lanes
        self.begun[worker] += 1
        self.gate.push((worker, lane))

    def lead(self) -> int:
        return max((self.counts[w] for w in self.training), default=0) - min(
            (self.counts[w] for w in self.training), default=0
        )


events = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["push"] * 12 + ["finish", "leave"])), max_size=120)


@given(st.integers(1, 4), st.integers(0, 4), events)
@settings(max_examples=300, deadline=None)
def test_nobody_is_ever_further_ahead_than_allowed(workers: int, staleness: int, events: list[tuple[int, str]]) -> None:
    simulated = Simulated(workers, staleness)
    for worker, event in events:
        if worker not in simulated.training:
            continue
        if event == "push":
            if simulated.may_push(worker):
                simulated.push(worker)
        elif event == "leave" or simulated.may_finish(worker):
            # A worker that ends its training waits for its last answers first.
            simulated.training.discard(worker)
            simulated.gate.finish(worker) if event == "finish" else simulated.gate.leave(worker)
        assert simulated.lead() <= staleness
        # Somebody can always go on.
        assert not simulated.training or any(map(simulated.may_push, simulated.training))


@given(st.integers(1, 4), st.lists(st.integers(0, 3), max_size=60))
def test_with_no_staleness_all_pushes_of_a_round_are_applied_once(workers: int, order: list[int]) -> None:
    simulated = Simulated(workers, 0)
    for worker in order:
        if simulated.may_push(worker):
            simulated.push(worker)
    assert all(together == tuple(range(workers)) for together in simulated.applied)


def test_without_a_bound_one_may_run_off() -> None:
    simulated = Simulated(2, None)
    for _ in range(100):
        assert simulated.may_push(0)
        simulated.push(0)
    assert simulated.applied == [(0,)] * 100
    assert simulated.gate.lead == 100


def test_two_pushes_are_under_way_only_where_gradients_are_large_and_staleness_allows_two() -> None:
    assert [lanes_for(bound, LARGE_BYTES) for bound in (None, 0, 1, 2, 9)] == [2, 1, 1, 2, 2]
    assert [lanes_for(bound, LARGE_BYTES - 1) for bound in (None, 0, 1, 2, 9)] == [1] * 5


def test_a_worker_with_two_lanes_waits_for_the_slowest_with_its_second_push_but_one() -> None:
    simulated = Simulated(2, 3)
    for _ in range(3):
        assert simulated.may_push(0)
        simulated.push(0)
    # Its second push is not answered: a fourth would lead by four.
    assert not simulated.may_push(0)
    simulated.push(1)
    assert simulated.may_push(0)
    assert simulated.gate.lead == 3


def test_one_that_leaves_completes_the_others_round() -> None:
    simulated = Simulated(3, 0)
    simulated.push(0)
    simulated.push(2)
    assert not simulated.gate.passed((0, 0), 0)
    simulated.gate.leave(1)
    assert simulated.gate.passed((0, 0), 0)
    assert simulated.applied == [(0, 2)]


def test_what_a_lost_worker_has_pushed_is_left_out_of_the_round() -> None:
    simulated = Simulated(2, 0)
    simulated.push(1)
    assert simulated.gate.leave(1)
    simulated.push(0)
    assert simulated.applied == [(0,)]
    # It was told once, and what is applied stays.
    assert not simulated.gate.leave(1)
    assert not simulated.gate.leave(0)


def test_training_ends_for_all_when_the_last_has_finished_and_begins_anew() -> None:
    simulated = Simulated(2, 1)
    for _ in range(2):
        simulated.push(0)
        simulated.push(1)
        end = simulated.gate.finish(0)
        assert not simulated.gate.finished(end, 0)
        simulated.push(1)
        assert simulated.gate.finished(simulated.gate.finish(1), 0)
        assert simulated.gate.finished(end, 0)
        assert simulated.gate.clocks == [0, 0]


def test_the_end_is_told_once_with_all_that_have_finished_before_any_of_them_is_let_go() -> None:
    ended: list[tuple[int, ...]] = []
    gate = Gate(3, None, lambda workers: None, 60.0, at_end=lambda finished: ended.append(tuple(finished)))
    end = gate.finish(2)
    gate.push((0, 0))
    gate.finish(0)
    assert ended == []
    gate.leave(1)
    assert ended == [(0, 2)]
    assert gate.finished(end, 0)
    gate.push((0, 0))
    gate.finish(2)
    gate.finish(0)
    assert ended == [(0, 2), (0, 2)]


def test_waiting_ends_with_the_name_of_the_one_that_does_not_come() -> None:
    gate = Gate(3, 0, lambda workers: None, timeout=1.0)
    gate.push((0, 0))
    gate.push((2, 0))
    assert not gate.passed((0, 0), 0.05)
    time.sleep(1.0)
    with pytest.raises(TransportTimeoutError, match="update of worker 1 within 1 s"):
        gate.passed((0, 0), 0.05)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_bound_holds_among_threads(staleness: int) -> None:
    counts, leads = [0] * 4, []

    def apply(pushes: Sequence[Push]) -> None:
        for worker, _ in pushes:
            counts[worker] += 1
        leads.append(max(counts) - min(counts))

    lanes = lanes_for(staleness, LARGE_BYTES)
    gate = Gate(4, staleness, apply, timeout=30.0, lanes=lanes)

    def work(worker: int) -> None:
        drawn = random.Random(worker)
        for step in range(60):
            # The lane that was used longest ago, once it has its answer.
            lane = (worker, step % lanes)
            while not gate.passed(lane, 1.0):
                pass
            gate.push(lane)
            time.sleep(drawn.random() * 2e-3)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [60] * 4
    assert max(leads) == gate.lead <= staleness
