"""From raw outputs to columns: pure, without Spark's JVM."""

from __future__ import annotations

import json

import keras
import numpy as np
import pyarrow as pa
import pytest
from keras import layers

from sparktf.errors import ParamError, PersistenceError
from sparktf.ml.outputs import nested_array, plan_outputs, result_type, to_result
from sparktf.ml.signature import ModelSignature, TensorSpec, input_specs, output_losses, output_specs


def sequential(*stack: keras.layers.Layer, loss: object = None, shape: tuple[int, ...] = (4,)) -> keras.Model:
    model = keras.Sequential([keras.Input(shape), *stack])
    if loss is not None:
        model.compile(loss=loss)
    return model


def logits(loss: type[keras.losses.Loss]) -> keras.losses.Loss:
    return loss(from_logits=True)


SPARSE = "sparse_categorical_crossentropy"


@pytest.mark.parametrize(
    ("last", "loss", "kind", "is_logits"),
    [
        (layers.Dense(3, activation="softmax"), SPARSE, "multiclass", False),
        (layers.Dense(3, activation="softmax"), keras.losses.CategoricalFocalCrossentropy(), "multiclass", False),
        (layers.Dense(3), logits(keras.losses.SparseCategoricalCrossentropy), "multiclass", True),
        (layers.Dense(3, activation="softmax"), logits(keras.losses.CategoricalCrossentropy), "multiclass", False),
        (layers.Softmax(), logits(keras.losses.CategoricalCrossentropy), "multiclass", False),
        (layers.Dense(1, activation="sigmoid"), "bce", "binary", False),
        (layers.Dense(1), logits(keras.losses.BinaryCrossentropy), "binary", True),
        (layers.Dense(1, activation="sigmoid"), keras.losses.binary_crossentropy, "binary", False),
        (layers.Dense(5, activation="sigmoid"), "binary_crossentropy", "values", False),
        (layers.Dense(1), "mse", "values", False),
        (layers.Dense(2), lambda y, p: keras.ops.mean(p), "values", False),
        (layers.Dense(3, activation="softmax"), None, "values", False),
    ],
)
def test_the_compiled_loss_and_the_last_activation_decide_the_kind(
    last: keras.layers.Layer, loss: object, kind: str, is_logits: bool
) -> None:
    signature = ModelSignature.of(sequential(last, loss=loss))
    assert (signature.kind, signature.logits) == (kind, is_logits)


def test_a_signature_survives_json_and_a_reloaded_model(tmp_path: object) -> None:
    model = sequential(layers.Dense(3), loss=logits(keras.losses.SparseCategoricalCrossentropy))
    model.save(f"{tmp_path}/m.keras")
    signature = ModelSignature.of(model)
    again = ModelSignature.of(keras.saving.load_model(f"{tmp_path}/m.keras"))
    assert ModelSignature.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature
    assert (again.outputs, again.kind, again.logits) == (signature.outputs, signature.kind, signature.logits)


def test_predictions_come_from_the_first_output_that_was_written() -> None:
    x = keras.Input((4,), name="x")
    model = keras.Model(x, {"z": layers.Dense(3, activation="softmax")(x), "a": layers.Dense(2)(x)})
    model.compile(loss={"z": SPARSE, "a": "mse"})
    signature = ModelSignature.of(model)
    assert [spec.name for spec in signature.outputs] == ["z", "a"]
    assert signature.kind == "multiclass"


@pytest.mark.parametrize("form", ["dict", "list"])
def test_predictions_come_from_the_first_output_that_has_a_loss(form: str) -> None:
    x = keras.Input((4,), name="x")
    embedding = layers.Dense(16, name="embedding")(x)
    classes = layers.Dense(3, activation="softmax", name="classes")(x)
    model = keras.Model(x, {"embedding": embedding, "classes": classes} if form == "dict" else [embedding, classes])
    model.compile(loss={"classes": SPARSE} if form == "dict" else [None, SPARSE])
    signature = ModelSignature.from_dict(json.loads(json.dumps(ModelSignature.of(model).to_dict())))
    assert signature.kind == "multiclass"
    scores = [np.zeros((1, 16), np.float32), np.array([[0.1, 0.2, 0.7]], np.float32)]
    (row,) = to_result(signature, plan_outputs(signature), scores, None).to_pylist()
    assert (row["prediction"], len(row["probability"])) == (2.0, 3)


def test_whether_scores_are_logits_is_seen_at_the_output_that_has_the_loss() -> None:
    x = keras.Input((4,), name="x")
    outputs = [layers.Dense(2, activation="softmax", name="gate")(x), layers.Dense(3, name="classes")(x)]
    model = keras.Model(x, outputs)
    model.compile(loss=[None, logits(keras.losses.SparseCategoricalCrossentropy)])
    assert ModelSignature.of(model).logits


class TwoHeads(layers.Layer):
    """Gives class probabilities, and what Keras calls by the same name."""

    def __init__(self) -> None:
        super().__init__(name="heads")
        self.first, self.second = layers.Dense(3, activation="softmax"), layers.Dense(3)

    def call(self, x: object) -> tuple[object, object]:
        return self.first(x), self.second(x)


@pytest.mark.parametrize(("losses", "predicted"), [([SPARSE, None], 0), ([None, SPARSE], 1)])
def test_outputs_of_one_name_are_told_apart_by_their_places(losses: list[object], predicted: int) -> None:
    x = keras.Input((4,), name="x")
    model = keras.Model(x, list(TwoHeads()(x)))
    model.compile(loss=losses)
    signature = ModelSignature.of(model)
    assert (signature.kind, signature.predicted) == ("multiclass", predicted)


def test_losses_of_nested_outputs_and_activations_of_inner_models_are_found() -> None:
    inner_x = keras.Input((4,))
    inner = keras.Model(inner_x, [layers.Dense(2, activation="softmax")(inner_x), layers.Dense(3)(inner_x)])
    x = keras.Input((4,), name="x")
    gate, classes = inner(x)
    model = keras.Model(x, {"a": {"gate": gate, "classes": classes}, "b": layers.Dense(1)(x)})
    model.compile(loss={"a": {"classes": logits(keras.losses.SparseCategoricalCrossentropy)}, "b": "mse"})
    assert [loss is None for loss in output_losses(model)] == [False, True, False]
    signature = ModelSignature.of(model)
    assert (signature.outputs[signature.predicted].name, signature.kind) == ("classes", "multiclass")
    assert signature.logits
    nested = keras.Model(x, [[gate, classes], layers.Dense(1)(x)])
    nested.compile(loss=[[None, None], "mae"])
    assert output_losses(nested) == [None, None, "mae"]


def test_names_of_inputs_and_outputs_are_those_keras_uses() -> None:
    a, b = keras.Input((4,), name="a"), keras.Input((2, 2), name="b", dtype="int32")
    model = keras.Model([b, a], [layers.Dense(1, name="one")(a), layers.Flatten(name="two")(b)])
    assert input_specs(model) == (TensorSpec("b", (2, 2), "int32"), TensorSpec("a", (4,), "float32"))
    assert output_specs(model) == (TensorSpec("one", (1,), "float32"), TensorSpec("two", (4,), "int32"))


@keras.saving.register_keras_serializable("outputs")
class Subclassed(keras.Model):
    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.dense = layers.Dense(1, activation="sigmoid")

    def call(self, x: object) -> object:
        return self.dense(x)


def test_a_subclassed_model_is_known_once_it_was_called() -> None:
    model = Subclassed()
    model.compile(loss="bce")
    with pytest.raises(PersistenceError, match="called once"):
        ModelSignature.of(model)
    model(np.zeros((2, 4), np.float32))
    signature = ModelSignature.of(model)
    assert signature.inputs[0].shape == (4,)
    assert (signature.kind, signature.logits) == ("binary", False)


def signature_of(kind: str, shape: tuple[int | None, ...], is_logits: bool = False) -> ModelSignature:
    spec = TensorSpec("x", (4,), "float32")
    return ModelSignature((spec,), (TensorSpec("out", shape, "float32"),), kind, is_logits)


def result(signature: ModelSignature, scores: object, valid: object = None, **names: object) -> list[object]:
    fields = plan_outputs(signature, **names)  # type: ignore[arg-type]
    mask = None if valid is None else np.array(valid)
    answer: list[object] = to_result(signature, fields, [np.array(scores, np.float32)], mask).to_pylist()
    return answer


def test_class_probabilities_give_argmax_and_log_probabilities() -> None:
    (row,) = result(signature_of("multiclass", (3,)), [[0.25, 0.5, 0.25]])
    assert row == {
        "prediction": 1.0,
        "probability": [0.25, 0.5, 0.25],
        "rawPrediction": pytest.approx(np.log([0.25, 0.5, 0.25])),
    }


def test_class_logits_give_softmax_and_stay_raw() -> None:
    (row,) = result(signature_of("multiclass", (2,), True), [[1000.0, 0.0]])
    assert row == {"prediction": 0.0, "probability": [1.0, 0.0], "rawPrediction": [1000.0, 0.0]}


def test_one_sigmoid_unit_gives_two_classes() -> None:
    rows = result(signature_of("binary", (1,)), [[0.75], [0.5], [0.0]])
    assert [row["prediction"] for row in rows] == [1.0, 0.0, 0.0]  # type: ignore[index]
    assert [row["probability"] for row in rows] == [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]  # type: ignore[index]
    assert all(np.isfinite(row["rawPrediction"]).all() for row in rows)  # type: ignore[index]


def test_one_logit_gives_two_classes_without_overflow() -> None:
    rows = result(signature_of("binary", (), True), [1000.0, -1000.0, 0.0])
    assert [row["prediction"] for row in rows] == [1.0, 0.0, 0.0]  # type: ignore[index]
    assert [row["probability"] for row in rows] == [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]  # type: ignore[index]
    assert rows[0]["rawPrediction"] == [-1000.0, 1000.0]  # type: ignore[index]


def test_nan_scores_give_nan_and_no_class() -> None:
    for signature, scores in (
        (signature_of("multiclass", (2,)), [[np.nan, 1.0]]),
        (signature_of("binary", (1,)), [[np.nan]]),
    ):
        (row,) = result(signature, scores)
        assert np.isnan(row["prediction"])  # type: ignore[index]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_value_is_a_double(shape: tuple[int, ...]) -> None:
    assert result(signature_of("values", shape), np.zeros((2, *shape))) == [0.0, 0.0]


def test_several_values_are_an_array_and_nested_ones_nested() -> None:
    assert result(signature_of("values", (2,)), [[1.0, 2.0]]) == [[1.0, 2.0]]
    nested = signature_of("values", (2, 1))
    assert result(nested, [[[1.0], [2.0]]]) == [[[1.0], [2.0]]]
    assert result_type(plan_outputs(nested)).simpleString() == "array<array<double>>"


def test_rows_that_were_not_scored_are_null_in_every_column() -> None:
    rows = result(signature_of("multiclass", (2,)), [[0.9, 0.1]], [False, True, False], mapping={"out": "raw"})
    assert rows[0] == dict.fromkeys(["prediction", "probability", "rawPrediction", "output_0"])
    assert rows[0] == rows[2]
    assert rows[1]["output_0"] == pytest.approx([0.9, 0.1])  # type: ignore[index]


def test_an_empty_name_switches_a_column_off() -> None:
    fields = plan_outputs(signature_of("binary", (1,)), probability="", raw_prediction="")
    assert [field.column for field in fields] == ["prediction"]
    assert plan_outputs(signature_of("values", (1,)), prediction="") == []


def test_a_mapping_must_name_outputs_of_the_model() -> None:
    with pytest.raises(ParamError, match=r"outputs of the model, out\. Received: 'other'"):
        plan_outputs(signature_of("values", (1,)), mapping={"other": "column"})


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ParamError, match="different name"):
        plan_outputs(signature_of("values", (1,)), mapping={"out": "prediction"})


def test_nested_arrays_keep_c_order_and_gaps() -> None:
    values = np.arange(12).reshape(2, 2, 3)
    array = nested_array(values, 2, pa.int64(), np.array([True, False, True]))
    assert array.to_pylist() == [values[0].tolist(), None, values[1].tolist()]


def test_no_rows_make_an_empty_column() -> None:
    assert nested_array(np.zeros((0, 3)), 1, pa.float64(), np.array([False])).to_pylist() == [None]
    assert nested_array(np.zeros((0, 0, 3)), 2, pa.float64()).to_pylist() == []


def test_strings_come_out_as_strings() -> None:
    assert nested_array(np.array([b"a", b"b"], object), 0, pa.string()).to_pylist() == ["a", "b"]
    assert nested_array(np.array([b"a"], object), 0, pa.string(), np.array([False, True])).to_pylist() == [None, "a"]
