"""The driver's end of the control connections."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self

from sparktf.cluster.control import CHUNK_BYTES, DONE, ERROR, FILE, FILE_END, HANDSHAKE_SECONDS, PROGRESS
from sparktf.errors import HandshakeError, PeerLostError, TransportError, TransportTimeoutError, own_error
from sparktf.transport.framing import recv_frame
from sparktf.transport.handshake import accept

_LOG = logging.getLogger("sparktf.cluster")

# Connections that have not said yet who they are, at once; others wait in the listener's queue.
_MOST_HANDSHAKES = 256


@dataclass(frozen=True)
class NodeFailure:
    """What a node said before it failed, or that it vanished.

    Attributes
    ----------
    rank : int
    kind : str
        The exception's qualified class name; empty where the node vanished without a word.
    message, traceback : str
        As the node printed them.
    """

    rank: int
    kind: str
    message: str
    traceback: str


class ControlServer:
    """The driver's end.

    Parameters
    ----------
    host : str
        Address to bind to.
    secret : bytes
        The job's.
    job_id : str
    world_size : int
    file_paths : mapping of int to str
        Where to write the file that a rank may send: the chief's model, or what a program returned.
    on_progress : callable
        ``on_progress(rank, dict)``, called from this server's threads.
    on_failure : callable
        Called once, after the first node failed.
    timeout : float
        Seconds without a word after which a node is taken for hanging; nodes report progress more often.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        job_id: str,
        world_size: int,
        file_paths: Mapping[int, str],
        on_progress: Callable[[int, dict[str, Any]], None],
        on_failure: Callable[[], None],
        timeout: float,
    ) -> None:
        self._secret, self._job_id, self._world_size = secret, job_id, world_size
        self._file_paths = file_paths
        self._on_progress, self._on_failure = on_progress, on_failure
        self._timeout = timeout
        self._lock = threading.Condition()
        self._failures: list[NodeFailure] = []
        self._files: set[int] = set()
        self._heard_from: set[int] = set()
        self._room = threading.Semaphore(_MOST_HANDSHAKES)
        self._closed = False
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((host, 0), backlog=world_size + 8)
        self.port: int = self._listener.getsockname()[1]
        # The first of the threads: the others each serve a node.
        self._start(self._accept_all, "control-accept")

    def received(self, rank: int) -> bool:
        """Tell whether a rank's file is complete."""
        return rank in self._files

    def heard_from_a_node(self) -> bool:
        """Tell whether any node has come so far."""
        return bool(self._heard_from)

    def failure(self, wait: float = 0.0) -> NodeFailure | None:
        """Return the failure that came first and is not about another node's.

        Parameters
        ----------
        wait : float
            Seconds to wait for one.
        """
        deadline = time.monotonic() + wait
        with self._lock:
            while (left := deadline - time.monotonic()) > 0:
                if any(not _secondary(f) for f in self._failures):
                    break
                self._lock.wait(left)
            primary = [f for f in self._failures if not _secondary(f)]
            candidates = primary or self._failures
            return candidates[0] if candidates else None

    def listen_to_the_end(self, seconds: float) -> None:
        """Wait until what nodes sent before they left has been read, for nodes whose tasks have ended."""
        deadline = time.monotonic() + seconds
        for thread in self._threads[1:]:
            thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Close every connection and end the threads. May be called twice."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        self._room.release()
        # A listener's close does not wake a thread that waits in accept(); its shutdown does.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=HANDSHAKE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, target: Callable[..., None], name: str, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=f"sparktf-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept_all(self) -> None:
        while True:
            self._room.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._connections.append(connection)
            self._start(self._serve, "control-node", connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                rank = self._admit(connection)
            except TransportError as error:
                # Strangers and nodes of other jobs; a node of ours goes on without a control connection.
                _LOG.warning("refused a control connection: %s", error)
                return
            finally:
                self._room.release()
            self._heard_from.add(rank)
            try:
                self._listen(connection, rank)
            except TransportTimeoutError:
                # Once a node has failed, those that stopped or hang with it have nothing to add.
                if self.failure() is None:
                    self._fail(self._silent(rank))
            except PeerLostError:
                # The node vanished: a node that leaves in good order says so first.
                if not self._closed:
                    self._fail(
                        NodeFailure(rank, "", "its process ended without a word (killed, perhaps for its memory)", "")
                    )
            except (TransportError, ValueError, TypeError) as error:
                # What else it says cannot be followed any more.
                self._fail(NodeFailure(rank, "", f"what it told the driver could not be read: {error}".rstrip("."), ""))
            except OSError as error:
                self._fail(NodeFailure(rank, "", f"its file could not be written on the driver: {error}", ""))

    def _silent(self, rank: int) -> NodeFailure:
        if missing := sorted(set(range(self._world_size)) - self._heard_from):
            # Likely what this one waits for.
            message = f"it has not come up: not a word from it for {self._timeout} s (timeout)"
            return NodeFailure(missing[0], "", message, "")
        message = f"no progress for {self._timeout} s (timeout): its process is stopped, or its program hangs"
        return NodeFailure(rank, "", message, "")

    def _admit(self, connection: socket.socket) -> int:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        peer = accept(connection, self._secret, {"job": self._job_id}, deadline)
        rank = peer.get("rank")
        if peer.get("job") != self._job_id or not isinstance(rank, int) or not 0 <= rank < self._world_size:
            raise HandshakeError(
                f"Expected a node of job {self._job_id} with a rank below {self._world_size}. Received: {peer}."
            )
        return rank

    def _show(self, rank: int, report: dict[str, Any]) -> None:
        try:
            self._on_progress(rank, report)
        except Exception:  # a screen that cannot be written to must not end a fit
            _LOG.warning("progress of rank %d could not be shown", rank, exc_info=True)

    def _listen(self, connection: socket.socket, rank: int) -> None:
        with contextlib.ExitStack() as stack:
            file: BinaryIO | None = None
            while True:
                kind, payload = recv_frame(connection, self._timeout, CHUNK_BYTES)
                if kind == PROGRESS:
                    self._show(rank, json.loads(payload))
                elif kind == ERROR:
                    self._fail(NodeFailure(rank, **json.loads(payload)))
                    return
                elif kind == FILE and rank in self._file_paths:
                    file = file or stack.enter_context(open(self._file_paths[rank], "wb"))
                    file.write(payload)
                elif kind == FILE_END and file is not None:
                    file.flush()
                    self._files.add(rank)
                elif kind == DONE:
                    return

    def _fail(self, failure: NodeFailure) -> None:
        with self._lock:
            known = any(f.rank == failure.rank for f in self._failures)
            first = not self._failures
            if not known:
                self._failures.append(failure)
            self._lock.notify_all()
        if first:
            self._on_failure()


def _secondary(failure: NodeFailure) -> bool:
    return own_error(failure.kind) in (PeerLostError, TransportTimeoutError)
