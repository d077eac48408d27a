"""The sharded tables of a model while it trains over several ranks, and where they are afterwards."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sparktf.distribute.sparse_optimizers import Array, SparseOptimizer
from sparktf.distribute.table import TableShard, TableState
from sparktf.distribute.table_access import LocalTable, TableAccess
from sparktf.distribute.table_exchange import TableGroup
from sparktf.distribute.table_saving import PACKED_BYTES, mapped_pieces, write_pieces
from sparktf.errors import ParamError, SparktfError
from sparktf.transport import Communicator


class OwnedPart(TableAccess):
    """What a rank other than the chief has of a table after a fit.

    Attributes
    ----------
    shard : TableShard
    """

    def __init__(self, shard: TableShard, name: str) -> None:
        super().__init__(shard.spec, name)
        self.shard = shard

    def _use(self, optimizer: SparseOptimizer) -> None:
        raise self._refusal()

    def _lookup(self, ids: Array, out: Array) -> Array:
        raise self._refusal()

    def _update(self, ids: Array, gradients: Array, rate: float) -> None:
        raise self._refusal()

    def load(self, pieces: Iterable[TableState]) -> None:
        """Refuse to be set."""
        raise self._refusal()

    def pieces(self) -> Iterator[TableState]:
        """Refuse to be read as if it were the whole table."""
        raise self._refusal()

    @property
    def updates(self) -> int:
        """The table's updates so far."""
        return self.shard.updates

    def _refusal(self) -> ParamError:
        return ParamError(
            f"layer {self.name!r}: expected the whole table, received part {self.shard.part} of {self.shard.parts}, "
            "which is what this rank has of it since the fit. Use the model that the fit returned."
        )


def tables_of(model: Any) -> list[Any]:
    """Return a model's `ShardedEmbedding` layers, in an order that is the same on every rank."""
    if "sparktf.distribute.embedding" not in sys.modules:
        # Nobody has made one.
        return []
    from sparktf.distribute.embedding import sharded_layers

    return sharded_layers(model)


@contextmanager
def tables_in_step(model: Any, communicator: Communicator, share: Callable[[], Any]) -> Iterator[None]:
    """Hold a model's tables spread over the ranks; every rank enters and leaves.

    Afterwards the chief has whole tables: in memory where they are small, else in files that it maps.

    Parameters
    ----------
    model : keras.Model
    communicator : Communicator
        The group's.
    share : callable
        Returns, while a step is traced, this rank's share of the step's rows.
    """
    layers = tables_of(model)
    if not layers:
        yield
        return
    states: list[list[TableState]] = []
    with TableGroup(communicator, [layer.access for layer in layers]) as group:
        for layer, table in zip(layers, group.tables, strict=True):
            layer.access = table
            layer.weigh_by(share)
        try:
            yield
            sizes = _table_bytes(group, communicator)
            if group.rank == 0:
                states = [kept(table, nbytes) for table, nbytes in zip(group.tables, sizes, strict=True)]
        finally:
            for layer, shard in zip(layers, group.shards, strict=True):
                layer.access = OwnedPart(shard.shard, layer.name)
                layer.weigh_by(None)
    for layer, state in zip(layers, states, strict=False):
        layer.access = LocalTable(layer.spec, layer.name)
        layer.access.load(state)


@contextmanager
def tables_in_program(variables: Sequence[Any], communicator: Communicator) -> Iterator[None]:
    """Spread the tables among an optimizer's variables over the ranks of a program that trains in step by itself.

    They are updated by the mean of all ranks' gradients, and stay spread: who saves asks the others, who serve until
    all have left.

    Parameters
    ----------
    variables : sequence of keras.Variable
        The same on every rank.
    communicator : Communicator
    """
    layers = [variable._sparktf_layer for variable in variables if hasattr(variable, "_sparktf_layer")]
    if not layers:
        yield
        return
    with TableGroup(communicator, [layer.access for layer in layers], 1 / communicator.size) as group:
        for layer, table in zip(layers, group.tables, strict=True):
            layer.access = table
        yield


def kept(table: TableAccess, nbytes: int) -> list[TableState]:
    """Return a whole table's state: in memory where it is small, else in files without a name that are mapped."""
    if nbytes <= PACKED_BYTES:
        return [TableState.joined(list(table.pieces()), table.spec.dim)]
    with tempfile.TemporaryDirectory(prefix="sparktf-table-") as directory:
        write_pieces(table.pieces(), directory)
        return mapped_pieces(directory, table.spec.dim)


def _table_bytes(group: TableGroup, communicator: Communicator) -> list[int]:
    """Return the bytes of each table's state, over all ranks."""
    for table in group.tables:
        table.settle()
    mine = np.array([shard.shard.nbytes for shard in group.shards], np.int64)
    return [int(nbytes) for nbytes in communicator.all_reduce(mine)]


def table_failure(model: Any) -> SparktfError | None:
    """Return what a table of a model has raised inside a step, of which TensorFlow tells only the text."""
    return next((layer.access.failure for layer in tables_of(model) if layer.access.failure is not None), None)


def table_seconds(model: Any) -> float:
    """Return the seconds that this process has waited so far for rows of others, while tables are spread."""
    return sum(float(layer.access.waited_seconds) for layer in tables_of(model))


def check_tables(model: Any) -> None:
    """Check that a compiled model's optimizer can update its tables.

    Raises
    ------
    ParamError
    """
    for layer in tables_of(model):
        layer.trained_by(model.optimizer)


def check_callbacks(model: Any, callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that would take back all of a model but its tables.

    Raises
    ------
    ParamError
    """
    import keras

    for callback in callbacks if tables_of(model) else ():
        if isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights:
            raise ParamError(
                "Expected EarlyStopping(restore_best_weights=False) with a ShardedEmbedding, received True: the rows "
                "of its table are not among the weights that are put back. Keep the best model by ModelCheckpoint("
                "save_best_only=True)."
            )
