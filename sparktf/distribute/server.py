"""A parameter server: a thread for every worker, one optimizer for all."""

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
from sparktf.distribute.gate import Gate
from sparktf.distribute.meeting import Meetings, pack_brought
from sparktf.distribute.pair import Hello, Messages
from sparktf.distribute.rates import Rates
from sparktf.distribute.served import ServedVariables, check_optimizer
from sparktf.distribute.shards import Array
from sparktf.errors import HandshakeError, PeerLostError, TransportTimeoutError
from sparktf.transport import Communicator

_LOG = logging.getLogger("sparktf.distribute")

# How often a worker that waits is told that its server is alive: well below any sensible timeout.
_WAIT_SECONDS = 1.0


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
        self._communicators = list(communicators)
        self._optimizer = optimizer
        self._timeout = timeout
        workers = len(self._communicators)
        self._messages: dict[int, Messages] = {}
        self._requests = [pair.request() for _ in range(workers)]
        self._answers = [pair.answer() for _ in range(workers)]
        self._rows = [0.0] * workers
        self._end_versions = [0] * workers
        self._stopping = False
        self._hello: Hello | None = None
        self._served: ServedVariables | None = None
        self._gate: Gate | None = None
        self._rates = Rates(workers, lambda rate: self._variables.set_learning_rate(rate))
        self._meetings = Meetings(workers, timeout, self._idle_seconds)
        self._ready = threading.Event()
        self._state = threading.Lock()
        self._lost: list[int] = []
        # Gone before training began, lost or not.
        self._left_early: set[int] = set()
        self._chief_came = threading.Event()
        self._failure: BaseException | None = None

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
        threads = [
            threading.Thread(target=self._attend, args=(worker,), name=f"sparktf-serve-{worker}", daemon=True)
            for worker in range(len(self._communicators))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_WAIT_SECONDS)
                alive()
        if self._failure is not None:
            raise self._failure
        updates = 0 if self._served is None else self._served.updates
        pushes = tuple(self._gate.pushes) if self._gate is not None else (0,) * len(threads)
        lead = 0 if self._gate is None else self._gate.lead
        return ServerReport(updates, pushes, lead, tuple(sorted(self._lost)), tuple(self._rows))

    def _attend(self, worker: int) -> None:
        """Serve one worker; the function of its thread."""
        communicator = self._communicators[worker]
        try:
            while self._answer(worker, communicator):
                pass
            communicator.close()
        except PeerLostError as error:
            self._lose(worker, error)
        except BaseException as error:  # raised again by serve()
            self._fail(error)

    def _answer(self, worker: int, communicator: Communicator) -> bool:
        """Take one request; return whether more can come."""
        request = communicator.recv(pair.WORKER, self._requests[worker])
        kind = int(request[pair.KIND])
        if kind == pair.LEAVE:
            self._leave(worker)
            return False
        if kind == pair.HELLO:
            self._greet(worker, communicator)
        elif kind == pair.PUSH:
            self._take_push(worker, communicator, request)
        elif kind == pair.FINISH:
            end = self._training.finish(worker)
            self._await(worker, lambda seconds: self._training.finished(end, seconds))
            # Others may have begun anew.
            self._send_copied(worker, communicator, self._end_versions[worker])
        elif kind == pair.MEET:
            self._hold_meeting(worker, communicator)
        else:
            self._send_bytes(worker, communicator, self._variables.state())
        return True

    def _greet(self, worker: int, communicator: Communicator) -> None:
        hello = Hello.receive(communicator)
        self._check(worker, hello)
        messages = Messages(communicator, hello)
        if worker == 0:
            communicator.recv(pair.WORKER, messages.weights)
            state = pair.receive_bytes(communicator, pair.WORKER)
            # What is made of it may take TensorFlow a while.
            self._chief_came.set()
            self._messages[worker] = messages
            self._begin(hello, messages, state)
        began = time.monotonic()
        self._await(worker, lambda seconds: self._begun(began, seconds))
        self._messages[worker] = messages
        self._send_weights(worker, communicator)

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

    def _take_push(self, worker: int, communicator: Communicator, request: Array) -> None:
        messages = self._messages[worker]
        communicator.recv(pair.WORKER, messages.gradients)
        rows = float(request[pair.ROWS])
        self._rates.tell(worker, float(request[pair.RATE]))
        if request[pair.STOP]:
            # Only ever set: what another worker's thread has set meanwhile must not be lost.
            self._stopping = True
        self._rows[worker] += rows
        self._variables.rows[worker] = rows
        self._training.push(worker)
        self._await(worker, lambda seconds: self._training.passed(worker, seconds))
        self._send_weights(worker, communicator)

    def _hold_meeting(self, worker: int, communicator: Communicator) -> None:
        number = self._meetings.come(worker, pair.receive_bytes(communicator, pair.WORKER))
        self._await(worker, lambda seconds: self._meetings.passed(number, seconds))
        self._send_bytes(worker, communicator, pack_brought(self._meetings.result(number, worker)))

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
        workers = len(self._communicators)
        self._gate = Gate(workers, hello.max_staleness, self._served.apply, self._timeout, self._copy_at_end)
        with self._state:
            for worker in self._left_early:
                self._gate.leave(worker)
            self._ready.set()

    def _await(self, worker: int, reached: Callable[[float], bool]) -> None:
        """Wait for something, and let the worker know that it is waited for."""
        communicator = self._communicators[worker]
        while not reached(_WAIT_SECONDS):
            communicator.send(pair.WORKER, pair.answer(pair.WAIT))

    def _copy_at_end(self, finished: Sequence[int]) -> None:
        """Keep the weights of the end for all that have finished, in their messages: all get the same."""
        for worker in finished:
            self._end_versions[worker] = self._variables.copy_to(worker)

    def _send_weights(self, worker: int, communicator: Communicator) -> None:
        self._send_copied(worker, communicator, self._variables.copy_to(worker))

    def _send_copied(self, worker: int, communicator: Communicator, version: int) -> None:
        answer, messages = self._answers[worker], self._messages[worker]
        answer[:] = pair.WEIGHTS, version, self._stopping
        communicator.send(pair.WORKER, answer)
        communicator.send(pair.WORKER, messages.weights)

    def _send_bytes(self, worker: int, communicator: Communicator, data: bytes) -> None:
        communicator.send(pair.WORKER, pair.answer(pair.BYTES))
        pair.send_bytes(communicator, pair.WORKER, data)

    def _leave(self, worker: int) -> None:
        # First, as its leaving may complete a round of pushes.
        self._rates.leave(worker)
        self._meetings.leave(worker)
        with self._state:
            ready = self._ready.is_set()
            if not ready:
                self._left_early.add(worker)
        if ready and self._training.leave(worker):
            self._rows[worker] -= self._variables.rows[worker]

    def _lose(self, worker: int, error: PeerLostError) -> None:
        _LOG.warning("worker %d is lost: %s", worker, error.reason or error)
        self._communicators[worker].abort(str(error))
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
            first = self._failure is None
            self._failure = self._failure or error
        for communicator in self._communicators if first else ():
            communicator.abort(f"{type(error).__name__}: {error}")


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
