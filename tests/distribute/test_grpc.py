from __future__ import annotations

import subprocess
import sys

import pytest

from sparktf.distribute.grpc import start_cluster
from sparktf.errors import ProtocolError
from sparktf.transport.solo import SoloCommunicator


def test_where_encryption_is_asked_for_gradients_do_not_travel_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKTF_TLS", "1")
    with pytest.raises(ProtocolError, match="clear text"):
        start_cluster(SoloCommunicator("tcp"), "127.0.0.1")


# TensorFlow takes its cluster only before the first op of a process.
_TAKEN = """
import socket
from sparktf.distribute.grpc import start_cluster
from sparktf.errors import TransportError
from sparktf.transport.solo import SoloCommunicator

class Robbed(SoloCommunicator):
    def all_gather_bytes(self, data):
        host, port = data.decode().rsplit(":", 1)
        self.thief = socket.socket()
        self.thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.thief.bind((host, int(port)))
        self.thief.listen()
        print(data.decode())
        return super().all_gather_bytes(data)

try:
    start_cluster(Robbed("tcp"), "127.0.0.1")
except TransportError as error:
    print(error)
"""


def test_a_port_that_was_taken_before_tensorflow_listens_is_named() -> None:
    command = [sys.executable, "-c", _TAKEN]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=120)
    address, error = said.stdout.splitlines()
    assert error.startswith(f"Expected TensorFlow's server to listen on {address}")
    assert "Run again for another port" in error
