"""A rank that calls others; those that answer are real."""

import threading

import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import HandshakeError, PeerLostError  # noqa: E402
from sparktf.transport import doorman  # noqa: E402
from sparktf.transport.testing import results_of_threads, run_threads  # noqa: E402


def hang_up(monkeypatch, times):
    """Let whoever answers give up handshakes, the first so many or all, as after a pause of the machine."""
    calls, lock, accept = [0], threading.Lock(), doorman.accept

    def impatient(*args):
        with lock:
            calls[0] += 1
            late = times is None or calls[0] <= times
        if late:
            raise HandshakeError("The peer did not finish the handshake in time.")
        return accept(*args)

    monkeypatch.setattr(doorman, "accept", impatient)


@pytest.mark.parametrize("times", [1, 2])
def test_a_rank_calls_again_where_a_peer_hangs_up_during_the_handshake(times, monkeypatch):
    hang_up(monkeypatch, times)
    assert results_of_threads("tcp", 2, lambda comm: comm.all_gather_bytes(b"a" * comm.rank)) == [[b"", b"a"]] * 2


def test_a_peer_that_always_hangs_up_is_named(monkeypatch):
    hang_up(monkeypatch, None)
    outcomes = run_threads("tcp", 2, lambda comm: None, timeout=20.0)
    assert isinstance(outcomes[1], PeerLostError)
    assert outcomes[1].peer == 0
    assert "Handshake with rank 0" in str(outcomes[1])
