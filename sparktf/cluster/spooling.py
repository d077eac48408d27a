"""From a partition's Arrow batches to a spool, with the other ranks kept aware that this one still reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from sparktf.cluster.readiness import GettingReady, gather_when_ready
from sparktf.cluster.scratch import local_directory
from sparktf.data.columns import ColumnSpec
from sparktf.data.faults import Faults, raise_if_any
from sparktf.data.spool import Spool, SpoolWriter
from sparktf.distribute.fit import RankRows
from sparktf.distribute.group import Group
from sparktf.errors import DataError
from sparktf.transport import Communicator


class RefusedRows(DataError):
    """The DataFrame holds what a model cannot be trained on; raised by every rank alike, after it has read its rows."""


def spool_partition(
    batches: Iterable[Any],
    specs: Sequence[ColumnSpec],
    communicator: Communicator,
    getting_ready: GettingReady,
    alive: Callable[[], None] = lambda: None,
) -> Spool:
    """Spool a partition while other ranks spool theirs; return once all have.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
    specs : sequence of ColumnSpec
    communicator : Communicator
    getting_ready : GettingReady
        Entered. It takes part in the ranks' rounds until this one has read its rows, so that one that is done early
        does not take a slow one for a dead one.
    alive : callable
        Called again and again while this rank waits for the others.

    Raises
    ------
    RefusedRows
        Columns hold nulls, NaN and the like: one line a column, with the totals over all ranks.
    DataError
        A row of a wrong length, or a type that no tensor has; on the rank that met it.
    TransportError
        Another rank failed meanwhile.
    """
    with SpoolWriter(specs, local_directory()) as writer:
        for batch in batches:
            writer.append(batch)
            getting_ready.moved()
        getting_ready.ready()
        _check_everyones_rows(writer, specs, communicator, alive)
        return writer.finish()


def _check_everyones_rows(
    writer: SpoolWriter, specs: Sequence[ColumnSpec], communicator: Communicator, alive: Callable[[], None]
) -> None:
    """Wait until every rank has read its partition, and add up what they counted."""
    mine = json.dumps({name: asdict(faults) for name, faults in writer.faults().items()}).encode()
    counted = [json.loads(part) for part in gather_when_ready(communicator, mine, alive)]
    totals = [(s, sum((Faults(**c[s.name]) for c in counted), Faults())) for s in specs]
    try:
        raise_if_any(totals, "the DataFrame")
    except DataError as error:
        raise RefusedRows(str(error)) from None


def split_rows(spool: Spool, validation: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the spool's indices of the training and of the validation rows, in the data's order."""
    if validation is None:
        return spool.order, spool.order[:0]
    return spool.select(validation)


def agree_on_rows(spool: Spool, training: int, validation: int, group: Group) -> RankRows:
    """Tell all ranks how many rows each has, and agree on lengths that the model left open.

    Raises
    ------
    DataError
        Rows of one column differ in length from rank to rank.
    """
    mine = {
        "training": training,
        "validation": validation,
        "shapes": {name: spec.shape for name, spec in spool.columns.items()} if spool.rows else {},
    }
    everyones = [json.loads(part) for part in group.all_gather_bytes(json.dumps(mine).encode())]
    fill_shapes(spool, everyones)
    return RankRows(
        training=tuple(their["training"] for their in everyones),
        validation=tuple(their["validation"] for their in everyones),
    )


def fill_shapes(spool: Spool, everyones: Sequence[dict[str, Any]]) -> None:
    """Give a spool without rows the lengths that the rows of others have.

    Parameters
    ----------
    spool : Spool
        Changed in place.
    everyones : sequence of dict
        What each rank told: ``"shapes"`` by column where it has rows.

    Raises
    ------
    DataError
        Rows of one column differ in length from rank to rank.
    """
    for name, spec in list(spool.columns.items()):
        shapes = {tuple(told["shapes"][name]) for told in everyones if name in told["shapes"]}
        if len(shapes) > 1:
            raise DataError(
                f"column {spec.source!r}: expected rows of one length, received {sorted(shapes)} in different "
                "partitions."
            )
        if shapes:
            spool.columns[name] = replace(spec, shape=shapes.pop())
