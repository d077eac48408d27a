"""The child's end of what joins it to its task: questions and answers, and the word that the workers are done."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sparktf.data.spool import Spool
from sparktf.errors import PeerLostError
from sparktf.program import wire
from sparktf.transport.framing import recv_frame, send_frame


class TaskLink:
    """A child's connection to its task. Any thread may ask; one question at a time is under way.

    Parameters
    ----------
    frames : socket
    descriptors : socket

    Attributes
    ----------
    workers_done : threading.Event
        Set once chief and workers have returned, for those that serve them or wait for that.
    """

    def __init__(self, frames: socket.socket, descriptors: socket.socket) -> None:
        self._frames, self._descriptors = frames, descriptors
        self._sending, self._asking = threading.Lock(), threading.Lock()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._exchanges: Counter[str] = Counter()
        self.workers_done = threading.Event()
        self._failed = False

    def receive_job(self) -> bytes:
        """Return the pickled job; then listen for what else comes."""
        _, payload = recv_frame(self._frames, wire.SEND_SECONDS, wire.FRAME_LIMIT)
        threading.Thread(target=self._listen, name="sparktf-task", daemon=True).start()
        return payload

    def tell(self, kind: int, told: Any = None) -> None:
        """Send something that needs no answer; JSON-able."""
        with self._sending:
            send_frame(self._frames, kind, json.dumps(told).encode(), wire.SEND_SECONDS)

    def fail(self, told: dict[str, Any]) -> None:
        """Send what main has failed with; the first time counts."""
        if not self._failed:
            self.tell(wire.ERROR, told)
            self._failed = True

    def exchange(self, payload: bytes, members: Sequence[int], name: str) -> list[bytes]:
        """Give every one of some ranks what all of them put in, ordered as `members`.

        Each of them calls this with the same `name`, as often as the others. It waits as long as it takes: the tasks
        end a run in which nothing goes on.
        """
        with self._asking:
            self._exchanges[name] += 1
            told = {"name": f"{name} {self._exchanges[name]}", "payload": payload.hex(), "members": list(members)}
            self.tell(wire.POST, told)
            return [bytes.fromhex(part) for part in self._answer()]

    def next_piece(self, stream: bool) -> tuple[list[dict[str, Any]], dict[str, Spool]]:
        """Ask for the next piece of the data.

        Returns
        -------
        (list of dict, dict of Spool)
            What each compute rank told of its piece, and this rank's rows, by the DataFrame's name.
        """
        with self._asking:
            self.tell(wire.WANT, {"stream": stream})
            told = self._answer()
            descriptors: list[int] = []
            while len(descriptors) < told["descriptors"]:
                _, some, _, _ = socket.recv_fds(self._descriptors, 1, wire.DESCRIPTORS)
                descriptors += some
            spools = {}
            for name, description in told["spools"].items():
                count = sum(len(column["files"]) for column in description["columns"])
                spools[name] = Spool.from_fds(description, descriptors[:count])
                del descriptors[:count]
            return told["everyones"], spools

    def leave_data(self) -> None:
        """Tell that no piece of the data will be asked for any more, soon; safe to call from a finalizer."""
        # Which may run in a thread that is telling something else just now. At the interpreter's end no thread starts
        # any more, and nobody needs to be told.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._tell_left, name="sparktf-leave", daemon=True).start()

    def _tell_left(self) -> None:
        # A task that is gone reads nothing.
        with contextlib.suppress(PeerLostError, OSError):
            self.tell(wire.LEAVE)

    def _answer(self) -> Any:
        return self._answers.get()

    def _listen(self) -> None:
        while True:
            try:
                kind, payload = recv_frame(self._frames, None, wire.FRAME_LIMIT)
            except (PeerLostError, OSError):
                # The task is gone, and with it this process's reason; its own death signal may be late.
                os._exit(1)
            if kind == wire.ANSWER:
                self._answers.put(json.loads(payload))
            elif kind == wire.STOP:
                self.workers_done.set()


def plain(value: Any) -> Any:
    """Return a value, or lists of them, as JSON can hold it: bytes, as which strings come from tensors, as text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return [plain(part) for part in value] if isinstance(value, list) else value
