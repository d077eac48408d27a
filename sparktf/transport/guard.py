"""What every protocol with peers shares: one operation at a time, and one failure that ends them all."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sparktf.errors import PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.contract import Communicator
from sparktf.transport.link import Gone, Silent
from sparktf.transport.watch import Watch

# How long to wait, after a data connection has ended, for the control connection to say why.
_WORD_SECONDS = 1.0
# An operation that never stands still may take this many timeouts, and a second more for so many bytes: an eighth of
# what the slowest network of a cluster carries.
LONGEST_TIMEOUTS = 10
SLOWEST_BYTES = 1_000_000


@dataclass(frozen=True)
class _Failure:
    """Why the communicator is dead; every operation from then on raises an error made from it."""

    kind: type[TransportError]
    message: str
    peer: int | None = None
    reason: str = ""
    slow: bool = False

    def error(self, operation: str) -> TransportError:
        message = f"{operation}: {self.message}"
        if issubclass(self.kind, PeerLostError):
            return self.kind(message, self.peer, self.reason)
        return self.kind(message)


class GuardedCommunicator(Communicator):
    """A communicator whose failures are heard of by a `Watch` and shared with all ranks.

    A protocol adds the operations, each within ``with self._operation(name)``, starts `_watch` on its control
    connections, and says how to wake whoever waits (`_wake`) and how to release what it holds (`_free`).

    Parameters
    ----------
    rank, size : int
        This rank, and the world's size, at least 2.
    timeout : float
        Seconds without progress.
    """

    _watch: Watch

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        super().__init__(rank, size)
        self._timeout = timeout
        self._lock = threading.RLock()
        self._failure: _Failure | None = None
        self._failure_lock = threading.Lock()
        self._failed = threading.Event()
        self._released = False
        self._current = "connecting"
        self._deadline: float | None = None

    @abstractmethod
    def _wake(self) -> None:
        """Make every pending transfer raise `Gone`, now; called by any thread, perhaps more than once."""

    @abstractmethod
    def _free(self) -> None:
        """Release threads, connections and buffers; called once, by a thread that is in no operation."""

    def _drain(self) -> None:
        """Wait, before a goodbye, for what would be lost with the links; for protocols of which closing does not."""

    def check(self) -> None:
        """Raise what has ended this communicator; see `Communicator`."""
        failure = self._failure
        if failure is not None:
            raise failure.error("check")

    def close(self) -> None:
        """Say goodbye and release everything; see `Communicator`."""
        with self._lock:
            if not self._released and self._failure is None:
                self._drain()
                if self._leave():
                    self._watch.tell_bye()
            self._release()

    def abort(self, reason: str = "") -> None:
        """Tell everybody, wake everybody, release everything; see `Communicator`."""
        message = f"rank {self.rank} (this one) aborted: {reason or 'no reason given'}"
        self._fail(_Failure(PeerLostError, message, self.rank, reason))
        # The operation that another thread may be in has been woken and lets go of the lock.
        with self._lock:
            self._release()

    def _leave(self) -> bool:
        """Take no loss of a peer for a failure any more; return whether there was none before.

        A peer that hears a goodbye may leave without one of its own, before this rank has done its next step.
        """
        with self._failure_lock:
            fine = self._failure is None
            self._failure = self._failure or _Failure(TransportError, "the communicator is closed. Connect again.")
        return fine

    def _release(self) -> None:
        if self._released:
            return
        self._released = True
        self._wake()
        self._free()

    @contextmanager
    def _operation(self, name: str) -> Iterator[None]:
        """Guard, number and time one operation: whatever goes wrong inside ends the communicator."""
        with self._lock:
            number = self.stats.operations + 1
            current = f"{name} (operation {number})"
            if self._failure is not None:
                failure = self._failure
                self._release()
                raise failure.error(current)
            self.stats.operations = number
            self._current = current
            self._deadline = time.monotonic() + LONGEST_TIMEOUTS * self._timeout
            begin = time.perf_counter()
            try:
                yield
            except (Gone, Silent) as exc:
                failure = self._fail(self._explain(exc))
                self._release()
                waited = f"{current}, waiting for rank {exc.peer}" if failure.slow else current
                raise failure.error(waited) from exc
            except BaseException as exc:
                # A mismatch, an interrupt from the keyboard, no memory: what is under way can't be resumed.
                kind = type(exc) if isinstance(exc, TransportError) else TransportError
                self._fail(_Failure(kind, str(exc), self.rank, f"{current}: {exc!r}"))
                self._release()
                raise
            finally:
                self._deadline = None
                self.stats.seconds += time.perf_counter() - begin
                self._current = f"its own work, after {current}"

    def _allow(self, nbytes: int) -> None:
        """Give the operation under way the time that so many bytes take on a slow network."""
        if self._deadline is not None:
            self._deadline += nbytes / SLOWEST_BYTES

    def _on_tick(self) -> None:
        """End an operation that moves, but takes far too long: a peer may drip bytes without end."""
        deadline, current = self._deadline, self._current
        if deadline is not None and time.monotonic() > deadline:
            message = (
                f"{current} took longer than {LONGEST_TIMEOUTS} times the timeout of {self._timeout} s, and a second "
                f"for every {SLOWEST_BYTES} bytes: it moves, but far too slowly. Is the network what it should be?"
            )
            self._fail(_Failure(TransportTimeoutError, message, slow=True))

    def _explain(self, exc: Gone | Silent) -> _Failure:
        """Turn what a connection met into words, with the rank to blame."""
        if isinstance(exc, Silent):
            return self._explain_silence(exc)
        peer = exc.peer
        deadline = time.monotonic() + _WORD_SECONDS
        while time.monotonic() < deadline and not self._failed.wait(0.01):
            if self._watch.left(peer):
                reason = "it closed its communicator before this operation"
                return _Failure(PeerLostError, f"lost rank {peer}: {reason}", peer, reason)
        return self._failure or _Failure(PeerLostError, f"lost rank {peer}: {exc}", peer)

    def _explain_silence(self, exc: Silent) -> _Failure:
        answers = self._watch.answers()
        # Asked halfway through the timeout; who was asked just now, by another thread, may yet answer.
        dead = sorted(self._watch.silent(self._timeout / 4))
        # Whoever we wait for may itself wait for the one that is really stuck.
        blame = exc.peer if exc.peer in dead or not dead else dead[0]
        if blame in dead or blame not in answers:
            state = "it does not answer at all: its process is stopped, or its machine or network is gone"
        else:
            state = f"it is alive, and busy with {answers[blame]}"
        message = f"no progress for {self._timeout} s, waiting for rank {exc.peer} ({exc}); rank {blame}: {state}"
        return _Failure(TransportTimeoutError, message, blame)

    def _fail(self, failure: _Failure) -> _Failure:
        """Note the first failure, wake whoever waits, tell the others; return the failure that counts."""
        with self._failure_lock:
            first = self._failure is None
            if self._failure is None:
                self._failure = failure
            kept = self._failure
        if first:
            blame = self.rank if failure.peer is None else failure.peer
            self._watch.tell_abort(blame, failure.reason or f"rank {self.rank}: {failure.message}")
            self._failed.set()
            self._wake()
        return kept

    def _on_failure(self, peer: int, reason: str, told: bool) -> None:
        """Hear from the watch that a rank is lost."""
        message = f"rank {peer} failed: {reason or 'no reason given'}" if told else f"lost rank {peer}: {reason}"
        # Passed on even where it was told: a third rank may see this one leave before it hears of the first to fail.
        self._fail(_Failure(PeerLostError, message, peer, reason))

    def _on_left(self, peer: int) -> None:
        """Hear from the watch that a rank has said goodbye; for protocols whose links do not notice by themselves."""

    def _on_send_error(self, exc: Exception) -> None:
        """Hear from the outbox that it is stuck, so that the caller does not go on waiting for data."""
        if isinstance(exc, Gone | Silent):
            failure = self._explain(exc)
        else:
            failure = _Failure(TransportError, f"sending failed: {exc!r}", self.rank)
        self._fail(failure)
