"""Ranks that end while others tell each other what they have."""

import threading
import time

import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import PeerLostError, TransportTimeoutError  # noqa: E402
from sparktf.transport.mesh import connect_mesh  # noqa: E402
from sparktf.transport.survey import share  # noqa: E402
from sparktf.transport.testing import SECRET, MemoryExchange  # noqa: E402


def surveyed(mains, timeout=20.0):
    """Connect a rank for every function and call it with the mesh; return what each took, and returned or raised."""
    size = len(mains)
    meeting, outcomes = MemoryExchange(size), [None] * size

    def run(rank):
        begin = time.monotonic()
        try:
            with connect_mesh(rank, size, meeting.of(rank), SECRET, timeout, "127.0.0.1") as mesh:
                begin = time.monotonic()
                outcome = mains[rank](mesh)
        except Exception as exc:
            outcome = exc
        outcomes[rank] = (time.monotonic() - begin, outcome)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def ask(seconds):
    return lambda mesh: share(mesh, mesh.rank, {"rank": mesh.rank}, time.monotonic() + seconds)


def late(seconds, main):
    def wait_first(mesh):
        time.sleep(seconds)
        return main(mesh)

    return wait_first


def die(mesh):
    """End as a killed process does: the kernel closes its connections, and nothing is said."""
    mesh.close()


def tell_and_die(mesh):
    with pytest.raises(TransportTimeoutError):
        ask(0.3)(mesh)
    die(mesh)


def test_every_rank_is_given_the_facts_of_all():
    told = [{"rank": rank} for rank in range(3)]
    assert [outcome for _, outcome in surveyed([ask(10.0), late(1.5, ask(10.0)), ask(10.0)])] == [told] * 3


@pytest.mark.parametrize("dies", [0, 2])
def test_a_rank_that_dies_is_blamed_at_once_though_another_is_still_busy(dies):
    mains = [late(3.0, ask(10.0)), ask(10.0), ask(10.0)]
    if dies == 0:
        mains.reverse()
    mains[dies] = die
    outcomes = surveyed(mains)
    took, outcome = outcomes[1]
    assert took < 2
    assert isinstance(outcome, PeerLostError)
    assert outcome.peer == dies
    # The late one finds that the other has given up, and blames the same.
    _, outcome = outcomes[2 - dies]
    assert isinstance(outcome, PeerLostError)
    assert outcome.peer == dies


def test_a_rank_that_dies_after_it_has_told_is_reported_while_others_wait_for_a_third():
    mains = [late(4.0, ask(10.0)), ask(10.0), tell_and_die]
    took, outcome = surveyed(mains)[1]
    assert took < 2
    assert isinstance(outcome, PeerLostError)
    assert outcome.peer == 2


def test_ranks_that_say_nothing_are_named_at_the_deadline():
    silent = late(2.5, lambda mesh: None)
    outcomes = surveyed([silent, ask(0.7), silent, ask(0.7)])
    for took, outcome in (outcomes[1], outcomes[3]):
        assert 0.6 < took < 2
        assert isinstance(outcome, TransportTimeoutError)
        assert "rank(s) 0, 2" in str(outcome)
