"""Sums gradients over the ranks, each weighted by its share of the step's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np

from sparktf.distribute.exchange import Array, GradientExchange, Kind
from sparktf.distribute.threads import Threads
from sparktf.errors import SparktfError
from sparktf.transport import Communicator


class GradientReducer:
    """Reduces gradients in place of one process's backward pass on the global batch.

    ``reduce`` is called while TensorFlow traces a step; the communication itself runs when the step does. A request to
    stop rides along with the gradients, so that all ranks learn of it in the same step. Use it in a ``with`` block.

    Parameters
    ----------
    communicator : Communicator
        The group whose gradients are summed.
    compression : {"none", "bf16"}
        How dense gradients of single (or half) precision travel.

    Attributes
    ----------
    stop_agreed : bool
        A rank has asked to stop, and all know.
    failure : Exception or None
        What went wrong inside a step: TensorFlow raises an error of its own, which holds only the text.
    """

    def __init__(self, communicator: Communicator, compression: str = "none") -> None:
        self._communicator = communicator
        self._compression = compression
        self._exchanges: dict[tuple[Any, ...], GradientExchange] = {}
        self._thread = Threads(1, "sparktf-reduce")
        self._keys = 0
        self._stop_requested = False
        self.stop_agreed = False
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and any(exchange.pending for exchange in self._exchanges.values()):
            # The thread waits for peers that wait for what will not come.
            self._communicator.abort(f"{type(error).__name__}: {error}")
        self._thread.close()

    def explain(self, error: BaseException) -> BaseException | None:
        """Return what was behind an error that TensorFlow raised in a step; None where it was TensorFlow's own."""
        return self.failure

    @property
    def hidden_seconds(self) -> float:
        """Seconds of communication that no step waited for, as TensorFlow computed meanwhile."""
        return sum(exchange.hidden_seconds for exchange in self._exchanges.values())

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

    def reduce(self, key: int, gradients: Sequence[Any], share: Any, variables: Sequence[Any] = ()) -> list[Any]:
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
        variables : sequence of keras.Variable
            Whose gradients they are. A step may apply an optimizer to several sets of variables, each of which has
            buffers of its own: nothing orders the reading of one set's sums before the packing of another's.

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
        tensors = [tf.convert_to_tensor(gradients[i]) for i in dense]
        slices = [tf.convert_to_tensor(part) for i in sparse for part in (gradients[i].values, gradients[i].indices)]
        if len(variables) == len(gradients):
            # A gradient's own shape may not be known before it is computed.
            tensors = [tf.ensure_shape(t, variables[i].shape) for t, i in zip(tensors, dense, strict=True)]
        kinds = [(np.dtype(t.dtype.as_numpy_dtype), tuple(t.shape)) for t in tensors]
        # Whole tables' shapes where they are known, else those of their rows.
        shapes = [variables[i].shape if variables else gradients[i].values.shape[1:] for i in sparse]
        dtypes = [np.dtype(gradients[i].dtype.as_numpy_dtype) for i in sparse]
        tables = [(dtype, tuple(shape)) for dtype, shape in zip(dtypes, shapes, strict=True)]
        exchange = self.exchange(key, kinds, tables, tuple(map(id, variables)))
        reduced = self._trace(exchange, tensors, slices, share)
        for tensor, part in zip(reduced[: len(dense)], tensors, strict=True):
            tensor.set_shape(part.shape)
        for tensor, part in zip(reduced[len(dense) :], slices, strict=True):
            tensor.set_shape((None, *part.shape[1:]))
        results: list[Any] = list(gradients)
        for place, i in enumerate(dense):
            results[i] = reduced[place]
        for place, i in enumerate(sparse):
            values, indices = reduced[len(dense) + 2 * place :][:2]
            results[i] = tf.IndexedSlices(values, indices, gradients[i].dense_shape)
        return results

    def exchange(
        self, key: int, kinds: Sequence[Kind], sparse: Sequence[Kind] = (), variables: tuple[int, ...] = ()
    ) -> GradientExchange:
        """Return the exchange of one optimizer's gradients of a set of variables, told apart by their ids."""
        which = (key, _names(kinds), _names(sparse), variables)
        if which not in self._exchanges:
            self._exchanges[which] = GradientExchange(
                self._communicator, kinds, self._thread, self._compression, sparse
            )
        return self._exchanges[which]

    def _trace(self, exchange: GradientExchange, tensors: list[Any], slices: list[Any], share: Any) -> list[Any]:
        """Lay the ops that pack, send and wait into the graph."""
        import tensorflow as tf

        dtypes = [t.dtype for t in (*tensors, *slices)]
        parts = [[tensors[place.gradient] for place in bucket.places] for bucket in exchange.buckets]
        if len(parts) == 1:
            # Nothing is left to overlap with, and handing a small bucket to a thread takes longer than sending it.
            whole = self._guarded(lambda share, *arrays: self.reduce_now(exchange, float(share), arrays))
            return _listed(tf.numpy_function(whole, [share, *parts[0], *slices], dtypes, stateful=True))
        # Stateful, as the last one is: several optimizers so take their turns in one order on every rank.
        begun = tf.numpy_function(self._packer(exchange, 0), [share, *parts[0]], tf.int64, stateful=True)
        packed = [begun]
        for number in range(1, len(parts)):
            # Not stateful: each runs as soon as its own gradients are there.
            pack = self._packer(exchange, number)
            packed.append(tf.numpy_function(pack, [share, *parts[number], begun], tf.int64, stateful=False))

        def finish(share: Array, *arrays: Array) -> list[Array]:
            exchange.wait()
            return self._results(exchange, float(share), arrays[len(packed) :])

        return _listed(tf.numpy_function(self._guarded(finish), [share, *packed, *slices], dtypes, stateful=True))

    def _packer(self, exchange: GradientExchange, number: int) -> Callable[..., Any]:
        def pack(share: Array, *arrays: Array) -> Array:
            if number == 0:
                exchange.begin()
            count = len(exchange.buckets[number].places)
            exchange.pack(number, float(share), arrays[:count], self._stop_requested)
            exchange.send(number)
            return np.array(number)

        return self._guarded(pack)

    def reduce_now(self, exchange: GradientExchange, share: float, arrays: Sequence[Array]) -> list[Array]:
        """Sum gradients that lie in one bucket, in the calling thread.

        Parameters
        ----------
        exchange : GradientExchange
            Of one bucket.
        share : float
        arrays : sequence of ndarray
            The bucket's gradients in the order of its places, then values and indices of sparse ones.

        Returns
        -------
        list of ndarray
            In the order of the variables, then the sparse ones.
        """
        count = len(exchange.buckets[0].places)
        exchange.begin()
        exchange.pack(0, share, arrays[:count], self._stop_requested)
        exchange.reduce_here()
        return self._results(exchange, share, arrays[count:])

    def _results(self, exchange: GradientExchange, share: float, slices: Sequence[Array]) -> list[Array]:
        summed, stop = exchange.results()
        self.stop_agreed = self.stop_agreed or stop
        return summed + exchange.slices.join(share, slices)

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arrays: Array) -> Any:
            with self._keeping_failure():
                return function(*arrays)

        return run

    @contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        try:
            yield
        except SparktfError as error:
            self.failure = error
            raise


def weigh(gradient: Any, share: Any) -> Any:
    """Multiply a gradient by the rank's share; where that is 0, by selection: 0 * NaN would be NaN.

    Parameters
    ----------
    gradient : tensor or IndexedSlices
    share : scalar tensor
    """
    import tensorflow as tf

    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(weigh(gradient.values, share), gradient.indices, gradient.dense_shape)
    weighted = gradient * tf.cast(share, gradient.dtype)
    return tf.where(share > 0, weighted, tf.zeros_like(gradient))


def _listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _names(kinds: Sequence[Kind]) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    return tuple((dtype.name, shape) for dtype, shape in kinds)
