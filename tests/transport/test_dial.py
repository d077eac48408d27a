"""A rank that calls others; those that answer are real."""

import socket
import threading
import time

import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import HandshakeError, PeerLostError, TransportTimeoutError  # noqa: E402
from sparktf.transport import Settings, dial, doorman  # noqa: E402
from sparktf.transport.doorman import Group  # noqa: E402
from sparktf.transport.framing import pack_frame  # noqa: E402
from sparktf.transport.testing import results_of_threads, run_threads  # noqa: E402
from sparktf.transport.tls import Credentials  # noqa: E402


def hang_up(monkeypatch, times, owner=doorman, name="accept"):
    """Let whoever answers give up, the first so many times or always, as it does after a pause of the machine."""
    calls, lock, answer = [0], threading.Lock(), getattr(owner, name)

    def impatient(*args, **options):
        if not options.get("server", True):
            return answer(*args, **options)
        with lock:
            calls[0] += 1
            late = times is None or calls[0] <= times
        if late:
            raise HandshakeError("The peer did not finish the handshake in time.") from TimeoutError()
        return answer(*args, **options)

    monkeypatch.setattr(owner, name, impatient)


@pytest.mark.parametrize("times", [1, 2])
def test_a_rank_calls_again_where_a_peer_hangs_up_during_the_handshake(times, monkeypatch):
    hang_up(monkeypatch, times)
    assert results_of_threads("tcp", 2, lambda comm: comm.all_gather_bytes(b"a" * comm.rank)) == [[b"", b"a"]] * 2


def test_a_rank_calls_again_where_a_peer_hangs_up_before_all_is_encrypted(monkeypatch):
    hang_up(monkeypatch, 1, Credentials, "wrap")
    encrypted = [Settings(tls=True)] * 2
    outcomes = results_of_threads("tcp", 2, lambda comm: comm.all_gather_bytes(b"a" * comm.rank), settings=encrypted)
    assert outcomes == [[b"", b"a"]] * 2


def test_a_peer_that_always_hangs_up_is_named(monkeypatch):
    hang_up(monkeypatch, None)
    outcomes = run_threads("tcp", 2, lambda comm: None, timeout=20.0)
    assert isinstance(outcomes[1], PeerLostError)
    assert outcomes[1].peer == 0
    assert "Handshake with rank 0" in str(outcomes[1])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(b"", TransportTimeoutError), (b"\xff" * 64, HandshakeError), (pack_frame(9, b""), HandshakeError)],
)
def test_whoever_answers_and_is_no_rank_is_not_taken_for_one_that_has_ended(answer, kind):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def strange():
            sock, _ = listener.accept()
            with sock:
                sock.sendall(answer)
                sock.recv(1 << 16)
                time.sleep(1.5)

        thread = threading.Thread(target=strange)
        thread.start()
        try:
            with pytest.raises(kind, match="Handshake with rank 0"):
                dial.reach(listener.getsockname(), Group(1, 2, "job", b"s" * 32, time.monotonic() + 1.0), "data", 0)
        finally:
            thread.join()
