"""What every protocol gives: the communicator's contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@dataclass(slots=True)
class Stats:
    """What one communicator has done so far, on this rank.

    Attributes
    ----------
    bytes_sent, bytes_received : int
        Payload bytes given to, and taken from, other ranks; headers and control messages are not counted.
    operations : int
        Operations begun. Error messages count with the same number.
    registrations : int
        Buffers allocated (or registered with a device), those of `Communicator.allocate` and of single links too. It
        stands still once every size in use was seen, between every two ranks that talk.
    seconds : float
        Wall-clock time spent inside operations, waiting included.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    operations: int = 0
    registrations: int = 0
    seconds: float = 0.0


class Communicator(ABC):
    """A process's handle on its group.

    Every operation may raise these, and names the peer, the operation and its running number in the message:

    - `PeerLostError`: a peer died, closed its communicator too early, or aborted (``.peer``, ``.reason``);
    - `TransportTimeoutError`: nothing moved for the communicator's timeout;
    - `TransportError`: ranks called operations that do not match, or the communicator is closed;
    - `ParamError`: an argument cannot work; raised before anything is sent, the communicator stays usable.

    After any but `ParamError` the communicator is dead, and the contents of arrays given to the operation
    that failed are undefined. Operations of one communicator run one at a time; a second thread waits for the
    first.

    Arrays may have any shape and length, none included. Supported dtypes: float16, float32, float64, bfloat16
    (of ml_dtypes), int8, uint8, int32, int64 and bool. Arrays that are written in place must be writable;
    those that are not C-contiguous are copied on the way.

    Attributes
    ----------
    rank, size : int
        This process's number, and the number of processes.
    protocol : str
        The protocol's short name, never ``"auto"``.
    reason : str
        Why it is this protocol, in words that continue "protocol 'tcp': ".
    stats : Stats
        Counters of this rank.
    timeout : float
        Seconds without progress after which an operation fails, as `connect` was told. It may be set between
        operations, and counts on this rank.
    another : callable
        `sparktf.transport.connect` with the protocol, secret, timeout, address and settings of this communicator: it
        takes ``rank``, ``size`` and ``exchange``, for a further group of the same processes or of some of them.
    """

    protocol: str
    timeout: float
    another: Callable[..., Communicator]

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.reason = ""
        self.stats = Stats()

    @abstractmethod
    def all_reduce(self, array: Array, op: str = "sum", compression: str = "none") -> Array:
        """Reduce an array over all ranks, in place.

        Parameters
        ----------
        array : ndarray
            Same shape and dtype on every rank; overwritten with the result.
        op : {"sum", "mean", "max", "min"}
            The mean needs a floating dtype. On bool, sum and max mean "or", min means "and".
        compression : {"none", "bf16"}
            "bf16", for sums and means of float32: what travels between machines is rounded to bfloat16, what is added
            up is float32. Small arrays, and those that go through the memory of one machine, stay as they are.

        Returns
        -------
        ndarray
            `array`. Its bits are equal on all ranks, and between runs of the same world and shape.
        """

    @abstractmethod
    def reduce_scatter(self, array: Array, op: str = "sum") -> Array:
        """Reduce an array over all ranks and keep this rank's shard.

        Returns
        -------
        ndarray
            A new one-dimensional array: shard `rank` of the flattened result, bounded as
            ``numpy.array_split(flat, size)[rank]`` is: the first ``len % size`` shards hold one element more.
            `array` itself is left as it was.
        """

    @abstractmethod
    def all_gather(self, array: Array, out: Callable[[int], Array] | None = None) -> list[Array]:
        """Give every rank the arrays of all.

        Parameters
        ----------
        array : ndarray
            Same dtype and same shape but for the first axis, whose length is the rank's own business.
        out : callable, optional
            ``out(rows)`` gives a contiguous array of so many rows, as `array` has them, to receive into: of memory that
            is used again, say. Every rank passes one, or none does.

        Returns
        -------
        list of ndarray
            Ordered by rank: new arrays, or consecutive slices of what `out` gave.
        """

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Give every rank the bytes of all, ordered by rank; lengths may differ."""
        return [part.tobytes() for part in self.all_gather(np.frombuffer(data, np.uint8))]

    @abstractmethod
    def broadcast(self, array: Array, root: int = 0) -> Array:
        """Overwrite `array` (same shape and dtype on every rank) with the root's, in place; return it."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called this."""

    @abstractmethod
    def send(self, peer: int, array: Array) -> None:
        """Send an array to one rank, which calls `recv` with an array of the same dtype and size.

        It returns when `array` may be changed again, which says nothing about what has arrived. Two ranks
        that send to each other before either receives may block each other until the timeout.
        """

    @abstractmethod
    def recv(self, peer: int, array: Array) -> Array:
        """Fill `array` in place with what `peer` sends to this rank; return it."""

    @abstractmethod
    def allocate(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        """Allocate an array in memory that the protocol reaches without a copy of its own.

        Every rank calls this, with the same shape and dtype. Operations take any array; on these, and on contiguous
        slices of them, they are as fast as the protocol allows. Allocate once, use for every step.

        Returns
        -------
        ndarray
            Zeros. The memory is held until the communicator is closed *and* nobody refers to the array.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise what has ended this communicator, if something has; return at once, without meeting anybody."""

    @abstractmethod
    def close(self) -> None:
        """Leave in good order: what was sent still arrives. May be called twice, and after a failure."""

    @abstractmethod
    def abort(self, reason: str = "") -> None:
        """Leave at once and tell every rank why.

        Pending and later operations of all ranks raise `PeerLostError` with this rank as ``.peer`` and with
        ``.reason``. May be called from any thread, and wakes whoever waits in this communicator.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort(f"{type(error).__name__}: {error}")
