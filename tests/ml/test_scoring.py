"""The function that runs in Spark's workers, called without Spark."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pytest
from keras import layers

from sparktf.data.columns import ColumnSpec
from sparktf.distribute.custom_objects import custom_objects
from sparktf.errors import DataError
from sparktf.ml import scoring
from sparktf.ml.archive import ModelArchive
from sparktf.ml.outputs import plan_outputs
from sparktf.ml.payload import Inline
from sparktf.ml.scoring import ScoringTask, score, valid_rows
from sparktf.ml.signature import ModelSignature

FLOATS = pa.list_(pa.float32())


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    scoring._models.clear()
    yield
    scoring._models.clear()


def summing(shape: tuple[int, ...] = (3,), dtype: str = "float32") -> keras.Model:
    """Return a model whose output is the sum of its inputs, so that expectations are easy."""
    x = keras.Input(shape, dtype=dtype)
    flat = layers.Flatten()(x)
    return keras.Model(x, keras.ops.sum(keras.ops.cast(flat, "float32"), axis=1, keepdims=True))


def task_for(model: keras.Model, batch_size: int = 4, **options: Any) -> ScoringTask:
    archive, signature = ModelArchive.from_model(model), ModelSignature.of(model)
    columns = tuple(
        ColumnSpec(spec.name, spec.shape, spec.dtype, "features", nullable="float" in spec.dtype)
        for spec in signature.inputs
    )
    return ScoringTask(
        archive.digest,
        Inline(archive.read_bytes()),
        signature,
        columns,
        tuple(plan_outputs(signature, **options)),
        batch_size,
        custom_objects(),
    )


def run(task: ScoringTask, *batches: Sequence[pa.Array] | pa.Array) -> list[Any]:
    tuples = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    return [row for part in score(task, tuples) for row in part.to_pylist()]  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_every_row_is_scored_in_order_whatever_the_batch_size(batch_size: int) -> None:
    rows = [[float(i), 0.0, 0.0] for i in range(11)]
    batches = [pa.array(part, FLOATS) for part in (rows[:5], rows[5:6], [], rows[6:])]
    assert run(task_for(summing(), batch_size), *batches) == [float(i) for i in range(11)]


def test_no_forward_pass_has_more_rows_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    task, sizes = task_for(summing(), 4), []
    forward = scoring.load_forward(task)

    def watched(tensors: list[np.ndarray]) -> list[np.ndarray]:
        sizes.append(len(tensors[0]))
        return forward(tensors)

    monkeypatch.setattr(scoring, "load_forward", lambda _: watched)
    run(task, pa.array([[1.0, 0.0, 0.0]] * 10, FLOATS))
    assert sizes == [4, 4, 2]


def test_a_null_anywhere_in_a_row_gives_a_null_and_spares_the_others() -> None:
    rows = [[1.0, 2.0, 3.0], None, [1.0, None, 3.0], [4.0, 0.0, 0.0]]
    assert run(task_for(summing()), pa.array(rows, FLOATS)) == [6.0, None, None, 4.0]


def test_a_batch_of_nulls_alone_gives_nulls() -> None:
    assert run(task_for(summing()), pa.array([None, None], FLOATS)) == [None, None]


def test_nulls_inside_nested_arrays_are_found_at_every_depth() -> None:
    nested = pa.list_(pa.list_(pa.float32()))
    rows = [[[1.0, 2.0]], [[1.0, None]], [None], None, [[3.0, 4.0]]]
    mask = valid_rows((pa.array(rows, nested),))
    assert mask is not None
    assert mask.tolist() == [True, False, False, False, True]
    sliced = valid_rows((pa.array(rows, nested).slice(1, 2),))
    assert sliced is not None
    assert sliced.tolist() == [False, False]
    assert valid_rows((pa.array(rows, nested).slice(4, 1),)) is None


def test_nan_is_the_models_own_business() -> None:
    assert np.isnan(run(task_for(summing()), pa.array([[np.nan, 1.0, 1.0]], FLOATS))).all()


def test_a_wrong_length_names_the_column_and_what_the_model_wants() -> None:
    with pytest.raises(DataError, match=r"'features'.*2 values.*3 values.*\(3,\)"):
        run(task_for(summing()), pa.array([[1.0, 2.0]], FLOATS))


@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_(), pa.decimal128(5, 2)],
)
def test_scalars_of_every_numeric_kind_feed_a_model_of_one_value(kind: pa.DataType) -> None:
    values = pa.array([1, 0, None], pa.int8()).cast(kind)
    assert run(task_for(summing((1,))), values) == [1.0, 0.0, None]


def test_nested_arrays_reach_the_models_shape_in_c_order() -> None:
    x = keras.Input((2, 3))
    model = keras.Model(x, x[:, 1, :])
    array = pa.array([[[1, 2, 3], [4, 5, 6]]], pa.list_(pa.list_(pa.int64())))
    assert run(task_for(model), array) == [[4.0, 5.0, 6.0]]
    assert run(task_for(model), pa.array([[1, 2, 3, 4, 5, 6]], pa.list_(pa.int32()))) == [[4.0, 5.0, 6.0]]


def test_integer_inputs_refuse_fractions() -> None:
    with pytest.raises(DataError, match="int32"):
        run(task_for(summing((2,), "int32")), pa.array([[1.5, 2.0]], FLOATS))


def test_several_inputs_are_told_apart_by_name() -> None:
    b, a = keras.Input((1,), name="b"), keras.Input((2,), name="a")
    model = keras.Model({"b": b, "a": a}, b * 10.0 + keras.ops.sum(a, axis=1, keepdims=True))
    task = task_for(model)
    arrays = {"b": pa.array([1.0, 2.0, None]), "a": pa.array([[1.0, 2.0], None, [1.0, 1.0]], FLOATS)}
    assert run(task, tuple(arrays[spec.name] for spec in task.columns)) == [13.0, None, None]


def test_strings_feed_models_that_start_with_preprocessing() -> None:
    lookup = layers.StringLookup(vocabulary=["a", "b"])
    x = keras.Input((), dtype="string")
    model = keras.Model(x, keras.ops.cast(lookup(x), "float32"))
    assert run(task_for(model), pa.array(["b", None, "zz", "a"])) == [2.0, None, 0.0, 1.0]
    assert run(task_for(model), pa.array([b"b"], pa.binary())) == [2.0]


def test_several_outputs_of_any_shape_and_dtype_come_out_raw() -> None:
    x = keras.Input((2,), name="x")
    matrix = keras.ops.reshape(keras.ops.concatenate([x, x], axis=1), (-1, 2, 2))
    model = keras.Model(x, {"first": keras.ops.sum(x, axis=1), "m": matrix, "i": keras.ops.cast(x, "int32")})
    task = task_for(model, mapping={"m": "matrix", "i": "integers"})
    assert run(task, pa.array([[1.0, 2.0], None], FLOATS)) == [
        {"prediction": 3.0, "output_1": [[1.0, 2.0], [1.0, 2.0]], "output_2": [1, 2]},
        {"prediction": None, "output_1": None, "output_2": None},
    ]


def test_half_precision_models_give_floats() -> None:
    x = keras.Input((2,))
    model = keras.Model(x, layers.Dense(2, kernel_initializer="identity", dtype="mixed_float16")(x))
    task = task_for(model, mapping={model.output_names[0]: "raw"})
    assert run(task, pa.array([[1.0, 2.0]], FLOATS)) == [{"prediction": [1.0, 2.0], "output_0": [1.0, 2.0]}]


@keras.saving.register_keras_serializable("scoring")
class Doubling(layers.Layer):
    def call(self, x: Any) -> Any:
        return x * 2.0


def test_custom_layers_come_with_the_task() -> None:
    x = keras.Input((1,))
    task = task_for(keras.Model(x, Doubling()(x)))
    registry = keras.saving.get_custom_objects()
    del registry["scoring>Doubling"]
    try:
        assert run(task, pa.array([1.5])) == [3.0]
        assert "scoring>Doubling" not in registry
    finally:
        registry["scoring>Doubling"] = Doubling


def test_lambda_layers_of_the_jobs_own_model_are_trusted() -> None:
    x = keras.Input((1,))
    assert run(task_for(keras.Model(x, layers.Lambda(lambda v: v + 1.0)(x))), pa.array([1.0])) == [2.0]


def test_dropout_is_off_when_scoring() -> None:
    x = keras.Input((1,))
    assert run(task_for(keras.Model(x, layers.Dropout(0.9)(x))), pa.array([1.0] * 20)) == [1.0] * 20


def test_a_worker_keeps_the_last_two_models_and_asks_for_bytes_once() -> None:
    reads = 0

    class Counted(Inline):
        def pieces(self) -> Iterator[bytes]:
            nonlocal reads
            reads += 1
            return super().pieces()

    tasks = []
    for _ in range(3):
        task = task_for(summing())
        tasks.append(ScoringTask(**{**task.__dict__, "archive": Counted(task.archive.data)}))
    for task in (tasks[0], tasks[0], tasks[1], tasks[0], tasks[2], tasks[0]):
        run(task, pa.array([[1.0, 1.0, 1.0]], FLOATS))
    assert reads == 3
    assert [key.split(":")[0] for key in scoring._models] == [tasks[2].digest, tasks[0].digest]


_KILLED = """
import pickle, sys, time
from sparktf.ml import scoring

def loads_for_long(*given):
    print("loading", flush=True)
    time.sleep(60)

scoring._keras_forward = loads_for_long
scoring.load_forward(pickle.load(sys.stdin.buffer))
"""


def test_a_worker_that_is_killed_while_it_loads_a_model_leaves_no_file(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "SPARK_LOCAL_DIRS": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _KILLED], stdin=pipe, stdout=pipe, env=environment) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(pickle.dumps(task_for(summing())))
        worker.stdin.close()
        assert worker.stdout.readline() == b"loading\n"
        assert list(tmp_path.rglob("*.keras"))
        worker.kill()
    deadline = time.monotonic() + 10
    while any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())
