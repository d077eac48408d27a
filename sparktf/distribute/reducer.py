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
            # Half precision is summed in single: its shares would not add up to 1.
            dtype = np.dtype(np.float32) if array.dtype.itemsize == 2 else array.dtype
            start = sizes.get(dtype, 0)
            self.places.append((dtype, start, start + array.size))
            sizes[dtype] = start + array.size
        # One element more for the stop flag, in the first dtype.
        self.flag_dtype = self.places[0][0] if arrays else np.dtype(np.float32)
        self.flag_at = sizes.get(self.flag_dtype, 0)
        sizes[self.flag_dtype] = self.flag_at + 1
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
        self._layouts: dict[tuple[Any, ...], _Layout] = {}
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
            This rank's gradients, floating. Sparse ones stay sparse: the ranks' slices one after the other, as one
            process has them for the global batch. Keras's optimizers treat repeated rows of such gradients otherwise
            than their sum (Adam adds up the squares of each), and an embedding may be too large to be sent whole.
        share : scalar float32 tensor
            This rank's rows by the rows of all ranks in this step. Where it is 0 the gradients are not looked at
            (0 * NaN would be NaN).

        Returns
        -------
        list of tensors or IndexedSlices
            The same on every rank, shapes and dtypes of `gradients`.

        Raises
        ------
        PeerLostError, TransportTimeoutError, HandshakeError
            Through TensorFlow, when the step runs; `failure` keeps the original.
        """
        import tensorflow as tf

        dense = [i for i, g in enumerate(gradients) if not isinstance(g, tf.IndexedSlices)]
        sparse = [i for i, g in enumerate(gradients) if isinstance(g, tf.IndexedSlices)]
        parts = [gradients[i] for i in dense]
        parts += [part for i in sparse for part in (gradients[i].values, gradients[i].indices)]
        parts = [tf.convert_to_tensor(part) for part in parts]
        # One optimizer may be applied to several sets of variables in a step.
        which = (key, tuple((p.dtype.name, tuple(p.shape)) for p in parts[: len(dense)]), len(sparse))

        def host(share: np.ndarray[Any, Any], *arrays: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
            return self._reduce_now(which, float(share), arrays[: len(dense)], arrays[len(dense) :])

        reduced = tf.numpy_function(host, [share, *parts], [p.dtype for p in parts], stateful=True)
        reduced = list(reduced) if isinstance(reduced, list | tuple) else [reduced]
        for tensor, part in zip(reduced[: len(dense)], parts, strict=False):
            tensor.set_shape(part.shape)
        for tensor, part in zip(reduced[len(dense) :], parts[len(dense) :], strict=True):
            tensor.set_shape((None, *part.shape[1:]))
        results: list[Any] = list(gradients)
        for place, i in enumerate(dense):
            results[i] = reduced[place]
        for place, i in enumerate(sparse):
            values, indices = reduced[len(dense) + 2 * place :][:2]
            results[i] = tf.IndexedSlices(values, indices, gradients[i].dense_shape)
        return results

    def _reduce_now(
        self,
        key: tuple[Any, ...],
        share: float,
        arrays: Sequence[np.ndarray[Any, Any]],
        slices: Sequence[np.ndarray[Any, Any]] = (),
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
            summed = [
                buffers[dtype][start:stop].reshape(array.shape).astype(array.dtype, copy=False)
                for (dtype, start, stop), array in zip(layout.places, arrays, strict=True)
            ]
            return summed + self._gather(share, slices)
        except SparktfError as error:
            # TensorFlow turns whatever is raised here into an error of its own that holds only the text.
            self.failure = error
            raise
        finally:
            self.seconds += time.perf_counter() - started

    def _gather(self, share: float, slices: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Join all ranks' slices, values and indices in turn, the values weighted by the rank's share."""
        joined = []
        for place, array in enumerate(slices):
            mine = array[:0] if share == 0.0 else array
            if place % 2 == 0:
                mine = np.multiply(mine, mine.dtype.type(share))
            joined.append(np.concatenate(self._communicator.all_gather(np.ascontiguousarray(mine))))
        return joined

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
            elif array.dtype == dtype:
                np.multiply(array.reshape(-1), dtype.type(share), out=target)
            else:
                target[:] = array.reshape(-1)
                target *= dtype.type(share)
        buffers[layout.flag_dtype][layout.flag_at] = 1 if self._stop_requested else 0

    def _agree_on_layout(self, key: tuple[Any, ...], arrays: Sequence[np.ndarray[Any, Any]]) -> _Layout:
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
