"""Files of ``tf.train.Example`` records to and from Arrow batches.

TensorFlow checks, parses and writes the records: of each column it gives all values of a batch and where each row's
begin, which is how Arrow keeps lists too, so that nothing is done row by row when reading.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as types
from pyarrow import fs

from sparktf.errors import DataError
from sparktf.quiet import quiet_stderr

# Of a batch that goes to Spark; its own batches of Arrow data have as many rows.
BATCH_ROWS = 10_000
_COPY_BYTES = 8 << 20


def read_examples(system: Any, path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield a file's records as Arrow batches.

    Parameters
    ----------
    system : pyarrow.fs.FileSystem
    path : str
    schema : pyarrow.Schema
        The features to read, and as what; those that a record does not have are null, or empty lists.

    Raises
    ------
    DataError
        The file is damaged, or a feature holds values of another kind, or several where the schema has one.
    """
    tf = _tensorflow()
    specs = {field.name: tf.io.RaggedFeature(_dtype(tf, field.type), row_splits_dtype=tf.int32) for field in schema}
    with _local(system, path) as name:
        try:
            for records in _records(tf, name, path).batch(BATCH_ROWS):
                parsed = tf.io.parse_example(records, specs)
                arrays = [_array(field, parsed[field.name]) for field in schema]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        except tf.errors.OpError as error:
            raise DataError(f"tfrecord: {path!r}: expected records with {schema}, received {error.message}") from error


def record_dataset(system: Any, paths: Sequence[str]) -> Any:
    """Return the records of TFRecord files on any file system that pyarrow knows, as `tf.data.TFRecordDataset` does.

    TensorFlow from PyPI opens local files only. Of others one at a time is copied to the local disk, into the
    temporary directory, and removed once it was read.

    Parameters
    ----------
    system : pyarrow.fs.FileSystem
    paths : sequence of str
        On `system`; gzipped where they end in ``.gz``.

    Returns
    -------
    tf.data.Dataset
        Of records, scalar strings, in the files' order; for ``tf.io.parse_example`` and the like.
    """
    tf = _tensorflow()

    def names() -> Iterator[tuple[str, str]]:
        for path in paths:
            with _local(system, path) as name:
                # The next is asked for when this one was read to its end.
                yield name, _compression(path)

    text = tf.TensorSpec((), tf.string)
    return tf.data.Dataset.from_generator(names, output_signature=(text, text)).flat_map(tf.data.TFRecordDataset)


def features_of(system: Any, path: str, limit: int) -> dict[str, tuple[str, int]]:
    """Return what a file's first records hold: by feature the kind of its values, and the most that one record has.

    Kinds are ``"int64"``, ``"float"`` and ``"bytes"``; features without any value are left out.

    Raises
    ------
    DataError
        The file is damaged.
    """
    tf = _tensorflow()
    found: dict[str, tuple[str, int]] = {}
    with _local(system, path) as name:
        try:
            for record in _records(tf, name, path).take(limit).as_numpy_iterator():
                for feature, kind, count in _counted(tf.train.Example.FromString(record)):
                    found[feature] = kind, max(count, found.get(feature, (kind, 0))[1])
        except tf.errors.OpError as error:
            raise DataError(f"tfrecord: {path!r}: expected records, received {error.message}") from error
    return found


def _records(tf: Any, name: str, path: str) -> Any:
    options = tf.data.Options()
    # There is nothing to tune; and an iterator that ends may have to wait for TensorFlow's tuner, which sleeps for as
    # long as it has lived, up to a minute, and misses at times that it is woken.
    options.autotune.enabled = False
    return tf.data.TFRecordDataset(name, _compression(path)).with_options(options)


def _counted(example: Any) -> Iterator[tuple[str, str, int]]:
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind and (count := len(getattr(feature, kind).value)):
            yield name, kind.removesuffix("_list"), count


def write_examples(system: Any, path: str, batches: Iterable[pa.RecordBatch]) -> None:
    """Write Arrow batches as one file of records; nulls are left out.

    Parameters
    ----------
    system : pyarrow.fs.FileSystem
    path : str
        Replaced where it exists.
    batches : iterable of pyarrow.RecordBatch
        Of numbers, booleans, strings, binary columns and lists of them.

    Raises
    ------
    DataError
        A list holds a null.
    """
    tf = _tensorflow()
    with tempfile.TemporaryDirectory(prefix="sparktf-") as directory:
        name = os.path.join(directory, "records")
        with tf.io.TFRecordWriter(name) as writer:
            for batch in batches:
                columns = [_features(tf, field.name, batch.column(n)) for n, field in enumerate(batch.schema)]
                for row in zip(*columns, strict=True):
                    features = {
                        f.name: feature for f, feature in zip(batch.schema, row, strict=True) if feature is not None
                    }
                    writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
        with open(name, "rb") as source, system.open_output_stream(path) as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)


def _dtype(tf: Any, kind: pa.DataType) -> Any:
    inner = kind.value_type if types.is_list(kind) else kind
    if types.is_string(inner) or types.is_binary(inner):
        return tf.string
    return tf.float32 if types.is_floating(inner) else tf.int64


def _array(field: pa.Field, ragged: Any) -> pa.Array:
    """Make an Arrow column of a batch's values and row splits."""
    name, kind = field.name, field.type
    splits, listed = ragged.row_splits.numpy(), types.is_list(kind)
    values = pa.array(ragged.values.numpy())
    try:
        values = values.cast(kind.value_type if listed else kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"tfrecord: feature {name!r}: expected {kind}, received other values: {error}.") from error
    if listed:
        return pa.ListArray.from_arrays(pa.array(splits), values, type=kind)
    lengths = np.diff(splits)
    if lengths.max(initial=0) > 1:
        raise DataError(
            f"tfrecord: feature {name!r}: expected one value a record, received {lengths.max()}. Read it as an array: "
            f'.schema("`{name}` array<...>, ...").'
        )
    if not field.nullable and lengths.min(initial=1) == 0:
        raise DataError(f"tfrecord: feature {name!r}: expected a value in every record, received a record without it.")
    return values.take(pa.array(splits[:-1], mask=lengths == 0))


def _features(tf: Any, name: str, column: pa.Array) -> Iterator[Any]:
    """Yield a column's features row by row; None for nulls."""
    listed = types.is_list(column.type) or types.is_large_list(column.type)
    inner = column.flatten() if listed else column
    if listed and inner.null_count:
        raise DataError(f"tfrecord: column {name!r}: expected arrays without nulls, received {inner.null_count} nulls.")
    make, values = _maker(tf, inner)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    # Of a null row neither length nor values are kept by flatten().
    lengths = column.value_lengths().fill_null(0).to_numpy() if listed else present.astype(np.int64)
    ends = np.cumsum(lengths)
    for valid, start, end in zip(present, ends - lengths, ends, strict=True):
        yield make(values[start:end]) if valid else None


def _maker(tf: Any, column: pa.Array) -> tuple[Any, Any]:
    """Return what makes a feature, and the values without nulls as it takes them."""
    column = column.drop_null()
    if types.is_floating(column.type):
        return lambda part: tf.train.Feature(float_list=tf.train.FloatList(value=part)), column.to_numpy()
    if types.is_integer(column.type) or types.is_boolean(column.type):
        integers = column.cast(pa.int64()).to_numpy()
        return lambda part: tf.train.Feature(int64_list=tf.train.Int64List(value=part)), integers
    texts = column.cast(pa.large_binary()).to_pylist()
    return lambda part: tf.train.Feature(bytes_list=tf.train.BytesList(value=part)), texts


def _compression(path: str) -> str:
    return "GZIP" if path.endswith(".gz") else ""


@contextlib.contextmanager
def _local(system: Any, path: str) -> Iterator[str]:
    """Give a file's name on this machine, where TensorFlow reads it whatever file system it comes from."""
    if isinstance(system, fs.LocalFileSystem):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="sparktf-") as copy:
        with system.open_input_stream(path, compression=None) as source:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
        copy.flush()
        yield copy.name


def _tensorflow() -> Any:
    with quiet_stderr():
        import tensorflow as tf
    return tf
