"""Meetings of workers at a server: who is waited for, and what is kept for whom."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.distribute.meeting import Meetings, pack_brought, unpack_brought
from sparktf.errors import TransportTimeoutError


def meetings(workers: int, timeout: float = 60.0, idle: float = math.inf) -> Meetings:
    return Meetings(workers, timeout, lambda: idle)


def test_a_round_is_complete_when_all_have_come_and_each_is_told_what_all_brought() -> None:
    at = meetings(3)
    numbers = [at.come(worker, b"%d" % worker) for worker in (2, 0)]
    assert not at.passed(numbers[0], 0)
    numbers.append(at.come(1, b"1"))
    assert numbers == [0, 0, 0]
    assert at.passed(0, 0)
    for worker in range(3):
        assert at.result(0, worker) == {0: b"0", 1: b"1", 2: b"2"}


def test_the_next_round_may_begin_before_all_have_been_told_of_the_last() -> None:
    at = meetings(2)
    at.come(0, b"a")
    at.come(1, b"b")
    assert at.result(0, 0) == {0: b"a", 1: b"b"}
    assert at.come(0, b"c") == 1
    assert not at.passed(1, 0)
    assert at.result(0, 1) == {0: b"a", 1: b"b"}
    assert at.come(1, b"d") == 1
    assert at.result(1, 1) == {0: b"c", 1: b"d"}


def test_one_that_leaves_before_it_has_come_is_not_waited_for() -> None:
    at = meetings(3)
    at.come(0, b"0")
    at.come(1, b"1")
    assert not at.passed(0, 0)
    at.leave(2)
    assert at.passed(0, 0)
    assert at.result(0, 0) == at.result(0, 1) == {0: b"0", 1: b"1"}


def test_what_one_brought_counts_where_it_leaves_after_it_has_come() -> None:
    at = meetings(3)
    at.come(2, b"2")
    at.leave(2)
    at.leave(2)
    at.come(0, b"0")
    assert not at.passed(0, 0)
    at.come(1, b"1")
    assert at.result(0, 0) == at.result(0, 1) == {0: b"0", 1: b"1", 2: b"2"}


@pytest.mark.parametrize("left", [None, 1])
def test_results_are_dropped_once_all_are_told_or_gone(left: int | None) -> None:
    at = meetings(2)
    at.come(0, b"0")
    at.come(1, b"1")
    at.result(0, 0)
    if left is None:
        at.result(0, 1)
    else:
        at.leave(left)
    with pytest.raises(KeyError):
        at.result(0, 0)


def test_nothing_is_kept_of_a_round_of_which_nobody_is_left() -> None:
    at = meetings(2)
    at.come(0, b"0")
    at.leave(0)
    at.leave(1)
    assert at.passed(0, 0)
    with pytest.raises(KeyError):
        at.result(0, 0)


def test_the_timeout_names_the_one_that_is_awaited() -> None:
    at = meetings(3, timeout=1.0)
    at.come(0, b"")
    number = at.come(2, b"")
    assert not at.passed(number, 0)
    time.sleep(1.0)
    with pytest.raises(TransportTimeoutError, match="worker 1 within 1 s"):
        at.passed(number, 0.1)


def test_one_that_still_trains_is_waited_for() -> None:
    at = meetings(2, timeout=0.05, idle=0.0)
    number = at.come(0, b"")
    time.sleep(0.1)
    assert not at.passed(number, 0)


def test_a_leave_wakes_those_that_wait() -> None:
    at = meetings(2)
    number = at.come(0, b"")
    threading.Timer(0.05, at.leave, (1,)).start()
    began = time.monotonic()
    assert at.passed(number, 30)
    assert time.monotonic() - began < 15


@given(st.integers(1, 5), st.data())
def test_among_threads_all_that_stay_are_told_the_same_of_every_round(workers: int, data: Any) -> None:
    rounds = 4
    # The round before which a worker leaves; the last number: it stays.
    ends = data.draw(st.lists(st.integers(0, rounds), min_size=workers, max_size=workers))
    at, told = meetings(workers), [[] for _ in range(workers)]

    def attend(worker: int) -> None:
        for turn in range(ends[worker]):
            number = at.come(worker, b"%d of %d" % (turn, worker))
            assert at.passed(number, 30)
            told[worker].append(at.result(number, worker))
        at.leave(worker)

    threads = [threading.Thread(target=attend, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for turn in range(rounds):
        staying = [worker for worker in range(workers) if ends[worker] > turn]
        expected = {worker: b"%d of %d" % (turn, worker) for worker in staying}
        assert [told[worker][turn] for worker in staying] == [expected] * len(staying)


@given(st.dictionaries(st.integers(0, 1000), st.binary(max_size=40)))
def test_what_is_brought_arrives_as_it_was(brought: dict[int, bytes]) -> None:
    assert unpack_brought(pack_brought(brought)) == brought
