"""TFModel on Spark Connect: no JVM in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler

from sparktf.errors import PersistenceError
from sparktf.ml import chunks, payload
from sparktf.ml.inputs import input_columns
from sparktf.ml.model import TFModel


def network() -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.fixture(scope="module")
def frame(spark: Any) -> Any:
    return spark.createDataFrame([(float(i), None if i == 2 else 1.0) for i in range(5)], ["a", "b"]).coalesce(1)


def rows(model: Any, frame: Any) -> list[Any]:
    return [tuple(r) for r in model.transform(frame).select("prediction", "probability").collect()]


def test_a_model_scores_and_comes_back_from_disk(frame: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    model = TFModel.fromKeras(network(), inputCols=["a", "b"])
    scored = rows(model, frame)
    assert [r[0] is None for r in scored] == [False, False, True, False, False]
    path = str(tmp_path / "m")
    model.save(path)
    with pytest.raises(PersistenceError, match="overwrite"):
        model.save(path)
    model.write().overwrite().save(path)
    assert rows(TFModel.load(path), frame) == scored


def test_a_model_lives_in_a_pipeline(frame: Any, tmp_path: Path) -> None:
    stages = [VectorAssembler(inputCols=["a"] * 2, outputCol="features"), TFModel.fromKeras(network())]
    fitted = Pipeline(stages=stages).fit(frame)
    for _ in range(2):
        fitted.write().overwrite().save(str(tmp_path / "pm"))
    assert rows(PipelineModel.load(str(tmp_path / "pm")), frame) == rows(fitted, frame)


def test_a_model_too_large_for_a_message_travels_as_a_file(frame: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "_CONNECT_INLINE_BYTES", 0)
    model = TFModel.fromKeras(network(), inputCols=["a", "b"])
    inputs = input_columns(model, frame.schema)
    assert isinstance(model._task(inputs, [], frame).archive, payload.SessionFile)
    assert len(rows(model, frame)) == 5
