"""TFRecord files of ``tf.train.Example`` as a format of Spark's own readers and writers.

``spark.dataSource.register(TFRecordDataSource)`` once a session, then ``spark.read.format("tfrecord")`` and
``df.write.format("tfrecord")``. The files' bytes are TensorFlow's business (`sparktf.data.tfdata_example`); this module
tells Spark which files there are, and makes written ones appear together.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs
from pyspark.sql.datasource import (
    DataSource,
    DataSourceArrowWriter,
    DataSourceReader,
    InputPartition,
    WriterCommitMessage,
)
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    ByteType,
    DataType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    ShortType,
    StringType,
    StructField,
    StructType,
)

from sparktf.errors import DataError, ParamError

_ARROW: dict[type[DataType], pa.DataType] = {
    BooleanType: pa.bool_(),
    ByteType: pa.int8(),
    ShortType: pa.int16(),
    IntegerType: pa.int32(),
    LongType: pa.int64(),
    FloatType: pa.float32(),
    DoubleType: pa.float64(),
    StringType: pa.string(),
    BinaryType: pa.binary(),
}
# Records that tell the schema where the user does not.
_INFERRED_FROM = 1000
_INFERRED: dict[str, DataType] = {"int64": LongType(), "float": FloatType(), "bytes": BinaryType()}


class TFRecordDataSource(DataSource):
    """``spark.read.format("tfrecord").load(path)`` and ``df.write.format("tfrecord").mode(...).save(path)``.

    A path is a directory, a file, or either as a URI that pyarrow knows (``s3://``, ``gs://``, ``hdfs://`` with
    libhdfs, ``fsspec+hdfs://`` with hdfs-native); of a directory all files count whose names begin with neither "."
    nor "_". Each file is read by one task; files end in ``.gz`` where they are compressed so. Written files are called
    ``part-*.tfrecord``; modes are append and overwrite.

    Numbers, booleans, strings, binary columns and arrays of them are features: integers int64, floating ones float32,
    which is all that ``tf.train.Example`` has. Nulls are left out; what a record does not have is null in a plain
    column, and an empty array in one of arrays.

    The schema is the user's (``.schema(...)``), or is told from the first file's first thousand records: features of
    one value are plain columns, and bytes binary, as nothing in a record tells text from other bytes.
    """

    @classmethod
    def name(cls) -> str:
        """Return the name of the format."""
        return "tfrecord"

    def schema(self) -> StructType:
        """Infer the schema from the first file that has records.

        Raises
        ------
        DataError
            There is none.
        """
        from sparktf.data.tfdata_example import features_of

        system, files = _files(self._path())
        for file in files:
            if features := features_of(system, file, _INFERRED_FROM):
                return StructType(
                    [
                        StructField(name, ArrayType(_INFERRED[kind]) if count > 1 else _INFERRED[kind])
                        for name, (kind, count) in sorted(features.items())
                    ]
                )
        raise DataError(f"tfrecord: expected records in {self._path()!r} to tell the columns from, received none.")

    def reader(self, schema: StructType) -> DataSourceReader:
        """Return what reads the files."""
        return _Reader(self._path(), arrow_schema(schema))

    def writer(self, schema: StructType, overwrite: bool) -> DataSourceArrowWriter:
        """Return what writes them."""
        arrow_schema(schema)
        return _Writer(self._path(), overwrite)

    def _path(self) -> str:
        path: str = self.options.get("path", "")
        if not path:
            raise ParamError("tfrecord: expected one path, load(path) or save(path), received none or several.")
        return path


def arrow_schema(schema: StructType) -> pa.Schema:
    """Return the Arrow types of a DataFrame's columns.

    Raises
    ------
    DataError
        A column has a type that no feature of ``tf.train.Example`` has.
    """
    fields = []
    for field in schema.fields:
        inner = field.dataType.elementType if isinstance(field.dataType, ArrayType) else field.dataType
        if type(inner) not in _ARROW:
            raise DataError(
                f"tfrecord: column {field.name!r}: expected numbers, booleans, strings, binary or arrays of them, "
                f"received {field.dataType.simpleString()}. Cast it, or leave it out."
            )
        kind = _ARROW[type(inner)]
        if isinstance(field.dataType, ArrayType):
            kind = pa.list_(pa.field("element", kind, field.dataType.containsNull))
        fields.append(pa.field(field.name, kind, field.nullable))
    return pa.schema(fields)


@dataclass
class _File(InputPartition):
    path: str


class _Reader(DataSourceReader):
    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema

    def partitions(self) -> list[InputPartition]:
        return [_File(file) for file in _files(self._path)[1]]

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        from sparktf.data.tfdata_example import read_examples

        assert isinstance(partition, _File)
        yield from read_examples(_file_system(self._path)[0], partition.path, self._schema)


@dataclass
class _Written(WriterCommitMessage):
    name: str


class _Writer(DataSourceArrowWriter):
    """Writes into a hidden directory beside the files, and moves them in when all tasks are done.

    A task that still writes when another has failed may make that directory anew after `abort`; readers skip it.
    """

    def __init__(self, path: str, overwrite: bool) -> None:
        self._path, self._overwrite = path, overwrite
        self._hidden = f"_temporary-{uuid.uuid4().hex[:12]}"

    def write(self, iterator: Iterator[pa.RecordBatch]) -> WriterCommitMessage:
        from pyspark import TaskContext

        from sparktf.data.tfdata_example import write_examples

        context = TaskContext.get()
        assert context is not None  # Spark calls this in a task
        system, place = _file_system(self._path)
        name = f"part-{context.partitionId():05d}-{uuid.uuid4().hex[:12]}.tfrecord"
        system.create_dir(f"{place}/{self._hidden}", recursive=True)
        write_examples(system, f"{place}/{self._hidden}/{name}", iterator)
        return _Written(name)

    def commit(self, messages: list[WriterCommitMessage | None]) -> None:
        system, place = _file_system(self._path)
        if self._overwrite:
            for file in _visible(system, place):
                system.delete_file(file)
        for message in messages:
            assert isinstance(message, _Written)
            system.move(f"{place}/{self._hidden}/{message.name}", f"{place}/{message.name}")
        system.delete_dir(f"{place}/{self._hidden}")

    def abort(self, messages: list[WriterCommitMessage | None]) -> None:
        system, place = _file_system(self._path)
        if system.get_file_info(f"{place}/{self._hidden}").type == fs.FileType.Directory:
            system.delete_dir(f"{place}/{self._hidden}")


def _files(path: str) -> tuple[Any, list[str]]:
    system, place = _file_system(path)
    kind = system.get_file_info(place).type
    if kind == fs.FileType.NotFound:
        raise DataError(f"tfrecord: expected files at {path!r}, received a path at which there is nothing.")
    return system, [place] if kind == fs.FileType.File else _visible(system, place)


def _visible(system: Any, place: str) -> list[str]:
    found = system.get_file_info(fs.FileSelector(place, allow_not_found=True))
    return sorted(info.path for info in found if info.is_file and info.base_name[0] not in "._")


def _file_system(path: str) -> tuple[Any, str]:
    try:
        system, place = fs.FileSystem.from_uri(path if ":/" in path else os.path.abspath(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ParamError(f"tfrecord: expected a path or URI that pyarrow knows, received {path!r}: {error}.") from error
    return system, place.rstrip("/")
