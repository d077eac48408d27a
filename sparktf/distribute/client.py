"""A worker's side of the parameter servers: gradients out, weights in, with all servers at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import numpy as np

from sparktf.distribute import pair
from sparktf.distribute.pair import Hello, Messages, Part
from sparktf.distribute.shards import Array, Slice, check_shards, plan_shards, slice_shape
from sparktf.distribute.slots import Values, joined, pack, sliced, unpack
from sparktf.errors import PeerLostError, SparktfError, TransportTimeoutError
from sparktf.transport import Communicator


class ParameterClient:
    """One worker's handle on all parameter servers. Used by one thread; has one of its own for every server.

    A push is one message to each server, which answers it with its newest weights. Where staleness allows, the worker
    computes on meanwhile: `push` only begins, and `pull` waits for the answer to the push before.

    Parameters
    ----------
    communicators : sequence of Communicator
        One with each server; they belong to the client from now on.
    worker : int
        This worker's number; the chief is 0.
    max_staleness : int or None
        As for `sparktf.distribute.gate.Gate`; the same on all workers, as the next is.
    compression : {"none", "bf16"}
        Of gradients of single precision.
    alive : callable, optional
        Called every second or so while this worker is made to wait, by any thread.

    Attributes
    ----------
    communicators : list of Communicator
    overlaps : bool
        A push may be under way while the worker computes the next.
    version : int
        Of the weights that came last, at the first server.
    stopping : bool
        A worker has asked all to stop.
    waited_seconds : float
        For which the worker waited for answers.
    failure : SparktfError or None
        What ended it, which TensorFlow repeats only as text.
    """

    def __init__(
        self,
        communicators: Sequence[Communicator],
        worker: int,
        max_staleness: int | None = None,
        compression: str = "none",
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.communicators = list(communicators)
        self._alive = alive
        self._requests = [pair.request() for _ in self.communicators]
        self._answers = [pair.answer() for _ in self.communicators]
        self._worker = worker
        self._max_staleness = max_staleness
        self._compression = compression
        self._slices: list[list[Slice]] = []
        self._messages: list[Messages] = []
        self._threads = ThreadPoolExecutor(len(self.communicators), thread_name_prefix="sparktf-push")
        self._under_way: list[Future[None]] = []
        self.overlaps = max_staleness != 0
        self.version = 0
        self.stopping = False
        self.waited_seconds = 0.0
        self.failure: SparktfError | None = None

    def start(
        self,
        variables: Sequence[Part],
        weights: Sequence[Array],
        optimizer: str,
        split: bool,
        state: Values | None = None,
    ) -> None:
        """Tell the servers what there is; the chief's weights become everyone's. Then `weights` has them.

        Parameters
        ----------
        variables : sequence of Part
            The trainable variables, whole.
        weights : sequence of ndarray
            Their values; only the chief's count.
        optimizer : str
            The name of its class.
        split : bool
            Whether large variables may be split.
        state : dict of Slot to ndarray, optional
            The optimizer's, whole, where it goes on; only the chief's counts.

        Raises
        ------
        ParamError
            There are more servers than parts to spread.
        PeerLostError
            A server is lost, or refuses what this worker wants.
        """
        shapes, itemsizes = [v.shape for v in variables], [np.dtype(v.dtype).itemsize for v in variables]
        self._slices = plan_shards(shapes, itemsizes, len(self.communicators), split)
        check_shards(self._slices)
        hellos = [
            Hello(
                optimizer, tuple(_part(variables[s.variable], s) for s in shard), self._max_staleness, self._compression
            )
            for shard in self._slices
        ]
        made: dict[int, Messages] = {}

        def greet(server: int) -> None:
            communicator = self.communicators[server]
            communicator.send(pair.SERVER, pair.request(pair.HELLO))
            hellos[server].send(communicator)
            made[server] = Messages(communicator, hellos[server])
            if self._worker == 0:
                for view, piece in zip(made[server].weight_views, self._slices[server], strict=True):
                    np.copyto(view, _rows(weights[piece.variable], piece))
                communicator.send(pair.SERVER, made[server].weights)
                parts = pack(sliced(state, self._slices[server])) if state else b""
                pair.send_bytes(communicator, pair.SERVER, parts)
            self._receive(server, made[server])

        self._begin(greet)
        self._wait()
        self._messages = [made[server] for server in range(len(made))]

    @property
    def weights(self) -> list[list[Array]]:
        """Each variable's rows, from first to last, where they were received: valid until the next push."""
        count = 1 + max(piece.variable for shard in self._slices for piece in shard)
        found: list[dict[int, Array]] = [{} for _ in range(count)]
        for shard, messages in zip(self._slices, self._messages, strict=True):
            for piece, view in zip(shard, messages.weight_views, strict=True):
                found[piece.variable][piece.start] = view
        return [[parts[start] for start in sorted(parts)] for parts in found]

    def push(self, gradients: Sequence[Array], learning_rate: float, rows: float = 1, stop: bool = False) -> None:
        """Begin to send gradients to all servers.

        Parameters
        ----------
        gradients : sequence of ndarray
            One a variable; free again when this returns.
        learning_rate : float
            That of the lowest worker that is still there counts; NaN where the optimizer has a schedule.
        rows : float
            What the gradients count for where a server takes the mean of several workers' (``max_staleness=0``); with
            0 they count for nothing.
        stop : bool
            This worker wants all to stop: `stopping` becomes true for each with its next answer.
        """
        self._wait()
        for shard, messages, request in zip(self._slices, self._messages, self._requests, strict=True):
            for piece, view in zip(shard, messages.gradient_views, strict=True):
                np.copyto(view, _rows(gradients[piece.variable], piece), casting="same_kind")
            request[:] = pair.PUSH, learning_rate, rows, stop
        self._begin(self._push)

    def pull(self) -> list[list[Array]]:
        """Wait for the answers to the last push; return `weights`."""
        self._wait()
        return self.weights

    def finish(self) -> list[list[Array]]:
        """Wait until all workers have come to the end of their training for now; return the `weights` of the end.

        They are the same on all workers.
        """
        self._wait()
        self._begin(self._finish)
        return self.pull()

    def meet(self, brought: bytes) -> bytes:
        """Meet all workers that are not lost, at the first server.

        Parameters
        ----------
        brought : bytes

        Returns
        -------
        bytes
            What each brought, for `sparktf.distribute.meeting.unpack_brought`.
        """
        self._wait()
        found: list[bytes] = []

        def talk(server: int) -> None:
            communicator = self.communicators[server]
            communicator.send(pair.SERVER, pair.request(pair.MEET))
            pair.send_bytes(communicator, pair.SERVER, brought)
            self._await(server)
            found.append(pair.receive_bytes(communicator, pair.SERVER))

        self._begin(talk, servers=1)
        self._wait()
        return found[0]

    def state(self) -> Values:
        """Return the optimizer's state, whole; nothing where it cannot be told by variable."""
        self._wait()
        found: dict[int, Values] = {}

        def talk(server: int) -> None:
            communicator = self.communicators[server]
            communicator.send(pair.SERVER, pair.request(pair.STATE))
            self._await(server)
            found[server] = unpack(pair.receive_bytes(communicator, pair.SERVER))

        self._begin(talk)
        self._wait()
        return joined([(shard, found[server]) for server, shard in enumerate(self._slices)])

    def _push(self, server: int) -> None:
        communicator, messages = self.communicators[server], self._messages[server]
        communicator.send(pair.SERVER, self._requests[server])
        communicator.send(pair.SERVER, messages.gradients)
        self._receive(server, messages)

    def _finish(self, server: int) -> None:
        self.communicators[server].send(pair.SERVER, pair.request(pair.FINISH))
        self._receive(server, self._messages[server])

    def _receive(self, server: int, messages: Messages) -> None:
        """Receive the weights."""
        self._await(server)
        self.communicators[server].recv(pair.SERVER, messages.weights)

    def _await(self, server: int) -> None:
        """Wait for an answer, however long the server says that it is not time yet."""
        answer = self._answers[server]
        while int(self.communicators[server].recv(pair.SERVER, answer)[pair.KIND]) == pair.WAIT:
            self._alive()

    def _begin(self, talk: Callable[[int], None], servers: int | None = None) -> None:
        def run(server: int) -> None:
            with naming_server(server):
                talk(server)

        self._under_way = [self._threads.submit(run, server) for server in range(servers or len(self.communicators))]

    def _wait(self) -> None:
        began = time.monotonic()
        try:
            # A server that is lost is heard of at once, however long another one says that it is not time yet.
            for future in wait(self._under_way, return_when=FIRST_EXCEPTION).done:
                future.result()
        except SparktfError as error:
            self.failure = error
            raise
        finally:
            self.waited_seconds += time.monotonic() - began
        if self._answers[0][pair.KIND] == pair.WEIGHTS:
            self.version = int(self._answers[0][pair.VERSION])
            self.stopping = self.stopping or bool(self._answers[0][pair.STOPPING])

    def close(self) -> None:
        """Leave the servers in good order. May be called twice."""
        with suppress(SparktfError):
            self._wait()
        for communicator in self.communicators:
            # A server that is lost must not keep the others from hearing of it.
            with suppress(SparktfError):
                communicator.send(pair.SERVER, pair.request(pair.LEAVE))
        self._threads.shutdown()
        for communicator in self.communicators:
            communicator.close()

    def abort(self, reason: str) -> None:
        """Leave at once; the other workers go on."""
        for communicator in self.communicators:
            communicator.abort(reason)
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort(f"{type(error).__name__}: {error}")


@contextmanager
def naming_server(server: int) -> Iterator[None]:
    """Say which server an error is about: in a pair everyone is rank 0 or 1."""
    try:
        yield
    except PeerLostError as error:
        raise PeerLostError(f"parameter server {server}: {error.reason or error}", None, error.reason) from error
    except TransportTimeoutError as error:
        raise TransportTimeoutError(f"parameter server {server}: {error}") from error


def _part(variable: Part, piece: Slice) -> Part:
    return Part(variable.path, slice_shape(variable.shape, piece), variable.dtype)


def _rows(array: Array, piece: Slice) -> Any:
    return array[piece.start : piece.stop] if array.ndim else array
