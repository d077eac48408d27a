"""One optimizer's gradients on their way over the ranks, the dense ones bucket after bucket."""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from sparktf.distribute import buckets
from sparktf.distribute.buckets import ALIGN_BYTES, Bucket, plan_buckets
from sparktf.distribute.slices import SlicesExchange
from sparktf.distribute.threads import Threads
from sparktf.errors import HandshakeError
from sparktf.transport import Communicator

Array = np.ndarray[Any, Any]
Kind = tuple[np.dtype[Any], tuple[int, ...]]


class GradientExchange:
    """Packs gradients into buckets and sums each over the ranks.

    Where there are several buckets, each is sent by a thread of its own as soon as it and those before it are full: in
    one order on all ranks, while TensorFlow computes the rest. Two sets of buffers alternate: TensorFlow reads the
    results where they lie, and may still do so when the next step's gradients arrive.

    Parameters
    ----------
    communicator : Communicator
    kinds : sequence of (dtype, shape)
        One a gradient, in the order of the variables; the same on every rank.
    thread : Threads
        Of one thread, shared by all exchanges of a communicator.
    compression : {"none", "bf16"}
    sparse : sequence of (dtype, shape)
        Of the tables with sparse gradients, to find out whether all ranks have the same.

    Attributes
    ----------
    buckets : list of Bucket
    slices : SlicesExchange
        For the sparse ones.
    hidden_seconds : float
        Seconds of communication so far that no step waited for.
    """

    def __init__(
        self,
        communicator: Communicator,
        kinds: Sequence[Kind],
        thread: Threads,
        compression: str = "none",
        sparse: Sequence[Kind] = (),
    ) -> None:
        self._communicator = communicator
        self._kinds = list(kinds)
        self._sparse = list(sparse)
        self._thread = thread
        self._compression = compression
        self.slices = SlicesExchange(communicator)
        sizes = [(dtype, int(np.prod(shape))) for dtype, shape in kinds]
        self.buckets: list[Bucket] = plan_buckets(sizes, buckets.FIRST_BYTES, buckets.BUCKET_BYTES)
        self._sets: list[list[Array]] = []
        # By set and gradient, of those whose sums are kept in a wider type than their own.
        self._narrow: list[dict[int, Array]] = [{}, {}]
        self._agreed = False
        self._turn = 0
        self._lock = threading.Lock()
        self._full: set[int] = set()
        self._sent: list[Future[float]] = []
        self.hidden_seconds = 0.0

    def begin(self) -> None:
        """Start a step; the first time, agree on the buckets with all ranks and allocate them.

        Raises
        ------
        HandshakeError
            Ranks have different gradients.
        """
        if not self._sets:
            self.agree()
            # One element more than the gradients need, for the stop flag.
            self._sets = [
                [aligned_zeros(self._communicator, b.size + 1, b.dtype) for b in self.buckets] for _ in range(2)
            ]
        self._turn = 1 - self._turn
        self._full.clear()
        self._sent.clear()

    def pack(self, number: int, share: float, gradients: Sequence[Array], stop: bool) -> None:
        """Fill a bucket with this rank's gradients, weighted by its share of the step's rows.

        Parameters
        ----------
        number : int
            Of the bucket.
        share : float
            Where it is 0 the gradients are not looked at: 0 * NaN would be NaN.
        gradients : sequence of ndarray
            In the order of the bucket's places.
        stop : bool
            This rank asks all to stop.
        """
        bucket, buffer = self.buckets[number], self._sets[self._turn][number]
        for place, gradient in zip(bucket.places, gradients, strict=True):
            target = buffer[place.start : place.stop]
            if share == 0.0:
                target.fill(0)
            elif gradient.dtype == bucket.dtype:
                np.multiply(gradient.reshape(-1), bucket.dtype.type(share), out=target)
            else:
                target[:] = gradient.reshape(-1)
                target *= bucket.dtype.type(share)
        buffer[-1] = stop

    def send(self, number: int) -> None:
        """Say that a bucket is full; it goes to the thread once those before it have gone. Any thread may call this."""
        with self._lock:
            self._full.add(number)
            while len(self._sent) in self._full:
                buffer = self._sets[self._turn][len(self._sent)]
                self._sent.append(self._thread.submit(functools.partial(self._reduce, buffer)))

    @property
    def pending(self) -> bool:
        """Whether the thread still has buckets to sum."""
        return not all(future.done() for future in self._sent)

    def reduce_here(self) -> None:
        """Sum all buckets in the calling thread."""
        for buffer in self._sets[self._turn]:
            self._reduce(buffer)

    def wait(self) -> None:
        """Return once all buckets are summed; raise what the thread met."""
        began = time.perf_counter()
        busy = sum(future.result() for future in self._sent)
        self.hidden_seconds += max(0.0, busy - (time.perf_counter() - began))

    def results(self) -> tuple[list[Array], bool]:
        """Return the sums, in the order of the variables, and whether any rank asked to stop.

        Returns
        -------
        list of ndarray
            Views of buffers; read them before the step after the next.
        bool
        """
        buffers = self._sets[self._turn]
        summed: list[Array] = [np.empty(0)] * len(self._kinds)
        for bucket, buffer in zip(self.buckets, buffers, strict=True):
            for place in bucket.places:
                dtype, shape = self._kinds[place.gradient]
                part = buffer[place.start : place.stop].reshape(shape)
                summed[place.gradient] = part if part.dtype == dtype else self._narrowed(place.gradient, part, dtype)
        return summed, float(buffers[-1][-1]) > 0

    def _narrowed(self, gradient: int, part: Array, dtype: np.dtype[Any]) -> Array:
        held = self._narrow[self._turn]
        if gradient not in held:
            held[gradient] = np.empty(part.shape, dtype)
        np.copyto(held[gradient], part, casting="unsafe")
        return held[gradient]

    def _reduce(self, buffer: Array) -> float:
        began = time.perf_counter()
        # Double precision was asked for by whoever made the model.
        compression = self._compression if buffer.dtype == np.float32 else "none"
        self._communicator.all_reduce(buffer, compression=compression)
        return time.perf_counter() - began

    def agree(self) -> None:
        """Check, once, that all ranks have the same gradients.

        Raises
        ------
        HandshakeError
            They do not.
        """
        if self._agreed:
            return
        signature = [(dtype.name, shape) for dtype, shape in self._kinds]
        signature += [(f"sparse {dtype.name}", shape) for dtype, shape in self._sparse]
        # Buckets are cut by their sizes, which a rank's program may have set.
        told = repr((signature, [bucket.size for bucket in self.buckets]))
        digest = hashlib.blake2b(told.encode(), digest_size=16).digest()
        everyones = self._communicator.all_gather_bytes(digest)
        differing = [rank for rank, theirs in enumerate(everyones) if theirs != everyones[0]]
        if differing:
            raise HandshakeError(
                f"Expected the same gradients on every rank, received others on ranks {differing} than on rank 0; "
                f"this rank has {signature}. Build the same model on every rank (modelFn must not depend on the rank)."
            )
        self._agreed = True


def aligned_zeros(communicator: Communicator, elements: int, dtype: np.dtype[Any]) -> Array:
    """Allocate from the communicator, beginning on a boundary from which TensorFlow takes memory as it is."""
    spare = ALIGN_BYTES // dtype.itemsize
    memory = communicator.allocate(elements + spare, dtype)
    skipped = (-memory.ctypes.data % ALIGN_BYTES) // dtype.itemsize
    return memory[skipped : skipped + elements]
