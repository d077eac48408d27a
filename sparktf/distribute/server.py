"""A parameter server: a thread for every lane of every worker, one optimizer for all."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sparktf.distribute import pair
from sparktf.distribute.gate import Gate, Push
from sparktf.distribute.lane import WAIT_SECONDS, Lane
from sparktf.distribute.meeting import Meetings, pack_brought
from sparktf.distribute.pair import Hello, Messages
from sparktf.distribute.rates import Rates
from sparktf.distribute.served import ServedVariables, check_optimizer
from sparktf.distribute.shards import Array
from sparktf.distribute.table_programs import ToldTables
from sparktf.errors import HandshakeError, PeerLostError, TransportTimeoutError
from sparktf.transport import Communicator

_LOG = logging.getLogger("sparktf.distribute")

# For threads to end once training has failed: what they wait for has been woken.
_END_SECONDS = 5.0


@dataclass(frozen=True)
class ServerReport:
    """What a parameter server has done.

    Attributes
    ----------
    updates : int
        Applied to its variables.
    pushes : tuple of int
        Each worker's.
    lead : int
        The most updates that any worker was ahead of the slowest.
    lost : tuple of int
        Workers that were gone without a word.
    rows : tuple of float
        What each worker's pushes stand for, added up: rows of data in `TFEstimator`, pushes elsewhere.
    """

    updates: int
    pushes: tuple[int, ...]
    lead: int
    lost: tuple[int, ...]
    rows: tuple[float, ...] = ()


class ParameterServer:
    """Serves a model's variables, or a part of them, until all workers have left.

    Parameters
    ----------
    communicators : sequence of Communicator
        One with each worker, the chief's first; they belong to the server from now on. Their timeout is how long a
        worker may compute between two pushes: a dead one is heard of at once.
    optimizer : keras.optimizers.Optimizer
        Not built yet, of the same class as the workers'.
    timeout : float
        Seconds for which nobody need push while somebody waits for it.

    Raises
    ------
    ParamError
        The optimizer cannot live on servers.
    """

    def __init__(self, communicators: Sequence[Communicator], optimizer: Any, timeout: float) -> None:
        check_optimizer(optimizer)
        # By worker, the first first.
        self._lanes = [[Lane(worker, 0, communicator)] for worker, communicator in enumerate(communicators)]
        self._optimizer = optimizer
        self._timeout = timeout
        workers = len(self._lanes)
        self._messages: dict[Push, Messages] = {}
        self._threads: list[threading.Thread] = []
        self._rows = [0.0] * workers
        self._end_versions = [0] * workers
        self._stopping = False
        self._hello: Hello | None = None
        self._served: ServedVariables | None = None
        self._gate: Gate | None = None
        self._rates = Rates(workers, lambda rate: self._variables.set_learning_rate(rate))
        self._meetings = Meetings(workers, timeout, self._idle_seconds)
        self._tables = ToldTables(workers, timeout)
        self._ready = threading.Event()
        self._state = threading.Lock()
        self._lost: list[int] = []
        # Gone before training began, lost or not.
        self._left_early: set[int] = set()
        self._chief_came = threading.Event()
        self._failure: BaseException | None = None
        self._failed_at: float | None = None

    def serve(self, alive: Callable[[], None] = lambda: None) -> ServerReport:
        """Serve until all workers have left or are lost.

        Parameters
        ----------
        alive : callable
            Called every second.

        Raises
        ------
        HandshakeError
            Workers do not want the same, or the chief does not train and others do.
        PeerLostError
            The chief was lost before it had told its weights.
        TransportTimeoutError
            Workers waited for one that has sent nothing for the timeout, or for the chief's first weights.
        """
        for lanes in self._lanes:
            self._start(lanes[0])
        # Others may come as long as the first of a worker is there.
        for thread in self._threads:
            # Where training has failed, one may still try to connect with a worker that does not answer.
            while thread.is_alive() and not self._failed_for(_END_SECONDS):
                thread.join(WAIT_SECONDS)
                alive()
        if self._failure is not None:
            raise self._failure
        self._tables.join()
        updates = 0 if self._served is None else self._served.updates
        pushes = tuple(self._gate.pushes) if self._gate is not None else (0,) * len(self._lanes)
        lead = 0 if self._gate is None else self._gate.lead
        return ServerReport(updates, pushes, lead, tuple(sorted(self._lost)), tuple(self._rows))

    def _failed_for(self, seconds: float) -> bool:
        return self._failed_at is not None and time.monotonic() - self._failed_at > seconds

    def _start(self, lane: Lane) -> None:
        name = f"sparktf-serve-{lane.worker}" + (f"-{lane.push[1]}" if lane.push[1] else "")
        thread = threading.Thread(target=self._attend, args=(lane,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _attend(self, lane: Lane) -> None:
        """Serve one worker's lane; the function of its thread."""
        try:
            while self._answer(lane):
                pass
            lane.communicator.close()
        except PeerLostError as error:
            if lane.first:
                self._lose(lane.worker, error)
            else:
                # The thread of the first lane is told, which may be about to answer the worker.
                self._lanes[lane.worker][0].communicator.abort(error.reason or str(error))
        except BaseException as error:  # raised again by serve()
            self._fail(error)

    def _answer(self, lane: Lane) -> bool:
        """Take one request; return whether more can come."""
        request = lane.receive_request()
        kind = int(request[pair.KIND])
        if kind == pair.LEAVE:
            # A worker's first lane is the last that it leaves.
            if lane.first:
                self._leave(lane.worker)
            return False
        if kind == pair.HELLO:
            self._greet(lane)
        elif kind == pair.PUSH:
            self._take_push(lane, request)
        elif kind == pair.FINISH:
            self._tables.rest(lane.worker)
            end = self._training.finish(lane.worker)
            lane.await_(lambda seconds: self._training.finished(end, seconds))
            # Others may have begun anew.
            lane.send_weights(self._end_versions[lane.worker], self._stopping)
        elif kind == pair.MEET:
            self._hold_meeting(lane)
        elif kind == pair.TABLES:
            self._tables.hear(lane)
        else:
            lane.send_bytes(self._variables.state())
        return True

    def _greet(self, lane: Lane) -> None:
        communicator = lane.communicator
        hello = Hello.receive(communicator)
        self._check(lane.worker, hello)
        messages = self._messages[lane.push] = lane.allocate(hello)
        self._open_lanes(lane, hello)
        if lane.worker == 0:
            communicator.recv(pair.WORKER, messages.weights)
            state = pair.receive_bytes(communicator, pair.WORKER)
            # What is made of it may take TensorFlow a while.
            self._chief_came.set()
            self._begin(hello, messages, state)
        began = time.monotonic()
        lane.await_(lambda seconds: self._begun(began, seconds))
        self._send_weights(lane)

    def _open_lanes(self, first: Lane, hello: Hello) -> None:
        """Connect a worker's further lanes, as its client does at the same time."""
        for number in range(1, hello.lanes):
            lane = Lane(first.worker, number, first.connect_again())
            self._lanes[first.worker].append(lane)
            self._messages[lane.push] = lane.allocate(hello)
            self._start(lane)

    def _begun(self, since: float, seconds: float) -> bool:
        """Wait until the chief has told its weights; return whether it has."""
        if self._ready.wait(seconds):
            return True
        if 0 in self._left_early:
            raise HandshakeError(
                "Expected worker 0, the chief, to train as the others do, whose first weights are its own; it has left "
                "without. Let all workers train, or none."
            )
        waited = time.monotonic() - since
        if waited > self._timeout and not self._chief_came.is_set():
            raise TransportTimeoutError(
                f"Expected the weights of worker 0, the chief, within {self._timeout:g} s (timeout); others have "
                f"waited for {waited:.0f} s to begin. Raise timeout where its callbacks take so long to begin."
            )
        return False

    def _take_push(self, lane: Lane, request: Array) -> None:
        lane.receive_gradients()
        rows = float(request[pair.ROWS])
        self._rates.tell(lane.worker, float(request[pair.RATE]))
        if request[pair.STOP]:
            # Only ever set: what another worker's thread has set meanwhile must not be lost.
            self._stopping = True
        with self._state:
            self._rows[lane.worker] += rows
        self._variables.rows[lane.push] = rows
        self._training.push(lane.push)
        lane.await_(lambda seconds: self._training.passed(lane.push, seconds))
        self._send_weights(lane)

    def _hold_meeting(self, lane: Lane) -> None:
        number = self._meetings.come(lane.worker, pair.receive_bytes(lane.communicator, pair.WORKER))
        lane.await_(lambda seconds: self._meetings.passed(number, seconds))
        lane.send_bytes(pack_brought(self._meetings.result(number, lane.worker)))

    @property
    def _variables(self) -> ServedVariables:
        # There from the first greeting on, before which no worker asks for more.
        assert self._served is not None
        return self._served

    @property
    def _training(self) -> Gate:
        assert self._gate is not None
        return self._gate

    def _idle_seconds(self) -> float:
        return self._gate.idle_seconds() if self._gate is not None else math.inf

    def _check(self, worker: int, hello: Hello) -> None:
        with self._state:
            first = self._hello = self._hello or hello
        mine = type(self._optimizer).__name__
        if hello.optimizer != mine:
            raise HandshakeError(
                f"Expected the same optimizer on workers and servers, received {hello.optimizer} on worker {worker} "
                f"and {mine} on this server."
            )
        if difference := first.difference(hello):
            raise HandshakeError(
                f"Expected the same model and arguments on every worker, received {difference} (the latter from worker "
                f"{worker})."
            )

    def _begin(self, hello: Hello, messages: Messages, state: bytes) -> None:
        self._served = ServedVariables(self._optimizer, hello, self._messages)
        self._served.assign(messages.weight_views)
        if state:
            self._served.set_state(state)
        workers = len(self._lanes)
        self._gate = Gate(
            workers, hello.max_staleness, self._served.apply, self._timeout, self._copy_at_end, hello.lanes
        )
        with self._state:
            for worker in self._left_early:
                self._gate.leave(worker)
            self._ready.set()

    def _copy_at_end(self, finished: Sequence[int]) -> None:
        """Keep the weights of the end for all that have finished, in their messages: all get the same."""
        self._tables.resume(finished)
        for worker in finished:
            self._end_versions[worker] = self._variables.copy_to(self._lanes[worker][0].push)

    def _send_weights(self, lane: Lane) -> None:
        lane.send_weights(self._variables.copy_to(lane.push), self._stopping)

    def _leave(self, worker: int) -> None:
        # First, as its leaving may complete a round of pushes.
        self._rates.leave(worker)
        self._meetings.leave(worker)
        self._tables.leave(worker)
        with self._state:
            ready = self._ready.is_set()
            if not ready:
                self._left_early.add(worker)
        if ready and self._training.leave(worker):
            # A push is kept only where workers have a single lane.
            with self._state:
                self._rows[worker] -= self._variables.rows[worker, 0]

    def _lose(self, worker: int, error: PeerLostError) -> None:
        _LOG.warning("worker %d is lost: %s", worker, error.reason or error)
        for lane in self._lanes[worker]:
            lane.communicator.abort(str(error))
        with self._state:
            self._lost.append(worker)
            ready = self._ready.is_set()
        try:
            if not ready and worker == 0:
                raise PeerLostError(f"the chief, before training began: {error.reason or error}", 0, error.reason)
            self._leave(worker)
        except BaseException as failure:  # leaving may complete a round of pushes, and applying it may fail
            self._fail(failure)

    def _fail(self, error: BaseException) -> None:
        with self._state:
            self._failure = self._failure or error
            self._failed_at = self._failed_at or time.monotonic()
        # Every time: a lane may just have been opened.
        for lane in [lane for lanes in self._lanes for lane in lanes]:
            lane.communicator.abort(f"{type(error).__name__}: {error}")
        self._tables.abort(f"{type(error).__name__}: {error}")


def serve(
    communicators: Sequence[Communicator], optimizer: Any, timeout: float, alive: Callable[[], None] = lambda: None
) -> ServerReport:
    """Serve until all workers have left; then, or where something fails, close the communicators.

    Arguments, result and errors are those of `ParameterServer` and its `serve`.
    """
    with ExitStack() as stack:
        for communicator in communicators:
            stack.enter_context(communicator)
        return ParameterServer(communicators, optimizer, timeout).serve(alive)
