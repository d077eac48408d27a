"""Whole fits on Spark over RDMA; in a pytest of its own, as it takes minutes where the machine is emulated."""

import numpy as np
import pytest


def fit(spark, protocol, **params):
    # Late, as it takes minutes under emulation, which the other tests of this directory need not spend.
    import keras

    from sparktf import TFEstimator

    rows = [(float(x % 7), float(x % 5), float(x % 7 - x % 5)) for x in range(64)]
    df = spark.createDataFrame(rows, ["a", "b", "label"])
    keras.utils.set_random_seed(1)
    # Large enough for its gradient to travel around the ring: 2 x 16 + 16 and 16 x 2048, 2048 x 1.
    model = keras.Sequential(
        [
            keras.layers.Input((2,)),
            keras.layers.Dense(16, "relu"),
            keras.layers.Dense(2048, "relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    estimator = TFEstimator(
        model=model,
        inputCols=["a", "b"],
        numWorkers=2,
        epochs=2,
        batchSize=8,
        protocol=protocol,
        timeout=900.0,
        verbose=0,
        **params,
    )
    return estimator.fit(df)


@pytest.fixture(scope="module")
def over_tcp(spark):
    fitted = fit(spark, "tcp")
    assert fitted.summary.protocol == "tcp"
    return fitted.model.get_weights()


@pytest.mark.timeout(1500)
def test_a_fit_over_rdma_gives_the_weights_of_one_over_tcp(spark, over_tcp):
    over_rdma = fit(spark, "grpc_rdma")
    assert over_rdma.summary.protocol == "rdma"
    for ours, theirs in zip(over_rdma.model.get_weights(), over_tcp, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    losses = over_rdma.summary.history["loss"]
    assert losses.iloc[-1] < losses.iloc[0]


@pytest.mark.timeout(1500)
def test_a_fit_on_a_parameter_server_over_rdma_gives_the_weights_of_training_in_step(spark, over_tcp):
    fitted = fit(spark, "rdma", mode="async", numPs=1, maxStaleness=0)
    assert (fitted.summary.protocol, fitted.summary.numPs) == ("rdma", 1)
    for ours, theirs in zip(fitted.model.get_weights(), over_tcp, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
