"""Write a trained model to any file system, so that it appears when it is complete, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from typing import Any

from sparktf.cluster.spooling import local_directory
from sparktf.errors import ParamError


def export_model(model: Any, path: str, overwrite: bool = False) -> None:
    """Write a model.

    It is saved locally, copied beside its place, and moved there. On an object store a move is a copy: there a
    ``.keras`` file appears at once, a SavedModel file by file.

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
    parent, _, name = place.rpartition("/")
    beside = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}" if parent else f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        _copy(saved, system, beside)
        if os.path.isdir(saved):
            _remove(system, place)
        try:
            system.move(beside, place)
        except FileExistsError:
            # HDFS moves no file over another.
            _remove(system, place)
            system.move(beside, place)
    finally:
        _remove(system, beside)


def _copy(saved: str, system: Any, place: str) -> None:
    from pyarrow import fs

    if os.path.isdir(saved):
        fs.copy_files(saved, place, destination_filesystem=system)
        return
    with open(saved, "rb") as source, system.open_output_stream(place) as target:
        shutil.copyfileobj(source, target, 8 << 20)


def _remove(system: Any, place: str) -> None:
    from pyarrow import fs

    kind = system.get_file_info(place).type
    if kind == fs.FileType.Directory:
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
