"""An archive as a table of chunks, on any file system that Spark reaches.

Layout::

    path/0, path/1, ...   Parquet: one row, data (binary, CHUNK_BYTES or less)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.errors import AnalysisException

from sparktf.errors import PersistenceError
from sparktf.ml.archive import ModelArchive

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Spark and Parquet hold a chunk in memory some ten times over while they write it.
CHUNK_BYTES = 8 << 20
_TABLE = pa.schema([("data", pa.large_binary())])


def chunk_count(archive: ModelArchive) -> int:
    """Return how many chunks an archive makes."""
    return -(-archive.size // CHUNK_BYTES)


def write_chunks(spark: SparkSession, archive: ModelArchive, path: str) -> None:
    """Write an archive; there must be nothing at the path."""
    for index, piece in enumerate(archive.chunks(CHUNK_BYTES)):
        table = pa.table({"data": pa.array([piece], pa.large_binary())}, schema=_TABLE)
        # One job a chunk: neither this process nor Spark then holds more than one. Weights neither compress nor repeat.
        writer = spark.createDataFrame(table).coalesce(1).write.option("compression", "uncompressed")
        writer.option("parquet.enable.dictionary", "false").parquet(os.path.join(path, str(index)))


def read_chunks(spark: SparkSession, path: str, described: Mapping[str, Any]) -> ModelArchive:
    """Read an archive.

    Parameters
    ----------
    spark : SparkSession
    path : str
    described : mapping
        ``chunks`` (see `chunk_count`) and the archive's ``digest``.

    Raises
    ------
    PersistenceError
        A chunk is missing, or the bytes are not those that were written.
    """
    with tempfile.TemporaryDirectory(prefix="sparktf-load-") as directory:
        local = os.path.join(directory, "archive")
        with open(local, "wb") as file:
            for index in range(described["chunks"]):
                file.write(_read_chunk(spark, path, index))
        archive = ModelArchive.from_file(local, move=True)
    if archive.digest != described["digest"]:
        raise _damaged(path, f"digest {described['digest']}", archive.digest)
    return archive


def _read_chunk(spark: SparkSession, path: str, index: int) -> bytes:
    try:
        rows = spark.read.schema("data binary").parquet(os.path.join(path, str(index))).collect()
    except AnalysisException as exc:
        if exc.getCondition() != "PATH_NOT_FOUND":
            raise
        rows = []
    if len(rows) != 1:
        raise _damaged(path, f"one chunk {index}", len(rows))
    return bytes(rows[0][0])


def _damaged(path: str, expected: str, received: object) -> PersistenceError:
    return PersistenceError(f"the archive at {path!r} is damaged: expected {expected}. Received: {received}")
