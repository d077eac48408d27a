"""Workers that meet at a parameter server: an all-gather that goes on without those that are lost."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from sparktf.distribute.shards import Array
from sparktf.errors import ParamError, TransportTimeoutError
from sparktf.transport.contract import Stats

if TYPE_CHECKING:
    from sparktf.distribute.client import ParameterClient


class Meetings:
    """The server's side. Any thread may call.

    Parameters
    ----------
    workers : int
    timeout : float
        Seconds for which nothing need happen while somebody waits.
    idle_seconds : callable
        For how long nothing has happened elsewhere: those that are awaited may still train.
    """

    def __init__(self, workers: int, timeout: float, idle_seconds: Callable[[], float]) -> None:
        self._timeout = timeout
        self._idle_seconds = idle_seconds
        self._news = threading.Condition()
        self._moved_at = time.monotonic()
        self._present = set(range(workers))
        self._brought: dict[int, bytes] = {}
        self._round = 0
        # What was brought to a meeting, and who is still to be told.
        self._held: dict[int, tuple[dict[int, bytes], set[int]]] = {}

    def come(self, worker: int, brought: bytes) -> int:
        """Note that a worker has come; return the meeting's number."""
        with self._news:
            self._brought[worker] = brought
            number = self._round
            self._advance()
            return number

    def passed(self, number: int, seconds: float) -> bool:
        """Wait until all workers that are not lost have come; returns and raises as `Gate.passed` does."""
        with self._news:
            if self._news.wait_for(lambda: self._round > number, seconds):
                return True
            waited = min(time.monotonic() - self._moved_at, self._idle_seconds())
            if waited <= self._timeout:
                return False
            awaited = sorted(self._present - set(self._brought))
            raise TransportTimeoutError(
                f"Expected worker {awaited[0] if awaited else '?'} within {self._timeout:g} s (timeout), where others "
                f"wait for it between two epochs; nothing has come from anybody for {waited:.0f} s. Raise timeout "
                "where a callback or the validation takes so long."
            )

    def result(self, number: int, worker: int) -> dict[int, bytes]:
        """Return what each worker brought; a worker asks once."""
        with self._news:
            brought, untold = self._held[number]
            untold.discard(worker)
            if not untold:
                del self._held[number]
            return brought

    def leave(self, worker: int) -> None:
        """Note that a worker is gone for good; what it has brought counts. May be called twice."""
        with self._news:
            self._present.discard(worker)
            for number, (_, untold) in list(self._held.items()):
                untold.discard(worker)
                if not untold:
                    del self._held[number]
            self._advance()

    def _advance(self) -> None:
        self._moved_at = time.monotonic()
        if self._brought and self._present <= set(self._brought):
            brought, self._brought = self._brought, {}
            # One that has come and is lost since is not to be told.
            if untold := set(brought) & self._present:
                self._held[self._round] = (brought, untold)
            self._round += 1
        self._news.notify_all()


class Meeting:
    """A worker's side: as much of a `sparktf.transport.Communicator` as epochs' ends need.

    Its collectives are those of the workers that are still there. Bytes go through the first server's memory, so that
    they suit states and metrics, not gradients.

    Parameters
    ----------
    client : ParameterClient
    rank, size : int
        This worker's number, and how many began.

    Attributes
    ----------
    stats : Stats
        Its seconds are those of the client.
    """

    def __init__(self, client: ParameterClient, rank: int, size: int) -> None:
        self._client = client
        self.rank = rank
        self.size = size

    @property
    def stats(self) -> Stats:
        """The seconds so far that this worker waited."""
        return Stats(seconds=self._client.waited_seconds)

    def gather(self, data: bytes) -> dict[int, bytes]:
        """Return what each worker that is still there brings, in the order of their numbers."""
        brought = unpack_brought(self._client.meet(data))
        return {worker: brought[worker] for worker in sorted(brought)}

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes of all that are still there, ordered by rank; lengths may differ."""
        return list(self.gather(data).values())

    def all_reduce(self, array: Array, op: str = "sum") -> Array:
        """Add up an array over the workers that are still there, in place; its bits are equal on all of them.

        Raises
        ------
        ParamError
            For another `op` than "sum".
        """
        if op != "sum":
            raise ParamError(f"op: expected 'sum', received {op!r}.")
        parts = self.all_gather_bytes(np.ascontiguousarray(array).tobytes())
        total = sum(np.frombuffer(part, array.dtype) for part in parts)
        array[...] = np.asarray(total, array.dtype).reshape(array.shape)
        return array

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite an array with the root's, in place, or where the root is lost with that of the next worker."""
        brought = self.gather(array.tobytes() if self.rank == root else b"")
        if root not in brought:
            return self.broadcast(array, min(brought))
        array[...] = np.frombuffer(brought[root], array.dtype).reshape(array.shape)
        return array


def pack_brought(brought: Mapping[int, bytes]) -> bytes:
    """Return what workers brought as one message."""
    header = json.dumps([[worker, len(data)] for worker, data in brought.items()]).encode()
    return b"".join([struct.pack("<q", len(header)), header, *brought.values()])


def unpack_brought(message: bytes) -> dict[int, bytes]:
    """Return what `pack_brought` packed."""
    (size,) = struct.unpack_from("<q", message)
    start = 8 + size
    brought: dict[int, bytes] = {}
    for worker, length in json.loads(message[8:start]):
        brought[worker] = message[start : start + length]
        start += length
    return brought
