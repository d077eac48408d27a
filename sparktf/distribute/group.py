"""What ranks of a fit need of each other between steps, whatever joins them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Group(Protocol):
    """What ranks talk over between steps; a `sparktf.transport.Communicator` is one.

    Attributes
    ----------
    rank, size : int
    """

    rank: int
    size: int

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes of all, ordered by rank."""

    def all_reduce(self, array: np.ndarray[Any, Any], op: str = "sum") -> np.ndarray[Any, Any]:
        """Add up an array, in place."""

    def broadcast(self, array: np.ndarray[Any, Any], root: int = 0) -> np.ndarray[Any, Any]:
        """Overwrite an array with the root's, in place."""


class Stopping(Protocol):
    """How ranks agree to stop.

    Attributes
    ----------
    stop_agreed : bool
    """

    @property
    def stop_agreed(self) -> bool:
        """Whether a rank has asked to stop and this one knows."""

    def request_stop(self) -> None:
        """Ask all ranks to stop."""

    def clear_stop(self) -> None:
        """Forget it, before a fit begins."""
