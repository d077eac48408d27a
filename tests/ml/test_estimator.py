"""TFEstimator beside the rest of Spark ML."""

from __future__ import annotations

from typing import Any

import keras
from modes import in_both_modes
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import functions as F

from sparktf.ml import TFEstimator


def _network() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy")
    return model


@in_both_modes
def test_mllibs_own_models_score_after_a_fit_as_before(spark: Any, mode: dict[str, Any], no_leftovers: Any) -> None:
    columns = spark.range(60).select(F.rand(1).alias("a"), F.rand(2).alias("b"), (F.col("id") % 2).alias("label"))
    rows = VectorAssembler(inputCols=["a", "b"], outputCol="features").transform(columns)
    mllib = LogisticRegression().fit(rows)
    before = mllib.transform(rows).select("probability").collect()
    TFEstimator(model=_network(), verbose=0, **mode).fit(rows)
    assert mllib.transform(rows).select("probability").collect() == before


def test_explain_params_names_the_model_in_a_few_words() -> None:
    text = TFEstimator(model=_network()).explainParams()
    assert "numWorkers" in text
    assert len(text) < 8_000


@in_both_modes
def test_progress_is_one_line_an_epoch_where_there_is_no_terminal(
    spark: Any, capsys: Any, mode: dict[str, Any]
) -> None:
    columns = spark.range(60).select(F.rand(1).alias("a"), F.rand(2).alias("b"), (F.col("id") % 2).alias("label"))
    TFEstimator(model=_network(), inputCols=["a", "b"], epochs=2, verbose=2, **mode).fit(columns)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("loss" in line for line in lines)
