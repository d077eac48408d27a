"""The files of a spool: nameless on disk, written in order, then mapped read-only.

Each storage holds one column: `DenseStorage` rows of equal length in one file, `BytesStorage` offsets and
bytes, `VectorStorage` values and indices with offsets each (CSR, in which a dense row has no indices).
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from math import prod
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from sparktf.data.blocks import Block, Bytes, Dense
from sparktf.data.columns import ColumnSpec, numpy_dtype
from sparktf.errors import ClusterError


class ScratchFile:
    """A file without a name that only grows; its space is free again once nobody holds it.

    Parameters
    ----------
    directory : str
        Where the bytes go. The file is never visible there (``O_TMPFILE``, else unlinked at once), so
        nothing is left even when the process is killed.
    """

    def __init__(self, directory: str) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by close()
        self._directory = directory
        self.nbytes = 0

    def append(self, values: np.ndarray) -> None:
        """Write an array's bytes at the end.

        Raises
        ------
        ClusterError
            The disk is full.
        """
        left = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
        try:
            while left.nbytes:
                # One write takes at most 2 GiB on Linux, and may take less.
                written = os.write(self._file.fileno(), left)
                self.nbytes += written
                left = left[written:]
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ClusterError(
                f"no space left in {self._directory} after {self.nbytes:,} bytes of one column. Expected: "
                "room for a worker's whole partition; point spark.local.dir (SPARK_LOCAL_DIRS) at a larger "
                "disk or use more workers"
            ) from exc

    def detach(self) -> int:
        """Give a descriptor of the file to the caller, and close this one."""
        descriptor = os.dup(self._file.fileno())
        self.close()
        return descriptor

    def close(self) -> None:
        """Give the space back, unless a detached descriptor or a mapping still holds it."""
        self._file.close()


def map_file(descriptor: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Map a whole file as a flat read-only array; an empty file as an empty array."""
    if os.fstat(descriptor).st_size == 0:
        return np.empty(0, dtype)
    return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), dtype)


class ColumnWriter:
    """Writes the blocks of one column; which files it needs shows with the first block.

    Parameters
    ----------
    directory : str
        Where its files go.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._files: dict[str, ScratchFile] = {}
        self._dtype: np.dtype[Any] | None = None
        self._kind = ""

    def append(self, block: Block) -> None:
        """Write one batch's block."""
        if isinstance(block, Dense):
            self._kind, self._dtype = "dense", block.values.dtype
            self._file("values").append(block.values)
        elif isinstance(block, Bytes):
            self._kind, self._dtype = "bytes", np.dtype(np.uint8)
            self._append_parts("values", block.data, block.lengths)
        else:
            self._kind, self._dtype = "vector", block.values.dtype
            self._append_parts("values", block.values, block.value_lengths)
            self._append_parts("indices", block.indices, block.index_lengths)

    def _append_parts(self, name: str, values: np.ndarray, lengths: np.ndarray) -> None:
        file = self._file(name)
        ends = self._file(f"{name}_ends")
        ends.append(file.nbytes // values.dtype.itemsize + np.cumsum(lengths, dtype=np.int64))
        file.append(values)

    def _file(self, name: str) -> ScratchFile:
        if name not in self._files:
            self._files[name] = ScratchFile(self._directory)
        return self._files[name]

    def finish(self, spec: ColumnSpec) -> tuple[dict[str, Any], dict[str, int]]:
        """Give the column's layout, as JSON can hold it, and its files' descriptors by name."""
        kind, dtype = self._kind, self._dtype
        if dtype is None:
            # No batch came, so nothing says how the column would have been stored.
            kind = "bytes" if spec.dtype == "string" else "dense"
            dtype = np.dtype(np.uint8) if kind == "bytes" else spec.numpy_dtype
        if kind == "vector" and self._file("indices").nbytes == 0 and self._is_full(spec):
            kind = "dense"
        names = {"dense": ("values",), "bytes": ("values", "values_ends")}.get(
            kind, ("values", "values_ends", "indices", "indices_ends")
        )
        descriptors = {name: self._file(name).detach() for name in names}
        self.close()
        return {"kind": kind, "dtype": dtype.name}, descriptors

    def _is_full(self, spec: ColumnSpec) -> bool:
        """Whether vectors without any index are all dense, rather than sparse ones of zeros among them."""
        rows = self._file("values_ends").nbytes // 8
        return self._file("values").nbytes == rows * (spec.size or 0) * np.dtype(np.float64).itemsize

    def close(self) -> None:
        """Close what is still open."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class Storage(Protocol):
    """Reads one column of a spool."""

    nbytes: int

    def take(self, rows: np.ndarray | slice) -> np.ndarray:
        """Give rows in their stored dtype, of shape ``(rows, *shape)``."""


class DenseStorage:
    """Rows of equal length."""

    def __init__(self, shape: tuple[int, ...], values: np.ndarray) -> None:
        self.nbytes = values.nbytes
        self._values = values.reshape(-1, *shape)

    def take(self, rows: np.ndarray | slice) -> np.ndarray:
        """Give rows in their stored dtype; a slice is a view."""
        return self._values[rows] if isinstance(rows, slice) else np.take(self._values, rows, axis=0)


class BytesStorage:
    """Strings, given as object arrays of bytes, which is what tf.string takes."""

    def __init__(self, shape: tuple[int, ...], ends: np.ndarray, data: np.ndarray) -> None:
        self.nbytes = ends.nbytes + data.nbytes
        self._shape = shape
        offsets = np.concatenate([np.zeros(1, np.int64), ends])
        # Arrow makes the bytes objects: a Python loop would take several times as long.
        self._array = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        )

    def take(self, rows: np.ndarray | slice) -> np.ndarray:
        """Give rows as an object array of bytes."""
        size = prod(self._shape)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self._array) // size)
            found = self._array.slice(start * size, max(stop - start, 0) * size)
        else:
            flat = rows if size == 1 else (rows[:, None] * size + np.arange(size)).reshape(-1)
            found = self._array.take(pa.array(flat))
        return np.asarray(found.to_numpy(zero_copy_only=False), object).reshape(-1, *self._shape)


class VectorStorage:
    """Vectors, sparse and dense mixed, given dense."""

    def __init__(self, shape: tuple[int, ...], files: dict[str, np.ndarray]) -> None:
        self.nbytes = sum(part.nbytes for part in files.values())
        self._shape = shape
        self._files = files

    def take(self, rows: np.ndarray | slice) -> np.ndarray:
        """Give rows as dense float64."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self._files["values_ends"])))
        size = prod(self._shape)
        out = np.zeros((len(rows), size), self._files["values"].dtype)
        value_places, counts = _ranges(self._files["values_ends"], rows)
        index_places, index_counts = _ranges(self._files["indices_ends"], rows)
        columns = np.arange(len(value_places)) - np.repeat(np.cumsum(counts) - counts, counts)
        # A sparse row's k-th value goes to its k-th index, a dense row's to k itself.
        columns[np.repeat(index_counts > 0, counts)] = self._files["indices"][index_places]
        out[np.repeat(np.arange(len(rows)), counts), columns] = self._files["values"][value_places]
        return out.reshape(-1, *self._shape)


def _ranges(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the places of some rows' elements, one after the other, and each row's number of them."""
    stops = ends[rows]
    starts = np.where(rows > 0, ends[rows - 1], 0)
    counts = stops - starts
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts), counts


def open_storage(layout: dict[str, Any], spec: ColumnSpec, descriptors: dict[str, int]) -> Storage:
    """Map a column's files.

    Parameters
    ----------
    layout : dict
        What `ColumnWriter.finish` gave.
    spec : ColumnSpec
        The column; a length still open (no row was read) counts as one.
    descriptors : dict of int
        Its files by name. Mappings outlive them.
    """
    shape = tuple(1 if d is None else d for d in spec.shape)
    dtypes = {"values": numpy_dtype(layout["dtype"]), "indices": np.dtype(np.int32)}
    files = {name: map_file(fd, dtypes.get(name, np.dtype(np.int64))) for name, fd in descriptors.items()}
    if layout["kind"] == "dense":
        return DenseStorage(shape, files["values"])
    if layout["kind"] == "bytes":
        return BytesStorage(shape, files["values_ends"], files["values"])
    return VectorStorage(shape, files)
