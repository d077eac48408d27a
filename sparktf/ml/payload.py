"""How an archive gets from the driver to the workers.

A payload is what a task carries for an archive: a small one whole, a larger one as a reference. Workers read any of
them piece by piece, so that no process has to hold an archive in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparktf.cluster.job import Payload
from sparktf.cluster.preflight import is_connect

if TYPE_CHECKING:
    from pyspark import Broadcast
    from pyspark.sql import SparkSession

    from sparktf.ml.archive import ModelArchive

# Up to here a model travels in the UDF's own pickle. Spark broadcasts larger pickles anyway, anew for every UDF;
# broadcast variables of our own are made once for all transforms, and read only by workers without the model.
_INLINE_BYTES = 1 << 20

# Connect has no broadcast variables, and takes no message over 128 MiB. A file is uploaded once in pieces.
_CONNECT_INLINE_BYTES = 16 << 20

# The driver's JVM holds a variable whole on its heap while it makes blocks of it; blocks it may move to disk.
_PIECE_BYTES = 32 << 20

_sent: weakref.WeakKeyDictionary[ModelArchive, tuple[str, Payload]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Inline:
    """An archive's bytes as they are."""

    data: bytes = field(repr=False)

    @property
    def message_bytes(self) -> int:
        """What it adds to the message that submits a job."""
        return len(self.data)

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive's bytes, on a worker."""
        yield self.data

    def close(self) -> None:
        """Give nothing back: the bytes are the task's own."""


@dataclass(frozen=True)
class Broadcasts:
    """Broadcast variables, each of a piece of the archive."""

    variables: tuple[Broadcast[bytes], ...]
    message_bytes: int = 0

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive's bytes, on a worker."""
        for variable in self.variables:
            yield variable.value
            # What was read would stay with the variable while the task runs: in all, a second model. Where Spark
            # encrypts its files there is none to read it from again.
            if getattr(variable, "_path", None):
                del variable._value

    def close(self) -> None:
        """Remove the variables from driver and executors; on the driver."""
        for variable in self.variables:
            variable.destroy()


@dataclass(frozen=True)
class SessionFile:
    """A file that the session brings to every worker.

    Parameters
    ----------
    name : str
        Its name among Spark's files.
    """

    name: str
    message_bytes: int = 0

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive's bytes, on a worker."""
        from pyspark import SparkFiles

        with open(SparkFiles.get(self.name), "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    def close(self) -> None:
        """Give nothing back: files stay with the session."""


def payload_for(archive: ModelArchive, spark: SparkSession) -> Payload:
    """Return what a task carries for an archive.

    What was sent once to a session is used again, for as long as the archive lives.
    """
    connect = is_connect(spark)
    if archive.size <= (_CONNECT_INLINE_BYTES if connect else _INLINE_BYTES):
        return Inline(archive.read_bytes())
    # Only Connect's class has session_id; Spark's type hints know the classic one alone.
    session = str(spark.session_id if connect else spark.sparkContext.applicationId)  # type: ignore[attr-defined]
    if archive in _sent and _sent[archive][0] == session:
        return _sent[archive][1]
    payload: Payload = _upload(archive, spark) if connect else _broadcast(archive, spark)
    _sent[archive] = (session, payload)
    return payload


def _broadcast(archive: ModelArchive, spark: SparkSession) -> Broadcasts:
    return Broadcasts(tuple(spark.sparkContext.broadcast(piece) for piece in archive.chunks(_PIECE_BYTES)))


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
