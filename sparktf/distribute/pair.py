"""What a worker and a parameter server say to each other, over a communicator of the two.

A request of the worker, and the server's answer. First, where the worker has something to train, its `Hello`: both
allocate the two messages; the chief sends its weights and its optimizer's state; all are answered with the weights.
Then, for every step, gradients go one way, weights the other.

A worker that need not wait for an answer has further lanes to the server, communicators with messages of their own:
while one push is applied and answered, the next is sent. All but pushes goes over the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import ml_dtypes
import numpy as np

from sparktf.distribute.exchange import aligned_zeros
from sparktf.distribute.shards import Array, Layout
from sparktf.errors import PeerLostError, TransportTimeoutError
from sparktf.transport import Communicator

# Ranks in the pair.
WORKER, SERVER = 0, 1
# One that is sent, and one that is applied or answered: more would only make gradients older.
MOST_LANES = 2
# Gradients of fewer bytes are soon there. A second push under way would gain nothing and make all of them older, by
# which training with a rate that is barely small enough begins to swing.
LARGE_BYTES = 1 << 20
# Requests. HELLO: it follows; answered with weights. PUSH: gradients follow; answered with weights once the gate lets
# the worker pass. FINISH: the worker has come to the end of its training for now; answered with the weights of then
# once all have. MEET: bytes follow; answered with all workers' bytes once all have come. STATE: answered with the
# optimizer's state. LEAVE: it is gone; not answered. TABLES: a program's worker tells, before its Hello, which tables
# there are; then both connect once more.
HELLO, PUSH, FINISH, MEET, STATE, LEAVE, TABLES = range(7)
# Answers. WAIT: not yet, but the server is alive. WEIGHTS, BYTES: they follow.
WAIT, WEIGHTS, BYTES = range(3)
# Places in a request: its kind, the learning rate (NaN: none), how many rows a push stands for, whether the worker
# wants all to stop.
KIND, RATE, ROWS, STOP = range(4)
# And in an answer, behind its kind: the weights' version, whether any worker wants to stop.
VERSION, STOPPING = 1, 2

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Part:
    """A slice of a variable, as its server knows it.

    Optimizers exclude variables by their paths, for which the chief's count: Keras numbers models by how many a process
    has made.
    """

    path: str = field(compare=False)
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Hello:
    """What a worker tells a server first; the same from all workers.

    Attributes
    ----------
    optimizer : str
        The name of its class, which the server's must have.
    parts : tuple of Part
        What lives on this server.
    max_staleness : int or None
    compression : {"none", "bf16"}
    tables : int
        How many there are beside.
    lanes : int
        The worker's, to each server.
    """

    optimizer: str
    parts: tuple[Part, ...]
    max_staleness: int | None
    compression: str
    tables: int = 0
    lanes: int = 1

    def difference(self, other: Hello) -> str:
        """Say in a few words in what another one differs; empty where it does not."""
        for name in ("optimizer", "max_staleness", "compression", "tables", "lanes"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)!r} and {getattr(other, name)!r}"
        if len(self.parts) != len(other.parts):
            return f"{len(self.parts)} and {len(other.parts)} variables"
        differing = [(mine, theirs) for mine, theirs in zip(self.parts, other.parts, strict=True) if mine != theirs]
        return " and ".join(f"{p.path} of {p.dtype} {p.shape}" for p in differing[0]) if differing else ""

    @property
    def gradients(self) -> Layout:
        """How gradients lie in a message."""
        dtypes = [np.dtype(part.dtype) for part in self.parts]
        if self.compression == "bf16":
            # Double precision was asked for by whoever made the model.
            dtypes = [_BFLOAT16 if dtype == np.float32 else dtype for dtype in dtypes]
        return Layout(tuple(dtypes), tuple(part.shape for part in self.parts))

    @property
    def weights(self) -> Layout:
        """How weights lie in a message."""
        return Layout(tuple(np.dtype(part.dtype) for part in self.parts), tuple(part.shape for part in self.parts))

    def send(self, communicator: Communicator) -> None:
        """Send it to the server."""
        send_bytes(communicator, SERVER, json.dumps(asdict(self)).encode())

    @classmethod
    def receive(cls, communicator: Communicator) -> Hello:
        """Receive the worker's."""
        told = json.loads(receive_bytes(communicator, WORKER))
        parts = tuple(Part(part["path"], tuple(part["shape"]), part["dtype"]) for part in told.pop("parts"))
        return cls(parts=parts, **told)


class Messages:
    """The memory of a pair's messages, allocated once; both sides make one at the same time.

    Attributes
    ----------
    gradients, weights : ndarray
        uint8, the messages as they travel.
    gradient_views, weight_views : list of ndarray
        The parts in them.
    """

    def __init__(self, communicator: Communicator, hello: Hello) -> None:
        self.gradients = aligned_zeros(communicator, hello.gradients.nbytes, np.dtype(np.uint8))
        self.weights = aligned_zeros(communicator, hello.weights.nbytes, np.dtype(np.uint8))
        self.gradient_views: list[Array] = hello.gradients.views(self.gradients)
        self.weight_views: list[Array] = hello.weights.views(self.weights)


def lanes_for(max_staleness: int | None, nbytes: int) -> int:
    """Return how many pushes a worker may have under way to a server.

    Parameters
    ----------
    max_staleness : int or None
        A worker computes on the weights of so many updates ago, at most, also where those are its own.
    nbytes : int
        Of a push's gradients, to the server that gets the most.
    """
    if nbytes < LARGE_BYTES:
        return 1
    return MOST_LANES if max_staleness is None else max(1, min(MOST_LANES, max_staleness))


def connect_again(communicator: Communicator, timeout: float) -> Communicator:
    """Connect a worker and a server once more; both call this.

    Parameters
    ----------
    communicator : Communicator
        One of the two's.
    timeout : float
        Seconds for which this side waits for the other.
    """

    def exchange(payload: bytes) -> list[bytes]:
        if communicator.rank == WORKER:
            send_bytes(communicator, SERVER, payload)
            return [payload, receive_bytes(communicator, SERVER)]
        theirs = receive_bytes(communicator, WORKER)
        send_bytes(communicator, WORKER, payload)
        return [theirs, payload]

    return communicator.another(rank=communicator.rank, size=2, exchange=exchange, timeout=timeout)


@contextmanager
def naming_server(server: int) -> Iterator[None]:
    """Say which server an error is about: in a pair everyone is rank 0 or 1."""
    try:
        yield
    except PeerLostError as error:
        raise PeerLostError(f"parameter server {server}: {error.reason or error}", None, error.reason) from error
    except TransportTimeoutError as error:
        raise TransportTimeoutError(f"parameter server {server}: {error}") from error


def request(kind: int = WAIT, rate: float = math.nan, rows: float = 1, stop: bool = False) -> Array:
    """Return what goes before a worker's message."""
    return np.array([kind, rate, rows, stop], np.float64)


def answer(kind: int = WAIT, version: int = 0, stopping: bool = False) -> Array:
    """Return what goes before a server's message."""
    return np.array([kind, version, stopping], np.float64)


def send_bytes(communicator: Communicator, peer: int, data: bytes) -> None:
    """Send bytes of any number; what they need is allocated for them."""
    communicator.send(peer, np.array([len(data)]))
    communicator.send(peer, np.frombuffer(data, np.uint8))


def receive_bytes(communicator: Communicator, peer: int) -> bytes:
    """Receive what `send_bytes` sends."""
    size = communicator.recv(peer, np.zeros(1, np.int64))
    return communicator.recv(peer, np.empty(int(size[0]), np.uint8)).tobytes()
