"""A parameter server's end of a connection with a worker."""

from __future__ import annotations

from collections.abc import Callable

from sparktf.distribute import pair
from sparktf.distribute.gate import Push
from sparktf.distribute.pair import Hello, Messages
from sparktf.distribute.shards import Array
from sparktf.errors import PeerLostError, TransportError
from sparktf.transport import Communicator

# How often a worker that waits is told that its server is alive: well below any sensible timeout.
WAIT_SECONDS = 1.0


class Lane:
    """A connection with a worker and its messages: a worker's first is for all that is said, others are for pushes.

    Parameters
    ----------
    worker : int
    number : int
        Of the worker's lanes, from 0.
    communicator : Communicator

    Attributes
    ----------
    push : Push
        What a push over it is to the gate.
    """

    def __init__(self, worker: int, number: int, communicator: Communicator) -> None:
        self.worker = worker
        self.push: Push = (worker, number)
        self.communicator = communicator
        self._request = pair.request()
        self._answer = pair.answer()
        self._messages: Messages | None = None

    @property
    def first(self) -> bool:
        """Whether it is the worker's first."""
        return self.push[1] == 0

    def allocate(self, hello: Hello) -> Messages:
        """Allocate its messages, as the worker does at the same time."""
        self._messages = Messages(self.communicator, hello)
        return self._messages

    def connect_again(self) -> Communicator:
        """Connect with the worker once more, as it does at the same time.

        Raises
        ------
        PeerLostError
            However it ended: the other workers go on.
        """
        try:
            return pair.connect_again(self.communicator, self.communicator.timeout)
        except TransportError as error:
            raise PeerLostError(f"opening a further connection: {error}", pair.WORKER, str(error)) from error

    def receive_request(self) -> Array:
        """Wait for what the worker says next."""
        return self.communicator.recv(pair.WORKER, self._request)

    def receive_gradients(self) -> None:
        """Receive what a push brings."""
        self.communicator.recv(pair.WORKER, self._allocated.gradients)

    def await_(self, reached: Callable[[float], bool]) -> None:
        """Wait for something, and let the worker know that it is waited for.

        Parameters
        ----------
        reached : callable
            Waits for as many seconds as it is given; returns whether it came.
        """
        while not reached(WAIT_SECONDS):
            self.communicator.send(pair.WORKER, pair.answer(pair.WAIT))

    def send_weights(self, version: int, stopping: bool) -> None:
        """Answer with the weights that lie in the messages.

        Parameters
        ----------
        version : int
            Theirs.
        stopping : bool
            A worker wants all to stop.
        """
        self._answer[:] = pair.WEIGHTS, version, stopping
        self.communicator.send(pair.WORKER, self._answer)
        self.communicator.send(pair.WORKER, self._allocated.weights)

    def send_bytes(self, data: bytes) -> None:
        """Answer with bytes."""
        self.communicator.send(pair.WORKER, pair.answer(pair.BYTES))
        pair.send_bytes(self.communicator, pair.WORKER, data)

    @property
    def _allocated(self) -> Messages:
        # There from the worker's greeting on, before which it neither pushes nor asks for weights.
        assert self._messages is not None
        return self._messages
