"""The control connection: how nodes tell the driver of progress, of their first error, and of what they have made.

One connection a node, opened by the node, authenticated with the job's secret. What comes over it is JSON and the bytes
of a file, such as the chief's model; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from sparktf.errors import TransportError
from sparktf.transport.framing import send_frame
from sparktf.transport.handshake import initiate

_LOG = logging.getLogger("sparktf.cluster")

PROGRESS, ERROR, FILE, FILE_END, DONE = range(1, 6)
# Of a file; a frame must fit in memory on both sides and be large enough that its header does not count.
CHUNK_BYTES = 4 << 20
HANDSHAKE_SECONDS = 10.0
# A node that cannot tell the driver something in this time goes on without.
_SEND_SECONDS = 30.0


@dataclass(frozen=True)
class ControlAddress:
    """Where nodes find the driver."""

    host: str
    port: int


class ControlClient:
    """A node's end. Everything it sends is dropped where there is no connection.

    Parameters
    ----------
    connection : socket or None
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._moved_at: float | None = None
        self._training = False

    @classmethod
    def connect(cls, address: ControlAddress | None, secret: bytes, job_id: str, rank: int) -> Self:
        """Connect to the driver; where that cannot be done, say so in the log and go on without."""
        if address is None:
            return cls()
        connection = None
        try:
            connection = socket.create_connection((address.host, address.port), timeout=HANDSHAKE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            initiate(connection, secret, {"job": job_id, "rank": rank}, time.monotonic() + HANDSHAKE_SECONDS)
        except OSError as error:
            _LOG.warning("the driver cannot be reached at %s:%d: %s", address.host, address.port, error)
            if connection is not None:
                connection.close()
            return cls()
        return cls(connection)

    @property
    def connected(self) -> bool:
        """Whether the driver hears this node."""
        return self._connection is not None

    def moved_at(self) -> float | None:
        """Return when this node had a word to say last, by the monotonic clock; None where it had none yet."""
        return self._moved_at

    def training(self) -> bool:
        """Tell whether this node has had progress to report: more than that it goes on."""
        return self._training

    def progress(self, report: dict[str, Any]) -> None:
        """Tell the driver how far this node is; of a report that no frame holds, only that there was one."""
        self._moved_at = time.monotonic()
        self._training = self._training or bool(report)
        told = json.dumps(report).encode()
        self._send(PROGRESS, told if len(told) <= CHUNK_BYTES else b"{}")

    def alive(self) -> None:
        """Tell the driver that this node goes on, in a phase that has no progress to report."""
        self.progress({})

    def error(self, kind: str, message: str, traceback: str) -> None:
        """Tell the driver that this node failed."""
        # Cut, so that it fits a frame whatever a user's exception says.
        fields = {"kind": kind, "message": message[-100_000:], "traceback": traceback[-1_000_000:]}
        self._send(ERROR, json.dumps(fields).encode())

    def send_file(self, file: BinaryIO) -> bool:
        """Send what this node has for the driver, one file; return whether the driver has it."""
        while chunk := file.read(CHUNK_BYTES):
            self._send(FILE, chunk)
        self._send(FILE_END, b"")
        return self.connected

    def close(self) -> None:
        """Tell the driver that this node is done. May be called twice."""
        self._send(DONE, b"")
        self._drop()

    def _send(self, kind: int, payload: bytes) -> None:
        with self._lock:
            if self._connection is None:
                return
            try:
                send_frame(self._connection, kind, payload, _SEND_SECONDS)
            except TransportError as error:
                _LOG.warning("lost the connection to the driver (process %d): %s", os.getpid(), error)
                self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
