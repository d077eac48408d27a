"""What goes into a spool comes out of it, and nothing stays on the disk."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import SpoolWriter
from sparktf.errors import DataError, ParamError

VECTOR = pa.struct(
    [
        ("type", pa.int8()),
        ("size", pa.int32()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)
bounded = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spool_of(directory, specs, batches, **more):
    with SpoolWriter(specs, str(directory), **more) as writer:
        for batch in batches:
            assert writer.append(batch) == batch.num_rows
        return writer.finish()


def vector(values, is_sparse):
    if not is_sparse:
        return {"type": 1, "size": None, "indices": None, "values": values}
    kept = [i for i, v in enumerate(values) if v]
    return {"type": 0, "size": len(values), "indices": kept, "values": [values[i] for i in kept]}


def split(table_rows, kind, cuts):
    """Cut one array into slices (with offsets), empty ones among them."""
    array = pa.array(table_rows, kind)
    ends = sorted(min(cut, len(table_rows)) for cut in cuts)
    bounds = zip([0, *ends], [*ends, len(table_rows)], strict=True)
    return [pa.record_batch({"x": array.slice(a, b - a)}) for a, b in bounds]


cuts = st.lists(st.integers(0, 30), max_size=5)
numbers = st.sampled_from([pa.float32(), pa.float64(), pa.int8(), pa.int64(), pa.uint8(), pa.int16()])


@bounded
@given(
    st.lists(st.lists(st.integers(0, 100), min_size=6, max_size=6), max_size=30),
    numbers,
    st.sampled_from(["flat", "nested", "fixed", "large"]),
    st.sampled_from([(6,), (2, 3), (None,), (2, 3, 1)]),
    cuts,
    st.randoms(use_true_random=False),
)
def test_lists_come_back_by_index_whatever_the_batches(tmp_path, rows, kind, nesting, shape, at, rng):
    lists = {
        "flat": pa.list_(kind),
        "nested": pa.list_(pa.list_(kind)),
        "fixed": pa.list_(kind, 6),
        "large": pa.large_list(kind),
    }[nesting]
    values = [[row[:3], row[3:]] for row in rows] if nesting == "nested" else rows
    spec = ColumnSpec("x", shape, "float32", "x")
    with spool_of(tmp_path, [spec], split(values, lists, at)) as spool:
        assert spool.rows == len(rows)
        indices = [rng.randrange(len(rows)) for _ in range(10)] if rows else []
        found = spool.take(np.array(indices, np.int64))["x"]
        full = (6,) if shape == (None,) and rows else tuple(d or 1 for d in shape)
        assert found.shape == (len(indices), *full)
        assert found.dtype == np.float32
        assert [row.reshape(-1).tolist() for row in found] == [rows[i] for i in indices]
        assert [row.reshape(-1).tolist() for row in spool.slice(0, len(rows))["x"]] == rows
        assert spool.nbytes == len(rows) * 6 * np.dtype(kind.to_pandas_dtype()).itemsize


@bounded
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([0.0, 1.5, -2.0]), min_size=4, max_size=4), st.booleans()),
        max_size=30,
    ),
    cuts,
)
def test_vectors_come_back_dense_whether_sparse_or_not(tmp_path, rows, at):
    stored = [vector(values, is_sparse) for values, is_sparse in rows]
    spec = ColumnSpec("x", (4,), "float32", "x")
    with spool_of(tmp_path, [spec], split(stored, VECTOR, at)) as spool:
        expected = [values for values, _ in rows]
        assert spool.take(np.arange(len(rows))[::-1])["x"].tolist() == expected[::-1]
        assert spool.slice(1, 3)["x"].tolist() == expected[1:3]
        if not any(is_sparse for _, is_sparse in rows):
            assert spool.nbytes == len(rows) * 4 * 8


@bounded
@given(
    st.lists(st.lists(st.text(max_size=5) | st.just("a\x00"), min_size=2, max_size=2), max_size=30),
    st.sampled_from([pa.string(), pa.large_string()]),
    cuts,
)
def test_strings_come_back_as_bytes_whatever_they_hold(tmp_path, rows, kind, at):
    spec = ColumnSpec("x", (2,), "string", "x")
    with spool_of(tmp_path, [spec], split(rows, pa.list_(kind), at)) as spool:
        expected = [[text.encode() for text in row] for row in rows]
        assert spool.take(np.arange(len(rows))[::-1])["x"].tolist() == expected[::-1]
        assert spool.slice(1, 4)["x"].tolist() == expected[1:4]


@bounded
@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), max_size=30))
def test_order_and_selection_follow_the_id_column(tmp_path, rows):
    batch = pa.record_batch(
        {
            "id": pa.array([i for i, _ in rows], pa.int64()),
            "v": pa.array([flag for _, flag in rows], pa.bool_()),
        }
    )
    specs = [ColumnSpec("v", (), "bool", "v", "validation")]
    with spool_of(tmp_path, specs, [batch], id_column="id") as spool:
        order = sorted(range(len(rows)), key=lambda i: rows[i][0])
        assert spool.order.tolist() == order
        training, validation = spool.select("v")
        assert training.tolist() == [i for i in order if not rows[i][1]]
        assert validation.tolist() == [i for i in order if rows[i][1]]
        assert list(spool.columns) == ["v"]


def test_without_an_id_column_the_order_is_that_of_arrival(tmp_path):
    with spool_of(tmp_path, [SCALAR], [pa.record_batch({"x": [3, 1, 2]})]) as spool:
        assert spool.order.tolist() == [0, 1, 2]


SCALAR = ColumnSpec("x", (), "float32", "x")


def test_a_column_keeps_its_own_dtype_on_disk_and_is_cast_when_taken(tmp_path):
    batch = pa.record_batch({"x": pa.array([1, 2, 255], pa.uint8())})
    with spool_of(tmp_path, [SCALAR], [batch]) as spool:
        assert spool.nbytes == 3
        assert spool.take(np.array([2]))["x"].dtype == np.float32


def test_bfloat16_columns_are_cast_too(tmp_path):
    spec = ColumnSpec("x", (), "bfloat16", "x")
    with spool_of(tmp_path, [spec], [pa.record_batch({"x": [1.5]})]) as spool:
        assert spool.take(np.array([0]))["x"].dtype.name == "bfloat16"


@pytest.mark.parametrize("batches", [[], [pa.record_batch({"x": pa.array([], pa.list_(pa.float32()))})]])
def test_a_partition_without_rows_works(tmp_path, batches):
    spec = ColumnSpec("x", (3, None), "float32", "x")
    with spool_of(tmp_path, [spec], batches) as spool:
        assert (spool.rows, spool.nbytes) == (0, 0)
        assert spool.order.shape == (0,)
        assert spool.take(spool.order)["x"].shape == (0, 3, 1)
        assert spool.columns["x"].shape == (3, None)


def test_no_file_is_in_the_directory_even_while_the_spool_is_open(tmp_path):
    with SpoolWriter([SCALAR], str(tmp_path)) as writer:
        writer.append(pa.record_batch({"x": [1.0]}))
        assert os.listdir(tmp_path) == []
        with writer.finish():
            assert os.listdir(tmp_path) == []


def test_nothing_is_left_after_a_kill(tmp_path):
    program = (
        "import os, signal, sys, pyarrow as pa\n"
        "from sparktf.data.columns import ColumnSpec\n"
        "from sparktf.data.spool import SpoolWriter\n"
        "w = SpoolWriter([ColumnSpec('x', (), 'float32', 'x')], sys.argv[1])\n"
        "w.append(pa.record_batch({'x': [1.0]}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_child_process_opens_the_spool_by_inherited_descriptors(tmp_path):
    batch = pa.record_batch(
        {
            "x": pa.array([[1.0, 2.0], [3.0, 4.0]]),
            "s": pa.array(["ä", "b"]),
            "v": pa.array([vector([0.0, 1.0], True), vector([2.0, 3.0], False)], VECTOR),
            "id": pa.array([7, 3], pa.int64()),
        }
    )
    specs = [ColumnSpec("x", (2,), "float32", "x"), ColumnSpec("s", (), "string", "s")]
    specs.append(ColumnSpec("v", (2,), "float32", "v"))
    program = (
        "import json, sys\n"
        "from sparktf.data.spool import Spool\n"
        "with Spool.from_fds(json.loads(sys.argv[1]), json.loads(sys.argv[2])) as spool:\n"
        "    got = spool.take(spool.order)\n"
        "print(json.dumps([got['x'].tolist(), [s.decode() for s in got['s']], got['v'].tolist()]))\n"
    )
    with spool_of(tmp_path, specs, [batch], id_column="id") as spool:
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(spool.describe()), json.dumps(spool.fds())],
            pass_fds=spool.fds(),
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert json.loads(done.stdout) == [[[3, 4], [1, 2]], ["b", "ä"], [[2, 3], [0, 1]]]
        assert spool.take(np.array([0]))["x"].tolist() == [[1, 2]]


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_are_given_back_by_close_by_collection_and_on_failure(tmp_path):
    gc.collect()
    before = open_descriptors()
    batch = pa.record_batch({"x": [1.0]})
    spool = spool_of(tmp_path, [SCALAR], [batch])
    spool.close()
    spool.close()
    assert open_descriptors() == before
    spool = spool_of(tmp_path, [SCALAR], [batch])
    del spool
    gc.collect()
    assert open_descriptors() == before
    with pytest.raises(DataError, match="1 null"):
        spool_of(tmp_path, [SCALAR], [pa.record_batch({"x": [1.0, None]})])
    with pytest.raises(DataError, match="not in the feed"):
        spool_of(tmp_path, [SCALAR], [pa.record_batch({"y": [1.0]})])
    gc.collect()
    assert open_descriptors() == before


def test_a_view_outlives_its_spool(tmp_path):
    spool = spool_of(tmp_path, [SCALAR], [pa.record_batch({"x": pa.array([1, 2], pa.float32())})])
    view = spool.slice(0, 2)["x"]
    spool.close()
    assert view.tolist() == [1, 2]
    with pytest.raises(ParamError, match="closed"):
        spool.take(np.array([0]))


def test_every_faulty_column_is_named_at_once(tmp_path):
    specs = [SCALAR, ColumnSpec("y", (), "float32", "other")]
    with pytest.raises(DataError, match=r"(?s)'x'.*1 null.*'other'.*1 NaN"):
        spool_of(tmp_path, specs, [pa.record_batch({"x": [1.0, None], "y": [float("nan"), 1.0]})])


def test_a_column_may_not_change_its_type_within_a_partition(tmp_path):
    batches = [pa.record_batch({"x": pa.array([1], kind)}) for kind in (pa.int32(), pa.float32())]
    with pytest.raises(DataError, match="int32 before, float now"):
        spool_of(tmp_path, [SCALAR], batches)


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(ParamError, match="different names"):
        SpoolWriter([SCALAR, SCALAR], str(tmp_path))


def test_an_unknown_column_is_named_with_the_known_ones(tmp_path):
    with (
        spool_of(tmp_path, [SCALAR], [pa.record_batch({"x": [1.0]})]) as spool,
        pytest.raises(ParamError, match=r"'nope'.*\['x'\]"),
    ):
        spool.take(np.array([0]), ["nope"])


def test_an_index_beyond_the_rows_is_an_error(tmp_path):
    with (
        spool_of(tmp_path, [SCALAR], [pa.record_batch({"x": [1.0]})]) as spool,
        pytest.raises(IndexError),
    ):
        spool.take(np.array([1]))


def test_a_full_disk_is_named_as_such():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    from sparktf.data.storage import ScratchFile
    from sparktf.errors import ClusterError

    scratch = ScratchFile("/tmp")
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), scratch._file.fileno())
    with pytest.raises(ClusterError, match=r"no space left in /tmp.*SPARK_LOCAL_DIRS"):
        scratch.append(np.ones(10))
    scratch.close()
