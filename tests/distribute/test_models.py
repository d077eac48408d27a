"""Every kind of model that Keras's ``fit`` trains is trained by several ranks as by one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from groups import Task, assert_as_one_process, assert_ranks_agree, by_one_process, by_ranks, fresh, weights

from sparktf.distribute.state import average_state
from sparktf.errors import DriftError, ParamError
from sparktf.transport.testing import results_of_threads

_RANDOM = np.random.default_rng(5)
X = _RANDOM.normal(size=(40, 6)).astype("float32")
Y = (X @ _RANDOM.normal(size=(6, 1)) + 0.3).astype("float32")
CLASSES = (X[:, 0] + X[:, 1] > 0).astype("int64")
WEIGHTS = _RANDOM.uniform(0.2, 3.0, size=40).astype("float32")

# Rows that do not divide: a short batch on each rank, and steps in which one of them has no rows.
UNEVEN = (13, 6)
REGRESSION = Task((X[:19], Y[:19]), UNEVEN)
CLASSIFICATION = Task((X[:19], CLASSES[:19]), UNEVEN)


def mlp(optimizer: Any, **compiled: Any) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1, name="head")]
    )
    model.compile(optimizer, **{"loss": "mse", **compiled})
    return model


def classifier(metrics: Sequence[Any] = (), layers: Sequence[Any] = ()) -> keras.Model:
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.SGD(0.2), "binary_crossentropy", metrics=list(metrics))
    return model


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.05),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.02, global_clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.02),
    "ema": lambda: keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3),
    "weight decay": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.2, 1, 0.7)),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_does_to_gradients_it_does_to_those_of_the_global_batch(name: str) -> None:
    assert_as_one_process(lambda: mlp(OPTIMIZERS[name]()), REGRESSION)


def test_several_steps_in_one_execution_take_the_steps_of_one_process() -> None:
    # 4 steps an epoch: one execution of three steps and one of one.
    assert_as_one_process(lambda: mlp(keras.optimizers.Adam(0.02), steps_per_execution=3), REGRESSION)


def test_models_that_run_eagerly_are_trained_alike() -> None:
    assert_as_one_process(lambda: mlp(keras.optimizers.SGD(0.1), run_eagerly=True), replace(REGRESSION, epochs=1))


def test_xla_is_set_aside_with_a_notice_and_given_back() -> None:
    ranks = by_ranks(lambda: mlp(keras.optimizers.SGD(0.1), jit_compile=True), replace(REGRESSION, epochs=1))
    assert_ranks_agree(ranks)
    for rank in ranks:
        assert rank.model.jit_compile is True
        assert any("jit_compile" in notice for notice in rank.report.notices)


# Precision --------------------------------------------------------------------------------------------------------


def half(policy: str, optimizer: Any) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh", dtype=policy),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    model.compile(optimizer, "mse")
    return model


def test_bfloat16_models_are_trained_alike() -> None:
    assert_as_one_process(lambda: half("mixed_bfloat16", keras.optimizers.SGD(0.1)), REGRESSION, rtol=0.02, atol=0.01)


def test_weights_that_are_bfloat16_themselves_are_reduced() -> None:
    ranks = by_ranks(lambda: half("bfloat16", keras.optimizers.SGD(0.1)), REGRESSION)
    assert_ranks_agree(ranks)
    assert ranks[0].model.trainable_variables[0].dtype == "bfloat16"


def scaled(accumulate: int | None = None) -> keras.Model:
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulate)
    return half("mixed_float16", keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0))


def test_loss_scaling_trains_as_one_process() -> None:
    assert_as_one_process(scaled, REGRESSION, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("accumulate", [None, 3])
def test_an_overflow_on_one_rank_makes_all_ranks_skip_the_step(accumulate: int | None) -> None:
    labels = Y.copy()
    labels[16] = np.inf  # the second rank's first batch
    task = Task((X[:19], labels[:19]), UNEVEN, epochs=1)
    ranks = by_ranks(lambda: scaled(accumulate), task)
    assert_ranks_agree(ranks)
    before = weights(fresh(scaled))
    assert any(not np.array_equal(v, w) for v, w in zip(weights(ranks[0].model), before, strict=True))
    for rank in ranks:
        # Of 4 steps; Keras counts updates.
        assert int(rank.model.optimizer.iterations.numpy()) == 3 // (accumulate or 1)
        assert float(rank.model.optimizer.dynamic_scale.numpy()) == 512.0
        assert all(np.isfinite(value).all() for value in weights(rank.model))


# Losses -----------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("sparktf-tests")
class Activity(keras.layers.Layer):
    """Adds a loss of its own, a mean over the rows."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def penalised(reduction: str) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.05)),
            Activity(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.02), keras.losses.MeanSquaredError(reduction=reduction))
    return model


def test_regularizers_and_added_losses_weigh_as_in_one_process() -> None:
    assert_as_one_process(lambda: penalised("sum_over_batch_size"), REGRESSION)


def test_a_loss_that_sums_over_the_rows_is_summed_over_the_ranks() -> None:
    held_out = Task(REGRESSION.data, UNEVEN, held_out=(X[19:28], Y[19:28]), held_out_rows=(5, 4))

    def make() -> keras.Model:
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.05))]
        )
        model.compile(keras.optimizers.SGD(0.02), keras.losses.MeanSquaredError(reduction="sum"))
        return model

    # Keras's record of a validation's sums depends on how it is cut into batches, so only training is compared.
    ranks = by_ranks(make, held_out)
    assert_ranks_agree(ranks)
    assert_as_one_process(make, REGRESSION)


def test_a_loss_that_divides_by_the_weights_is_refused_by_name() -> None:
    loss = keras.losses.MeanSquaredError
    for rank in by_ranks(
        lambda: mlp("sgd", loss=loss(reduction="mean_with_sample_weight")), replace(REGRESSION, epochs=1)
    ):
        assert isinstance(rank, ParamError)
        assert "mean_with_sample_weight" in str(rank)
        assert "numWorkers=1" in str(rank)


def test_sample_weights_weigh_as_in_one_process() -> None:
    task = Task((X[:19], Y[:19], WEIGHTS[:19]), UNEVEN)
    mae = keras.metrics.MeanAbsoluteError
    assert_as_one_process(
        lambda: mlp(keras.optimizers.SGD(0.05), metrics=[mae(name="plain")], weighted_metrics=[mae(name="weighted")]),
        task,
    )


# Structures -------------------------------------------------------------------------------------------------------


def sequence(pooled: bool) -> keras.Model:
    layers = [keras.layers.Embedding(20, 4, mask_zero=True)]
    if pooled:
        layers += [keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    else:
        layers += [keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return model


TOKENS = _RANDOM.integers(0, 20, size=(19, 5)).astype("int32")


def test_an_output_with_a_mask_is_refused() -> None:
    task = Task((TOKENS, np.repeat(Y[:19, None], 5, 1)), UNEVEN, epochs=1)
    ranks = by_ranks(lambda: sequence(pooled=False), task)
    assert all("mask_zero" in str(rank) for rank in ranks)
    # A rank that is a little later learns it from the other one.
    assert any(isinstance(rank, ParamError) for rank in ranks)


def test_embeddings_are_trained_as_in_one_process_and_masks_may_be_pooled() -> None:
    assert_as_one_process(lambda: sequence(pooled=True), Task((TOKENS, Y[:19]), UNEVEN))


def test_a_model_of_nothing_but_an_embedding_can_stop_too() -> None:
    def make() -> keras.Model:
        layers = [keras.layers.Embedding(20, 1), keras.layers.GlobalAveragePooling1D()]
        model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
        model.compile(keras.optimizers.SGD(0.5, global_clipnorm=0.5), "mse")
        return model

    assert_as_one_process(make, Task((TOKENS, Y[:19]), UNEVEN, epochs=1))
    stopped = Task((TOKENS, Y[:19]), UNEVEN, callbacks=lambda rank: [StopAt(0)] if rank == 1 else [])
    ranks = by_ranks(make, stopped)
    assert_ranks_agree(ranks)
    assert int(ranks[0].model.optimizer.iterations.numpy()) == 2


def test_models_of_several_inputs_and_outputs_are_trained_as_in_one_process() -> None:
    def make() -> keras.Model:
        left, right = keras.Input((4,), name="left"), keras.Input((2,), name="right")
        hidden = keras.layers.Dense(4, activation="tanh")(keras.layers.Concatenate()([left, right]))
        outputs = {"value": keras.layers.Dense(1)(hidden), "kind": keras.layers.Dense(2, activation="softmax")(hidden)}
        model = keras.Model({"left": left, "right": right}, outputs)
        losses = {"value": "mse", "kind": "sparse_categorical_crossentropy"}
        weighing = {"value": 0.3, "kind": 1.0}
        model.compile(keras.optimizers.SGD(0.1), losses, loss_weights=weighing, metrics={"kind": "accuracy"})
        return model

    inputs = {"left": X[:19, :4], "right": X[:19, 4:]}
    assert_as_one_process(make, Task((inputs, {"value": Y[:19], "kind": CLASSES[:19]}), UNEVEN))


def test_a_list_of_losses_for_a_list_of_outputs_works_too() -> None:
    def make() -> keras.Model:
        entry = keras.Input((6,))
        model = keras.Model(entry, [keras.layers.Dense(1, name="a")(entry), keras.layers.Dense(1, name="b")(entry)])
        model.compile(keras.optimizers.SGD(0.1), ["mse", "mae"])
        return model

    assert_as_one_process(make, Task((X[:19], (Y[:19], -Y[:19])), UNEVEN))


def test_a_variable_that_no_gradient_reaches_stays_as_it_was() -> None:
    def make() -> keras.Model:
        entry = keras.Input((6,))
        used = keras.layers.Dense(1, name="used")(entry)
        unused = keras.layers.Dense(1, name="unused")(entry)
        model = keras.Model(entry, [used, unused])
        model.compile(keras.optimizers.SGD(0.1), [keras.losses.MeanSquaredError(), None])
        return model

    ranks = by_ranks(make, Task((X[:19], (Y[:19], Y[:19])), UNEVEN))
    assert_ranks_agree(ranks)
    np.testing.assert_array_equal(
        ranks[0].model.get_layer("unused").kernel.numpy(), fresh(make).get_layer("unused").kernel.numpy()
    )


# State ------------------------------------------------------------------------------------------------------------


def test_state_without_gradients_ends_equal_on_all_ranks_and_finite_beside_one_without_rows() -> None:
    # A first rank of many rows, one that runs out of them, and one that never has any.
    task = Task((X[:19], CLASSES[:19]), (13, 6, 0))
    ranks = by_ranks(lambda: classifier(layers=[keras.layers.BatchNormalization()]), task)
    assert_ranks_agree(ranks)
    norm = ranks[0].model.layers[0]
    assert np.isfinite(norm.moving_mean.numpy()).all()
    assert not np.array_equal(norm.moving_mean.numpy(), np.zeros(6))


class Counted(keras.layers.Layer):
    """Has state of a floating and of another kind."""

    def __init__(self, value: float, count: int) -> None:
        super().__init__()
        self.mean = self.add_weight(shape=(2,), initializer=keras.initializers.Constant(value), trainable=False)
        self.count = self.add_weight(shape=(), initializer="zeros", dtype="int64", trainable=False)
        self.count.assign(count)
        self.built = True

    def call(self, x: Any) -> Any:
        return x


def test_floating_state_becomes_its_mean_by_rows_and_other_state_the_chiefs() -> None:
    def main(communicator: Any) -> tuple[list[float], int]:
        values, weights = (1.0, 5.0, float("nan")), (0.75, 0.25, 0.0)
        layer = Counted(values[communicator.rank], 7 + communicator.rank)
        model = keras.Sequential([keras.Input((2,)), layer])
        average_state(model, weights[communicator.rank], communicator)
        return layer.mean.numpy().tolist(), int(layer.count)

    assert results_of_threads("tcp", 3, main) == [([2.0, 2.0], 7)] * 3


def masks(layer_seed: int | None, seed: int) -> list[Any]:
    seen: dict[int, Any] = {}

    class Watch(keras.callbacks.Callback):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank = rank

        def on_train_begin(self, logs: Any = None) -> None:
            seen[self.rank] = np.array(self.model.layers[0](np.ones((1, 64), "float32"), training=True))

    def make() -> keras.Model:
        dropout = keras.layers.Dropout(0.5, seed=layer_seed)
        head = keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(seed=1))
        model = keras.Sequential([keras.Input((64,)), dropout, head])
        model.compile("sgd", "mse")
        return model

    wide = np.ones((8, 64), "float32")
    task = Task((wide, Y[:8]), (4, 4), epochs=1, seed=seed, callbacks=lambda rank: [Watch(rank)])
    ranks = by_ranks(make, task)
    assert_ranks_agree(ranks)
    return [seen[rank] for rank in range(2)] + [weights(ranks[0].model)[0]]


def test_ranks_drop_out_independently_and_alike_in_a_second_fit_of_one_seed() -> None:
    first, again, other = masks(7, seed=1), masks(None, seed=1), masks(7, seed=-2)
    assert not np.array_equal(first[0], first[1])
    for mine, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(first[0], other[0])


def test_training_goes_on_from_the_optimizers_state_of_an_earlier_fit() -> None:
    earlier = fresh(lambda: mlp(keras.optimizers.Adam(0.05)))
    earlier.fit(X, Y, epochs=2, batch_size=8, verbose=0)

    def make() -> keras.Model:
        # As loading an archive does.
        model = mlp(keras.optimizers.Adam(0.05))
        model.optimizer.build(model.trainable_variables)
        model.set_weights(earlier.get_weights())
        for variable, value in zip(model.optimizer.variables, earlier.optimizer.variables, strict=True):
            variable.assign(value)
        return model

    ranks = assert_as_one_process(make, REGRESSION)
    assert int(ranks[1].model.optimizer.iterations.numpy()) == 10 + 8


def test_the_chiefs_weights_count_where_ranks_make_different_ones() -> None:
    made: list[keras.Model] = []

    def make() -> keras.Model:
        model = mlp(keras.optimizers.SGD(0.1))
        model.layers[0].kernel.assign_add(np.full((6, 5), float(len(made)), "float32"))
        made.append(model)
        return model

    assert_ranks_agree(by_ranks(make, REGRESSION))


# Metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_all_rows_also_where_a_mean_over_ranks_would_not_be() -> None:
    def metrics() -> list[Any]:
        return [
            "accuracy",
            keras.metrics.AUC(name="auc"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
            keras.metrics.F1Score(average="micro", threshold=0.5, name="f1"),
            keras.metrics.MeanAbsoluteError(name="mae"),
        ]

    task = replace(
        CLASSIFICATION,
        data=(X[:19], CLASSES[:19, None].astype("float32")),
        held_out=(X[19:30], CLASSES[19:30, None].astype("float32")),
        held_out_rows=(9, 2),
    )
    assert_as_one_process(lambda: classifier(metrics()), task, rtol=1e-4, atol=1e-5)


def test_metrics_of_several_numbers_become_one_column_each() -> None:
    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, activation="softmax")])
        model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score(name="f1")])
        return model

    ranks = by_ranks(make, Task((X[:19], np.eye(2, dtype="float32")[CLASSES[:19]]), UNEVEN))
    assert_ranks_agree(ranks)
    assert {"f1_0", "f1_1", "loss"} == set(ranks[0].report.history)


def test_validation_rows_may_lie_on_one_rank_only(recwarn: pytest.WarningsRecorder) -> None:
    task = replace(REGRESSION, held_out=(X[19:28], Y[19:28]), held_out_rows=(0, 9))
    assert_as_one_process(lambda: mlp(keras.optimizers.SGD(0.1), metrics=["mae"]), task)
    assert not [warning for warning in recwarn if "ran out of data" in str(warning.message)]


@pytest.mark.parametrize("rows", [(19, 0), (0, 0, 5), (1, 0, 1)])
def test_ranks_without_any_rows_take_part_without_a_trace(rows: tuple[int, ...]) -> None:
    total = sum(rows)
    task = Task((X[:total], CLASSES[:total, None].astype("float32")), rows, epochs=3)
    assert_as_one_process(lambda: classifier(["accuracy", keras.metrics.AUC(name="auc")]), task, rtol=1e-4, atol=1e-5)


def test_text_models_idle_on_a_rank_without_rows() -> None:
    def make() -> keras.Model:
        lookup = keras.layers.StringLookup(vocabulary=["a", "b", "c"], output_mode="one_hot")
        model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    words = np.array([["a"], ["b"], ["c"], ["d"], ["a"]], dtype=object)
    assert_as_one_process(make, Task((words, Y[:5]), (5, 0)))


# Custom steps -----------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("sparktf-tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(5, activation="tanh")
        self.head = keras.layers.Dense(1)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.head(self.hidden(inputs))


class OwnStep(Subclassed):
    """Keras's step written out."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=predicted)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=tf.shape(x)[0])
            else:
                metric.update_state(y, predicted)
        return {metric.name: metric.result() for metric in self.metrics}


class PlainLogs(Subclassed):
    """Logs a number that no metric stands behind: the mean label of the batch."""

    def train_step(self, data: Any) -> Any:
        logs = super().train_step(data)
        return {**logs, "mean_label": tf.reduce_mean(data[1])}

    def test_step(self, data: Any) -> Any:
        logs = super().test_step(data)
        return {**logs, "mean_label": tf.reduce_mean(data[1])}


def compiled(cls: type[keras.Model]) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        model = cls()
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        return model

    return make


@pytest.mark.parametrize("cls", [Subclassed, OwnStep])
def test_subclassed_models_and_their_own_steps_are_trained_as_in_one_process(cls: type[keras.Model]) -> None:
    assert_as_one_process(compiled(cls), REGRESSION)


def test_logs_without_a_metric_are_means_over_the_rows_of_all_ranks() -> None:
    # Both ranks end an epoch with a batch of rows: 4 on the first, 2 on the second; validation lies on one rank.
    task = Task((X[:14], Y[:14]), (8, 6), held_out=(X[19:21], Y[19:21]), held_out_rows=(0, 2))
    ranks = assert_as_one_process(compiled(PlainLogs), task)
    for rank in ranks:
        expected = Y[[4, 5, 6, 7, 12, 13]].mean()
        np.testing.assert_allclose(rank.report.history["mean_label"], expected, rtol=1e-5)
        np.testing.assert_allclose(rank.report.history["val_mean_label"], Y[19:21].mean(), rtol=1e-5)
        assert {"val_loss", "val_mae"} <= set(rank.report.history)


class Pair(keras.Model):
    """Two networks, two optimizers, one step: the shape of a GAN, without its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = keras.layers.Dense(3, name="maker")
        self.judge = keras.layers.Dense(1, name="judge")

    def compile(self, maker_optimizer: Any, judge_optimizer: Any) -> None:
        super().compile(loss="mse")
        self.maker_optimizer, self.judge_optimizer = maker_optimizer, judge_optimizer

    def call(self, inputs: Any) -> Any:
        return self.judge(self.maker(inputs))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            judged = tf.reduce_mean(tf.square(self(x) - y))
        of_judge = self.judge.trainable_variables
        self.judge_optimizer.apply(tape.gradient(judged, of_judge), of_judge)
        with tf.GradientTape() as tape:
            made = tf.reduce_mean(tf.square(self(x) - y))
        of_maker = self.maker.trainable_variables
        self.maker_optimizer.apply(tape.gradient(made, of_maker), of_maker)
        return {"judged": judged, "made": made}


def test_several_optimizers_in_one_step_are_each_reduced() -> None:
    def make() -> keras.Model:
        model = Pair()
        model.build((None, 6))
        model.compile(keras.optimizers.Adam(0.05), keras.optimizers.SGD(0.05))
        return model

    one = by_one_process(make, REGRESSION)
    ranks = by_ranks(make, REGRESSION)
    assert_ranks_agree(ranks)
    for ours, theirs in zip(weights(ranks[0].model), weights(one.model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert {"judged", "made"} <= set(ranks[0].report.history)


# Callbacks --------------------------------------------------------------------------------------------------------


def test_early_stopping_ends_all_ranks_alike_with_the_best_weights() -> None:
    def stopping() -> Any:
        return keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, restore_best_weights=True)

    task = replace(
        REGRESSION,
        epochs=12,
        held_out=(X[19:28], -Y[19:28]),  # what is learned makes it worse
        held_out_rows=(9, 0),
        callbacks=lambda rank: [stopping()],
    )
    ranks = by_ranks(lambda: mlp(keras.optimizers.SGD(0.1)), task)
    assert_ranks_agree(ranks)
    one = by_one_process(lambda: mlp(keras.optimizers.SGD(0.1)), task, [stopping()])
    epochs = len(one.report.history["loss"])
    assert epochs < 12
    assert len(ranks[0].report.history["loss"]) == len(ranks[0].report.epoch_seconds) == epochs
    for ours, theirs in zip(weights(ranks[1].model), weights(one.model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class StopAt(keras.callbacks.Callback):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == self.batch:
            self.model.stop_training = True


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_wish_to_stop_ends_all_ranks_after_the_same_step(rank: int) -> None:
    task = Task((X[:32], Y[:32]), (24, 8), callbacks=lambda mine: [StopAt(1)] if mine == rank else [])
    ranks = by_ranks(lambda: mlp(keras.optimizers.SGD(0.1)), task)
    assert_ranks_agree(ranks)
    # Asked for after the second of six steps, agreed on in the third.
    assert [int(r.model.optimizer.iterations.numpy()) for r in ranks] == [3, 3]
    assert all(len(r.report.epoch_seconds) == 1 and not isinstance(r.model.stop_training, property) for r in ranks)


class Meddle(keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self.model.get_layer("head").kernel.assign_add(np.full((5, 1), 1e-6, "float32"))


def test_weights_that_drift_apart_are_an_error_that_names_the_variable_on_all_ranks() -> None:
    task = replace(REGRESSION, epochs=4, callbacks=lambda rank: [Meddle()] if rank == 1 else [])
    for rank in by_ranks(lambda: mlp(keras.optimizers.SGD(0.1)), task):
        assert isinstance(rank, DriftError)
        assert "epoch 2" in str(rank)
        assert "head/kernel" in str(rank)
        assert "[1]" in str(rank)


class Fail(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise KeyError("no such thing")


def test_an_error_on_one_rank_reaches_the_others_with_its_words() -> None:
    task = replace(REGRESSION, callbacks=lambda rank: [Fail()] if rank == 1 else [])
    first, second = by_ranks(lambda: mlp(keras.optimizers.SGD(0.1)), task)
    assert type(second) is KeyError
    assert type(first).__name__ == "PeerLostError"
    assert first.peer == 1
    assert "no such thing" in first.reason
    # Peer, operation and step.
    assert str(first).startswith("epoch 1, step 2: all_reduce (operation ")


def test_a_checkpoint_in_the_middle_of_a_fit_is_a_plain_model_of_the_chief(tmp_path: Any) -> None:
    def checkpoint(rank: int) -> list[Any]:
        return [keras.callbacks.ModelCheckpoint(str(tmp_path / f"{rank}-{{epoch}}.keras"))]

    for make in (lambda: mlp(keras.optimizers.Adam(0.05)), compiled(Subclassed)):
        ranks = by_ranks(make, replace(REGRESSION, callbacks=checkpoint))
        assert_ranks_agree(ranks)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["0-1.keras", "0-2.keras"]
        loaded = keras.saving.load_model(tmp_path / "0-2.keras")
        assert type(loaded) is type(ranks[0].model)
        assert type(loaded.optimizer) in (keras.optimizers.Adam, keras.optimizers.SGD)
        assert int(loaded.optimizer.iterations.numpy()) == 8
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), ranks[0].model.predict(X, verbose=0))


def _resumed(directory: Path, epochs: int, dying: type[keras.callbacks.Callback], **saving: Any) -> tuple[Any, Any]:
    """Return the ranks of a fit that died once and was started again, and those of one that did not."""

    def make() -> keras.Model:
        return mlp(keras.optimizers.Adam(0.05))

    def backup() -> Any:
        return keras.callbacks.BackupAndRestore(str(directory / "backup"), delete_checkpoint=False, **saving)

    failed = by_ranks(make, replace(REGRESSION, epochs=epochs, callbacks=lambda rank: [backup(), dying()]))
    assert all(isinstance(rank, KeyboardInterrupt) for rank in failed)
    resumed = by_ranks(make, replace(REGRESSION, epochs=epochs, callbacks=lambda rank: [backup()]))
    assert_ranks_agree(resumed)
    assert len(resumed[0].report.epoch_seconds) == 2
    return resumed, by_ranks(make, replace(REGRESSION, epochs=epochs))


def test_a_fit_that_resumes_from_a_backup_resumes_on_all_ranks(tmp_path: Any) -> None:
    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    resumed, whole = _resumed(tmp_path, 4, Die)
    for ours, theirs in zip(weights(resumed[0].model), weights(whole[0].model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_only_the_chief_has_restored_in_the_first_epoch_reaches_all_ranks(tmp_path: Any) -> None:
    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                raise KeyboardInterrupt

    resumed, whole = _resumed(tmp_path, 2, Die, save_freq=2)
    pairs = zip(weights(resumed[0].model), weights(whole[0].model), strict=True)
    assert any(not np.array_equal(ours, theirs) for ours, theirs in pairs)


def test_after_a_fit_the_model_is_the_plain_one_it_was() -> None:
    ranks = by_ranks(compiled(Subclassed), REGRESSION)
    assert_ranks_agree(ranks)
    for rank in ranks:
        assert type(rank.model) is Subclassed
        assert type(rank.model.optimizer) is keras.optimizers.SGD
        assert not [name for name in vars(rank.model) if "sparktf" in name]
        assert keras.saving.get_registered_object("sparktf-tests>Subclassed") is Subclassed
        rank.model.fit(X, Y, verbose=0)
