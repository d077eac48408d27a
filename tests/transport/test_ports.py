from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from sparktf.errors import TransportError
from sparktf.transport.ports import HeldPort, host_and_port

HOST = "127.0.0.1"

# TensorFlow's server ends only with its process.
SERVE = """
import socket, sys
import tensorflow as tf

server = tf.distribute.Server({"worker": [f"127.0.0.1:{sys.argv[1]}"]}, job_name="worker", task_index=0)
socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10).close()
print("serves", flush=True)
"""


def _listen(port: int, *, reuse: bool) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        sock.bind((HOST, port))
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def test_nobody_else_takes_a_held_port_and_nobody_reaches_it() -> None:
    with HeldPort(HOST) as held:
        with pytest.raises(OSError, match="already in use"):
            _listen(held.port, reuse=False).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, held.port), 10)


def test_a_held_port_is_taken_once_somebody_listens_on_it() -> None:
    with HeldPort(HOST) as held:
        assert not held.taken()
        with _listen(held.port, reuse=True):
            assert held.taken()
        assert not held.taken()


def test_a_server_listens_beside_whoever_holds_its_port_and_keeps_it() -> None:
    held = HeldPort(HOST)
    with _listen(held.port, reuse=True) as server:
        held.close()
        held.close()
        with socket.create_connection((HOST, held.port), 10), pytest.raises(OSError, match="already in use"):
            _listen(held.port, reuse=True).close()
        server.accept()[0].close()


def test_tensorflow_serves_on_a_held_port() -> None:
    with HeldPort(HOST) as held:
        command = [sys.executable, "-c", SERVE, str(held.port)]
        said = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=120)
    assert said.stdout == "serves\n"


def test_a_host_that_is_not_here_is_named() -> None:
    # Of the range that RFC 5737 keeps for documentation.
    with pytest.raises(TransportError, match=r"192\.0\.2\.1.*Pass an address of this machine"):
        HeldPort("192.0.2.1")


@pytest.mark.parametrize(
    ("host", "address"), [("10.0.0.1", "10.0.0.1:5"), ("::1", "[::1]:5"), ("[::1]", "[::1]:5"), ("node", "node:5")]
)
def test_an_address_of_ipv6_is_written_in_brackets(host: str, address: str) -> None:
    assert host_and_port(host, 5) == address
