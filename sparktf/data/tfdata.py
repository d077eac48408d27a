"""Spooled rows as a ``tf.data.Dataset``: gathered in large chunks, cut into batches by TensorFlow.

A call into Python at every step would wait for the interpreter's lock; one that gathers a few megabytes is
rare, and numpy gathers without the lock. ``Dataset.from_generator`` is avoided on purpose: its first use sets
malloc's trim threshold to 128 kB for the whole process, after which large arrays, Keras's own too, pay for
fresh pages again and again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparktf.data.columns import STRING, ColumnSpec
from sparktf.data.spool import Spool
from sparktf.errors import ParamError

Pack = Callable[[dict[str, Any]], Any]

# Measured on rows of 784 floats: below 1 MiB the calls into Python show, far above 8 MiB the first batch of
# an epoch waits and pages are faulted in anew; between them a drained epoch costs as much as Keras's own feed
# of arrays.
CHUNK_BYTES = 4 << 20


def training_dataset(
    spool: Spool,
    indices_of_epoch: Callable[[], np.ndarray],
    batch_size: int,
    steps: int,
    *,
    features: Iterable[str],
    labels: Iterable[str] = (),
    weight: str | None = None,
    pack: Pack | None = None,
    pack_y: Pack | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    idle: Mapping[str, np.ndarray] | None = None,
) -> Any:
    """Feed one rank's training rows, exactly `steps` batches an iteration.

    Parameters
    ----------
    spool : Spool
        The rank's rows.
    indices_of_epoch : callable
        Called once at the start of each iteration; gives the spool indices (int64) in the order to feed.
        Keras starts one iteration more than epochs: it takes a first batch to build the model.
    batch_size : int
        Rows per batch.
    steps : int
        Batches per iteration: full ones, at most one short one, then such as `idle` says.
    features, labels : iterable of str
        Columns of the spool; a mapping by name will do.
    weight : str, optional
        Column of the sample weights.
    pack, pack_y : callable, optional
        Make the model's structure out of a dict of tensors by column name. By default a single column is
        given as its tensor, several as the dict. They are traced, and see tensors of any number of rows.
    chunk_bytes : int
        Bytes gathered at once.
    idle : mapping of str to ndarray, optional
        By column, what is given in steps for which there are no rows; by default batches of no rows.

    Returns
    -------
    tf.data.Dataset
        Of ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``, of known cardinality, always in the same order.

    Raises
    ------
    ParamError
        Weights without labels, or more rows than `steps` batches hold (raised when iterated).
    """
    import tensorflow as tf

    feed = _Feed(spool, list(features), list(labels), weight, pack, pack_y)
    chunk_rows = feed.chunk_rows(batch_size, chunk_bytes)

    def epoch() -> np.ndarray:
        indices = np.asarray(indices_of_epoch(), np.int64)
        if len(indices) > steps * batch_size:
            raise ParamError(f"Expected at most {steps} batches of {batch_size} rows. Received: {len(indices):,} rows")
        return indices

    full = feed.batches(epoch, batch_size, chunk_rows)
    last = tf.data.Dataset.from_tensors(feed.structure(feed.no_rows() if idle is None else feed.given(idle))).repeat()
    return _finish(full.concatenate(last).take(steps), steps)


def evaluation_dataset(
    spool: Spool,
    indices: np.ndarray,
    batch_size: int,
    *,
    features: Iterable[str],
    labels: Iterable[str] = (),
    weight: str | None = None,
    pack: Pack | None = None,
    pack_y: Pack | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Any:
    """Feed rows in a fixed order, without batches of no rows.

    Parameters and result are those of `training_dataset`; the number of batches follows from `indices`.
    """
    feed = _Feed(spool, list(features), list(labels), weight, pack, pack_y)
    chunk_rows = feed.chunk_rows(batch_size, chunk_bytes)
    indices = np.asarray(indices, np.int64)
    return _finish(feed.batches(lambda: indices, batch_size, chunk_rows), -(-len(indices) // batch_size))


def iterator_dataset(batches: Iterator[dict[str, np.ndarray]]) -> Any:
    """Give what an iterator yields as a dataset, which can be gone through once; no batch is fetched before its turn.

    Parameters
    ----------
    batches : iterator of dict of numpy.ndarray
        Batches by column name; all have the names, dtypes and row shapes of the first, which is fetched at once.

    Returns
    -------
    tf.data.Dataset
        Of dicts of tensors, of unknown cardinality; empty where the iterator is.
    """
    import tensorflow as tf

    first = next(batches, None)
    if first is None:
        # Nothing tells what it would hold.
        return tf.data.Dataset.range(0)
    left = itertools.chain([first], batches)
    nothing = {name: array[:0] for name, array in first.items()}
    dtypes = [tf.string if array.dtype == object else tf.as_dtype(array.dtype) for array in first.values()]

    def step() -> list[Any]:
        batch = next(left, None)
        return [np.array(batch is not None), *(batch or nothing).values()]

    def arranged(_: Any, *arrays: Any) -> dict[str, Any]:
        parts = zip(first.items(), arrays, strict=True)
        return {name: tf.ensure_shape(part, (None, *array.shape[1:])) for (name, array), part in parts}

    # Dataset.from_generator would do, were it not for what this module says of it.
    steps = tf.data.Dataset.range(2**62).map(lambda _: tuple(tf.numpy_function(step, [], [tf.bool, *dtypes])))
    return steps.take_while(lambda more, *_: tf.ensure_shape(more, ())).map(arranged)


class _Feed:
    """Columns of a spool on their way to a model's structure."""

    def __init__(
        self,
        spool: Spool,
        features: list[str],
        labels: list[str],
        weight: str | None,
        pack: Pack | None,
        pack_y: Pack | None,
    ) -> None:
        if weight is not None and not labels:
            raise ParamError(f"Expected labels beside sample weights. Received: only weights, {weight!r}")
        self._spool = spool
        self._features, self._labels, self._weight = features, labels, weight
        self._pack, self._pack_y = pack or _single, pack_y or _single
        # A column may be both input and label, as in an autoencoder: it is gathered once.
        self._names = list(dict.fromkeys([*features, *labels, *([weight] if weight else [])]))
        missing = [name for name in self._names if name not in spool.columns]
        if missing:
            raise ParamError(f"Expected columns of the spool, {sorted(spool.columns)}. Received also: {missing}")

    def structure(self, tensors: dict[str, Any]) -> tuple[Any, ...]:
        """Arrange tensors by column name as Keras takes them."""
        x = _tuples(self._pack({name: tensors[name] for name in self._features}))
        if not self._labels:
            return (x,)
        y = _tuples(self._pack_y({name: tensors[name] for name in self._labels}))
        return (x, y) if self._weight is None else (x, y, tensors[self._weight])

    def chunk_rows(self, batch_size: int, chunk_bytes: int) -> int:
        """Rows of one chunk: whole batches, so that rebatching cuts and does not join."""
        row_bytes = sum(_row_bytes(self._spool.columns[name]) for name in self._names)
        return batch_size * max(1, chunk_bytes // (row_bytes * batch_size))

    def batches(self, epoch: Callable[[], np.ndarray], batch_size: int, chunk_rows: int) -> Any:
        """Gather chunks of an epoch's rows and cut them into batches inside TensorFlow."""
        import tensorflow as tf

        dtypes = [tf.dtypes.as_dtype(spec.dtype) for _, spec in self._specs()]

        def gather(indices: np.ndarray) -> list[np.ndarray]:
            return list(self._spool.take(indices, self._names).values())

        def chunk(indices: Any) -> tuple[Any, ...]:
            tensors = dict(zip(self._names, tf.numpy_function(gather, [indices], dtypes), strict=True))
            return self.structure(
                {name: tf.ensure_shape(tensors[name], (None, *_known(spec))) for name, spec in self._specs()}
            )

        # The function runs when an iterator starts, not when the dataset is made.
        started = tf.data.Dataset.from_tensors(0).map(lambda _: tf.numpy_function(epoch, [], tf.int64))
        chunks = started.flat_map(
            lambda order: tf.data.Dataset.from_tensor_slices(tf.reshape(order, (-1,))).batch(chunk_rows)
        )
        # The next chunk is gathered while the model computes on this one.
        return chunks.map(chunk).prefetch(1).rebatch(batch_size)

    def no_rows(self) -> dict[str, Any]:
        """Give tensors of no rows by column name."""
        import tensorflow as tf

        return {name: tf.zeros((0, *_known(spec)), spec.dtype) for name, spec in self._specs()}

    def given(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Give tensors of arrays by column name."""
        import tensorflow as tf

        return {name: tf.constant(arrays[name], spec.dtype) for name, spec in self._specs()}

    def _specs(self) -> Sequence[tuple[str, ColumnSpec]]:
        return [(name, self._spool.columns[name]) for name in self._names]


def _single(tensors: dict[str, Any]) -> Any:
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _tuples(structure: Any) -> Any:
    """Make tuples of lists, which tf.data would stack into one tensor; Keras takes either."""
    if isinstance(structure, (list, tuple)) and not hasattr(structure, "_fields"):
        return tuple(_tuples(part) for part in structure)
    if isinstance(structure, dict):
        return {name: _tuples(part) for name, part in structure.items()}
    return structure


def _known(spec: ColumnSpec) -> tuple[int, ...]:
    return tuple(1 if d is None else d for d in spec.shape)


def _row_bytes(spec: ColumnSpec) -> int:
    # A string's length is not known here; 64 bytes cover its object and a short text.
    item = 64 if spec.dtype == STRING else spec.numpy_dtype.itemsize
    return item * int(np.prod(_known(spec), dtype=np.int64))


def _finish(dataset: Any, steps: int) -> Any:
    import tensorflow as tf

    options = tf.data.Options()
    options.deterministic = True
    # A rank's rows are its own already; there is nothing left to shard.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    # One thread fills the pipeline beside those that compute, and nothing in it is left to tune: with TensorFlow's
    # own pool and tuner, epochs of the same work took 0.8 s or 1.3 s. Without the tuner an iterator also ends at once:
    # the tuner sleeps for as long as the iterator has lived, up to a minute, and misses at times that it is woken.
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    return dataset.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2).with_options(options)
