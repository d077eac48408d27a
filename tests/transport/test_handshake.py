import hashlib
import hmac
import json
import socket
import threading
import time
from contextlib import suppress

import pytest

from sparktf.errors import HandshakeError
from sparktf.transport.framing import recv_frame, send_frame
from sparktf.transport.handshake import accept, initiate

SECRET = b"the secret of this job"


def shake(initiator_secret=SECRET, acceptor_secret=SECRET, seconds=2.0):
    """Run both sides over a socket pair; return what each got or raised."""
    left, right = socket.socketpair()
    got = {}

    def side(name, function, sock, secret):
        try:
            got[name] = function(sock, secret, {"name": name}, time.monotonic() + seconds)
        except HandshakeError as exc:
            got[name] = exc

    with left, right:
        thread = threading.Thread(target=side, args=("acceptor", accept, right, acceptor_secret))
        thread.start()
        side("initiator", initiate, left, initiator_secret)
        thread.join(10)
    return got["initiator"], got["acceptor"]


def accept_what(stranger, seconds=0.5):
    """Let `stranger(sock)` play the initiator; return how long `accept` took and what it raised."""
    left, right = socket.socketpair()
    with left, right:
        thread = threading.Thread(target=stranger, args=(left,), daemon=True)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(HandshakeError) as caught:
            accept(right, SECRET, {"name": "acceptor"}, begin + seconds)
        took = time.monotonic() - begin
    thread.join(10)
    return took, str(caught.value)


def test_both_sides_learn_the_others_identity():
    assert shake() == ({"name": "acceptor"}, {"name": "initiator"})


def test_another_secret_is_refused_on_both_sides_with_the_reason():
    for outcome in shake(initiator_secret=b"another job's"):
        assert isinstance(outcome, HandshakeError)
        assert "secret" in str(outcome)


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x01" + b"\xff" * 8, b"\x01" + bytes(8), bytes(5000)],
    ids=["hangs up", "http", "announces too much", "empty hello", "zeros"],
)
def test_garbage_is_refused_at_once(data):
    def stranger(sock):
        # Refused before it has finished, it may find its socket closed.
        with suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    took, _ = accept_what(stranger)
    assert took < 0.4


@pytest.mark.parametrize("data", [b"", b"\x01" + (40).to_bytes(8, "big") + b"half of it"], ids=["none", "half"])
def test_a_stranger_that_goes_silent_is_refused_at_the_deadline(data):
    took, message = accept_what(lambda sock: sock.sendall(data))
    assert 0.4 < took < 2
    assert "handshake" in message


def test_a_stranger_that_drips_bytes_cannot_stretch_the_deadline():
    def stranger(sock):
        for byte in b"\x01" + (1000).to_bytes(8, "big") + bytes(100):
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    took, _ = accept_what(stranger)
    assert took < 2


def test_an_acceptor_without_the_secret_learns_no_answer_it_can_use():
    left, right = socket.socketpair()
    with left, right:
        failed = []

        def initiator():
            try:
                initiate(left, SECRET, {}, time.monotonic() + 2)
            except HandshakeError as exc:
                failed.append(str(exc))

        thread = threading.Thread(target=initiator)
        thread.start()
        recv_frame(right, 2, 4096)
        send_frame(right, 2, bytes(32) + b"{}", 2)
        _, proof = recv_frame(right, 2, 4096)
        # Sending the initiator's own proof back is the best that an impostor can do.
        send_frame(right, 3, proof, 2)
        thread.join(10)
    assert "secret" in failed[0]


def test_the_proof_covers_the_identity():
    left, right = socket.socketpair()
    with left, right:

        def initiator():
            forged = json.dumps({"rank": 1}).encode()
            send_frame(left, 1, bytes(32) + forged, 2)
            _, challenge = recv_frame(left, 2, 4096)
            parts = (bytes(32), challenge[:32], json.dumps({"rank": 0}).encode(), challenge[32:])
            transcript = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
            message = b"|".join((b"sparktf handshake 1", b"initiate", transcript))
            send_frame(left, 3, hmac.new(SECRET, message, hashlib.sha256).digest(), 2)

        thread = threading.Thread(target=initiator)
        thread.start()
        with pytest.raises(HandshakeError, match="secret"):
            accept(right, SECRET, {}, time.monotonic() + 2)
        thread.join(10)
