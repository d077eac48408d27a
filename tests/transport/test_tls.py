import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import HandshakeError, ParamError, PeerLostError, ProtocolError  # noqa: E402
from sparktf.transport import Settings, dial  # noqa: E402
from sparktf.transport.doorman import Doorman, Group  # noqa: E402
from sparktf.transport.handshake import initiate  # noqa: E402
from sparktf.transport.testing import SECRET, TransportConformance, run_threads  # noqa: E402
from sparktf.transport.tls import Credentials  # noqa: E402

MARK = b"these weights are secret"


class TestTcpOverTls(TransportConformance):
    protocol = "tcp_over_tls:connect"


class Tap:
    """Connects through a relay that keeps a copy of everything."""

    def __init__(self):
        self.seen = bytearray()
        self._dial = dial._dial

    def dial(self, address, timeout):
        beyond = self._dial(address, timeout)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = self._dial(listener.getsockname(), timeout)
            far, _ = listener.accept()
        for source, target in ((far, beyond), (beyond, far)):
            threading.Thread(target=self._relay, args=(source, target), daemon=True).start()
        return near

    def _relay(self, source, target):
        with suppress(OSError):
            while data := source.recv(1 << 20):
                self.seen += data
                target.sendall(data)
        target.close()


@pytest.mark.parametrize("tls", [False, True])
def test_what_travels_can_be_read_on_the_way_unless_it_is_encrypted(tls, monkeypatch):
    tap = Tap()
    monkeypatch.setattr(dial, "_dial", tap.dial)
    outcomes = run_threads("tcp", 2, lambda comm: comm.all_gather_bytes(MARK * 5000), settings=[Settings(tls=tls)] * 2)
    assert outcomes == [[MARK * 5000] * 2] * 2
    assert (MARK in tap.seen) != tls


def test_a_rank_that_says_goodbye_to_tls_in_the_middle_of_its_handshake_is_lost_and_has_refused_nothing(monkeypatch):
    secure = Group.secure

    def ending(group, sock, theirs, deadline, *, server):
        if server:
            # TLS's own goodbye (close_notify), instead of a greeting.
            sock.sendall(bytes.fromhex("15030300020100"))
            raise HandshakeError("it ends")
        return secure(group, sock, theirs, deadline, server=server)

    monkeypatch.setattr(Group, "secure", ending)
    outcomes = run_threads("tcp", 2, lambda comm: comm.rank, timeout=5.0, settings=[Settings(tls=True)] * 2)
    assert isinstance(outcomes[1], PeerLostError), outcomes
    assert outcomes[1].peer == 0


@pytest.mark.parametrize("impostor", ["server", "client"])
def test_an_end_without_the_proven_certificate_is_refused(impostor):
    left, right = socket.socketpair()
    known, stranger = Credentials(), Credentials()
    caught = []

    def side(credentials, sock, theirs, server):
        try:
            wrapped = credentials.wrap(sock, {"rank": 0, "certificate": theirs}, time.monotonic() + 5, server=server)
            # TLS 1.3 tells the client only with the next byte that its certificate was refused.
            wrapped.recv(1)
            wrapped.close()
        except (HandshakeError, OSError) as exc:
            caught.append(exc)
            sock.close()

    server = stranger if impostor == "server" else known
    client = stranger if impostor == "client" else known
    arguments = (server, right, known.certificate, True)
    thread = threading.Thread(target=side, args=arguments)
    thread.start()
    side(client, left, known.certificate, False)
    thread.join(10)
    assert any(isinstance(exc, HandshakeError) for exc in caught)
    assert len(caught) == 2


def test_a_peer_that_is_stuck_while_encrypting_does_not_hold_up_a_rank_that_leaves():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        group = Group(0, 2, "job", SECRET, time.monotonic() + 30, Credentials())
        theirs = Group(1, 2, "job", SECRET, group.deadline, Credentials())
        with socket.create_connection(listener.getsockname(), 5) as peer:
            with Doorman(listener, group):
                initiate(peer, SECRET, theirs.identity("data", 0), group.deadline)
                time.sleep(0.2)
                begin = time.monotonic()
            assert time.monotonic() - begin < 2


@pytest.mark.parametrize("certificate", [None, "", "no base64", "QUJD"])
def test_an_identity_without_a_certificate_is_refused(certificate):
    left, right = socket.socketpair()
    with left, right, pytest.raises(HandshakeError, match="certificate"):
        Credentials().wrap(left, {"rank": 1, "certificate": certificate}, time.monotonic() + 1, server=False)


def test_ranks_that_encrypt_and_ranks_that_do_not_refuse_each_other():
    outcomes = run_threads("tcp", 2, lambda comm: None, settings=[Settings(tls=True), Settings()], timeout=3.0)
    assert all(isinstance(outcome, HandshakeError) and "over TLS" in str(outcome) for outcome in outcomes)


def test_auto_takes_the_protocol_that_encrypts_and_others_refuse():
    outcomes = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason), settings=[Settings(tls=True)] * 2)
    assert outcomes == [("tcp", "encryption was asked for")] * 2
    outcomes = run_threads("shm", 2, lambda comm: None, settings=[Settings(tls=True)] * 2)
    assert all(isinstance(outcome, ProtocolError) for outcome in outcomes)


def test_encrypted_ranks_reduce_large_arrays():
    outcomes = run_threads(
        "tcp", 3, lambda comm: float(comm.all_reduce(np.ones(3_000_000))[-1]), settings=[Settings(tls=True)] * 3
    )
    assert outcomes == [3.0] * 3


def test_the_environment_asks_for_encryption_and_auto_heeds_it(monkeypatch):
    monkeypatch.setenv("SPARKTF_TLS", "1")
    (protocol, reason), _ = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason))
    assert (protocol, reason) == ("tcp", "encryption was asked for")
    monkeypatch.setenv("SPARKTF_TLS", "2")
    with pytest.raises(ParamError, match="SPARKTF_TLS to be 0 or 1"):
        Settings.from_environment()
