"""The communicator of a world of one, for every protocol: no peer, no socket, no thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import DTypeLike

from sparktf.errors import ParamError, TransportError
from sparktf.transport.contract import Array, Communicator
from sparktf.transport.reduction import (
    check_array,
    check_compression,
    check_dtype,
    check_gathered,
    check_op,
    check_rows,
)


class SoloCommunicator(Communicator):
    """Every collective over one rank is the identity."""

    def __init__(self, protocol: str) -> None:
        super().__init__(0, 1)
        self.protocol = protocol
        self.reason = "a world of one exchanges nothing"
        self._ended = ""

    @contextmanager
    def _operation(self, name: str) -> Iterator[None]:
        if self._ended:
            raise TransportError(f"{name}: the communicator {self._ended}. Connect again.")
        self.stats.operations += 1
        begin = time.perf_counter()
        yield
        self.stats.seconds += time.perf_counter() - begin

    def all_reduce(self, array: Array, op: str = "sum", compression: str = "none") -> Array:
        """Return `array`, unchanged."""
        check_array(array, written=True)
        check_op(op, array.dtype)
        check_compression(compression, op, array.dtype)
        with self._operation("all_reduce"):
            return array

    def reduce_scatter(self, array: Array, op: str = "sum") -> Array:
        """Return a flat copy: the one shard is the whole."""
        check_array(array, written=False)
        check_op(op, array.dtype)
        with self._operation("reduce_scatter"):
            return array.reshape(-1).copy()

    def all_gather(self, array: Array, out: Callable[[int], Array] | None = None) -> list[Array]:
        """Return a copy as the only entry."""
        check_array(array, written=False)
        check_gathered(array, out)
        with self._operation("all_gather"):
            if out is None:
                return [array.copy()]
            copy = check_rows(out(len(array)), len(array), array)
            np.copyto(copy, array)
            return [copy]

    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Return `array`, unchanged."""
        check_array(array, written=True)
        if root != 0:
            raise ParamError(f"Expected root to be 0, as the world has one rank. Received: {root}.")
        with self._operation("broadcast"):
            return array

    def barrier(self) -> None:
        """Return at once."""
        with self._operation("barrier"):
            return

    def send(self, peer: int, array: Array) -> None:
        """Raise `ParamError`: there is no other rank."""
        raise ParamError(f"Expected another rank to send to. Received: {peer} in a world of one.")

    def recv(self, peer: int, array: Array) -> Array:
        """Raise `ParamError`: there is no other rank."""
        raise ParamError(f"Expected another rank to receive from. Received: {peer} in a world of one.")

    def allocate(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return zeros: there is nobody to reach them."""
        check_dtype(np.dtype(dtype))
        with self._operation("allocate"):
            self.stats.registrations += 1
            return np.zeros(shape, dtype)

    def check(self) -> None:
        """Raise where the communicator has ended."""
        if self._ended:
            raise TransportError(f"check: the communicator {self._ended}. Connect again.")

    def close(self) -> None:
        """Refuse later operations."""
        self._ended = self._ended or "is closed"

    def abort(self, reason: str = "") -> None:
        """Refuse later operations, with the reason."""
        self._ended = self._ended or f"was aborted: {reason}"
