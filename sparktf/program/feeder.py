"""A task's partition, read from Spark only as far as the program asks for it, and spooled for the child in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from sparktf.cluster.scratch import local_directory
from sparktf.data.columns import ColumnSpec
from sparktf.data.faults import Faults, raise_if_any
from sparktf.data.spool import Spool, SpoolWriter
from sparktf.errors import DataError
from sparktf.program.board import DONE, Board

# Of a piece, where the program reads the data as a stream.
PIECE_BYTES = 64 << 20
ROW_ID = "_sparktf_row"
# What the others are told of rows that nobody here will read.
_LEFT = {"rows": 0, "shapes": {}, "faults": {}, "broken": False}


class Partition:
    """The Arrow batches of one task.

    Parameters
    ----------
    batches : iterable of pyarrow.RecordBatch
        Of one DataFrame: its columns and the row's number; of several: one struct column each, null in the rows of the
        others, and the row's number.
    feeds : mapping of str to sequence of ColumnSpec
        The columns of each DataFrame, in their order there; their names count, not those of the batches.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch], feeds: Mapping[str, Sequence[ColumnSpec]]) -> None:
        self._batches = iter(batches)
        self.feeds = feeds
        self.ended = False

    def next_piece(self, limit: int | None, alive: Callable[[], None]) -> dict[str, Piece]:
        """Spool the rows that come next.

        Parameters
        ----------
        limit : int or None
            Bytes of Arrow data after which the piece ends; None: all that is left.
        alive : callable
            Called between batches.

        Returns
        -------
        dict of Piece
            By the DataFrame's name.

        Raises
        ------
        DataError
            A row of a wrong length, or a type that no tensor has.
        """
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(SpoolWriter(specs, local_directory(), id_column=ROW_ID))
                for name, specs in self.feeds.items()
            }
            taken = 0
            while not self.ended and (limit is None or taken < limit):
                batch = next(self._batches, None)
                if batch is None:
                    self.ended = True
                    break
                for name, arrays in _split(batch, list(self.feeds)).items():
                    names = [*[spec.name for spec in self.feeds[name]], ROW_ID]
                    writers[name].append(pa.RecordBatch.from_arrays(arrays, names))
                taken += batch.nbytes
                alive()
            return {name: _finish(writer) for name, writer in writers.items()}


class Piece:
    """Rows of one DataFrame that a task has spooled, or what is wrong with them.

    Attributes
    ----------
    spool : Spool or None
        None where columns hold what they may not.
    told : dict
        What the other ranks are told of it, JSON-able.
    """

    def __init__(self, spool: Spool | None, rows: int, faults: dict[str, Any]) -> None:
        self.spool = spool
        shapes = {name: spec.shape for name, spec in spool.columns.items()} if spool is not None and rows else {}
        self.told = {"rows": rows, "shapes": shapes, "faults": faults, "broken": spool is None}


def _finish(writer: SpoolWriter) -> Piece:
    faults = {name: asdict(found) for name, found in writer.faults().items()}
    broken = any(found.any for found in writer.faults().values())
    return Piece(None if broken else writer.finish(), writer.rows, faults)


def _split(batch: pa.RecordBatch, names: list[str]) -> dict[str, list[pa.Array]]:
    if len(names) == 1:
        return {names[0]: batch.columns}
    ids = batch.column(len(names))
    parts = {}
    for place, name in enumerate(names):
        column = batch.column(place)
        if column.null_count < len(column):
            present = column.is_valid()
            parts[name] = [*column.filter(present).flatten(), ids.filter(present)]
    return parts


class Feeder:
    """Gives the child its rows in pieces, each of which all ranks spool at the same time. A context manager.

    Once one child asks for a piece, all tasks spool theirs, so that every rank knows how many rows each of them has,
    whether its own child asks or not. A child that has left a stream, or has ended, has no more rows: what is left of
    them stays unread, and the others go on without it.

    Parameters
    ----------
    partition : Partition
    rank : int
    ranks : sequence of int
        That have partitions.
    fed : bool
        There is a DataFrame.
    """

    def __init__(self, partition: Partition, rank: int, ranks: Sequence[int], fed: bool) -> None:
        self._partition = partition
        self._ranks = ranks
        self._feeds = fed and rank in ranks
        self._rank = rank
        self._asked = self._given = self._spooled = 0
        self._left = False
        self._pieces: dict[int, dict[str, Piece]] = {}

    def want(self, board: Board, stream: bool) -> None:
        """Note that the child asks for its next piece."""
        self._asked += 1
        board.mine.wants, board.mine.stream = self._asked, stream

    def leave(self) -> None:
        """Note that the child will ask for no more pieces, and drop those that were read ahead for it."""
        self._left = True
        self.close()

    def lose(self, board: Board) -> None:
        """Note that the child is lost: what it has asked for is nobody's any more."""
        self._asked = self._given
        # Else it might be the first that has asked, who is to tell what is wrong with the rows.
        board.mine.wants = 0
        self.leave()

    def spool(self, board: Board, alive: Callable[[], None]) -> None:
        """Spool as many pieces as any rank's child has asked for.

        Parameters
        ----------
        board : Board
        alive : callable
            Called between batches.

        Raises
        ------
        DataError
            See `Partition.next_piece`.
        """
        if not self._feeds:
            return
        asking = [notice for notice in (board.notices[rank] for rank in self._ranks) if notice.wants]
        while asking and self._spooled < max(notice.wants for notice in asking):
            streamed = any(notice.stream for notice in asking)
            if streamed and (self._left or board.mine.state == DONE):
                told = {"ended": True, "feeds": dict.fromkeys(self._partition.feeds, _LEFT)}
            else:
                pieces = self._partition.next_piece(PIECE_BYTES if streamed else None, alive)
                told = {"ended": self._partition.ended, "feeds": {name: piece.told for name, piece in pieces.items()}}
                self._pieces[self._spooled] = pieces
            board.post(f"piece {self._spooled}", json.dumps(told).encode(), self._ranks)
            self._spooled += 1
            if board.mine.state == DONE:
                # The others need its rows' number only.
                self.close()

    def answer(self, board: Board) -> tuple[dict[str, Any], list[Spool]] | None:
        """Return the piece that the child waits for, once all ranks have theirs.

        Returns
        -------
        (dict, list of Spool) or None
            What every rank told of its piece, and this rank's spools, for the caller to close.

        Raises
        ------
        DataError
            Columns hold nulls and the like: one line a column, with the totals over all ranks. On the first rank that
            has asked; others are not answered.
        """
        if self._given == self._asked or (parts := board.take(f"piece {self._given}")) is None:
            return None
        everyones = [json.loads(part) for part in parts]
        pieces = self._pieces.pop(self._given)
        self._given += 1
        if any(feed["broken"] for told in everyones for feed in told["feeds"].values()):
            if self._rank == min(rank for rank in self._ranks if board.notices[rank].wants >= self._given):
                raise DataError(self._faults(everyones))
            return None
        spools = [piece.spool for piece in pieces.values() if piece.spool is not None]
        described = {name: spool.describe() for name, spool in zip(pieces, spools, strict=True)}
        return {"everyones": everyones, "spools": described}, spools

    def _faults(self, everyones: Sequence[dict[str, Any]]) -> str:
        messages = []
        for name, specs in self._partition.feeds.items():
            counted = [told["feeds"][name]["faults"] for told in everyones]
            totals = [(s, sum((Faults(**c[s.name]) for c in counted if s.name in c), Faults())) for s in specs]
            try:
                raise_if_any(totals, "the DataFrame" if len(self._partition.feeds) == 1 else f"the DataFrame {name!r}")
            except DataError as error:
                messages.append(str(error))
        return "\n".join(messages)

    def close(self) -> None:
        """Give back the disk space of pieces that nobody has asked for."""
        for pieces in self._pieces.values():
            for piece in pieces.values():
                if piece.spool is not None:
                    piece.spool.close()
        self._pieces.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
