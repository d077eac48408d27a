"""The Keras layer over a table that may be larger than a node.

This file alone makes a class of Keras's when it is imported, and is itself imported only where it is needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from sparktf.distribute.sparse_optimizers import SparseOptimizer, sparse_optimizer_of
from sparktf.distribute.table_access import LocalTable, TableAccess
from sparktf.distribute.table_rows import RowInitializer, TableSpec
from sparktf.distribute.table_saving import load_table, mapped_pieces, save_table, write_pieces
from sparktf.errors import ParamError, PersistenceError, SparktfError

Array = np.ndarray[Any, Any]


@keras.saving.register_keras_serializable("sparktf")
class ShardedEmbedding(keras.layers.Layer):  # type: ignore[misc]  # mypy does not follow Keras
    """Turns ids into rows of a trained table, as `keras.layers.Embedding` does, for tables of any size.

    In a fit over several nodes each holds a part of the rows; a step fetches the rows that its batch names and sends
    back the gradients of these. Elsewhere the whole table lives in the process. Rows take memory once they are updated.

    Parameters
    ----------
    rows : int
        Ids are from 0 to ``rows - 1``.
    dim : int
        Numbers in a row.
    embeddings_initializer : str or keras.initializers.Initializer
        RandomUniform ("uniform"), RandomNormal ("normal"), Constant, Zeros or Ones. A new row is a function of the seed
        and its id; the initializer's own seed does not count.
    seed : int, optional
        Default: drawn as Keras draws seeds, so that `keras.utils.set_random_seed` fixes it.
    hashing : bool
        Take any integers or strings and hash them into the table; ids of equal hash share a row.
    optimizer : keras.optimizers.Optimizer or str, optional
        SGD, Adagrad, Adam or Ftrl for the table alone, with its own learning rate. Default: what the model's optimizer
        does, which must be one of these, with its learning rate (and schedules and callbacks that set it).
    **kwargs
        Of `keras.layers.Layer`.

    Notes
    -----
    Input: integers of any shape (or strings, with hashing). Output: floats of ``(*shape, dim)``. Under an optimizer
    with state only rows of the batch change; see `sparktf.distribute.sparse_optimizers`. The layer's one variable, of
    no dimensions, stays zero: it tells Keras that there is something to train, and that a step is over.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        embeddings_initializer: Any = "uniform",
        seed: int | None = None,
        hashing: bool = False,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # XLA cannot call back into Python.
        self.supports_jit = False
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.hashing = bool(hashing)
        kind = type(self.embeddings_initializer).__name__
        initial = RowInitializer.of(kind, self.embeddings_initializer.get_config())
        self.spec = TableSpec(rows, dim, _new_seed() if seed is None else int(seed), initial)
        self._source = _OptimizerSource(optimizer)
        self._access: TableAccess | None = None
        self._share: Callable[[], Any] | None = None
        self._sparse: SparseOptimizer | None = None
        self._used: tuple[TableAccess | None, SparseOptimizer | None] = None, None
        self._beside = False
        self._missing: PersistenceError | None = None

    @property
    def access(self) -> TableAccess:
        """How this layer reaches its table; made when first needed."""
        if self._access is None:
            self._access = LocalTable(self.spec, self.name)
        return self._access

    @access.setter
    def access(self, access: TableAccess) -> None:
        self._access = access

    def weigh_by(self, share: Callable[[], Any] | None) -> None:
        """Multiply gradients by what this returns, while a step is traced: a scalar float32 tensor."""
        self._share = share

    def follow(self, optimizer: Any) -> None:
        """Train the table as this optimizer trains the model; for training loops of your own, which `fit` does not run.

        Parameters
        ----------
        optimizer : keras.optimizers.Optimizer

        Raises
        ------
        ParamError
            It is none of those that tables can follow.
        """
        sparse_optimizer_of(optimizer)
        self._source.followed = optimizer

    def trained_by(self, optimizer: Any) -> SparseOptimizer:
        """Return what updates the table in a model that is compiled with this optimizer."""
        return sparse_optimizer_of(self._source.of_call(None) or optimizer)

    def build(self, input_shape: Any = None) -> None:
        """Make the variable by which Keras differentiates."""
        # Its gradient is assigned to it, by every optimizer, once a step: no slots, no decay, and a hook.
        self._handle = self.add_weight(
            name="handle", shape=(), initializer="zeros", dtype="float32", autocast=False, overwrite_with_gradient=True
        )
        assign = self._handle.assign

        def commit_and_assign(value: Any) -> Any:
            return assign(self._committed(value))

        self._handle.assign = commit_and_assign
        # For optimizers that are distributed, who know variables alone.
        self._handle._sparktf_layer = self
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Look rows up."""
        import tensorflow as tf

        ids = self._ids(inputs)
        unique, inverse = tf.unique(tf.reshape(ids, [-1]))
        optimizer = self._source.of_call(self._get_call_context().entry_layer)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def look_up(handle: Any) -> Any:
            rows = tf.numpy_function(self._lookup, [unique], tf.float32, stateful=True)
            rows.set_shape((None, self.spec.dim))

            def gradient(upstream: Any) -> Any:
                upstream = tf.cast(tf.convert_to_tensor(upstream), tf.float32)
                sums = tf.math.unsorted_segment_sum(upstream, inverse, tf.size(unique))
                return self._traced_push(unique, sums, optimizer)

            return tf.gather(rows, inverse), gradient

        found = look_up(tf.convert_to_tensor(self._handle.value))
        shape = tf.concat([tf.shape(ids), [self.spec.dim]], axis=0)
        found = tf.cast(tf.reshape(found, shape), self.compute_dtype)
        found.set_shape((*ids.shape, self.spec.dim))
        return found

    def _ids(self, inputs: Any) -> Any:
        import tensorflow as tf

        inputs = tf.convert_to_tensor(inputs)
        if self.hashing:
            if not (inputs.dtype.is_integer or inputs.dtype == tf.string):
                raise ParamError(f"layer {self.name!r}: expected integers or strings, received {inputs.dtype.name}.")
            texts = inputs if inputs.dtype == tf.string else tf.strings.as_string(inputs)
            return tf.strings.to_hash_bucket_fast(texts, self.spec.rows)
        if inputs.dtype == tf.string:
            raise ParamError(f"layer {self.name!r}: expected integers, received strings. Take hashing=True.")
        return tf.cast(inputs, tf.int64)

    def _traced_push(self, ids: Any, gradients: Any, optimizer: Any) -> Any:
        """Lay into the graph that gradients go to the table; return the variable's own gradient, zero."""
        import tensorflow as tf

        if optimizer is None:
            raise ParamError(
                f"layer {self.name!r}: expected to be trained by the fit of the compiled model that it is part of. In "
                "a training loop of your own call layer.follow(optimizer), or give the layer one: optimizer=..."
            )
        with tf.init_scope():
            # Its configuration reads a variable.
            self._sparse = sparse_optimizer_of(optimizer)
        share = tf.constant(1.0) if self._share is None else tf.cast(self._share(), tf.float32)
        rate = tf.cast(optimizer.learning_rate, tf.float32)
        # Its result is the gradient, so that whoever applies that comes later.
        return tf.ensure_shape(
            tf.numpy_function(self._push, [ids, gradients, share, rate], tf.float32, stateful=True), ()
        )

    def _committed(self, value: Any) -> Any:
        """Update the table, then return `value`."""
        import tensorflow as tf

        value = tf.convert_to_tensor(value, tf.float32)
        own = self._source.own
        if own is not None:
            # Nobody else counts the steps of its schedule.
            own.iterations.assign_add(1)
        return tf.ensure_shape(tf.numpy_function(self._commit, [value], tf.float32, stateful=True), ())

    def _lookup(self, ids: Array) -> Array:
        with _Keeping(self.access):
            if self._missing is not None:
                raise self._missing
            return self.access.lookup(ids)

    def _push(self, ids: Array, gradients: Array, share: Array, rate: Array) -> Array:
        access = self.access
        with _Keeping(access):
            if self._used != (access, self._sparse):
                assert self._sparse is not None  # traced before
                access.use(self._sparse)
                self._used = access, self._sparse
            access.push(ids, gradients, float(share), float(rate))
        return np.zeros((), np.float32)

    def _commit(self, value: Array) -> Array:
        with _Keeping(self.access):
            self.access.commit()
        return value

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape and the length of a row."""
        return (*input_shape, self.spec.dim)

    def get_config(self) -> dict[str, Any]:
        """Return what makes the layer anew."""
        own = self._source.own
        return {
            **super().get_config(),
            "rows": self.spec.rows,
            "dim": self.spec.dim,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
            "seed": self.spec.seed,
            "hashing": self.hashing,
            "optimizer": None if own is None else keras.optimizers.serialize(own),
        }

    def save_own_variables(self, store: Any) -> None:
        """Write the table's rows that are not new, and their slots, into a saved model."""
        self._beside = save_table(self.access, store)

    def save_assets(self, inner_path: str) -> None:
        """Write a table that is too large to be among the weights into files."""
        if self._beside:
            write_pieces(self.access.pieces(), inner_path)

    def load_own_variables(self, store: Any) -> None:
        """Set the table to what `save_own_variables` wrote."""
        self._beside = load_table(self.access, store)
        if self._beside:
            # Only a whole model has files, saved weights have not.
            self._missing = PersistenceError(
                f"layer {self.name!r}: expected a saved model with the files of its table, received weights alone. A "
                "table of this size is saved by model.save(path), not by save_weights."
            )
        else:
            self._loaded()

    def load_assets(self, inner_path: str) -> None:
        """Map the table from what `save_assets` wrote."""
        if self._beside:
            self.access.load(mapped_pieces(inner_path, self.spec.dim))
            self._loaded()

    def _loaded(self) -> None:
        self._missing = None
        if self._source.own is not None:
            self._source.own.iterations.assign(self.access.updates)


class _OptimizerSource:
    """Which Keras optimizer a table follows. Keras and the fit would take one among a layer's attributes for theirs."""

    def __init__(self, own: Any) -> None:
        self.own = None if own is None else keras.optimizers.get(own)
        self.followed: Any = None
        if self.own is not None:
            sparse_optimizer_of(self.own)

    def of_call(self, model: Any) -> Any:
        """Return the one to follow where `model` is what was called first; None where there is none."""
        if self.own is not None:
            return self.own
        return self.followed or getattr(model, "optimizer", None)


class _Keeping:
    """Keep what a block raises with the table: TensorFlow raises an error of its own, of which it is the text."""

    def __init__(self, access: TableAccess) -> None:
        self._access = access

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, SparktfError):
            self._access.failure = error


def sharded_layers(model: Any) -> list[ShardedEmbedding]:
    """Return a model's layers of this kind, in an order that is the same on every rank."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, ShardedEmbedding)]


def _new_seed() -> int:
    # Of the generator that keras.utils.set_random_seed sets, and that Keras's layers draw theirs from.
    return random.randint(1, 10**9)
