from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparktf.distribute.grpc import GrpcReducer, start_cluster
from sparktf.errors import ProtocolError
from sparktf.transport import Communicator
from sparktf.transport.solo import SoloCommunicator
from sparktf.transport.testing import processes


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


_SECONDS = 5.0


def _reduce_forever(communicator: Communicator) -> None:
    import tensorflow as tf

    cluster = start_cluster(communicator, "127.0.0.1")
    with GrpcReducer(communicator, _SECONDS) as reducer:
        step = tf.function(lambda: reducer.reduce(1, [tf.ones(1000)], tf.constant(0.5)))
        try:
            for number in itertools.count():
                step()
                if number == 3:
                    Path(os.environ["SIGNS"], str(communicator.rank)).touch()
        except tf.errors.OpError as error:
            raise reducer.explain(error) or error from None
    del cluster


@pytest.mark.long
def test_a_stopped_rank_is_named_within_half_a_timeout_after_tensorflows_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, signs = tmp_path / "meeting", tmp_path / "signs"
    for directory in (meeting, signs):
        directory.mkdir()
    monkeypatch.setenv("SIGNS", str(signs))
    with processes("tcp", 2, _reduce_forever, meeting, timeout=_SECONDS) as ranks:
        deadline = time.monotonic() + 100
        while len(list(signs.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        begin = time.monotonic()
        ranks[1].signal(signal.SIGSTOP)
        assert ranks[0].report()["event"] == "connected"
        failure = ranks[0].report()
    assert failure["error"] == "TransportTimeoutError"
    assert "rank 1: it does not answer at all" in failure["message"]
    # A second for a busy machine.
    assert failure["at"] - begin < 1.5 * _SECONDS + 1.0
