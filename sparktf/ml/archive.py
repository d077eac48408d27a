"""A trained model as one immutable file on the driver's disk."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

from sparktf.distribute.custom_objects import resolved, why_missing
from sparktf.errors import PersistenceError

if TYPE_CHECKING:
    import keras

KERAS = "keras"
SAVED_MODEL = "saved_model"

# One constant date for every member of a zipped SavedModel: the digest must depend on the content alone.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_BLOCK = 1 << 20


class ModelArchive:
    """An immutable trained model, a file on this machine's disk.

    The object owns a private directory (mode 0700) that is removed when the object is collected or when the
    process ends. Objects are shared, never copied: a model's copies hold the same archive.

    Attributes
    ----------
    path : str
        The file. A ``.keras`` archive, or a zip of a SavedModel directory.
    kind : str
        ``"keras"`` or ``"saved_model"``.
    size : int
        Bytes.
    """

    def __init__(self, directory: str, path: str, kind: str = KERAS) -> None:
        self.path = path
        self.kind = kind
        self.size = os.path.getsize(path)
        self._remove = weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hex: the key of caches."""
        return _sha256(self.path)

    @classmethod
    def from_model(cls, model: keras.Model) -> Self:
        """Save a Keras model, compiled state and optimizer variables included; the model is not changed.

        A model that was never built (a Sequential without Input) is saved as such, without weights.

        Raises
        ------
        PersistenceError
            Keras cannot save this model.
        """
        with _private_directory() as directory, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are saving a model that has not yet been built")
            path = os.path.join(directory, "model.keras")
            try:
                model.save(path)
            except (TypeError, ValueError, NotImplementedError) as exc:
                raise PersistenceError(
                    f"model {model.name!r} cannot be saved as a .keras archive: {exc}. Custom classes need "
                    "get_config() and @keras.saving.register_keras_serializable()"
                ) from exc
            return cls(directory, path)

    @classmethod
    def from_file(cls, path: str, move: bool = False, directory: str | None = None) -> Self:
        """Take a ``.keras`` file or a SavedModel directory from the local disk.

        Parameters
        ----------
        path : str
            The file, or the directory that holds ``saved_model.pb``.
        move : bool
            Move the file instead of copying it; for large files that nobody else needs.
        directory : str, optional
            Where the archive's own directory is made. Default: among the machine's temporary files.

        Raises
        ------
        PersistenceError
            There is no such file, or it is neither of the two.
        """
        if os.path.isdir(path):
            return cls._from_directory(path)
        if not zipfile.is_zipfile(path):
            what = "a file that is not a zip archive" if os.path.exists(path) else "nothing there"
            raise PersistenceError(f"expected a .keras archive or a SavedModel directory at {path!r}. Received: {what}")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        kind = SAVED_MODEL if "saved_model.pb" in names else KERAS
        if kind == KERAS and "config.json" not in names:
            raise PersistenceError(f"expected a .keras archive at {path!r}. Received: a zip without config.json")
        with _private_directory(directory) as own:
            target = os.path.join(own, "model.keras" if kind == KERAS else "model.zip")
            shutil.move(path, target) if move else shutil.copyfile(path, target)
            return cls(own, target, kind)

    @classmethod
    def from_pieces(cls, pieces: Iterable[bytes], directory: str | None = None) -> Self:
        """Take an archive's bytes, in the order of :meth:`chunks`; `directory` as in :meth:`from_file`."""
        with tempfile.TemporaryDirectory(prefix="sparktf-received-", dir=directory) as received:
            path = os.path.join(received, "received")
            with open(path, "wb") as file:
                file.writelines(pieces)
            return cls.from_file(path, move=True, directory=directory)

    @classmethod
    def _from_directory(cls, source: str) -> Self:
        if not os.path.exists(os.path.join(source, "saved_model.pb")):
            raise PersistenceError(
                f"expected a SavedModel directory at {source!r}. Received: a directory without saved_model.pb"
            )
        with _private_directory() as directory:
            path = os.path.join(directory, "model.zip")
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
                for name in _files_below(source):
                    info = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
                    with open(os.path.join(source, name), "rb") as file, archive.open(info, "w") as member:
                        shutil.copyfileobj(file, member, _BLOCK)
            return cls(directory, path, SAVED_MODEL)

    def load(
        self,
        custom_objects: Mapping[str, Any] | None = None,
        compile: bool = True,
        safe_mode: bool = False,
    ) -> keras.Model:
        """Return a new ``keras.Model`` with this archive's weights.

        Parameters
        ----------
        custom_objects : mapping, optional
            Classes and functions by registered name, in addition to Keras's registry; or as a job carries them.
        compile : bool
            Restore loss, metrics and the optimizer's state.
        safe_mode : bool
            Refuse what would run Python code from the file (Lambda layers). False is for a job's own model.

        Raises
        ------
        PersistenceError
            This is a SavedModel, or Keras cannot rebuild the model.
        """
        if self.kind != KERAS:
            raise PersistenceError("a SavedModel holds no keras.Model. Expected a .keras archive")
        return _load_keras(self.path, custom_objects, compile, safe_mode)

    def unpack(self, directory: str) -> str:
        """Unpack a SavedModel into an existing directory and return the SavedModel's path."""
        with zipfile.ZipFile(self.path) as archive:
            archive.extractall(directory)
        return directory

    def read_bytes(self) -> bytes:
        """Return the whole file; for models that fit in memory twice."""
        with open(self.path, "rb") as file:
            return file.read()

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield the file in pieces of ``size`` bytes, the last one shorter."""
        with open(self.path, "rb") as file:
            while piece := file.read(size):
                yield piece

    def close(self) -> None:
        """Remove the file now; for an archive that nobody else holds. May be called twice."""
        self._remove()

    def __reduce__(self) -> Any:
        """Refuse to be pickled: the file would be lost without a word."""
        raise PersistenceError("a ModelArchive is a file on this machine. Send read_bytes() instead")

    def __repr__(self) -> str:
        return f"ModelArchive(kind={self.kind!r}, size={self.size:,}, digest={self.digest[:12]!r})"


def _load_keras(path: str, objects: Mapping[str, Any] | None, compile: bool, safe_mode: bool) -> keras.Model:
    import keras

    # A layer of ours that the file may hold, for Keras to find.
    import_module("sparktf.distribute.embedding")
    try:
        with warnings.catch_warnings():
            # A model that was compiled but never trained has an optimizer without state; nothing is lost.
            warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
            return keras.saving.load_model(
                path, custom_objects=resolved(objects or {}) or None, compile=compile, safe_mode=safe_mode
            )
    except (TypeError, ValueError, KeyError, ImportError, AttributeError) as exc:
        raise PersistenceError(f"Keras cannot rebuild the model: {_advice(exc, objects or {})}") from exc


def _advice(exc: Exception, objects: Mapping[str, Any]) -> str:
    """Return what Keras said, in short, and what to do about it."""
    text = str(exc).strip()
    # Keras has no exception classes for these two; its words are all there is to tell them by.
    if missing := re.search(r"Could not locate (class|function) '([^']+)'", text):
        return why_missing(missing[2], objects) or (
            f"the {missing[1]} {missing[2]!r} is not registered with Keras in this process. Decorate it with "
            "@keras.saving.register_keras_serializable() and import its module before loading"
        )
    if "Lambda" in text or "safe_mode" in text:
        return (
            "the file holds Python code (a Lambda layer), which is not run unless asked for. If you trust "
            "where the file comes from, load it with safe_mode=False (TFModel.load, TFEstimator.load, "
            "TFModel.fromKeras); where it is loaded as a part of a Pipeline or of a tuned model, call "
            "keras.config.enable_unsafe_deserialization() before"
        )
    return text.splitlines()[0] if text else type(exc).__name__


@contextmanager
def _private_directory(parent: str | None = None) -> Iterator[str]:
    """Make a directory for its owner alone (mkdtemp's mode is 0700); keep it unless the block fails."""
    directory = tempfile.mkdtemp(prefix="sparktf-model-", dir=parent)
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _files_below(root: str) -> list[str]:
    names = [os.path.relpath(os.path.join(folder, name), root) for folder, _, files in os.walk(root) for name in files]
    return sorted(names)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
