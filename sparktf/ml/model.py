"""TFModel: a trained model as a Spark ML Transformer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
from pyspark import cloudpickle
from pyspark.ml import Model
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F
from pyspark.sql import types as T

from sparktf.cluster.pickling import portable
from sparktf.data.columns import ColumnSpec
from sparktf.distribute.custom_objects import custom_objects
from sparktf.errors import ParamError, PersistenceError
from sparktf.ml.archive import KERAS, ModelArchive
from sparktf.ml.inputs import FeedColumn, fill_inputs, input_columns
from sparktf.ml.model_params import _TFModelParams
from sparktf.ml.outputs import OutputField, plan_outputs, result_type
from sparktf.ml.payload import payload_for
from sparktf.ml.persistence import ModelPersistence
from sparktf.ml.scoring import ScoringTask, score
from sparktf.ml.signature import ModelSignature, TensorSpec
from sparktf.ml.trained import Trained, saved_signature

if TYPE_CHECKING:
    import keras
    from pyspark.sql import Column, DataFrame

    from sparktf.ml.summary import TrainingSummary


class TFModel(Model, _TFModelParams, ModelPersistence):
    """A trained model that scores DataFrames: what ``TFEstimator.fit`` returns.

    ``transform`` adds columns and keeps all others. From the model's compiled loss: classification gives
    double ``predictionCol``, vector ``probabilityCol`` and vector ``rawPredictionCol`` (logits where the
    model gives logits, else log p; two classes for one sigmoid unit); everything else gives
    ``predictionCol`` as a double, or as an array where the model gives several numbers. ``outputMapping``
    adds raw outputs. An empty column name switches a column off. A row with a null in its features gets
    nulls.

    See Also
    --------
    TFModel.fromKeras, TFModel.fromSavedModel : models that were trained elsewhere.
    """

    _trained: Trained
    _summary: TrainingSummary | None

    @classmethod
    def _create(
        cls,
        archive: ModelArchive,
        *,
        uid: str | None = None,
        summary: TrainingSummary | None = None,
        signature: ModelSignature | None = None,
        custom_objects: Mapping[str, Any] | None = None,
        saved_signature: str = "",
    ) -> Self:
        """Make a model of an archive.

        Parameters
        ----------
        archive : ModelArchive
        uid : str, optional
            The estimator's, for a model that it made.
        summary : TrainingSummary, optional
        signature : ModelSignature, optional
            None: read from the archive when first needed, which loads the model into this process.
        custom_objects : mapping, optional
            Keras's registry at the time of the fit.
        saved_signature : str
            Which signature to call, for a SavedModel.
        """
        model = cls()
        if uid is not None:
            model._resetUid(uid)
        model._trained = Trained(archive, signature, custom_objects or {}, saved_signature)
        model._summary = summary
        return model

    @classmethod
    def fromKeras(cls, model_or_path: Any, *, safe_mode: bool = True, **params: Any) -> Self:
        """Make a stage of a Keras model that was trained elsewhere.

        Parameters
        ----------
        model_or_path : keras.Model or path
            A built model, compiled where probabilities are wanted; or a ``.keras`` file on the driver.
        safe_mode : bool
            Refuse files that hold Python code (Lambda layers). Objects are always trusted.
        **params
            Params of TFModel: ``featuresCol="pixels"``, ...

        Raises
        ------
        PersistenceError
            The model was never built, Keras cannot save it, or the file cannot be loaded.
        """
        import keras

        if isinstance(model_or_path, keras.Model):
            if not model_or_path.built:
                raise PersistenceError(
                    f"model {model_or_path.name!r} has no weights yet. Expected a built model: give it an Input layer, "
                    "or call it once on data"
                )
            archive = ModelArchive.from_model(model_or_path)
            model = model_or_path
        elif isinstance(model_or_path, str | os.PathLike):
            archive = ModelArchive.from_file(os.fspath(model_or_path))
            if archive.kind != KERAS:
                raise PersistenceError(f"{model_or_path!s} is a SavedModel. Load it with TFModel.fromSavedModel")
            model = archive.load(safe_mode=safe_mode)
        else:
            raise TypeError(
                f"expected a keras.Model or the path of a .keras file. Received: {model_or_path!r} of type "
                f"{type(model_or_path).__name__}"
            )
        signature = ModelSignature.of(model)
        return cls._create(archive, signature=signature, custom_objects=custom_objects())._set(**params)

    @classmethod
    def fromSavedModel(cls, path: Any, signature: str = "serving_default", **params: Any) -> Self:
        """Make a stage of a TensorFlow SavedModel directory on the driver.

        Parameters
        ----------
        path : path
            The directory that holds ``saved_model.pb``.
        signature : str
            Which of its signatures to call.
        **params
            Params of TFModel, above all ``inputMapping`` and ``outputMapping`` by the signature's names.

        Raises
        ------
        PersistenceError
            There is no SavedModel.
        ParamError
            It has no such signature.
        """
        archive = ModelArchive.from_file(os.fspath(path))
        if archive.kind == KERAS:
            raise PersistenceError(f"{path!s} is a .keras archive. Load it with TFModel.fromKeras")
        shapes = saved_signature(os.fspath(path), signature)
        return cls._create(archive, signature=shapes, saved_signature=signature)._set(**params)

    @property
    def model(self) -> keras.Model:
        """The trained ``keras.Model``, compiled, with its optimizer's state; loaded once, on the driver."""
        return self._trained.model

    @property
    def hasSummary(self) -> bool:
        """Whether this model knows how it was trained."""
        return self._summary is not None

    @property
    def summary(self) -> TrainingSummary:
        """How the fit went.

        Raises
        ------
        RuntimeError
            There is none.
        """
        if self._summary is None:
            raise RuntimeError(f"{self.uid} has no training summary: it was not made by TFEstimator.fit")
        return self._summary

    def _transform(self, dataset: DataFrame) -> DataFrame:
        signature = self._trained.signature
        fields = plan_outputs(
            signature,
            self.getPredictionCol(),
            self.getProbabilityCol(),
            self.getRawPredictionCol(),
            self.getOutputMapping(),
        )
        _check_new(fields, dataset)
        inputs = fill_inputs(input_columns(self, dataset.schema), signature.inputs)
        expressions = [column.expression(sparse=False) for column in inputs]
        if not fields:
            return dataset
        task = self._task(inputs, fields, dataset)
        frame, expressions, added = _apart_from_scans(dataset, expressions, self.uid)
        scored = f"{self.uid}__scored"
        frame = frame.withColumn(scored, _udf(task, len(inputs))(*expressions))
        whole = F.col(f"`{scored}`")
        parts = [whole] if len(fields) == 1 else [whole.getField(field.field) for field in fields]
        columns = {f.column: _output_column(part, f) for f, part in zip(fields, parts, strict=True)}
        return frame.withColumns(columns).drop(scored, *added)

    def _task(self, inputs: Sequence[FeedColumn], fields: list[OutputField], dataset: DataFrame) -> ScoringTask:
        archive = self._trained.archive
        specs = [
            # Nulls are gone when a column is read; nullable lets NaN through, as the model's own business.
            ColumnSpec(c.name, spec.shape, spec.dtype, c.source, nullable=_holds_nan(spec))
            for c, spec in zip(inputs, self._trained.signature.inputs, strict=True)
        ]
        objects = portable(self._trained.objects | custom_objects())
        return ScoringTask(
            digest=archive.digest,
            archive=payload_for(archive, dataset.sparkSession),
            signature=self._trained.signature,
            columns=tuple(specs),
            fields=tuple(fields),
            batch_size=self.getPredictBatchSize(),
            custom_objects=objects,
            objects_digest=_digest(objects),
            saved_signature=self._trained.saved_signature,
        )

    def __repr__(self) -> str:
        if not hasattr(self, "_trained"):
            return self.uid
        archive = self._trained.archive
        trained = f", epochs={self._summary.epochs}" if self._summary is not None else ""
        return f"TFModel: uid={self.uid}, archive={archive.size:,} bytes{trained}"


def _check_new(fields: Sequence[OutputField], dataset: DataFrame) -> None:
    """Refuse outputs in place of columns; Spark itself would replace them without a word."""
    exact = str(dataset.sparkSession.conf.get("spark.sql.caseSensitive", "false")).lower() == "true"
    there = {column if exact else column.lower(): column for column in dataset.columns}
    for field in fields:
        name = field.column if exact else field.column.lower()
        if name in there:
            raise ParamError(
                f"column {there[name]!r} is in the DataFrame already. Expected a new name for the "
                f"model's {field.role}, received {field.column!r}; or drop the column first"
            )


def _apart_from_scans(
    dataset: DataFrame, expressions: list[Column], uid: str
) -> tuple[DataFrame, list[Column], list[str]]:
    """Keep a UDF from reading a columnar scan directly where a column is an MLlib vector.

    Spark 4.3 hands such a scan's columns to Arrow UDFs as they are, vectors too, which it then cannot convert
    (UNSUPPORTED_DATATYPE), whether the UDF uses them or not. A projection that depends on the partition's id is one
    that Spark does not merge with the scan.

    Returns
    -------
    DataFrame, list of Column, list of str
        The frame, the UDF's inputs, and the helper columns to drop.
    """
    if not any(isinstance(field.dataType, T.UserDefinedType) for field in dataset.schema.fields):
        return dataset, expressions, []
    names = [f"{uid}__input_{i}" for i in range(len(expressions))]
    always = F.spark_partition_id() >= 0
    guarded = {name: F.when(always, column) for name, column in zip(names, expressions, strict=True)}
    return dataset.withColumns(guarded), [F.col(f"`{name}`") for name in names], names


def _output_column(column: Column, field: OutputField) -> Column:
    # The function behind array_to_vector fails on a null.
    return F.when(column.isNotNull(), array_to_vector(column)) if field.is_vector else column


def _udf(task: ScoringTask, inputs: int) -> Any:
    from pyspark.sql.functions import arrow_udf  # type: ignore[attr-defined]  # left out of pyspark's stubs

    def score_column(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        return score(task, ((array,) for array in batches))

    def score_columns(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        return score(task, batches)

    return arrow_udf(score_column if inputs == 1 else score_columns, result_type(list(task.fields)))


def _digest(objects: Mapping[str, Any]) -> str:
    if not objects:
        return ""
    return hashlib.sha256(cloudpickle.dumps(objects)).hexdigest()  # type: ignore[no-untyped-call]


def _holds_nan(spec: TensorSpec) -> bool:
    return "float" in spec.dtype
