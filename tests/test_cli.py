from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparktf import __main__ as cli
from sparktf import doctor
from sparktf.errors import PersistenceError
from sparktf.ml.batch_score import load_stage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def table(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("score") / "input")
    frame = spark.range(100).selectExpr("id", "cast(id as double) / 10 as x", "cast(id % 2 as double) as label")
    frame.repartition(3).write.parquet(path)
    return path


@pytest.fixture(scope="module")
def pipeline_model(spark: Any, table: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    from pyspark.ml import Pipeline
    from pyspark.ml.classification import DecisionTreeClassifier
    from pyspark.ml.feature import VectorAssembler

    path = str(tmp_path_factory.mktemp("score") / "model")
    stages = [VectorAssembler(inputCols=["x"], outputCol="features"), DecisionTreeClassifier(maxDepth=2)]
    Pipeline(stages=stages).fit(spark.read.parquet(table)).save(path)
    return path


def _score(model: str, table: str, output: Path, *more: str) -> int:
    return cli.main(["score", "--model", model, "--input", table, "--output", str(output), *more])


@pytest.mark.usefixtures("no_leftovers")
def test_score_writes_every_row_and_says_how_fast(
    spark: Any, pipeline_model: str, table: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scored"
    assert _score(pipeline_model, table, output) == 0
    line = capfd.readouterr().out.strip()
    assert re.fullmatch(rf"scored 100 rows in \d+\.\d s \([\d,]+ rows/s\) to {re.escape(str(output))}", line)
    rows = spark.read.parquet(str(output))
    assert rows.count() == 100
    assert {"id", "x", "probability", "prediction"} <= set(rows.columns)
    assert [path.name for path in tmp_path.iterdir()] == ["scored"]


def test_score_leaves_the_session_of_others_running(
    spark: Any, pipeline_model: str, table: str, tmp_path: Path
) -> None:
    assert _score(pipeline_model, table, tmp_path / "scored") == 0
    assert spark.range(3).count() == 3


def test_select_keeps_the_named_columns_in_another_format(
    spark: Any, pipeline_model: str, table: str, tmp_path: Path
) -> None:
    output = tmp_path / "scored"
    more = ("--select", "prediction, id", "--output-format", "csv")
    assert _score(pipeline_model, table, output, *more) == 0
    assert len(spark.read.csv(str(output)).columns) == 2
    assert spark.read.csv(str(output)).count() == 100


def test_reader_options_reach_the_reader(spark: Any, pipeline_model: str, table: str, tmp_path: Path) -> None:
    source = str(tmp_path / "csv")
    spark.read.parquet(table).write.option("header", True).csv(source)
    options = ("--format", "csv", "--option", "header=true", "--option", "inferSchema=true")
    output = tmp_path / "scored"
    assert _score(pipeline_model, source, output, *options, "--output-format", "parquet") == 0
    assert spark.read.parquet(str(output)).count() == 100


@pytest.mark.parametrize("wrong", ["--model", "--input"])
def test_a_path_that_does_not_exist_is_a_wrong_argument(
    pipeline_model: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    paths = {"--model": pipeline_model, "--input": table} | {wrong: str(tmp_path / "nowhere")}
    assert _score(paths["--model"], paths["--input"], tmp_path / "scored") == 2
    assert f"{wrong} {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_an_existing_output_is_refused_and_left_alone(
    pipeline_model: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # To Spark's readers a pattern, to its writers a name.
    output = tmp_path / "scored[2026]"
    output.mkdir()
    (output / "kept").write_text("kept")
    assert _score(pipeline_model, table, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "kept").read_text() == "kept"


def test_overwrite_replaces_the_output_and_keeps_nothing_of_the_old(
    spark: Any, pipeline_model: str, table: str, tmp_path: Path
) -> None:
    output = tmp_path / "scored"
    output.mkdir()
    (output / "old").write_text("old")
    assert _score(pipeline_model, table, output, "--overwrite") == 0
    assert spark.read.parquet(str(output)).count() == 100
    assert not (output / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["scored"]


def test_overwrite_that_fails_keeps_the_old_output(
    spark: Any, pipeline_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "input")
    # The assembler refuses the null while the job runs, not before.
    spark.createDataFrame([(1.0,), (None,)], "x double").write.parquet(source)
    output = tmp_path / "scored"
    output.mkdir()
    (output / "old").write_text("old")
    assert _score(pipeline_model, source, output, "--overwrite") == 1
    assert "the job failed" in capsys.readouterr().err
    assert (output / "old").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "scored"]


def test_a_table_without_the_models_columns_fails_the_job(
    spark: Any, pipeline_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tmp_path / "input")
    spark.range(3).write.parquet(source)
    assert _score(pipeline_model, source, tmp_path / "scored") == 1
    assert "x" in capsys.readouterr().err


def test_a_selected_column_that_does_not_exist_is_a_wrong_argument(
    pipeline_model: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _score(pipeline_model, table, tmp_path / "scored", "--select", "id,absent") == 2
    assert "absent: no such column; there are id" in capsys.readouterr().err


def test_a_path_without_a_stage_is_a_wrong_argument(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _score(table, table, tmp_path / "scored") == 2
    assert "holds no saved stage" in capsys.readouterr().err


def test_an_estimator_cannot_score(spark: Any, tmp_path: Path) -> None:
    from pyspark.ml.classification import LogisticRegression

    LogisticRegression().save(str(tmp_path / "estimator"))
    with pytest.raises(PersistenceError, match="not fitted"):
        load_stage(spark, str(tmp_path / "estimator"))


def test_missing_arguments_are_wrong_arguments() -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["score", "--model", "m"])
    assert stopped.value.code == 2
    assert cli.main(["score", "--model", "m", "--input", "i", "--output", "o", "--option", "header"]) == 2


def _run(command: list[str], directory: Path, spark_conf_dir: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "HOME": str(directory),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SPARK_CONF_DIR": spark_conf_dir,
    }
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=directory, timeout=240, check=False
    )


@pytest.mark.long
def test_score_runs_under_spark_submit(pipeline_model: str, table: str, tmp_path: Path, spark_conf_dir: str) -> None:
    from pyspark.find_spark_home import _find_spark_home

    submit = [f"{_find_spark_home()}/bin/spark-submit", "--master", "local[2]", "--conf", "spark.ui.enabled=false"]
    arguments = ["score", "--model", pipeline_model, "--input", table, "--output", "scored"]
    command = ["env", f"PYSPARK_PYTHON={sys.executable}", *submit, cli.__file__, *arguments]
    answer = _run(command, tmp_path, spark_conf_dir)
    assert answer.returncode == 0, answer.stderr
    assert "scored 100 rows" in answer.stdout
    assert (tmp_path / "scored" / "_SUCCESS").exists()


@pytest.fixture(scope="module")
def tf_model(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    import keras

    from sparktf.ml import TFModel

    network = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(3, activation="softmax")])
    network.compile("sgd", "sparse_categorical_crossentropy")
    path = str(tmp_path_factory.mktemp("score") / "tf_model")
    TFModel.fromKeras(network, featuresCol="features").save(path)
    return path


def test_score_loads_a_tensorflow_model_and_runs_alone_on_a_pipeline_with_one_line_on_the_screen(
    spark: Any, table: str, tf_model: str, tmp_path: Path, spark_conf_dir: str
) -> None:
    from pyspark.ml import PipelineModel
    from pyspark.ml.feature import VectorAssembler

    from sparktf.ml import TFModel

    assembler = VectorAssembler(inputCols=["x"], outputCol="features")
    source, pipeline = str(tmp_path / "input"), str(tmp_path / "pipeline")
    assembler.transform(spark.read.parquet(table)).write.parquet(source)
    PipelineModel(stages=[assembler, TFModel.load(tf_model)]).save(pipeline)

    assert _score(tf_model, source, tmp_path / "alone") == 0
    answer = _run(
        [sys.executable, "-m", "sparktf", "score", "--model", pipeline, "--input", table, "--output", "piped"],
        tmp_path,
        spark_conf_dir,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert re.fullmatch(r"scored 100 rows in .* to piped\n", answer.stdout)
    alone, piped = (spark.read.parquet(str(tmp_path / name)) for name in ("alone", "piped"))
    assert set(alone.columns) == {"id", "x", "label", "features", "prediction", "probability", "rawPrediction"}
    assert {row.id: row.prediction for row in alone.collect()} == {row.id: row.prediction for row in piped.collect()}


def test_a_table_that_does_not_fit_a_tensorflow_model_fails_the_job(
    table: str, tf_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _score(tf_model, table, tmp_path / "scored") == 1
    assert "features" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_this_machine_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("Java", "Python", "pyspark", "TensorFlow", "GPUs", "RDMA", "locked memory", "ports"):
        assert word in shown
    assert shown.strip().endswith("ready to train")


def test_doctor_fails_with_the_fix_where_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_tensorflow", lambda: doctor.Finding("TensorFlow", "2.21.0, 0 GPUs"))
    monkeypatch.setenv("PYSPARK_PYTHON", "/nowhere/python")
    monkeypatch.setenv("SPARK_LOCAL_DIRS", "/nowhere/disk")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL Python of workers  PYSPARK_PYTHON=/nowhere/python does not run" in shown
    assert "/nowhere/disk cannot be written" in shown
    assert shown.strip().endswith("cannot train here: fix Python of workers, local directories")


def test_importing_the_package_imports_neither_tensorflow_nor_spark() -> None:
    code = (
        "import sys, sparktf; sparktf.__version__; dir(sparktf);"
        "print(sorted({'tensorflow', 'keras', 'pyspark', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_lists_the_known_ones() -> None:
    import sparktf

    with pytest.raises(AttributeError, match="it has TFEstimator"):
        _ = sparktf.Estimator
