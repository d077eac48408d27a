"""The control connection: what nodes tell the driver arrives, and strangers tell it nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktf.cluster import control_server
from sparktf.cluster.control import CHUNK_BYTES, ERROR, PROGRESS, ControlAddress, ControlClient
from sparktf.cluster.control_server import ControlServer
from sparktf.cluster.submit import node_error

SECRET = b"s" * 32


class Driver:
    """A control server and what it was told."""

    def __init__(self, directory: Path, timeout: float = 60.0) -> None:
        self.progress: list[tuple[int, dict[str, Any]]] = []
        self.failed = threading.Event()
        self.model = directory / "trained.keras"
        self.server = ControlServer(
            "127.0.0.1",
            SECRET,
            "job",
            2,
            {0: str(self.model)},
            lambda rank, told: self.progress.append((rank, told)),
            self.failed.set,
            timeout,
        )

    def node(self, rank: int, secret: bytes = SECRET, job: str = "job") -> ControlClient:
        return ControlClient.connect(ControlAddress("127.0.0.1", self.server.port), secret, job, rank)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    with driver.server:
        yield driver
    assert not [t for t in threading.enumerate() if t.name.startswith("sparktf-control")]


def _until(condition: Any, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_progress_arrives_with_its_rank(driver: Driver) -> None:
    node = driver.node(1)
    node.progress({"epoch": 1})
    node.close()
    assert _until(lambda: driver.progress == [(1, {"epoch": 1})])
    assert driver.server.failure() is None


def test_a_nodes_error_arrives_with_its_traceback(driver: Driver) -> None:
    node = driver.node(1)
    node.error("ValueError", "no", "Traceback ...")
    node.close()
    failure = driver.server.failure(5.0)
    assert failure is not None
    assert (failure.rank, failure.kind, failure.message, failure.traceback) == (1, "ValueError", "no", "Traceback ...")
    assert driver.failed.is_set()


def test_the_error_that_counts_is_not_the_one_about_a_lost_peer(driver: Driver) -> None:
    first, second = driver.node(0), driver.node(1)
    first.error("sparktf.errors.PeerLostError", "rank 1 went away", "")
    time.sleep(0.1)
    second.error("ValueError", "no", "")
    assert _until(lambda: getattr(driver.server.failure(0.5), "rank", None) == 1)
    first.close()
    second.close()


def test_a_node_that_ends_without_a_word_is_named(driver: Driver) -> None:
    node = driver.node(1)
    assert node._connection is not None
    node._connection.close()
    failure = driver.server.failure(5.0)
    assert failure is not None
    assert (failure.rank, failure.kind) == (1, "")


def test_a_node_that_says_more_than_a_frame_holds_is_not_taken_for_killed(driver: Driver) -> None:
    node = driver.node(1)
    node._send(PROGRESS, b" " * (CHUNK_BYTES + 1))
    failure = driver.server.failure(5.0)
    assert failure is not None
    assert failure.rank == 1
    message = str(node_error(failure))
    assert f"Expected a frame of at most {CHUNK_BYTES} bytes. Received: one that announces" in message
    assert "killed" not in message
    node.close()


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(PROGRESS, b"{"), (PROGRESS, b"\xff\xfe"), (ERROR, b"[1]"), (ERROR, b'{"kind": "OSError"}'), (ERROR, b"null")],
)
def test_what_cannot_be_read_is_that_nodes_failure(driver: Driver, kind: int, payload: bytes) -> None:
    node = driver.node(1)
    node._send(kind, payload)
    failure = driver.server.failure(5.0)
    assert failure is not None
    assert failure.rank == 1
    assert "what it told the driver could not be read" in str(node_error(failure))
    node.close()


def test_a_report_that_no_frame_holds_ends_nothing(driver: Driver) -> None:
    node = driver.node(1)
    node.progress({"logs": {f"metric_{number}": 0.5 for number in range(CHUNK_BYTES // 10)}})
    node.progress({"epoch": 1})
    node.close()
    assert _until(lambda: len(driver.progress) == 2)
    assert driver.progress == [(1, {}), (1, {"epoch": 1})]
    assert driver.server.failure() is None


def test_a_node_that_says_nothing_for_the_timeout_is_named(tmp_path: Path) -> None:
    driver = Driver(tmp_path, timeout=0.5)
    with driver.server:
        node = driver.node(1)
        failure = driver.server.failure(5.0)
        assert failure is not None
        # The other one has not come at all: it is what this one waits for.
        assert failure.rank == 0
        assert "has not come up: not a word from it for 0.5 s" in failure.message
        node.close()


def test_of_nodes_that_have_all_come_the_silent_one_is_named(tmp_path: Path) -> None:
    driver = Driver(tmp_path, timeout=1.0)
    with driver.server:
        driver.node(0).close()
        silent = driver.node(1)
        failure = driver.server.failure(5.0)
        assert failure is not None
        assert failure.rank == 1
        assert "no progress for 1.0 s" in failure.message
        silent.close()


def test_a_node_that_says_which_other_stopped_counts_more_than_the_stopped_ones_silence(tmp_path: Path) -> None:
    driver = Driver(tmp_path, timeout=1.0)
    with driver.server:
        stopped, tells = driver.node(1), driver.node(0)
        tells.error("sparktf.errors.TransportTimeoutError", "all_reduce: waiting for rank 1", "a traceback")
        # Longer than the other one's silence, for something better than a timeout.
        failure = driver.server.failure(2.0)
        assert failure is not None
        assert (failure.rank, failure.message) == (0, "all_reduce: waiting for rank 1")
        stopped.close()


def test_a_screen_that_cannot_be_written_to_does_not_end_a_fit(driver: Driver) -> None:
    def broken(rank: int, told: dict[str, Any]) -> None:
        raise ValueError("closed")

    driver.server._on_progress = broken
    node = driver.node(1)
    node.progress({"epoch": 1})
    node.error("ValueError", "no", "")
    failure = driver.server.failure(5.0)
    assert failure is not None
    assert failure.kind == "ValueError"
    node.close()


def test_the_chiefs_model_arrives_whole(driver: Driver, tmp_path: Path) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES // 256 + 17)
    (tmp_path / "sent").write_bytes(content)
    node = driver.node(0)
    with (tmp_path / "sent").open("rb") as file:
        assert node.send_file(file)
    node.close()
    assert _until(lambda: driver.server.received(0))
    assert driver.model.read_bytes() == content


def test_what_a_node_sent_before_it_left_is_waited_for(driver: Driver, tmp_path: Path) -> None:
    show = driver.server._on_progress

    def slowly(rank: int, told: dict[str, Any]) -> None:
        time.sleep(0.5)
        show(rank, told)

    driver.server._on_progress = slowly
    (tmp_path / "sent").write_bytes(b"model")
    node = driver.node(0)
    node.progress({"stdout": ["last words"]})
    with (tmp_path / "sent").open("rb") as file:
        assert node.send_file(file)
    node.close()
    assert not driver.server.received(0)
    driver.server.listen_to_the_end(5.0)
    assert driver.progress == [(0, {"stdout": ["last words"]})]
    assert driver.server.received(0)


@pytest.mark.parametrize(("secret", "job"), [(b"x" * 32, "job"), (SECRET, "another job")])
def test_a_node_of_another_job_is_refused_and_goes_on_without(driver: Driver, secret: bytes, job: str) -> None:
    node = driver.node(0, secret, job)
    node.progress({"epoch": 1})
    node.error("ValueError", "no", "")
    node.close()
    assert driver.server.failure(0.3) is None
    assert driver.progress == []


def test_a_stranger_who_says_nothing_keeps_nobody_waiting(driver: Driver) -> None:
    with socket.create_connection(("127.0.0.1", driver.server.port)):
        node = driver.node(0)
        node.progress({"epoch": 1})
        assert _until(lambda: len(driver.progress) == 1)
        node.close()


def test_strangers_are_heard_a_few_at_a_time_and_end_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "_MOST_HANDSHAKES", 2)
    driver = Driver(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(driver.server.close)
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", driver.server.port))) for _ in range(5)]

        def served() -> int:
            return sum(t.name == "sparktf-control-node" for t in threading.enumerate())

        assert _until(lambda: served() == 2)
        time.sleep(0.3)
        assert served() == 2
        for stranger in strangers:
            stranger.close()
        node = driver.node(0)
        node.progress({"epoch": 1})
        assert _until(lambda: len(driver.progress) == 1)
        node.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("sparktf-control")]


def test_a_driver_that_cannot_be_reached_is_done_without() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    node = ControlClient.connect(ControlAddress("127.0.0.1", port), SECRET, "job", 0)
    assert not node.connected
    node.progress({"epoch": 1})
    node.close()
