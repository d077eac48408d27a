"""Fits over each protocol, between executors of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from failing import Break

from sparktf.errors import NodeError, ParamError
from sparktf.ml import TFEstimator

PROMISED_SECONDS = 10.0


@pytest.fixture(scope="module")
def rows(spark: Any) -> Any:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(101, 4))
    data = [([float(v) for v in row], float(row.sum())) for row in x]
    return spark.createDataFrame(data, "features array<float>, label double").repartition(3).cache()


def _estimator(protocol: str, **params: Any) -> TFEstimator:
    keras.utils.set_random_seed(0)
    features = keras.Input((4,))
    # Sparse gradients, beside over a megabyte of dense ones: several buckets, and more than goes to everybody at once.
    bins = keras.layers.Discretization([-1.0, 0.0, 1.0])(features)
    table = keras.layers.Flatten()(keras.layers.Embedding(4, 3)(bins))
    wide = keras.layers.Dense(700)(keras.layers.Dense(512, "tanh")(features))
    model = keras.Model(features, keras.layers.Dense(1)(keras.layers.concatenate([wide, table])))
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    common = {"model": model, "numWorkers": 2, "epochs": 2, "batchSize": 16, "verbose": 0}
    return TFEstimator(**{**common, "protocol": protocol, **params})


@pytest.fixture(scope="module")
def over_tcp(rows: Any) -> list[np.ndarray]:
    return _estimator("tcp").fit(rows).model.get_weights()


@pytest.mark.parametrize(("protocol", "used"), [("auto", "shm"), ("tcp", "tcp"), ("shm", "shm"), ("grpc", "grpc")])
def test_every_protocol_gives_the_same_weights(
    rows: Any, over_tcp: list[np.ndarray], protocol: str, used: str, no_leftovers: Any
) -> None:
    fitted = _estimator(protocol).fit(rows)
    assert fitted.summary.protocol == used
    assert fitted.summary.protocolReason
    for ours, theirs in zip(fitted.model.get_weights(), over_tcp, strict=True):
        if protocol == "tcp":
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("protocol", ["shm", "grpc"])
def test_two_fits_over_one_protocol_are_equal_to_the_last_bit(rows: Any, protocol: str) -> None:
    first, second = (_estimator(protocol).fit(rows).model.get_weights() for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bfloat16_on_the_wire_trains_nearly_alike(rows: Any, over_tcp: list[np.ndarray]) -> None:
    compressed = _estimator("tcp", compression="bf16").fit(rows).model.get_weights()
    assert any(not np.array_equal(ours, theirs) for ours, theirs in zip(compressed, over_tcp, strict=True))
    for ours, theirs in zip(compressed, over_tcp, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.01)


def test_tensorflows_own_ring_takes_no_compression(rows: Any) -> None:
    with pytest.raises(ParamError, match="compression='none' with protocol='grpc'"):
        _estimator("grpc", compression="bf16").fit(rows)


@pytest.mark.parametrize("protocol", ["shm", "grpc"])
@pytest.mark.parametrize("how", ["raise", "SIGKILL"])
def test_a_rank_that_fails_is_named_in_time(
    rows: Any, protocol: str, how: str, tmp_path: Path, no_leftovers: Any
) -> None:
    breaking = Break(1, how, str(tmp_path / "when"))
    with pytest.raises(NodeError) as caught:
        _estimator(protocol, callbacks=[breaking]).fit(rows)
    ended = time.time()
    assert caught.value.rank == 1, str(caught.value)
    assert ("kaboom" in str(caught.value)) == (how == "raise")
    raised = str(caught.value).split("kaboom at ")[1].split()[0] if how == "raise" else (tmp_path / "when").read_text()
    assert ended - float(raised) < PROMISED_SECONDS
