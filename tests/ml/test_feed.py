"""In which form labels reach a model."""

from __future__ import annotations

from typing import Any

import keras
import pytest
from pyspark.sql import types as T

from sparktf.errors import ParamError
from sparktf.ml import TFEstimator
from sparktf.ml.planning import plan_feed

SCHEMA = T.StructType([T.StructField(name, T.DoubleType()) for name in ("x", "y", "z")])


class Own(keras.Model):
    """Looks at its labels itself."""

    def train_step(self, data: Any) -> dict[str, Any]:
        raise NotImplementedError


def labels(model: keras.Model, **params: Any) -> Any:
    """Return what the model's loss is given, columns by their names."""
    feed = plan_feed(TFEstimator(model=model, inputCols=["x"], **params), SCHEMA)
    return feed.packs(model)[1]({column.name: column.source for column in feed.labels})


def outputs(form: str, x: Any) -> Any:
    made = {name: keras.layers.Dense(1, name=name)(x) for name in ("b", "c", "a")}
    return made if form == "dict" else list(made.values())


@pytest.mark.parametrize(
    ("form", "loss", "params", "given"),
    [
        ("list", [None, "mse", None], {"labelCol": "y"}, ["y", "y", "y"]),
        ("list", ["mse", None, "mse"], {"labelMapping": {"a": "y", "b": "z"}}, ["z", "y", "y"]),
        ("dict", {"b": "mse", "a": "mse"}, {"labelMapping": {"a": "y", "b": "z"}}, {"a": "y", "b": "z", "c": "y"}),
        ("list", ["mse"] * 3, {"labelMapping": {"a": "x", "b": "y", "c": "z"}}, ["y", "z", "x"]),
        ("list", None, {"labelCol": "y"}, "y"),
        ("list", None, {"labelMapping": {"a": "y", "b": "z"}}, {"a": "y", "b": "z"}),
    ],
)
def test_each_output_with_a_loss_is_given_its_label(form: str, loss: Any, params: dict[str, Any], given: Any) -> None:
    x = keras.Input((1,))
    model = keras.Model(x, outputs(form, x))
    model.compile("sgd", loss)
    assert labels(model, **params) == given


@pytest.mark.parametrize(
    ("params", "given"),
    [({"labelCol": "y"}, "y"), ({"labelMapping": {"a": "y", "b": "z"}}, {"a": "y", "b": "z"})],
)
def test_a_model_that_looks_at_labels_itself_is_given_those_that_were_named(params: dict[str, Any], given: Any) -> None:
    x = keras.Input((1,))
    model = Own(x, outputs("list", x))
    model.compile("sgd", ["mse", None, None])
    assert labels(model, **params) == given


def test_outputs_of_one_name_are_not_given_the_same_label() -> None:
    x = keras.Input((1,))
    inner = keras.Model(x, outputs("list", x), name="inner")
    model = keras.Model(x, inner(x))
    model.compile("sgd", ["mse", "mse", None])
    with pytest.raises(ParamError, match="a name of its own for every output with a loss, received inner, inner"):
        labels(model, labelMapping={"inner": "y"})
