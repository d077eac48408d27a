"""Params need neither Spark nor a JVM."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from sparktf.errors import ParamError
from sparktf.ml.model_params import _TFModelParams
from sparktf.ml.params import _TFEstimatorParams


@pytest.fixture
def params() -> _TFEstimatorParams:
    return _TFEstimatorParams()


def network() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="out")], name="net")


def test_defaults_are_those_of_the_design(params: _TFEstimatorParams) -> None:
    assert params.getBatchSize() == 32
    assert params.getSeed() == 0
    assert params.getTimeout() == 300.0
    assert params.getPredictBatchSize() == 8192
    assert params.getInputMapping() is None
    assert params.getModel() is None
    assert params.getVerbose() == "auto"
    assert params.getProtocol() == "auto"


@pytest.mark.parametrize("value", [np.int32(7), np.int64(7), np.float64(7.0), 7.0, 7])
def test_whole_numbers_of_every_kind_are_taken_as_int(params: _TFEstimatorParams, value: object) -> None:
    params.setBatchSize(value)  # type: ignore[arg-type]
    assert type(params.getBatchSize()) is int
    assert params.getBatchSize() == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batchSize", 0),
        ("epochs", 0),
        ("numWorkers", -1),
        ("threadsPerWorker", -1),
        ("predictBatchSize", 0),
        ("maxStaleness", -1),
        ("timeout", 0.0),
        ("timeout", float("nan")),
        ("timeout", 604_801.0),
        ("mode", "both"),
        ("protocol", "http"),
        ("compression", "zip"),
        ("verbose", 3),
        ("logDir", ""),
        ("inputCols", []),
        ("inputMapping", {}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(params: _TFEstimatorParams, name: str, value: object) -> None:
    with pytest.raises(ParamError, match=f"{name}: expected .*Received: "):
        params._set(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batchSize", True),
        ("batchSize", "8"),
        ("epochs", 1.5),
        ("shuffle", 1),
        ("tensorboard", 1),
        ("logDir", 1),
        ("model", 3),
        ("model", network),
        ("modelFn", "fn"),
        ("callbacks", [1]),
        ("inputCols", "features"),
        ("labelMapping", {"out": ["a"]}),
        ("outputMapping", {"out": 1}),
        ("inputMapping", {1: "a"}),
        ("timeout", True),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(params: _TFEstimatorParams, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected "):
        params._set(**{name: value})


def test_a_log_dir_may_be_a_path_object(params: _TFEstimatorParams) -> None:
    assert params.setLogDir(Path("/logs") / "fit").getLogDir() == "/logs/fit"
    assert params.setLogDir("s3://bucket/logs").getLogDir() == "s3://bucket/logs"


def test_set_keeps_our_own_errors(params: _TFEstimatorParams) -> None:
    with pytest.raises(ParamError):
        params.set(params.batchSize, 0)


def test_none_brings_the_default_back(params: _TFEstimatorParams) -> None:
    params.setBatchSize(8).setInputMapping({"a": "x"})
    params.setBatchSize(None).setInputMapping(None)  # type: ignore[arg-type]
    assert params.getBatchSize() == 32
    assert params.getInputMapping() is None


def test_every_param_has_a_setter_and_a_getter_that_agree(params: _TFEstimatorParams) -> None:
    values = {"model": network(), "modelFn": network, "callbacks": [keras.callbacks.Callback()]}
    for param in params.params:
        upper = param.name[0].upper() + param.name[1:]
        value = values.get(param.name, params._defaultParamMap.get(param, "column"))
        getattr(params, f"set{upper}")(value)
        assert getattr(params, f"get{upper}")() == value


def test_a_mapping_takes_one_column_or_several(params: _TFEstimatorParams) -> None:
    params.setInputMapping({"a": "x", "b": ("y", "z")})  # type: ignore[dict-item]
    assert params.getInputMapping() == {"a": "x", "b": ["y", "z"]}


def test_a_model_given_as_function_says_where_it_belongs(params: _TFEstimatorParams) -> None:
    with pytest.raises(TypeError, match="Give it as model"):
        params.setModelFn(network())
    with pytest.raises(TypeError, match="Give functions as modelFn"):
        params.setModel(network)


def test_explain_params_prints_no_weights(params: _TFEstimatorParams) -> None:
    params.setModel(network()).setModelFn(network).setCallbacks([keras.callbacks.EarlyStopping()])
    text = params.explainParams()
    assert "Sequential 'net' (8 parameters)" in text
    assert "EarlyStopping" in text
    assert "logDir: where the chief logs for TensorBoard" in text
    assert "tensorboard: run TensorBoard beside the chief" in text
    assert "object at 0x" not in text
    assert max(len(line) for line in text.splitlines()) < 400


def test_copy_takes_extra_values_and_leaves_the_original(params: _TFEstimatorParams) -> None:
    model = network()
    weights = [w.copy() for w in model.get_weights()]
    params.setModel(model).setInputMapping({"a": "x"})
    other = params.copy({params.batchSize: np.int64(5), params.inputMapping: None})
    assert other.getBatchSize() == 5
    assert other.getInputMapping() is None
    assert other.getModel() is model
    assert params.getBatchSize() == 32
    assert params.getInputMapping() == {"a": "x"}
    assert other.uid == params.uid
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_models_may_stand_in_a_param_grid(params: _TFEstimatorParams) -> None:
    from pyspark.ml.tuning import ParamGridBuilder

    models = [network(), network()]
    grid = ParamGridBuilder().addGrid(params.model, models).addGrid(params.batchSize, [1, 2]).build()
    assert [params.copy(point).getModel() for point in grid] == [models[0], models[0], models[1], models[1]]


def test_a_model_takes_over_what_it_shares_with_its_estimator(params: _TFEstimatorParams) -> None:
    params.setFeaturesCol("pixels").setPredictBatchSize(5).setBatchSize(7)
    model = _TFModelParams()
    params._copyValues(model)
    assert model.getFeaturesCol() == "pixels"
    assert model.getPredictBatchSize() == 5
    assert not model.hasParam("batchSize")
