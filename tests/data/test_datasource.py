"""TFRecord files as a format of Spark's readers and writers, against TensorFlow's own reader and writer."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tensorflow as tf
from pyarrow import fs
from pyspark.errors import PythonException
from pyspark.sql.types import StructType

from sparktf.data.datasource import TFRecordDataSource, arrow_schema
from sparktf.data.tfdata_example import features_of, read_examples, record_dataset, write_examples
from sparktf.errors import DataError, ParamError

LOCAL = pa.fs.LocalFileSystem()


@pytest.fixture(scope="module")
def registered(spark: Any) -> Any:
    spark.dataSource.register(TFRecordDataSource)
    return spark


def every_type(spark: Any, rows: int) -> Any:
    # Each task may be a process that has to import TensorFlow first.
    return spark.range(0, rows, 1, 2).selectExpr(
        "id",
        "cast(id as short) as small",
        "id % 2 = 0 as flag",
        "cast(id / 3 as float) as x",
        "cast(id as double) / 4 as wide",
        "if(id % 3 = 0, null, cast(id as string)) as text",
        "encode(cast(id as string), 'utf-8') as raw",
        "if(id % 5 = 0, null, array(id, id + 1)) as pair",
        "array(1.5f, cast(id as float)) as floats",
        "array('ä', cast(id as string)) as texts",
        "array_repeat(id, cast(id % 3 as int)) as ragged",
    )


def test_what_spark_writes_spark_reads(registered: Any, tmp_path: Path) -> None:
    frame, path = every_type(registered, 100), str(tmp_path / "records")
    frame.write.format("tfrecord").mode("append").save(path)
    read = registered.read.format("tfrecord").schema(frame.schema).load(path)
    # A record cannot tell a null from an empty array.
    expected = [row.asDict() | {"pair": row.pair or []} for row in frame.orderBy("id").collect()]
    assert [row.asDict() for row in read.orderBy("id").collect()] == expected

    frame.limit(7).write.format("tfrecord").mode("overwrite").save(path)
    assert registered.read.format("tfrecord").schema("id long").load(path).count() == 7
    assert all(name.name.startswith("part-") for name in Path(path).iterdir())


def test_the_schema_is_told_from_the_records(registered: Any, tmp_path: Path) -> None:
    schema = arrow_schema(every_type(registered, 1).schema)
    names = ["id", "x", "raw", "pair", "ragged"]
    rows = {"id": [0, 1], "x": [0.5, 1.5], "raw": [b"0", b"1"], "pair": [None, [1, 2]], "ragged": [[3], []]}
    batch = pa.RecordBatch.from_pydict(rows, schema=pa.schema([schema.field(name) for name in names]))
    write_examples(LOCAL, str(tmp_path / "part-0.tfrecord"), [batch])
    frame = registered.read.format("tfrecord").load(str(tmp_path))
    # A record may have no pair, and one value is no array, whatever it was written from.
    assert frame.schema.simpleString() == "struct<id:bigint,pair:array<bigint>,ragged:bigint,raw:binary,x:float>"
    assert [tuple(row) for row in frame.orderBy("id").collect()] == [
        (0, [], 3, bytearray(b"0"), 0.5),
        (1, [1, 2], None, bytearray(b"1"), 1.5),
    ]


def test_tensorflow_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    path = str(tmp_path / "records")
    batch = pa.RecordBatch.from_pydict({"x": [[1.5, 2.5], [3.5, 4.5]], "n": [7, None], "t": ["a", "b"]})
    write_examples(LOCAL, path, [batch, batch.slice(1)])
    features = {
        "x": tf.io.FixedLenFeature([2], tf.float32),
        "n": tf.io.FixedLenFeature([], tf.int64, default_value=-1),
        "t": tf.io.FixedLenFeature([], tf.string),
    }
    parsed = [tf.io.parse_single_example(record, features) for record in tf.data.TFRecordDataset(path)]
    assert [row["x"].numpy().tolist() for row in parsed] == [[1.5, 2.5], [3.5, 4.5], [3.5, 4.5]]
    assert [int(row["n"]) for row in parsed] == [7, -1, -1]
    assert [row["t"].numpy() for row in parsed] == [b"a", b"b", b"b"]

    zipped = str(tmp_path / "records.gz")
    with tf.io.TFRecordWriter(zipped, "GZIP") as writer:
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            writer.write(record)
    schema = pa.schema({"x": pa.list_(pa.float64()), "n": pa.int8(), "t": pa.string(), "absent": pa.bool_()})
    (read,) = read_examples(LOCAL, zipped, schema)
    assert read.to_pylist()[:2] == [
        {"x": [1.5, 2.5], "n": 7, "t": "a", "absent": None},
        {"x": [3.5, 4.5], "n": None, "t": "b", "absent": None},
    ]


def test_files_elsewhere_are_read_too(tmp_path: Path) -> None:
    elsewhere = pa.fs.SubTreeFileSystem(str(tmp_path), LOCAL)
    write_examples(elsewhere, "records", [pa.RecordBatch.from_pydict({"n": [1, 2]})])
    (read,) = read_examples(elsewhere, "records", pa.schema({"n": pa.int64()}))
    assert read.to_pydict() == {"n": [1, 2]}
    assert features_of(elsewhere, "records", 10) == {"n": ("int64", 1)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.int64(), "expected one value a record, received 2"),
        (pa.list_(pa.int8()), "300"),
        (pa.list_(pa.float32()), "Data types don't match"),
    ],
)
def test_features_that_do_not_fit_the_schema_are_named(kind: pa.DataType, message: str, tmp_path: Path) -> None:
    path = str(tmp_path / "records")
    write_examples(LOCAL, path, [pa.RecordBatch.from_pydict({"a": [[1, 300]]})])
    with pytest.raises(DataError, match=message) as caught:
        list(read_examples(LOCAL, path, pa.schema({"a": kind})))
    assert "a" in str(caught.value)


def test_damaged_and_impossible_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records"
    write_examples(LOCAL, str(path), [pa.RecordBatch.from_pydict({"a": [1, 2]})])
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="corrupted record"):
        list(read_examples(LOCAL, str(path), pa.schema({"a": pa.int64()})))
    with pytest.raises(DataError, match="without nulls"):
        write_examples(LOCAL, str(path), [pa.RecordBatch.from_pydict({"a": [[1, None]]})])
    write_examples(LOCAL, str(path), [pa.RecordBatch.from_pydict({"a": [None]}, schema=pa.schema({"a": pa.int64()}))])
    with pytest.raises(DataError, match="a value in every record"):
        list(read_examples(LOCAL, str(path), pa.schema([pa.field("a", pa.int64(), nullable=False)])))
    with pytest.raises(DataError, match=r"'m'.*map<string,int>.*Cast it"):
        arrow_schema(StructType.fromDDL("m map<string, int>"))


def test_a_failed_write_leaves_the_old_files_alone(registered: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "records")
    write = registered.range(0, 10, 1, 2).write.format("tfrecord").mode("append")
    write.save(path)
    before = sorted(tmp_path.glob("records/part-*"))
    broken = registered.range(0, 10, 1, 2).selectExpr("array(id, if(id = 9, null, id)) as a")
    with pytest.raises(PythonException, match="without nulls"):
        broken.write.format("tfrecord").mode("overwrite").save(path)
    # Spark aborts a write while its last tasks may still be at it: a hidden directory may be left, nobody reads it.
    assert sorted(tmp_path.glob("records/part-*")) == before
    assert registered.read.format("tfrecord").schema("id long").load(path).count() == 10


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing"):
        TFRecordDataSource({"path": str(tmp_path / "absent")}).schema()
    with pytest.raises(DataError, match="expected records"):
        TFRecordDataSource({"path": str(tmp_path)}).schema()
    with pytest.raises(ParamError, match="one path"):
        TFRecordDataSource({}).schema()
    with pytest.raises(ParamError, match="wasb://there"):
        TFRecordDataSource({"path": "wasb://there"}).schema()


def test_records_come_from_any_file_system_and_leave_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for number in range(3):
        options = tf.io.TFRecordOptions(compression_type="GZIP" if number == 1 else "")
        name = tmp_path / f"{number}.tfrecord{'.gz' if number == 1 else ''}"
        with tf.io.TFRecordWriter(str(name), options) as writer:
            for record in range(5):
                writer.write(f"{number} {record}".encode())
    elsewhere = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    names = ["0.tfrecord", "1.tfrecord.gz", "2.tfrecord"]
    records = list(record_dataset(elsewhere, names).as_numpy_iterator())
    assert records == [f"{number} {record}".encode() for number in range(3) for record in range(5)]
    # Who stops within the second file does not open the third.
    names[2] = "not there"
    assert len(list(record_dataset(elsewhere, names).take(7).as_numpy_iterator())) == 7
    gc.collect()
    assert list(scratch.iterdir()) == []
