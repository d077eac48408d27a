"""Fits whose nodes are in executors of their own: equal results, and failures that are named in time."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from failing import Break, breaking_model

from sparktf.cluster import launch
from sparktf.cluster.preflight import installed_versions
from sparktf.errors import (
    ClusterError,
    DataError,
    NodeError,
    SlotsError,
    TransportError,
    TransportTimeoutError,
    VersionError,
)
from sparktf.ml import TFEstimator

PROMISED_SECONDS = 10.0


@pytest.fixture(scope="module")
def rows(spark: Any) -> Any:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(301, 4))
    data = [([float(v) for v in row], float(row.sum())) for row in x]
    return spark.createDataFrame(data, "features array<float>, label double").repartition(3).cache()


def _model() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.2), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def _estimator(**params: Any) -> TFEstimator:
    return TFEstimator(**{"model": _model(), "numWorkers": 2, "epochs": 3, "verbose": 0, **params})


def _executors(spark: Any) -> set[str]:
    running = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    return {running.apply(i).id() for i in range(running.size())}


def test_two_fits_are_equal_to_the_last_bit(rows: Any, no_leftovers: Any) -> None:
    first, second = (_estimator().fit(rows) for _ in range(2))
    assert first.summary.worldSize == 2
    assert first.summary.protocol == "shm"
    assert first.summary.history.equals(second.summary.history)
    for ours, theirs in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_reaches_the_driver_and_the_session_fits_again(
    spark: Any, rows: Any, rank: int, no_leftovers: Any
) -> None:
    before = _executors(spark)
    with pytest.raises(NodeError, match="kaboom") as caught:
        _estimator(callbacks=[Break(rank, "raise")]).fit(rows)
    raised = float(re.search(r"kaboom at ([\d.]+)", str(caught.value))[1])
    assert time.time() - raised < PROMISED_SECONDS
    assert caught.value.rank == rank
    assert "failing.py" in caught.value.remote_traceback
    assert _executors(spark) == before
    assert len(_estimator(epochs=1).fit(rows).summary.history) == 1


def test_an_exception_in_a_model_on_one_rank_reaches_the_driver(spark: Any, rows: Any, no_leftovers: Any) -> None:
    before = _executors(spark)
    with pytest.raises(NodeError, match="kaboom") as caught:
        _estimator(model=None, modelFn=breaking_model(1)).fit(rows)
    raised = float(re.search(r"kaboom at ([\d.]+)", str(caught.value))[1])
    assert time.time() - raised < PROMISED_SECONDS
    assert caught.value.rank == 1
    assert "train_step" in caught.value.remote_traceback
    assert _executors(spark) == before


def test_versions_that_differ_on_executors_are_named_and_no_executor_pays_for_it(
    spark: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, no_leftovers: Any
) -> None:
    before = _executors(spark)
    monkeypatch.setattr(launch, "installed_versions", lambda: {**installed_versions(), "keras": "2.9.0"})
    with pytest.raises(VersionError, match=r"keras .*2\.9\.0"):
        _estimator().fit(rows)
    assert _executors(spark) == before


def test_an_asynchronous_fit_has_its_server_in_an_executor_of_its_own(rows: Any, no_leftovers: Any) -> None:
    fitted = _estimator(mode="async", numWorkers=1, epochs=4).fit(rows)
    assert (fitted.summary.worldSize, fitted.summary.numPs, fitted.summary.updates) == (1, 1, 4 * 10)
    assert fitted.summary.history.loss.iloc[-1] < fitted.summary.history.loss.iloc[0]


def test_an_asynchronous_fit_whose_only_worker_is_lost_says_so(spark: Any, rows: Any, no_leftovers: Any) -> None:
    before = _executors(spark)
    with pytest.raises(ClusterError, match=r"received none. Lost: worker 0: killed by signal 9"):
        _estimator(mode="async", numWorkers=1, callbacks=[Break(0, "SIGKILL")]).fit(rows)
    assert _executors(spark) == before


def test_nulls_in_one_partition_are_an_error_that_no_executor_pays_for(spark: Any, rows: Any) -> None:
    before = _executors(spark)
    with pytest.raises(DataError, match=r"'label' \(label\) holds 1 null in the 301 rows of the DataFrame"):
        _estimator().fit(rows.selectExpr("features", "if(monotonically_increasing_id() = 7, null, label) as label"))
    assert _executors(spark) == before


def test_a_killed_node_is_named_in_time_and_the_session_fits_again(
    spark: Any, rows: Any, tmp_path: Path, no_leftovers: Any
) -> None:
    before = _executors(spark)
    with pytest.raises(NodeError, match="Rank 1 was lost") as caught:
        _estimator(callbacks=[Break(1, "SIGKILL", str(tmp_path / "when"))]).fit(rows)
    assert time.time() - float((tmp_path / "when").read_text()) < PROMISED_SECONDS
    assert caught.value.rank == 1
    assert _executors(spark) == before
    assert len(_estimator(epochs=1).fit(rows).summary.history) == 1


def test_a_killed_chief_takes_its_tensorboard_along(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="Rank 0 was lost"):
        _estimator(tensorboard=True, logDir=tmp_path, callbacks=[Break(0, "SIGKILL")]).fit(rows)
    assert (tmp_path / "train").is_dir()

    def servers() -> list[psutil.Process]:
        # Of those that have ended meanwhile there is no command line.
        return [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])]

    deadline = time.monotonic() + PROMISED_SECONDS
    while servers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not servers()


def test_a_stopped_node_is_named_within_the_timeout(rows: Any) -> None:
    with pytest.raises(TransportError, match="rank 1") as caught:
        _estimator(callbacks=[Break(1, "SIGSTOP")], timeout=5.0).fit(rows)
    assert isinstance(caught.value, TransportTimeoutError)


def test_too_few_slots_are_told_at_once(rows: Any) -> None:
    started = time.monotonic()
    with pytest.raises(SlotsError, match=r"Expected 3 task slots.*received 2"):
        _estimator(numWorkers=3).fit(rows)
    assert time.monotonic() - started < PROMISED_SECONDS


def test_a_node_with_threads_of_its_own_trains_in_a_child_process(rows: Any, no_leftovers: Any) -> None:
    # Over a megabyte, so that it travels as a broadcast variable.
    layers = [keras.Input((4,)), keras.layers.Dense(400), keras.layers.Dense(800), keras.layers.Dense(1)]
    large = keras.Sequential(layers)
    large.compile(keras.optimizers.SGD(1e-3), "mse")
    params = {"model": large, "epochs": 1}
    usual, other = _estimator(**params).fit(rows), _estimator(**params, threadsPerWorker=3).fit(rows)
    np.testing.assert_allclose(usual.summary.history.loss, other.summary.history.loss, rtol=1e-5)


def test_scoring_between_two_fits_does_not_change_their_bits(rows: Any) -> None:
    first = _estimator().fit(rows)
    first.transform(rows).select("prediction").collect()
    second = _estimator().fit(rows)
    for ours, theirs in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_node_that_hangs_alone_is_named_after_the_timeout(rows: Any) -> None:
    with pytest.raises(NodeError, match="Rank 0 was lost: no progress"):
        _estimator(numWorkers=1, callbacks=[Break(0, "SIGSTOP")], timeout=4.0).fit(rows)


def test_a_rank_in_a_child_process_trains_with_one_in_its_worker(rows: Any, no_leftovers: Any) -> None:
    with pytest.raises(NodeError, match="Rank 1 was lost"):
        _estimator(callbacks=[Break(1, "SIGKILL")]).fit(rows)
    # Both workers are new now; one of them gets threads of its own.
    _estimator(numWorkers=1, epochs=1, threadsPerWorker=3).fit(rows)
    assert len(_estimator(epochs=2, threadsPerWorker=1).fit(rows).summary.history) == 2
