"""A worker's partition on its local disk: written once from Arrow, memory-mapped, read every epoch.

Each column keeps the dtype in which it came (bytes of an image stay bytes) and is cast to the tensor's dtype
at the batch, so the spool is as small as the data, and data larger than memory works.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from sparktf.data.arrow import ColumnReader
from sparktf.data.columns import ColumnSpec
from sparktf.data.faults import Faults, raise_if_any
from sparktf.data.storage import ColumnWriter, open_storage
from sparktf.errors import DataError, ParamError

Rows = np.ndarray | slice


class SpoolWriter:
    """Writes Arrow record batches, one file set a column. A context manager.

    Parameters
    ----------
    columns : sequence of ColumnSpec
        The columns of a batch that training needs; a batch may hold others.
    directory : str
        Where the nameless files go, such as one of Spark's local directories.
    id_column : str, optional
        The int64 column whose order is the data's own; by default the column of kind "id", if there is one.
        It need not be among `columns`.

    Raises
    ------
    ParamError
        Two columns of one name.
    """

    def __init__(self, columns: Sequence[ColumnSpec], directory: str, *, id_column: str | None = None) -> None:
        specs = {spec.name: spec for spec in columns}
        if len(specs) != len(columns):
            raise ParamError(f"Expected columns of different names. Received: {[c.name for c in columns]}")
        if id_column is None:
            id_column = next((spec.name for spec in columns if spec.kind == "id"), None)
        if id_column is not None:
            specs[id_column] = ColumnSpec(id_column, (), "int64", id_column, "id")
        self._id = id_column
        self._readers = {name: ColumnReader(spec) for name, spec in specs.items()}
        self._writers = {name: ColumnWriter(directory) for name in specs}
        self._types: dict[str, pa.DataType] = {}
        self.rows = 0

    def append(self, batch: pa.RecordBatch) -> int:
        """Write one batch.

        Returns
        -------
        int
            Its rows.

        Raises
        ------
        DataError
            A column is missing or has a type that no tensor has, or a row a wrong length. Nulls and NaN are
            counted first and raised by `finish`.
        ClusterError
            The disk is full.
        """
        for name, reader in self._readers.items():
            place = batch.schema.get_field_index(name)
            if place < 0:
                raise DataError(
                    f"column {name!r} is not in the feed. Expected: one column of this name. Received: "
                    f"{batch.schema.names}"
                )
            array = batch.column(place)
            if self._types.setdefault(name, array.type) != array.type:
                raise DataError(
                    f"column {reader.spec.source!r} changes its type within a partition: "
                    f"{self._types[name]} before, {array.type} now. Expected: one type"
                )
            block = reader.read(array)
            if block is not None:
                self._writers[name].append(block)
        rows: int = batch.num_rows
        self.rows += rows
        return rows

    def faults(self) -> dict[str, Faults]:
        """Give what has been counted so far, by column."""
        return {name: reader.faults for name, reader in self._readers.items()}

    def finish(self) -> Spool:
        """Check the totals and map the files.

        Returns
        -------
        Spool
            The caller's to close; this writer is done.

        Raises
        ------
        DataError
            Columns hold nulls, NaN, negative weights or values outside their tensor's dtype: one line each,
            with the totals.
        """
        with self:
            raise_if_any(((r.spec, r.faults) for r in self._readers.values()), "this worker's partition")
            columns: list[dict[str, Any]] = []
            descriptors: list[int] = []
            for name, writer in self._writers.items():
                spec = self._readers[name].spec
                layout, files = writer.finish(spec)
                columns.append({"spec": spec.to_dict(), "layout": layout, "files": list(files)})
                descriptors.extend(files.values())
            description = {"rows": self.rows, "id_column": self._id, "columns": columns}
            return Spool.from_fds(description, descriptors)

    def close(self) -> None:
        """Drop what has been written and not been finished."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Spool:
    """A finished partition: rows by index, gathered from mapped files. A context manager.

    Made by `SpoolWriter.finish` or `Spool.from_fds`. Rows are numbered in the order in which they came;
    `order` gives the data's own.

    Attributes
    ----------
    rows : int
        Rows of this worker's partition.
    columns : dict of ColumnSpec
        By name, their open lengths filled from the data; a length stays None where there are no rows. The
        id column is not among them.
    nbytes : int
        Bytes on disk.
    """

    def __init__(self, description: dict[str, Any], descriptors: Sequence[int]) -> None:
        self._description = description
        self._descriptors = tuple(descriptors)
        # Closes the descriptors when the spool is collected or the interpreter ends, too.
        self._closer = weakref.finalize(self, _close_all, self._descriptors)
        self.rows: int = description["rows"]
        specs = [ColumnSpec.from_dict(column["spec"]) for column in description["columns"]]
        left = list(descriptors)
        self._storages = {}
        for spec, column in zip(specs, description["columns"], strict=True):
            files = {name: left.pop(0) for name in column["files"]}
            self._storages[spec.name] = open_storage(column["layout"], spec, files)
        self._id: str | None = description["id_column"]
        self.columns = {spec.name: spec for spec in specs if spec.name != self._id}
        self.nbytes = sum(storage.nbytes for storage in self._storages.values())
        self._order: np.ndarray | None = None

    @classmethod
    def from_fds(cls, description: dict[str, Any], fds: Sequence[int]) -> Spool:
        """Open a spool by its descriptors, for example in a child process that inherited them.

        Parameters
        ----------
        description : dict
            What `describe` gave in the parent.
        fds : sequence of int
            What `fds` gave there. They belong to the new spool, which closes them.
        """
        return cls(description, fds)

    def describe(self) -> dict[str, Any]:
        """Give what `from_fds` needs beside the descriptors; JSON can hold it."""
        columns = []
        for column in self._description["columns"]:
            # The shapes of a spool without rows may have been told by others meanwhile.
            spec = self.columns.get(column["spec"]["name"])
            columns.append(column if spec is None else {**column, "spec": spec.to_dict()})
        return {**self._description, "columns": columns}

    def fds(self) -> tuple[int, ...]:
        """Give the files' descriptors, to be passed on (``subprocess.Popen(pass_fds=...)``); still owned."""
        return self._descriptors

    @property
    def order(self) -> np.ndarray:
        """Row indices (int64) in the order of the id column; as they came where there is none."""
        if self._order is None:
            if self._id is None:
                self._order = np.arange(self.rows, dtype=np.int64)
            else:
                ids = self._storage(self._id).take(slice(None))
                self._order = np.argsort(ids, kind="stable").astype(np.int64, copy=False)
        return self._order

    def select(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Split the rows by a bool column.

        Returns
        -------
        tuple of numpy.ndarray
            Indices (int64) of the training rows (False) and of the validation rows (True), each in `order`.
        """
        flags = np.asarray(self._storage(column).take(slice(None)), bool).reshape(self.rows)
        chosen = flags[self.order]
        return self.order[~chosen], self.order[chosen]

    def take(self, indices: np.ndarray, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Gather rows.

        Parameters
        ----------
        indices : numpy.ndarray
            Row indices, int64, in any order.
        columns : sequence of str, optional
            Only these.

        Returns
        -------
        dict of numpy.ndarray
            By column, of shape ``(len(indices), *shape)`` and the spec's dtype; strings as objects of bytes.
        """
        return self._read(np.asarray(indices, np.int64), columns)

    def slice(self, start: int, stop: int, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Give rows start to stop as they came, as `take` does; without a cast they are read-only views."""
        return self._read(slice(start, stop), columns)

    def _read(self, rows: Rows, columns: Sequence[str] | None) -> dict[str, np.ndarray]:
        return {
            name: self._storage(name).take(rows).astype(self.columns[name].numpy_dtype, copy=False)
            for name in (self.columns if columns is None else columns)
        }

    def _storage(self, name: str) -> Any:
        if name not in self._storages:
            state = "is closed" if not self._storages else f"holds {sorted(self._storages)}"
            raise ParamError(f"Expected a column of the spool. Received: {name!r}; the spool {state}")
        return self._storages[name]

    def close(self) -> None:
        """Close the files. May be called twice; disk space is free once the last view of it is gone."""
        self._storages = {}
        self._closer()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
