"""`sparktf.run` on a local session: nodes find each other, are fed, return, and end; on failure too."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import programs
import psutil
import pytest

from sparktf import run
from sparktf.errors import ClusterError, DataError, NodeError, ParamError, SlotsError, TransportError

pytestmark = pytest.mark.usefixtures("no_leftovers")

# Of a loaded machine that imports TensorFlow twice; failures themselves are seen within ten.
_START = 60.0
_PROMISED_SECONDS = 10.0


def test_every_node_knows_its_place(spark: Any) -> None:
    nodes = run(programs.who, {"rate": 0.5}, spark=spark, num_workers=2, num_ps=1)
    assert [n["job_name"] for n in nodes] == ["chief", "worker", "ps"]
    assert [n["rank"] for n in nodes] == [0, 1, 2]
    assert [n["is_chief"] for n in nodes] == [True, False, False]
    assert all(n["args"] == {"rate": 0.5} and n["world_size"] == 3 for n in nodes)
    spec = nodes[0]["cluster_spec"]
    assert {job: len(addresses) for job, addresses in spec.items()} == {"chief": 1, "worker": 1, "ps": 1}
    assert all(n["cluster_spec"] == spec and json.loads(n["tf_config"])["cluster"] == spec for n in nodes)
    assert json.loads(nodes[1]["tf_config"])["task"] == {"type": "worker", "index": 0}
    assert len({n["pid"] for n in nodes}) == 3


def test_servers_serve_until_the_workers_are_done(spark: Any) -> None:
    assert run(programs.total, spark=spark, num_workers=2, num_ps=1, protocol="tcp") == [3.0, 3.0, -1.0]


def test_a_plain_tensorflow_program_joins_and_is_let_go(spark: Any) -> None:
    assert run(programs.joins_a_server, spark=spark, num_workers=2) == ["6.0", "joined"]


@pytest.mark.long
def test_a_server_that_never_looks_up_is_stopped(spark: Any) -> None:
    assert run(programs.never_stops_serving, spark=spark, num_workers=1, num_ps=1) == ["chief", None]


def test_without_a_cluster_nodes_are_on_their_own(spark: Any) -> None:
    nodes = run(programs.who, spark=spark, num_workers=2, cluster=False)
    assert [(n["rank"], n["cluster_spec"], n["tf_config"]) for n in nodes] == [(0, {}, None), (1, {}, None)]


def test_the_kept_port_is_nobody_elses_and_then_tensorflows(spark: Any) -> None:
    assert run(programs.takes_a_port, spark=spark) == ["OSError, then True"]


@pytest.mark.parametrize("how", ["server", pytest.param("strategy", marks=pytest.mark.long)])
def test_a_node_whose_port_was_taken_is_named_with_the_port_in_time(spark: Any, tmp_path: Path, how: str) -> None:
    when = tmp_path / "when"
    # The other worker waits for this one, or serves.
    with pytest.raises(TransportError, match=r"^rank 1 \(worker 0\): ") as raised:
        run(programs.loses_its_port, (how, str(when)), spark=spark, num_workers=2)
    address, taken = when.read_text().split()
    assert time.time() - float(taken) < _PROMISED_SECONDS
    assert f"listen on {address}" in str(raised.value)
    assert "Run again for another port" in str(raised.value)
    (note,) = raised.value.__notes__
    assert "in loses_its_port" in note


def test_every_row_is_fed_once_in_as_many_batches_on_each_worker(spark: Any) -> None:
    frames = {
        "train": spark.range(101).selectExpr("id as x", "cast(id as float) as y"),
        "validation": spark.range(10).selectExpr("id + 1000 as x"),
    }
    results = run(programs.rows, ["validation", "train", "validation"], spark=spark, num_workers=2, dataset=frames)
    for place, expected in enumerate([sum(range(1000, 1010)), sum(range(101)), sum(range(1000, 1010))]):
        assert sum(found[place][1] for found in results) == expected
        assert len({found[place][0] for found in results}) == 1


def test_columns_come_in_their_own_dtypes_and_under_their_own_names(spark: Any) -> None:
    frame = spark.sql(
        "select 1Y as b, 2S as s, 3 as i, 4L as l, 1.5F as f, 2.5D as d, 1.25BD as m, true as t, 'é' as u, "
        "array(1, 2) as a, array(array(1.0F), array(2.0F)) as n"
    )
    expected = {
        "b": ("int8", (None,), 1),
        "s": ("int16", (None,), 2),
        "i": ("int32", (None,), 3),
        "l": ("int64", (None,), 4),
        "f": ("float32", (None,), 1.5),
        "d": ("float64", (None,), 2.5),
        "m": ("float64", (None,), 1.25),
        "t": ("bool", (None,), True),
        "u": ("string", (None,), "é".encode()),
        "a": ("int32", (None, 2), [1, 2]),
        "n": ("float32", (None, 2, 1), [[1.0], [2.0]]),
    }
    # Whatever Spark makes of them.
    names = {"b": "a.b", "s": "c`d ", "i": "x", "l": "X"}
    expected = {names.get(name, name): found for name, found in expected.items()}
    frame = frame.toDF(*expected)
    assert run(programs.reads_as_tensorflow, spark=spark, dataset=frame) == [expected]
    two = {"one": frame, "other": spark.range(3)}
    assert run(programs.reads_as_tensorflow, "one", spark=spark, dataset=two) == [expected]


def test_a_stream_that_is_left_early_begins_with_the_first_rows(spark: Any) -> None:
    frame = spark.range(0, 1000, 1, 1).selectExpr("id as x")
    (first,) = run(programs.streams_a_little, spark=spark, dataset=frame)
    assert first == sum(range(10))


def test_a_worker_that_stops_early_holds_nobody_up_where_rows_are_spooled_whole(spark: Any) -> None:
    frame = spark.range(0, 60, 1, 2).selectExpr("id as x")
    assert run(programs.one_leaves, False, spark=spark, num_workers=2, dataset=frame) == [10, 30]


def test_nulls_are_counted_over_the_whole_dataframe(spark: Any) -> None:
    frame = spark.range(100).selectExpr("if(id % 10 = 0, null, id) as x")
    with pytest.raises(DataError, match=r"column 'x'.*10 nulls in the 100 rows"):
        run(programs.rows, spark=spark, num_workers=2, dataset=frame)


def test_a_column_that_no_tensor_holds_is_named_before_anything_starts(spark: Any) -> None:
    with pytest.raises(DataError, match=r"'when'.*timestamp"):
        run(programs.rows, spark=spark, dataset=spark.sql("select current_timestamp() as when"))


@pytest.mark.long
def test_keras_fit_averages_gradients_from_the_chiefs_weights_on_over_our_ring_and_tensorflows(spark: Any) -> None:
    frame = spark.range(64).selectExpr("array(rand(1), rand(2)) as x", "rand(3) as y")
    found = {}
    for protocol in ("tcp", "grpc"):
        results = run(programs.trains, 3, spark=spark, num_workers=2, dataset=frame, protocol=protocol)
        (found[protocol], loss), (others, _) = results
        assert found[protocol] == others
        assert loss < 1.0
    np.testing.assert_allclose(found["grpc"][0], found["tcp"][0], rtol=1e-5)


def test_what_nodes_print_appears_at_once_and_marked(spark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    handle = run(programs.speaks, 4, spark=spark, num_workers=2, wait=False)
    deadline, out, err = time.monotonic() + _START, "", ""
    while "to stdout" not in out and time.monotonic() < deadline:
        time.sleep(0.1)
        some = capsys.readouterr()
        out, err = out + some.out, err + some.err
    assert "to stdout" in out
    assert not handle.done()
    handle.result(_START)
    rest = capsys.readouterr()
    out, err = out + rest.out, err + rest.err
    for name in ("rank 0 (chief)", "rank 1 (worker 0)"):
        for line in ("to stdout", "step 7  loss 0.5  note on  words ['caf\ufffd']", "no end of line"):
            assert f"[{name}] {line}\n" in out
        for line in ("to stderr", "INFO mine: to the log"):
            assert f"[{name}] {line}\n" in err


def test_large_results_come_as_files_and_small_ones_as_rows(spark: Any) -> None:
    sizes = [1000, 20_000_000]
    results = run(programs.returns_much, sizes, spark=spark, num_workers=2)
    assert [(r.nbytes, int(r.min()), int(r.max())) for r in results] == [(sizes[0], 1, 1), (sizes[1], 2, 2)]


def test_exported_models_are_whole(spark: Any, tmp_path: Path) -> None:
    import keras

    (path, refused), worker = run(programs.exports, str(tmp_path / "models"), spark=spark, num_workers=2)
    assert "overwrite=True" in refused
    # Only the chief writes, and is refused.
    assert worker == (path, None)
    assert path == str(tmp_path / "models" / "model.keras")
    assert keras.saving.load_model(path).output_shape == (None, 1)
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["model.keras", "saved"]


def test_a_nodes_own_error_reaches_the_driver_in_time_with_role_and_rank(
    spark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) failed: ValueError: exploded on 1") as raised:
        run(programs.fails_on_rank, 1, spark=spark, num_workers=2, num_ps=1)
    exploded = re.search(r"exploded on 1 at ([\d.]+)", str(raised.value))
    assert exploded
    assert time.time() - float(exploded[1]) < _PROMISED_SECONDS
    assert raised.value.rank == 1
    assert "in fails_on_rank" in raised.value.remote_traceback
    assert "child.py" not in raised.value.remote_traceback
    assert "[rank 1 (worker 0)] my last words" in capsys.readouterr().out


def test_a_killed_node_is_named(spark: Any) -> None:
    with pytest.raises(NodeError, match=r"Rank 1 \(worker 0\) failed: .*killed by signal 9"):
        run(programs.dies_on_rank, 1, spark=spark, num_workers=2)


def test_a_program_that_hangs_ends_after_the_timeout(spark: Any) -> None:
    with pytest.raises(NodeError, match="no node has made progress for 8 s"):
        run(programs.hangs, spark=spark, timeout=8)


@pytest.mark.long
def test_a_program_may_take_longer_than_the_timeout(spark: Any) -> None:
    assert run(programs.goes_on, 10, spark=spark, timeout=8) == ["done"]


def test_what_cannot_be_returned_is_named(spark: Any) -> None:
    with pytest.raises(NodeError, match=r"main returned a _thread.lock that cannot be pickled"):
        run(programs.cannot_be_returned, spark=spark)


def test_a_program_may_end_by_exit(spark: Any) -> None:
    assert run(programs.leaves, 0, spark=spark) == [None]
    with pytest.raises(NodeError, match="SystemExit: 3"):
        run(programs.leaves, 3, spark=spark)


def test_what_a_program_has_started_ends_with_it(spark: Any) -> None:
    (pid,) = run(programs.starts_a_process, spark=spark)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_handle_stops_all_nodes(spark: Any, no_leftovers: Callable[[], dict[str, set[str]]]) -> None:
    handle = run(programs.hangs, spark=spark, num_workers=2, wait=False)
    time.sleep(3)
    handle.stop()
    assert handle.done()
    with pytest.raises(ClusterError, match=r"was cancelled: RunHandle.stop\(\)"):
        handle.result()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"main": 3}, "main: expected a function"),
        ({"args": threading.Lock()}, "args: expected what can be pickled"),
        ({"protocol": "carrier pigeon"}, "protocol: expected one of"),
        ({"compression": "zip"}, "compression: expected"),
        ({"timeout": 0}, "timeout: expected"),
        ({"timeout": float("inf")}, "timeout: expected seconds, greater than 0 and at most 604800"),
        ({"timeout": 1e7}, "timeout: expected seconds, greater than 0 and at most 604800"),
        ({"num_workers": 0}, "num_workers: expected"),
        ({"cluster": False, "num_ps": 1}, "cluster=False"),
        ({"dataset": [1, 2]}, "dataset: expected a DataFrame"),
        ({"resources": {"gpu": 1}}, "resource profiles"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(spark: Any, wrong: dict[str, Any], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ParamError, match=message):
        run(**{"main": programs.who, "spark": spark, **wrong})
    assert time.monotonic() - started < 2


def test_too_few_slots_are_counted_at_once(spark: Any) -> None:
    with pytest.raises(SlotsError, match=r"Expected 5 task slots, one for each of 5 nodes \(num_workers=3, num_ps=2\)"):
        run(programs.who, spark=spark, num_workers=3, num_ps=2)
