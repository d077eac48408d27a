"""A worker's side of the parameter servers: gradients out, weights in, with all servers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from sparktf.distribute import pair
from sparktf.distribute.in_flight import InFlight
from sparktf.distribute.pair import Hello, Messages, Part
from sparktf.distribute.shards import Array, Slice, check_shards, plan_shards, slice_shape
from sparktf.distribute.slots import Values, joined, pack, sliced, unpack
from sparktf.errors import ParamError, SparktfError
from sparktf.transport import Communicator


class ParameterClient:
    """One worker's handle on all parameter servers. Used by one thread; has some of its own for every server.

    A push is one message to each server, which answers it with its newest weights. Where staleness allows, the worker
    computes on meanwhile: `push` only begins, and `pull` takes what has come. So many pushes may be under way as there
    are lanes to each server; they take turns.

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
    worker : int
    communicators : list of Communicator
        With each server: the first lanes.
    overlaps : bool
        A push may be under way while the worker computes the next.
    version : int
        Of the weights that came last, at the first server.
    stopping : bool
        A worker has asked all to stop.
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
        self._lanes = {(0, server): communicator for server, communicator in enumerate(self.communicators)}
        self._alive = alive
        self.worker = worker
        self._max_staleness = max_staleness
        self._compression = compression
        self._slices: list[list[Slice]] = []
        # By lane and server; `start` adds those of further lanes.
        self._requests: list[list[Array]] = []
        self._answers: list[list[Array]] = []
        self._messages: dict[tuple[int, int], Messages] = {}
        self._in_flight = InFlight(pair.MOST_LANES * len(self.communicators))
        self._add_lane()
        self._next_lane = 0
        self._newest_lane = 0
        self.overlaps = max_staleness != 0
        self.version = 0
        self.stopping = False

    def _add_lane(self) -> None:
        self._requests.append([pair.request() for _ in self.communicators])
        self._answers.append([pair.answer() for _ in self.communicators])

    @property
    def lanes(self) -> list[Communicator]:
        """All communicators with all servers; those beside the first are there from `start` on."""
        return [self._lanes[key] for key in sorted(self._lanes)]

    @property
    def waited_seconds(self) -> float:
        """Seconds for which the worker waited for answers."""
        return self._in_flight.waited_seconds

    @property
    def failure(self) -> SparktfError | None:
        """What ended it, which TensorFlow repeats only as text."""
        return self._in_flight.failure

    def start(
        self,
        variables: Sequence[Part],
        weights: Sequence[Array],
        optimizer: str,
        split: bool,
        state: Values | None = None,
        tables: int = 0,
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
        tables : int
            How many the servers hold beside: then some may be left without variables.

        Raises
        ------
        ParamError
            There are more servers than parts to spread, or it is the second call.
        PeerLostError
            A server is lost, or refuses what this worker wants.
        """
        if self._messages:
            raise ParamError("Expected start to be called once for a ParameterClient, received a second call.")
        shapes, itemsizes = [v.shape for v in variables], [np.dtype(v.dtype).itemsize for v in variables]
        self._slices = plan_shards(shapes, itemsizes, len(self.communicators), split)
        if not tables:
            check_shards(self._slices)
        hellos = self._greetings(variables, optimizer, tables)

        def greet(server: int) -> None:
            communicator = self.communicators[server]
            communicator.send(pair.SERVER, pair.request(pair.HELLO))
            hellos[server].send(communicator)
            self._allocate(server, hellos[server])
            messages = self._messages[0, server]
            if self.worker == 0:
                for view, piece in zip(messages.weight_views, self._slices[server], strict=True):
                    np.copyto(view, _rows(weights[piece.variable], piece))
                communicator.send(pair.SERVER, messages.weights)
                parts = pack(sliced(state, self._slices[server])) if state else b""
                pair.send_bytes(communicator, pair.SERVER, parts)
            self._receive(0, server)

        self._talk(greet, brings_weights=True)

    def _greetings(self, variables: Sequence[Part], optimizer: str, tables: int) -> list[Hello]:
        """Decide how many lanes there are to be, and return what each server is told."""
        shards = [tuple(_part(variables[piece.variable], piece) for piece in shard) for shard in self._slices]
        hellos = [Hello(optimizer, parts, self._max_staleness, self._compression, tables) for parts in shards]
        lanes = pair.lanes_for(self._max_staleness, max(hello.gradients.nbytes for hello in hellos))
        while len(self._answers) < lanes:
            self._add_lane()
        return [replace(hello, lanes=lanes) for hello in hellos]

    def _allocate(self, server: int, hello: Hello) -> None:
        """Open the further lanes to a server, and allocate the messages of all, as it does at the same time."""
        first = self.communicators[server]
        self._messages[0, server] = Messages(first, hello)
        for lane in range(1, hello.lanes):
            communicator = self._lanes[lane, server] = pair.connect_again(first, first.timeout)
            self._messages[lane, server] = Messages(communicator, hello)

    @property
    def weights(self) -> list[list[Array]]:
        """Each variable's rows, from first to last, where they were received: valid until the next push."""
        count = 1 + max((piece.variable for shard in self._slices for piece in shard), default=-1)
        found: list[dict[int, Array]] = [{} for _ in range(count)]
        for server, shard in enumerate(self._slices):
            for piece, view in zip(shard, self._messages[self._newest_lane, server].weight_views, strict=True):
                found[piece.variable][piece.start] = view
        return [[parts[start] for start in sorted(parts)] for parts in found]

    def push(self, gradients: Sequence[Array], learning_rate: float, rows: float = 1, stop: bool = False) -> None:
        """Begin to send gradients to all servers, once the oldest push has its answer where all lanes are taken.

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
            This worker wants all to stop: `stopping` becomes true for each with its next answer from then on.
        """
        lane = self._next_lane
        self._in_flight.settle(len(self._answers) - 1)
        for server, shard in enumerate(self._slices):
            for piece, view in zip(shard, self._messages[lane, server].gradient_views, strict=True):
                np.copyto(view, _rows(gradients[piece.variable], piece), casting="same_kind")
            self._requests[lane][server][:] = pair.PUSH, learning_rate, rows, stop
        self._next_lane = (lane + 1) % len(self._answers)
        self._in_flight.begin(partial(self._push, lane), len(self.communicators), partial(self._note_answer, lane))

    def pull(self) -> list[list[Array]]:
        """Take the answers that have come, and wait until another push could begin; return `weights`."""
        self._in_flight.settle(len(self._answers) - 1)
        return self.weights

    def finish(self) -> list[list[Array]]:
        """Wait until all workers have come to the end of their training for now; return the `weights` of the end.

        They are the same on all workers.
        """
        self._talk(self._finish, brings_weights=True)
        return self.weights

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
        found: list[bytes] = []

        def talk(server: int) -> None:
            communicator = self.communicators[server]
            communicator.send(pair.SERVER, pair.request(pair.MEET))
            pair.send_bytes(communicator, pair.SERVER, brought)
            self._await(0, server)
            found.append(pair.receive_bytes(communicator, pair.SERVER))

        self._talk(talk, servers=1)
        return found[0]

    def state(self) -> Values:
        """Return the optimizer's state, whole; nothing where it cannot be told by variable."""
        found: dict[int, Values] = {}

        def talk(server: int) -> None:
            communicator = self.communicators[server]
            communicator.send(pair.SERVER, pair.request(pair.STATE))
            self._await(0, server)
            found[server] = unpack(pair.receive_bytes(communicator, pair.SERVER))

        self._talk(talk)
        return joined([(shard, found[server]) for server, shard in enumerate(self._slices)])

    def _push(self, lane: int, server: int) -> None:
        communicator = self._lanes[lane, server]
        communicator.send(pair.SERVER, self._requests[lane][server])
        communicator.send(pair.SERVER, self._messages[lane, server].gradients)
        self._receive(lane, server)

    def _finish(self, server: int) -> None:
        self.communicators[server].send(pair.SERVER, pair.request(pair.FINISH))
        self._receive(0, server)

    def _receive(self, lane: int, server: int) -> None:
        """Receive the weights."""
        self._await(lane, server)
        self._lanes[lane, server].recv(pair.SERVER, self._messages[lane, server].weights)

    def _await(self, lane: int, server: int) -> None:
        """Wait for an answer, however long the server says that it is not time yet."""
        communicator, answer = self._lanes[lane, server], self._answers[lane][server]
        while int(communicator.recv(pair.SERVER, answer)[pair.KIND]) == pair.WAIT:
            self._alive()

    def _talk(self, talk: Callable[[int], None], servers: int | None = None, brings_weights: bool = False) -> None:
        """Say something over the first lanes once all pushes are answered, and wait for the answers."""
        self._in_flight.settle(0)
        done = partial(self._note_answer, 0) if brings_weights else lambda: None
        self._in_flight.begin(talk, servers or len(self.communicators), done)
        self._in_flight.settle(0)
        if brings_weights:
            # Not the first: the answer to the next push must not come where these weights may still be read.
            self._next_lane = 1 % len(self._answers)

    def _note_answer(self, lane: int) -> None:
        self._newest_lane = lane
        # Lanes may overtake each other on their way.
        self.version = max(self.version, int(self._answers[lane][0][pair.VERSION]))
        self.stopping = self.stopping or bool(self._answers[lane][0][pair.STOPPING])

    def close(self) -> None:
        """Leave the servers in good order. May be called twice."""
        with suppress(SparktfError):
            self._in_flight.settle(0)
        # The first lanes last: with them a worker is gone.
        for communicator in reversed(self.lanes):
            # A server that is lost must not keep the others from hearing of it.
            with suppress(SparktfError):
                communicator.send(pair.SERVER, pair.request(pair.LEAVE))
        self._in_flight.close()
        for communicator in self.lanes:
            communicator.close()

    def abort(self, reason: str) -> None:
        """Leave at once; the other workers go on."""
        for communicator in self.lanes:
            communicator.abort(reason)
        self._in_flight.close()
        # One may have been opened meanwhile.
        for communicator in self.lanes:
            communicator.abort(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort(f"{type(error).__name__}: {error}")


def _part(variable: Part, piece: Slice) -> Part:
    return Part(variable.path, slice_shape(variable.shape, piece), variable.dtype)


def _rows(array: Array, piece: Slice) -> Any:
    return array[piece.start : piece.stop] if array.ndim else array
