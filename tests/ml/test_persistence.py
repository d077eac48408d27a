"""Saving and loading on a real Spark session."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers
from keras.src.backend.common import global_state
from pyspark.ml import Estimator, Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder

from sparktf.distribute.custom_objects import custom_objects, registered
from sparktf.errors import PersistenceError
from sparktf.ml import chunks
from sparktf.ml.archive import ModelArchive
from sparktf.ml.model import TFModel
from sparktf.ml.params import _TFEstimatorParams
from sparktf.ml.persistence import EstimatorPersistence
from sparktf.ml.summary import TrainingSummary

SUMMARY = TrainingSummary(
    history=pd.DataFrame({"epoch": [1, 2], "loss": [0.5, float("nan")], "val_loss": [float("inf"), 0.25]}),
    rows=100,
    validationRows=10,
    rowsPerSecond=1234.5,
    seconds=3.0,
    feedSeconds=0.5,
    computeSeconds=2.0,
    communicateSeconds=0.25,
    protocol="tcp",
    worldSize=2,
    epochs=2,
    stepsPerEpoch=4,
    protocolReason="the only one",
    versions={"keras": "3"},
)


class Trainer(Estimator[Any], _TFEstimatorParams, EstimatorPersistence):
    """Has the Params of TFEstimator, and nothing to fit: what is saved does not depend on training."""

    def _fit(self, dataset: Any) -> Any:
        raise NotImplementedError


def network(units: int = 1, activation: str | None = None, loss: str = "mse") -> keras.Model:
    model = keras.Sequential([keras.Input((2,)), layers.Dense(units, activation=activation)])
    model.compile("adam", loss)
    return model


@pytest.fixture(scope="module")
def frame(spark: Any) -> Any:
    rows = [(i, float(i % 3), float(i % 2), float(i % 2)) for i in range(20)]
    return spark.createDataFrame(rows, ["id", "a", "b", "label"]).coalesce(1).cache()


def predictions(model: Any, frame: Any) -> list[float]:
    return [row.prediction for row in model.transform(frame).select("prediction").collect()]


def test_a_model_comes_back_whole(frame: Any, tmp_path: Path) -> None:
    trained = network()
    trained.fit(np.ones((4, 2)), np.ones(4), verbose=0)
    model = TFModel.fromKeras(trained, inputCols=["a", "b"], predictBatchSize=7)
    model._summary = SUMMARY
    model.save(str(tmp_path / "m"))
    loaded = TFModel.load(str(tmp_path / "m"))
    assert loaded.uid == model.uid
    assert loaded.getInputCols() == ["a", "b"]
    assert loaded.getPredictBatchSize() == 7
    assert int(loaded.model.optimizer.iterations) == 1
    assert predictions(loaded, frame) == predictions(model, frame)
    pd.testing.assert_frame_equal(loaded.summary.history, SUMMARY.history)
    assert dataclasses.replace(loaded.summary, history=None).__dict__ == {**SUMMARY.__dict__, "history": None}


def test_overwrite_replaces_and_save_alone_does_not(spark: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    first, second = TFModel.fromKeras(network()), TFModel.fromKeras(network())
    first.save(path)
    with pytest.raises(PersistenceError, match=r"write\(\)\.overwrite\(\)"):
        second.save(path)
    assert TFModel.load(path).uid == first.uid
    second.write().overwrite().save(path)
    assert TFModel.load(path).uid == second.uid


def test_archives_larger_than_a_chunk_are_put_together_again(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    model = TFModel.fromKeras(network())
    model.save(str(tmp_path / "m"))
    written = list((tmp_path / "m" / "archive").iterdir())
    assert len(written) == -(-model._trained.archive.size // 5000) > 1
    assert TFModel.load(str(tmp_path / "m"))._trained.archive.digest == model._trained.archive.digest
    (tmp_path / "m" / "archive" / "1").rename(tmp_path / "gone")
    with pytest.raises(PersistenceError, match="damaged: expected one chunk 1"):
        TFModel.load(str(tmp_path / "m"))


def test_models_live_in_pipelines_pipeline_models_and_cross_validators(frame: Any, tmp_path: Path) -> None:
    scorer = TFModel.fromKeras(network(2, "softmax"), outputMapping=None, predictionCol="scores")
    stages = [
        VectorAssembler(inputCols=["a", "b"], outputCol="features"),
        scorer,
        LogisticRegression(maxIter=1),
    ]
    pipeline = Pipeline(stages=stages)
    pipeline.write().overwrite().save(str(tmp_path / "p"))
    fitted = Pipeline.load(str(tmp_path / "p")).fit(frame)
    fitted.write().overwrite().save(str(tmp_path / "pm"))
    again = PipelineModel.load(str(tmp_path / "pm"))
    assert again.stages[1].uid == scorer.uid
    assert predictions(again, frame) == predictions(fitted, frame)

    grid = ParamGridBuilder().addGrid(stages[2].regParam, [0.0, 1.0]).build()
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
    search = CrossValidator(estimator=pipeline, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2, seed=1)
    search.write().overwrite().save(str(tmp_path / "cv"))
    best = CrossValidator.load(str(tmp_path / "cv")).fit(frame)
    best.write().overwrite().save(str(tmp_path / "cvm"))
    loaded = CrossValidatorModel.load(str(tmp_path / "cvm"))
    assert predictions(loaded, frame) == predictions(best, frame)


def test_an_estimator_comes_back_with_its_compiled_model(spark: Any, tmp_path: Path) -> None:
    model = network()
    trainer = Trainer()._set(model=model, batchSize=5, inputMapping={"x": ["a", "b"]}, timeout=9.0)
    trainer._set(logDir="hdfs://logs/fit", tensorboard=True)
    trainer.save(str(tmp_path / "e"))
    loaded = Trainer.load(str(tmp_path / "e"))
    assert loaded.uid == trainer.uid
    assert (loaded.getBatchSize(), loaded.getTimeout()) == (5, 9.0)
    assert (loaded.getLogDir(), loaded.getTensorboard()) == ("hdfs://logs/fit", True)
    assert loaded.getInputMapping() == {"x": ["a", "b"]}
    assert loaded.getModel().loss == "mse"
    for before, after in zip(model.get_weights(), loaded.getModel().get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    Pipeline(stages=[trainer]).save(str(tmp_path / "p"))
    (stage,) = Pipeline.load(str(tmp_path / "p")).getStages()
    assert isinstance(stage, Trainer)
    Trainer().save(str(tmp_path / "bare"))
    assert Trainer.load(str(tmp_path / "bare")).getModel() is None


@pytest.mark.parametrize("params", [{"modelFn": network}, {"callbacks": [keras.callbacks.EarlyStopping()]}])
def test_an_estimator_with_python_code_says_why_it_cannot_be_saved(
    spark: Any, tmp_path: Path, params: dict[str, Any]
) -> None:
    with pytest.raises(PersistenceError, match=f"cannot be saved with {next(iter(params))}"):
        Trainer()._set(**params).save(str(tmp_path / "e"))
    assert not (tmp_path / "e").exists()


class Unsaveable(layers.Layer):
    def call(self, x: Any) -> Any:
        return x

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("no config")


def test_what_cannot_be_saved_overwrites_nothing(spark: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "e")
    kept = Trainer()._set(model=network())
    kept.save(path)
    x = keras.Input((2,))
    unsaveable = keras.Model(x, Unsaveable()(x))
    unsaveable.compile("sgd", "mse")
    for params in ({"callbacks": [keras.callbacks.EarlyStopping()]}, {"modelFn": network}, {"model": unsaveable}):
        with pytest.raises(PersistenceError, match="cannot be saved"):
            Trainer()._set(**params).write().overwrite().save(path)
        loaded = Trainer.load(path)
        assert loaded.uid == kept.uid
        assert loaded.getModel().count_params() == 3


def test_code_in_a_file_is_refused_until_it_is_trusted(frame: Any, tmp_path: Path) -> None:
    x = keras.Input((2,))
    model = TFModel.fromKeras(keras.Model(x, layers.Lambda(lambda v: v[:, :1] * 2.0)(x)), inputCols=["a", "b"])
    model.save(str(tmp_path / "m"))
    with pytest.raises(PersistenceError, match="safe_mode=False"):
        TFModel.load(str(tmp_path / "m"))
    trusted = TFModel.load(str(tmp_path / "m"), safe_mode=False)
    assert predictions(trusted, frame) == predictions(model, frame)


@pytest.fixture
def keras_switch() -> Iterator[None]:
    """Put Keras's switch for unsafe files back, for which it has no function."""
    yield
    global_state.set_global_attribute("safe_mode_saving", None)


@pytest.mark.usefixtures("keras_switch")
def test_code_in_a_saved_pipeline_is_refused_until_keras_is_told_to_trust_it(frame: Any, tmp_path: Path) -> None:
    x = keras.Input((2,))
    network = keras.Model(x, layers.Lambda(lambda v: v[:, :1] * 2.0)(x))
    network.compile("sgd", "mse")
    model = TFModel.fromKeras(network, inputCols=["a", "b"])
    tuned = CrossValidatorModel(PipelineModel([model]), avgMetrics=[1.0])
    tuned._set(estimator=Trainer(), evaluator=RegressionEvaluator(), estimatorParamMaps=[{}])
    saved: list[tuple[Any, Any]] = [(PipelineModel, PipelineModel([model])), (CrossValidatorModel, tuned)]
    for kind, stage in saved:
        path = str(tmp_path / kind.__name__)
        stage.save(path)
        with pytest.raises(PersistenceError, match=r"keras\.config\.enable_unsafe_deserialization\(\) before"):
            kind.load(path)
    keras.config.enable_unsafe_deserialization()
    for kind, _ in saved:
        loaded = kind.load(str(tmp_path / kind.__name__))
        assert predictions(loaded, frame) == predictions(model, frame)


@keras.saving.register_keras_serializable("persistence")
class Shift(layers.Layer):
    def call(self, x: Any) -> Any:
        return x + 1.0


def test_a_class_that_is_not_registered_is_named(spark: Any, tmp_path: Path) -> None:
    x = keras.Input((2,))
    TFModel.fromKeras(keras.Model(x, Shift()(x))).save(str(tmp_path / "m"))
    registry = keras.saving.get_custom_objects()
    held, module = registry.pop("persistence>Shift"), globals().pop("Shift")
    try:
        with pytest.raises(PersistenceError, match="class 'Shift' is not registered"):
            TFModel.load(str(tmp_path / "m"))
        with registered({"persistence>Shift": held}):
            assert TFModel.load(str(tmp_path / "m")).model.count_params() == 0
        assert "persistence>Shift" not in registry
    finally:
        registry["persistence>Shift"] = held
        globals()["Shift"] = module


def rewrite(path: Path, change: Any) -> None:
    """Change a saved stage's metadata as another version would have written it."""
    (part,) = [p for p in (path / "metadata").iterdir() if p.name.startswith("part-")]
    metadata = json.loads(part.read_text())
    change(metadata)
    part.write_text(json.dumps(metadata))
    crc = part.with_name(f".{part.name}.crc")
    crc.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["sparktf"].update(format=99), "has format 99"),
        (lambda m: m["sparktf"]["versions"].update(keras="2.15"), r"saved with keras 2\.15.*major version"),
        (lambda m: m["sparktf"]["versions"].update(tensorflow="3.0"), r"saved with tensorflow 3\.0"),
        (lambda m: m.pop("sparktf"), "another kind of stage"),
        (lambda m: m.update({"class": "other.Thing"}), r"Received: other\.Thing"),
        (lambda m: m["sparktf"]["archive"].update(digest="0"), "damaged: expected digest 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(spark: Any, tmp_path: Path, change: Any, message: str) -> None:
    TFModel.fromKeras(network()).save(str(tmp_path / "m"))
    rewrite(tmp_path / "m", change)
    with pytest.raises(PersistenceError, match=message):
        TFModel.load(str(tmp_path / "m"))


def test_nothing_at_a_path_is_said_plainly(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(PersistenceError, match="no saved stage"):
        TFModel.load(str(tmp_path / "none"))


def test_saved_models_are_saved_too(frame: Any, tmp_path: Path) -> None:
    network().export(str(tmp_path / "sm"), verbose=False)
    model = TFModel.fromSavedModel(tmp_path / "sm", inputCols=["a", "b"])
    model.save(str(tmp_path / "m"))
    assert predictions(TFModel.load(str(tmp_path / "m")), frame) == predictions(model, frame)


def test_an_archive_is_private_and_removed_with_its_object() -> None:
    archive = ModelArchive.from_model(network())
    directory = os.path.dirname(archive.path)
    assert os.stat(directory).st_mode & 0o777 == 0o700
    copy = ModelArchive.from_pieces(archive.chunks(100))
    assert copy.digest == archive.digest
    del archive
    assert not os.path.exists(directory)
    assert os.path.exists(copy.path)


def test_an_archive_refuses_to_be_pickled() -> None:
    import pickle

    with pytest.raises(PersistenceError, match="file on this machine"):
        pickle.dumps(ModelArchive.from_model(network()))


def test_saving_does_not_change_the_model() -> None:
    model = network()
    before = json.dumps(model.get_config(), default=str), model.optimizer.built
    ModelArchive.from_model(model)
    assert (json.dumps(model.get_config(), default=str), model.optimizer.built) == before


def test_a_saved_model_directory_has_one_digest(tmp_path: Path) -> None:
    network().export(str(tmp_path / "sm"), verbose=False)
    first = ModelArchive.from_file(str(tmp_path / "sm"))
    for path in (tmp_path / "sm").rglob("*"):
        os.utime(path, (0, 0))
    assert ModelArchive.from_file(str(tmp_path / "sm")).digest == first.digest


def test_registration_is_undone_and_keeps_what_others_registered() -> None:
    class Theirs(layers.Layer):
        pass

    class Ours(layers.Layer):
        pass

    before = custom_objects()
    with registered({"package>Ours": Ours}):
        assert keras.saving.get_registered_name(Ours) == "package>Ours"
        keras.saving.register_keras_serializable("library")(Theirs)
    assert custom_objects() == {**before, "library>Theirs": Theirs}
    assert keras.saving.get_registered_name(Ours) == "Ours"
    del keras.saving.get_custom_objects()["library>Theirs"]


def test_a_summary_is_readable_and_survives_json() -> None:
    again = TrainingSummary.from_json(SUMMARY.to_json())
    pd.testing.assert_frame_equal(again.history, SUMMARY.history)
    assert "2 workers over tcp (the only one)" in repr(again)
    assert "<table" in again._repr_html_()
