"""Ranks leave at any time after the last operation, in any order, and nobody takes it for a failure."""

import time

import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.transport.testing import results_of_threads  # noqa: E402
from sparktf.transport.watch import Watch  # noqa: E402


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_ranks_that_leave_at_the_same_time_do_not_disturb_those_that_stay(protocol, monkeypatch):
    say, first = Watch.tell_bye, []

    def say_and_stand_still(watch):
        first.append(watch)
        say(watch)
        if first[0] is watch:
            time.sleep(0.5)

    # Another hears its goodbye, and need not say any more to it, before the first is done.
    monkeypatch.setattr(Watch, "tell_bye", say_and_stand_still)

    def main(comm):
        comm.barrier()
        if comm.rank == 1:
            time.sleep(0.1)
        if comm.rank == 2:
            time.sleep(1.0)
            comm.check()

    results_of_threads(protocol, 3, main)
