"""Who counts as alive: peers that have answered, whoever asked, and however often."""

import socket
import time

import pytest

from sparktf.transport.watch import Watch


@pytest.fixture
def watches():
    """Two ranks that watch each other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs = listener.accept()[0]
    pair = [
        Watch({1 - rank: sock}, lambda *_: None, lambda peer: None, lambda rank=rank: f"rank {rank}'s work")
        for rank, sock in enumerate((ours, theirs))
    ]
    yield pair
    for watch in pair:
        watch.stop()


def test_a_peer_that_is_asked_again_is_not_taken_for_dead(watches):
    asking, answering = watches
    asking.start()
    answering.start()
    asking.ask()
    time.sleep(0.5)
    # Another thread, which waits as well, asks the moment before this one looks.
    asking._tell = lambda frame: None
    asking.ask()
    assert asking.silent(0.25) == set()
    assert asking.answers() == {1: "rank 1's work"}


def test_a_peer_that_does_not_answer_is_dead_since_it_was_first_asked(watches):
    asking, stopped = watches
    asking.start()
    asking.ask()
    time.sleep(0.4)
    asking.ask()
    assert asking.silent(0.3) == {1}
    stopped.start()
    deadline = time.monotonic() + 5
    while asking.silent(0.0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asking.silent(0.0) == set()


def test_a_peer_that_has_said_goodbye_owes_no_answer(watches):
    asking, leaving = watches
    asking.start()
    leaving.start()
    leaving.tell_bye()
    deadline = time.monotonic() + 5
    while not asking.left(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    asking.ask()
    assert asking.silent(0.0) == set()
