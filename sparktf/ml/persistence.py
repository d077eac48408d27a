"""Saving and loading stages: Spark ML metadata, and the model's archive as a table of chunks beside it.

Layout of a saved stage::

    path/metadata   one JSON line, as Spark ML writes it, with a "sparktf" entry
    path/archive    the archive's bytes, see `sparktf.ml.chunks`

All of it goes through DataFrames, so that it reaches every file system that Spark reaches, from classic Spark
and from Spark Connect. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from pyspark.errors import AnalysisException
from pyspark.ml.param import Params
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)

from sparktf._version import __version__
from sparktf.cluster.preflight import is_connect
from sparktf.distribute.custom_objects import custom_objects
from sparktf.errors import PersistenceError
from sparktf.ml.archive import ModelArchive
from sparktf.ml.chunks import chunk_count, read_chunks, write_chunks
from sparktf.ml.grid import NOT_JSON
from sparktf.ml.signature import ModelSignature
from sparktf.ml.summary import TrainingSummary

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sparktf.ml.model import TFModel

FORMAT = 1

# What a saved stage holds: its archive, and sparktf's entry in the metadata.
_Content = tuple[ModelArchive | None, dict[str, Any]]


class _Writer(MLWriter):
    """What writers of both stages share."""

    def __init__(self, stage: Params) -> None:
        super().__init__()
        self.stage: Any = stage
        self._prepared: _Content | None = None

    def _handleOverwrite(self, path: str) -> None:
        if is_connect(self.sparkSession):
            from pyspark.ml.connect.readwrite import RemoteMLWriter

            # Spark's own way goes to a JVM that this process does not have.
            RemoteMLWriter.handleOverwrite(path, True)
        else:
            super()._handleOverwrite(path)

    def save(self, path: str) -> None:
        """Save the stage; what is to be overwritten is deleted only once the new stage is known to be one to save.

        Raises
        ------
        PersistenceError
            Something is at the path already, or the stage holds what cannot be saved.
        """
        # Spark deletes the old stage before it calls saveImpl.
        self._prepared = self._prepare()
        try:
            super().save(path)
        except AnalysisException as exc:
            if exc.getCondition() != "PATH_ALREADY_EXISTS":
                raise
            raise PersistenceError(
                f"there is something at {path!r} already. Use write().overwrite().save(...) to replace it"
            ) from exc
        finally:
            self._prepared = None

    def saveImpl(self, path: str) -> None:
        """Write metadata and archive.

        Raises
        ------
        PersistenceError
            The stage holds what cannot be saved.
        """
        archive, entry = self._prepared or self._prepare()
        # Of these a model is saved beside the metadata, the others cannot be saved at all.
        params = {p.name: v for p, v in self.stage._paramMap.items() if p.name not in NOT_JSON}
        DefaultParamsWriter.saveMetadata(self.stage, path, self.sparkSession, {"sparktf": entry}, params)
        if archive is not None:
            write_chunks(self.sparkSession, archive, os.path.join(path, "archive"))

    def _prepare(self) -> _Content:
        """Make all that is written, or refuse to."""
        raise NotImplementedError

    def _content(self, archive: ModelArchive | None, extra: Mapping[str, Any]) -> _Content:
        entry: dict[str, Any] = {"format": FORMAT, "versions": versions(), **extra}
        if archive is not None:
            entry["archive"] = {
                "kind": archive.kind,
                "size": archive.size,
                "digest": archive.digest,
                "chunks": chunk_count(archive),
            }
        return archive, entry


class ModelWriter(_Writer):
    """Writes a TFModel."""

    def _prepare(self) -> _Content:
        trained, summary = self.stage._trained, self.stage._summary
        extra = {
            "signature": trained.signature.to_dict(),
            "savedSignature": trained.saved_signature,
            "summary": summary.to_json() if summary is not None else None,
        }
        return self._content(trained.archive, extra)


class EstimatorWriter(_Writer):
    """Writes a TFEstimator and its compiled model, where there is one; refuses modelFn and callbacks."""

    def _prepare(self) -> _Content:
        for name, fix in {
            "modelFn": "Give the model itself (model=...) to an estimator that is to be saved",
            "callbacks": "Clear them first, and set them again after loading",
        }.items():
            if self.stage.getOrDefault(name):
                raise PersistenceError(
                    f"{self.stage.uid} cannot be saved with {name}: that is Python code, and loading a saved "
                    f"stage never runs code from a file. {fix}"
                )
        model = self.stage.getModel()
        return self._content(ModelArchive.from_model(model) if model is not None else None, {})


class _Reader(MLReader[Any]):
    """What readers of both stages share."""

    def __init__(self, cls: type[Any]) -> None:
        super().__init__()
        self.cls = cls
        self._safe_mode = True

    def safeMode(self, value: bool) -> Self:
        """Set whether a model that holds Python code (Lambda layers) is refused; True unless set.

        Keras's own switch for a process, ``keras.config.enable_unsafe_deserialization()``, is honoured besides: the
        readers of Pipelines and tuned models make a reader of their own for each stage.
        """
        self._safe_mode = value
        return self

    def _read(self, path: str) -> tuple[dict[str, Any], dict[str, Any], ModelArchive | None]:
        metadata = _read_metadata(self.sparkSession, path)
        expected = f"{self.cls.__module__}.{self.cls.__name__}"
        if metadata.get("class") != expected:
            raise PersistenceError(f"expected a saved {expected} at {path!r}. Received: {metadata.get('class')}")
        entry = metadata.get("sparktf") or {}
        check_versions(entry, path)
        described = entry.get("archive")
        if described is None:
            return metadata, entry, None
        return metadata, entry, read_chunks(self.sparkSession, os.path.join(path, "archive"), described)


class ModelReader(_Reader):
    """Reads a TFModel."""

    def load(self, path: str) -> TFModel:
        """Load a model; its Keras model is rebuilt at once, so that what is missing shows here.

        Raises
        ------
        PersistenceError
            Not a saved TFModel, other versions, a damaged archive, code in the file, a class that is not
            registered with Keras.
        """
        metadata, entry, archive = self._read(path)
        if archive is None:
            raise PersistenceError(f"expected an archive at {path!r}. Received: metadata without one")
        summary = entry.get("summary")
        model = self.cls._create(
            archive,
            uid=metadata["uid"],
            summary=TrainingSummary.from_json(summary) if summary else None,
            signature=ModelSignature.from_dict(entry["signature"]),
            custom_objects=custom_objects(),
            saved_signature=entry.get("savedSignature", ""),
        )
        DefaultParamsReader.getAndSetParams(model, metadata)
        if not entry.get("savedSignature"):
            model._trained.check(self._safe_mode)
        return cast("TFModel", model)


class EstimatorReader(_Reader):
    """Reads a TFEstimator."""

    def load(self, path: str) -> Any:
        """Load an estimator, and its model compiled as it was.

        Raises
        ------
        PersistenceError
            As for a model.
        """
        metadata, _, archive = self._read(path)
        estimator = self.cls()
        estimator._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(estimator, metadata)
        if archive is not None:
            estimator._set(model=archive.load(safe_mode=self._safe_mode))
        return estimator


class _Persistence(MLWritable, MLReadable[Any]):
    """write, save, read and load of a stage."""

    _writer: ClassVar[type[_Writer]]
    _reader: ClassVar[type[_Reader]]

    def write(self) -> _Writer:
        """Return a writer: ``write().overwrite().save(path)``."""
        return self._writer(cast(Params, self))

    @classmethod
    def read(cls) -> _Reader:
        """Return a reader: ``read().session(spark).load(path)``."""
        return cls._reader(cls)

    @classmethod
    def load(cls, path: str, safe_mode: bool = True) -> Self:
        """Load a saved stage.

        Parameters
        ----------
        path : str
        safe_mode : bool
            Refuse a model that holds Python code (Lambda layers). False for files that you trust.

        Raises
        ------
        PersistenceError
            Not such a stage, other versions, a damaged archive, code in the file, a class that is not registered with
            Keras.
        """
        return cast(Self, cls.read().safeMode(safe_mode).load(path))


class ModelPersistence(_Persistence):
    """write, save, read and load of TFModel."""

    _writer = ModelWriter
    _reader = ModelReader


class EstimatorPersistence(_Persistence):
    """write, save, read and load of TFEstimator."""

    _writer = EstimatorWriter
    _reader = EstimatorReader


def versions() -> dict[str, str]:
    """Return the versions that decide whether a saved stage can be read."""
    import keras
    import tensorflow as tf

    return {"sparktf": __version__, "keras": keras.__version__, "tensorflow": tf.__version__}


def check_versions(entry: Mapping[str, Any], path: str) -> None:
    """Refuse what another format or another major version of Keras or TensorFlow has written.

    Raises
    ------
    PersistenceError
        With both versions.
    """
    saved = entry.get("format")
    if saved is None:
        raise PersistenceError(f"expected a stage saved by sparktf at {path!r}. Received: another kind of stage")
    if int(saved) > FORMAT:
        raise PersistenceError(
            f"{path!r} has format {saved}, of sparktf {entry.get('versions', {}).get('sparktf')}. Expected: "
            f"format {FORMAT} or older, for sparktf {__version__}. Install the newer version"
        )
    ours = versions()
    for name in ("keras", "tensorflow"):
        theirs = str(entry.get("versions", {}).get(name, ""))
        if theirs.split(".")[0] != ours[name].split(".")[0]:
            raise PersistenceError(
                f"{path!r} was saved with {name} {theirs}. Expected: the major version of {name} {ours[name]}"
            )


def _read_metadata(spark: SparkSession, path: str) -> dict[str, Any]:
    try:
        return DefaultParamsReader.loadMetadata(path, spark)
    except AnalysisException as exc:
        if exc.getCondition() != "PATH_NOT_FOUND":
            raise
        raise PersistenceError(f"there is no saved stage at {path!r}") from exc
    except (json.JSONDecodeError, TypeError) as exc:
        raise PersistenceError(f"the metadata at {path!r} cannot be read: {exc}") from exc
