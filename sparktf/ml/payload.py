"""How an archive gets from the driver to the workers."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparktf.cluster.preflight import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sparktf.ml.archive import ModelArchive

# Up to here a model travels in the UDF's own pickle. Spark broadcasts larger pickles anyway, anew for every UDF;
# a broadcast variable of our own is made once for all transforms, and read only by workers without the model.
_INLINE_BYTES = 1 << 20

# Connect has no broadcast variables, and takes no message over 128 MiB. A file is uploaded once in pieces.
_CONNECT_INLINE_BYTES = 16 << 20

_sent: weakref.WeakKeyDictionary[ModelArchive, tuple[str, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class SessionFile:
    """A file that the session brings to every worker.

    Parameters
    ----------
    name : str
        Its name among Spark's files.
    """

    name: str

    @property
    def value(self) -> bytes:
        """The file's content, on a worker."""
        from pyspark import SparkFiles

        with open(SparkFiles.get(self.name), "rb") as file:
            return file.read()


def payload_for(archive: ModelArchive, spark: SparkSession) -> Any:
    """Return what a task carries for an archive: its bytes, or something whose ``.value`` gives them.

    What was sent once to a session is used again, for as long as the archive lives.
    """
    connect = is_connect(spark)
    if archive.size <= (_CONNECT_INLINE_BYTES if connect else _INLINE_BYTES):
        return archive.read_bytes()
    # Only Connect's class has session_id; Spark's type hints know the classic one alone.
    session = str(spark.session_id if connect else spark.sparkContext.applicationId)  # type: ignore[attr-defined]
    known, payload = _sent.get(archive, ("", None))
    if known != session:
        payload = _upload(archive, spark) if connect else spark.sparkContext.broadcast(archive.read_bytes())
        _sent[archive] = (session, payload)
    return payload


def _upload(archive: ModelArchive, spark: SparkSession) -> SessionFile:
    name = f"sparktf-{archive.digest}"
    with tempfile.TemporaryDirectory(prefix="sparktf-upload-") as directory:
        path = os.path.join(directory, name)
        try:
            os.link(archive.path, path)
        except OSError:
            shutil.copyfile(archive.path, path)
        spark.addArtifacts(path, file=True)
    return SessionFile(name)
