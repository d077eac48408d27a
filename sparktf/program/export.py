"""Write a trained model to any file system, so that it appears when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from typing import Any

from sparktf.cluster.scratch import local_directory
from sparktf.errors import ParamError

# pyarrow's names of file systems that move files and no directories.
_OBJECT_STORES = ("s3", "gcs", "abfs")


def export_model(model: Any, path: str, overwrite: bool = False) -> None:
    """Write a model.

    It is saved locally, copied beside its place as a whole, and moved there. What that means to those who read:

    - a ``.keras`` file appears at once, in place of an old one too; on HDFS the old one is moved aside first;
    - a SavedModel appears at once on local disks and HDFS. An old one is moved aside first: for a moment there is none;
    - on object stores (S3, Google, Azure), which have no directories to move, a SavedModel moves file by file, and
      ``saved_model.pb``, by which loaders know one, comes last; an old one has gone the same way before.

    Where any of this fails, the old model is moved back; where that fails as well, as when the store is gone, the error
    says where the old one is.

    Parameters
    ----------
    model : keras.Model or tf.Module
    path : str
        ``*.keras`` for a Keras archive, else a directory for a SavedModel.
    overwrite : bool

    Raises
    ------
    ParamError
        There is something at `path` already, or its file system is not known.
    """
    from pyarrow import fs

    system, place = _file_system(path)
    if not overwrite and system.get_file_info(place).type != fs.FileType.NotFound:
        raise ParamError(f"ctx.export: expected nothing at {path!r}, received something there. Pass overwrite=True.")
    with tempfile.TemporaryDirectory(prefix="sparktf-", dir=local_directory()) as directory:
        saved = os.path.join(directory, "model.keras" if place.endswith(".keras") else "model")
        _save(model, saved)
        system.create_dir(place.rpartition("/")[0] or ".", recursive=True)
        _place(saved, system, place)


def _save(model: Any, path: str) -> None:
    import keras
    import tensorflow as tf

    if path.endswith(".keras"):
        model.save(path)
    elif isinstance(model, keras.Model):
        model.export(path, verbose=False)
    else:
        tf.saved_model.save(model, path)


def _place(saved: str, system: Any, place: str) -> None:
    beside = _hidden(place)
    try:
        _copy(saved, system, beside)
        if not os.path.isdir(saved):
            # HDFS moves no file over another.
            with contextlib.suppress(FileExistsError):
                system.move(beside, place)
                return
        _exchange(system, beside, place)
    finally:
        _remove(system, beside)


def _exchange(system: Any, beside: str, place: str) -> None:
    """Move a model to its place, and what is there aside until it has come; on failure that is moved back."""
    aside, begun = _hidden(place), False
    try:
        _move(system, place, aside)
        begun = True
        _move(system, beside, place)
    except BaseException as error:
        try:
            if begun:
                # Of the new one, not whole.
                _remove(system, place)
            _move(system, aside, place)
        except Exception:  # the first failure tells more
            error.add_note(f"What was at {place!r} before is, in whole or in part, at {aside!r}.")
        raise
    _remove(system, aside)


def _hidden(place: str) -> str:
    parent, slash, name = place.rpartition("/")
    return f"{parent}{slash}.{name}.{uuid.uuid4().hex[:8]}"


def _move(system: Any, source: str, target: str) -> None:
    """Move a file or a directory to where there is nothing; nothing where there is nothing to move."""
    from pyarrow import fs

    kind = system.get_file_info(source).type
    if kind == fs.FileType.NotFound:
        return
    if kind == fs.FileType.File or system.type_name not in _OBJECT_STORES:
        system.move(source, target)
        return
    found = system.get_file_info(fs.FileSelector(source, recursive=True))
    for folder in [target, *(target + f.path[len(source) :] for f in found if f.type == fs.FileType.Directory)]:
        system.create_dir(folder)
    files = [f.path for f in found if f.type == fs.FileType.File]
    for path in sorted(files, key=lambda path: path == f"{source}/saved_model.pb"):
        system.move(path, target + path[len(source) :])
    _remove(system, source)


def _copy(saved: str, system: Any, place: str) -> None:
    from pyarrow import fs

    if os.path.isdir(saved):
        system.create_dir(place, recursive=True)
        fs.copy_files(saved, place, destination_filesystem=system)
        return
    with open(saved, "rb") as source, system.open_output_stream(place) as target:
        shutil.copyfileobj(source, target, 8 << 20)


def _remove(system: Any, place: str) -> None:
    from pyarrow import fs

    kind = system.get_file_info(place).type
    if kind == fs.FileType.Directory:
        # An object store may still tell of one that is gone.
        with contextlib.suppress(FileNotFoundError):
            system.delete_dir(place)
    elif kind == fs.FileType.File:
        system.delete_file(place)


def _file_system(path: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    try:
        system, place = fs.FileSystem.from_uri(path if "://" in path else os.path.abspath(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, OSError) as error:
        try:
            import fsspec  # type: ignore[import-not-found,unused-ignore]  # where the user has it

            found, place = fsspec.core.url_to_fs(path)
        except (ImportError, ValueError, OSError) as unknown:
            # Where there is no libhdfs, pyarrow goes on to list the hundred places where it looked.
            reason, _, _ = str(error).partition("\n")
            raise ParamError(
                f"ctx.export: expected a local path or a URI that pyarrow or fsspec knows, received {path!r}: "
                f"{reason}; {unknown}. Install what knows it, such as hdfs-native for HDFS."
            ) from error
        return fs.PyFileSystem(fs.FSSpecHandler(found)), place
    return system, place
