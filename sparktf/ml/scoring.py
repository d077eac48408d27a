"""Scoring in Spark's Python workers: Arrow columns in, one column of outputs out.

:func:`score` is all of it, a function of plain arguments that runs without Spark too. A worker process keeps
the last models it has loaded, so that a second job, and the next task, start at once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparktf.cluster.job import Payload
from sparktf.cluster.scratch import scratch_directory
from sparktf.cluster.threads import start_tensorflow
from sparktf.data.arrow import ColumnReader, is_list
from sparktf.data.blocks import Dense, Vectors
from sparktf.data.columns import ColumnSpec
from sparktf.errors import DataError
from sparktf.ml.archive import KERAS, ModelArchive
from sparktf.ml.outputs import OutputField, to_result
from sparktf.ml.signature import ModelSignature

Forward = Callable[[list[np.ndarray]], list[np.ndarray]]

# A job seldom uses more than two models in one stage, and each holds its weights in memory.
_KEPT_MODELS = 2
_models: OrderedDict[str, Forward] = OrderedDict()


@dataclass(frozen=True)
class ScoringTask:
    """Everything a worker needs to score, small enough to pickle.

    Parameters
    ----------
    digest : str
        The archive's digest: the key of the worker's cache.
    archive : Payload
        Only read where the model is not in the cache.
    signature : ModelSignature
    columns : tuple of ColumnSpec
        One a model input, in the model's order.
    fields : tuple of OutputField
    batch_size : int
        Rows in one forward pass, at most.
    custom_objects : mapping
        Keras's registry of the driver, as `sparktf.cluster.pickling.portable` gives it.
    saved_signature : str
        Which signature of a SavedModel to call.
    objects_digest : str
        Changes with the custom objects, so that a class defined anew is not taken for the old one.
    """

    digest: str
    archive: Payload
    signature: ModelSignature
    columns: tuple[ColumnSpec, ...]
    fields: tuple[OutputField, ...]
    batch_size: int
    custom_objects: Mapping[str, Any] = field(default_factory=dict)
    saved_signature: str = ""
    objects_digest: str = ""


def score(task: ScoringTask, batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
    """Score Arrow batches in order.

    Parameters
    ----------
    task : ScoringTask
    batches : iterator of tuple of pyarrow.Array
        One array a model input; of any length: they are cut anew for full forward passes.

    Yields
    ------
    pyarrow.Array
        Of the type that ``result_type`` gives for the fields. As many rows as came in, in their order; a row
        with a null in any input has nulls.

    Raises
    ------
    DataError
        A row does not have the length that the model wants.
    """
    forward = None
    readers = [ColumnReader(spec) for spec in task.columns]
    for arrays in _gather(batches, task.batch_size):
        forward = forward or load_forward(task)
        valid = valid_rows(arrays)
        if valid is not None:
            keep = pa.array(valid)
            arrays = tuple(array.filter(keep) for array in arrays)
        tensors = [read_tensor(reader, array) for reader, array in zip(readers, arrays, strict=True)]
        outputs = _run(forward, task, tensors)
        yield to_result(task.signature, list(task.fields), outputs, valid)


def valid_rows(arrays: tuple[pa.Array, ...]) -> np.ndarray | None:
    """Return which rows hold no null, not in any array, at any depth; None where all rows are so."""
    result: np.ndarray | None = None
    for array in arrays:
        mask = _valid(array)
        if mask is not None:
            result = mask if result is None else result & mask
    return result


def read_tensor(reader: ColumnReader, array: pa.Array) -> np.ndarray:
    """Return a column without nulls as ``(rows, *shape)`` in the model's dtype; strings as objects.

    Raises
    ------
    DataError
        A row has another length than the model wants, or a value that its dtype cannot hold.
    """
    block = reader.read(array)
    reader.check()
    shape = tuple(0 if length is None else length for length in reader.spec.shape)
    if isinstance(block, Dense):
        return block.values.astype(reader.spec.numpy_dtype, copy=False).reshape(len(array), *shape)
    if isinstance(block, Vectors):
        raise DataError(f"column {reader.spec.source!r}: expected an array. Received: a vector")
    leaf = array
    while is_list(leaf.type):
        leaf = leaf.flatten()
    texts: np.ndarray = leaf.cast(pa.large_binary()).to_numpy(zero_copy_only=False)
    return texts.reshape(len(array), *shape)


def load_forward(task: ScoringTask) -> Forward:
    """Return the model as a function from input to output tensors, from the cache where it is there."""
    key = f"{task.digest}:{task.saved_signature}:{task.objects_digest}"
    if key in _models:
        _models.move_to_end(key)
        return _models[key]
    tf = import_tensorflow(_task_threads())
    # What Keras has to say about a model, it has said to the user who made it.
    with scratch_directory("sparktf-model-") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive = ModelArchive.from_pieces(task.archive.pieces(), directory)
        build = _keras_forward if archive.kind == KERAS else _saved_forward
        forward = build(tf, archive, task)
    _models[key] = forward
    while len(_models) > _KEPT_MODELS:
        _models.popitem(last=False)
    return forward


def import_tensorflow(threads: int) -> Any:
    """Import TensorFlow without its start-up messages, and set its threads where it is not yet in use.

    Parameters
    ----------
    threads : int
        Threads within one operation. Spark runs as many tasks as it has cores; a pool as wide as the machine
        in each of them would only make them wait for each other.
    """
    # As a node does it, for a fit may run in the same worker later.
    start_tensorflow(threads)
    import tensorflow as tf

    # Where TensorFlow is in use already, an earlier job's settings stay for the process's life.
    with contextlib.suppress(RuntimeError):
        for device in tf.config.list_physical_devices("GPU"):
            # Several workers share a GPU; TensorFlow would give all of its memory to the first.
            tf.config.experimental.set_memory_growth(device, True)
    return tf


def _task_threads() -> int:
    from pyspark import TaskContext

    context = TaskContext.get()
    return max(1, context.cpus()) if context is not None else 1


def _keras_forward(tf: Any, archive: ModelArchive, task: ScoringTask) -> Forward:
    import keras

    model = archive.load(custom_objects=task.custom_objects, compile=False, safe_mode=False)
    names = [spec.name for spec in task.signature.outputs]
    structure = _call_structure(model, task.signature)

    def call(*tensors: Any) -> list[Any]:
        result = model(keras.tree.pack_sequence_as(structure, list(tensors)), training=False)
        if isinstance(result, Mapping) and set(names) <= set(result):
            return [result[name] for name in names]
        return list(keras.tree.flatten(result))

    return _compiled(tf, call, task)


def _call_structure(model: Any, signature: ModelSignature) -> Any:
    """Return what the model is called with, with each input's position in the place of its tensor."""
    names = [spec.name for spec in signature.inputs]
    functional = getattr(model, "_functional", None) or model
    structure = getattr(functional, "_inputs_struct", None)
    if isinstance(structure, Mapping) or (structure is None and len(names) > 1):
        return {name: position for position, name in enumerate(names)}
    return 0 if len(names) == 1 else list(range(len(names)))


def _saved_forward(tf: Any, archive: ModelArchive, task: ScoringTask) -> Forward:
    with scratch_directory("sparktf-saved-model-") as directory:
        loaded = tf.saved_model.load(archive.unpack(directory))
    function = loaded.signatures[task.saved_signature]
    names = [spec.name for spec in task.signature.outputs]
    inputs = [spec.name for spec in task.signature.inputs]

    def call(*tensors: Any) -> list[Any]:
        result = function(**dict(zip(inputs, tensors, strict=True)))
        return [result[name] for name in names]

    forward = _compiled(tf, call, task)
    # The signature's function does not keep its variables alive; the object does.
    forward.__dict__["owner"] = loaded
    return forward


def _compiled(tf: Any, call: Callable[..., list[Any]], task: ScoringTask) -> Forward:
    """Trace the model once for every batch size, rather than once for each."""
    specs = [tf.TensorSpec((None, *spec.shape), spec.dtype) for spec in task.signature.inputs]
    small = (tf.float16, tf.bfloat16)

    def widened(*tensors: Any) -> list[Any]:
        return [tf.cast(t, tf.float32) if t.dtype in small else t for t in call(*tensors)]

    # Called itself, it spares each pass the search for the trace that fits: 0.15 ms of 0.4 ms beside the computing.
    function = tf.function(widened, input_signature=specs, autograph=False).get_concrete_function()

    def forward(tensors: list[np.ndarray]) -> list[np.ndarray]:
        given = [tf.constant(t, spec.dtype) for t, spec in zip(tensors, specs, strict=True)]
        return [result.numpy() for result in function(*given)]

    return forward


def _run(forward: Forward, task: ScoringTask, tensors: list[np.ndarray]) -> list[np.ndarray]:
    """Run the model in even slices of at most ``batch_size`` rows."""
    rows = len(tensors[0])
    if rows == 0:
        shapes = [(0, *(length or 0 for length in spec.shape)) for spec in task.signature.outputs]
        return [np.zeros(shape, np.float32) for shape in shapes]
    slices = -(-rows // task.batch_size)
    edges = [rows * i // slices for i in range(slices + 1)]
    parts = [forward([t[a:b] for t in tensors]) for a, b in pairwise(edges)]
    return parts[0] if slices == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _gather(batches: Iterator[tuple[pa.Array, ...]], rows: int) -> Iterator[tuple[pa.Array, ...]]:
    """Cut Arrow batches of any length anew into whole multiples of ``rows``, so that forward passes are full."""
    held: list[tuple[pa.Array, ...]] = []
    count = 0
    for arrays in batches:
        held.append(arrays)
        count += len(arrays[0])
        if count >= rows:
            joined = _joined(held)
            whole = count - count % rows
            yield tuple(array.slice(0, whole) for array in joined)
            count -= whole
            held = [tuple(array.slice(whole) for array in joined)] if count else []
    if held:
        yield _joined(held)


def _joined(held: list[tuple[pa.Array, ...]]) -> tuple[pa.Array, ...]:
    return held[0] if len(held) == 1 else tuple(pa.concat_arrays(parts) for parts in zip(*held, strict=True))


def _valid(array: pa.Array) -> np.ndarray | None:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    mask: np.ndarray | None = None
    if array.null_count:
        mask = array.is_valid().to_numpy(zero_copy_only=False)
    if is_list(array.type):
        # flatten() and list_parent_indices() both leave out what stands under a null list.
        inside = _valid(array.flatten())
        if inside is not None:
            mask = np.ones(len(array), bool) if mask is None else mask.copy()
            mask[pc.list_parent_indices(array).to_numpy()[~inside]] = False
    return mask
