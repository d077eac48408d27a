"""Sums gradients over the ranks, each weighted by its share of the step's rows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparktf.errors import HandshakeError, SparktfError
from sparktf.transport import Communicator


class _Layout:
    """The gradients of one optimizer packed into one buffer a dtype, and where each lies in it.

    Two buffers alternate: TensorFlow reads the views that a step returns without copying them, and may still do
    so when the next step's gradients arrive.
    """

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        self.signature = [(str(a.dtype), a.shape) for a in arrays]
        sizes: dict[np.dtype[Any], int] = {}
        self.places: list[tuple[np.dtype[Any], int, int]] = []
        for array in arrays:
            start = sizes.get(array.dtype, 0)
            self.places.append((array.dtype, start, start + array.size))
            sizes[array.dtype] = start + array.size
        # One element more for the stop flag, in the first dtype.
        self.flag_dtype = arrays[0].dtype
        self.flag_at = sizes[self.flag_dtype]
        sizes[self.flag_dtype] += 1
        self._buffers = [{d: np.zeros(n, dtype=d) for d, n in sizes.items()} for _ in range(2)]
        self._turn = 0

    def next_buffers(self) -> dict[np.dtype[Any], np.ndarray[Any, Any]]:
        self._turn = 1 - self._turn
        return self._buffers[self._turn]

    def digest(self) -> bytes:
        return hashlib.blake2b(repr(self.signature).encode(), digest_size=16).digest()


class GradientReducer:
    """Reduces gradients in place of one process's backward pass on the global batch.

    ``reduce`` is called while TensorFlow traces a step; the communication itself runs when the step does, as one
    stateful op, so that several optimizers reduce in the same order on every rank. A request to stop rides along
    with the gradients, so that all ranks learn of it in the same step.

    Parameters
    ----------
    communicator : Communicator
        The group whose gradients are summed.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._layouts: dict[tuple[int, Any], _Layout] = {}
        self._keys = 0
        self._stop_requested = False
        self.stop_agreed = False
        self.seconds = 0.0
        self.failure: BaseException | None = None

    def request_stop(self) -> None:
        """Ask all ranks to stop; takes effect on all of them after the same step."""
        self._stop_requested = True

    def clear_stop(self) -> None:
        """Forget requests and agreements, before a fit begins."""
        self._stop_requested = False
        self.stop_agreed = False

    def agree_to_stop(self) -> bool:
        """Between steps: let all ranks know whether any of them wants to stop. Every rank must call it.

        Returns
        -------
        bool
            True where any rank asked for it.
        """
        if not self.stop_agreed:
            flag = np.array([1 if self._stop_requested else 0], dtype=np.int32)
            self.stop_agreed = bool(self._communicator.all_reduce(flag, op="max")[0])
        return self.stop_agreed

    def new_key(self) -> int:
        """Return a number for one optimizer's gradients; optimizers are numbered alike on all ranks."""
        self._keys += 1
        return self._keys

    def reduce(self, key: int, gradients: Sequence[Any], share: Any) -> list[Any]:
        """Replace gradients by their weighted sum over the ranks; for use inside a traced step.

        Parameters
        ----------
        key : int
            The optimizer's number, from `new_key`.
        gradients : sequence of tensors or IndexedSlices
            This rank's gradients, floating. Sparse ones are made dense.
        share : scalar float32 tensor
            This rank's rows by the rows of all ranks in this step. Where it is 0 the gradients are not looked at
            (0 * NaN would be NaN).

        Returns
        -------
        list of tensors
            The same on every rank, shapes and dtypes of `gradients`.

        Raises
        ------
        PeerLostError, TransportTimeoutError, HandshakeError
            Through TensorFlow, when the step runs; `failure` keeps the original.
        """
        import tensorflow as tf

        dense = [tf.convert_to_tensor(g) for g in gradients]

        # One optimizer may be applied to several sets of variables in a step.
        which = (key, tuple((g.dtype.name, tuple(g.shape)) for g in dense))

        def host(share: np.ndarray[Any, Any], *arrays: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
            return self._reduce_now(which, float(share), arrays)

        reduced = tf.numpy_function(host, [share, *dense], [g.dtype for g in dense], stateful=True)
        reduced = reduced if isinstance(reduced, list | tuple) else [reduced]
        for tensor, gradient in zip(reduced, dense, strict=True):
            tensor.set_shape(gradient.shape)
        return list(reduced)

    def _reduce_now(
        self, key: tuple[int, Any], share: float, arrays: Sequence[np.ndarray[Any, Any]]
    ) -> list[np.ndarray[Any, Any]]:
        started = time.perf_counter()
        try:
            layout = self._layouts.get(key) or self._agree_on_layout(key, arrays)
            buffers = layout.next_buffers()
            self._pack(layout, buffers, share, arrays)
            for buffer in buffers.values():
                self._communicator.all_reduce(buffer)
            if float(buffers[layout.flag_dtype][layout.flag_at]) > 0:
                self.stop_agreed = True
            return [
                buffers[dtype][start:stop].reshape(array.shape)
                for (dtype, start, stop), array in zip(layout.places, arrays, strict=True)
            ]
        except SparktfError as error:
            # TensorFlow turns whatever is raised here into an error of its own that holds only the text.
            self.failure = error
            raise
        finally:
            self.seconds += time.perf_counter() - started

    def _pack(
        self,
        layout: _Layout,
        buffers: dict[np.dtype[Any], np.ndarray[Any, Any]],
        share: float,
        arrays: Sequence[np.ndarray[Any, Any]],
    ) -> None:
        for (dtype, start, stop), array in zip(layout.places, arrays, strict=True):
            target = buffers[dtype][start:stop]
            if share == 0.0:
                target.fill(0)
            else:
                np.multiply(array.reshape(-1), dtype.type(share), out=target)
        buffers[layout.flag_dtype][layout.flag_at] = 1 if self._stop_requested else 0

    def _agree_on_layout(self, key: tuple[int, Any], arrays: Sequence[np.ndarray[Any, Any]]) -> _Layout:
        layout = _Layout(arrays)
        everyones = self._communicator.all_gather_bytes(layout.digest())
        differing = [rank for rank, digest in enumerate(everyones) if digest != everyones[0]]
        if differing:
            raise HandshakeError(
                f"Expected the same gradients on every rank, received others on ranks {differing} than on rank 0; "
                f"this rank has {layout.signature}. Build the same model on every rank (modelFn must not depend on "
                "the rank)."
            )
        self._layouts[key] = layout
        return layout
