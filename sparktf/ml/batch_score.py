"""Score a table with a saved stage: read, transform, write whole or not at all."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparktf.errors import ClusterError, DataError, ParamError, PersistenceError
from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    from pyspark.ml import Transformer
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["ScoreJob", "ScoreResult", "load_stage", "score"]


@dataclass(frozen=True)
class ScoreJob:
    """What to score.

    Parameters
    ----------
    model, input, output : str
        Paths on any file system that Spark knows.
    format : str
        Spark's name of the input's format: ``parquet``, ``json``, ``csv``, ``orc``, ...
    output_format : str
        The output's; empty for the input's.
    select : sequence of str
        The columns to write; empty for all.
    options : mapping of str to str
        Options of Spark's reader, such as ``header`` for CSV.
    overwrite : bool
        Replace an existing output, once the new one is complete.
    """

    model: str
    input: str
    output: str
    format: str = "parquet"
    output_format: str = ""
    select: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class ScoreResult:
    """What was scored: rows, in how many seconds from reading to the finished output, and where it is."""

    rows: int
    seconds: float
    output: str

    def __str__(self) -> str:
        rate = self.rows / self.seconds if self.seconds > 0 else 0.0
        return f"scored {self.rows:,} rows in {self.seconds:.1f} s ({rate:,.0f} rows/s) to {self.output}"


def score(spark: SparkSession, job: ScoreJob) -> ScoreResult:
    """Run a batch scoring job.

    The output is written beside its place and renamed into it, so that a reader finds all of it or nothing.

    Parameters
    ----------
    spark : SparkSession
    job : ScoreJob

    Returns
    -------
    ScoreResult

    Raises
    ------
    ParamError
        A path is missing or holds no model, the output exists already, or a selected column does not exist.
    DataError
        The table does not fit the model.
    PersistenceError
        The model cannot be loaded, or cannot score.
    """
    from pyspark.sql import Observation
    from pyspark.sql import functions as sf

    _check_paths(spark, job)
    # A stage of ours imports TensorFlow while it is loaded.
    with quiet_stderr():
        stage = load_stage(spark, job.model)
        started = time.perf_counter()
        frame = spark.read.format(job.format).options(**job.options).load(job.input)
        transformed = _transformed(stage, frame)
    # The observation counts while the rows pass: no second pass over the data.
    observation = Observation("scored")
    scored = _selected(transformed, job.select).observe(observation, sf.count(sf.lit(1)).alias("rows"))
    temporary = f"{job.output.rstrip('/')}.tmp-{secrets.token_hex(6)}"
    try:
        scored.write.format(job.output_format or job.format).save(temporary)
        _move_into_place(spark, temporary, job.output)
    except BaseException:
        _delete(spark, temporary)
        raise
    return ScoreResult(observation.get["rows"], time.perf_counter() - started, job.output)


def load_stage(spark: SparkSession, path: str) -> Transformer:
    """Load a saved TFModel, PipelineModel or other fitted stage of Spark ML, by its own metadata.

    Parameters
    ----------
    spark : SparkSession
    path : str

    Returns
    -------
    Transformer

    Raises
    ------
    ParamError
        There is no stage at the path.
    PersistenceError
        It cannot be loaded, or cannot score.
    """
    from pyspark.ml import Transformer
    from pyspark.ml.util import DefaultParamsReader

    name = _stage_class(spark, path)
    if not name.startswith(("sparktf.ml.", "pyspark.ml.", "org.apache.spark.ml.")):
        raise PersistenceError(
            f"{path} holds a {name}; expected a TFModel, or a PipelineModel or other stage of Spark ML. Put a "
            "stage of another package into a PipelineModel to score with it."
        )
    stage: Any = DefaultParamsReader.loadParamsInstance(path, spark)
    if not isinstance(stage, Transformer):
        raise PersistenceError(f"{path} holds a {name}, which is not fitted: save what its fit() returns.")
    return stage


def _stage_class(spark: SparkSession, path: str) -> str:
    metadata = f"{path.rstrip('/')}/metadata"
    if not _exists(spark, metadata):
        raise ParamError(f"{path} holds no saved stage: there is no {metadata}.")
    row = spark.read.text(metadata).first()
    try:
        return str(json.loads(row[0] if row else "")["class"])
    except (ValueError, KeyError, TypeError) as error:
        raise PersistenceError(f"{metadata} is not the metadata of a saved stage: {error}.") from error


def _check_paths(spark: SparkSession, job: ScoreJob) -> None:
    for name, path in (("--model", job.model), ("--input", job.input)):
        if not _exists(spark, path):
            raise ParamError(f"{name} {path} does not exist.")
    if not job.overwrite and _taken(spark, job.output):
        raise ParamError(f"--output {job.output} exists already; choose another path, or give --overwrite.")


def _transformed(stage: Transformer, frame: DataFrame) -> DataFrame:
    try:
        return stage.transform(frame)
    except ParamError as error:
        # The stage speaks of its Params; here they are given, and it is the table that does not fit.
        raise DataError(str(error)) from error


def _selected(frame: DataFrame, columns: Sequence[str]) -> DataFrame:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ParamError(f"--select {', '.join(missing)}: no such column; there are {', '.join(frame.columns)}.")
    return frame.select(*columns) if columns else frame


def _hadoop(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """Return Hadoop's file system for a path, and its Path: the only way to every system that Spark can write."""
    jvm: Any = spark._jvm
    hadoop_path = jvm.org.apache.hadoop.fs.Path(path)
    return hadoop_path.getFileSystem(spark._jsc.hadoopConfiguration()), hadoop_path


def _exists(spark: SparkSession, path: str) -> bool:
    system, hadoop_path = _hadoop(spark, path)
    # A glob is how Spark's own readers take paths.
    matches = system.globStatus(hadoop_path)
    return matches is not None and len(matches) > 0


def _taken(spark: SparkSession, path: str) -> bool:
    # Spark's writers take a path as it is: "scored[2026]" is a name.
    system, hadoop_path = _hadoop(spark, path)
    return bool(system.exists(hadoop_path))


def _delete(spark: SparkSession, path: str) -> None:
    system, hadoop_path = _hadoop(spark, path)
    system.delete(hadoop_path, True)


def _rename(spark: SparkSession, source: str, target: str) -> None:
    system, source_path = _hadoop(spark, source)
    if not system.rename(source_path, _hadoop(spark, target)[1]):
        raise ClusterError(f"{source} could not be renamed to {target}.")


def _move_into_place(spark: SparkSession, temporary: str, output: str) -> None:
    if not _taken(spark, output):
        _rename(spark, temporary, output)
        return
    # The old output stays until the new one is in its place.
    replaced = f"{output.rstrip('/')}.old-{secrets.token_hex(6)}"
    _rename(spark, output, replaced)
    try:
        _rename(spark, temporary, output)
    except BaseException:
        _rename(spark, replaced, output)
        raise
    _delete(spark, replaced)
