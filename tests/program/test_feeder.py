"""Tasks that give their children rows in pieces, in step, and read no more than is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from sparktf.data.columns import ColumnSpec
from sparktf.errors import DataError
from sparktf.program.board import DONE, Board
from sparktf.program.feeder import ROW_ID, Feeder, Partition
from sparktf.transport import Communicator
from sparktf.transport.testing import run_threads

_SPECS = (ColumnSpec("x", (), "int64", "x", "value"),)


def _batches(read: list[int]) -> Iterator[pa.RecordBatch]:
    for number in range(3):
        read.append(number)
        column = pa.array([number] * 5, pa.int64())
        yield pa.RecordBatch.from_pydict({"x": column, ROW_ID: column})


def _take_turns(communicator: Communicator, stream: bool, gone: str) -> tuple[list[int], list[Any]]:
    """Ask for a piece on rank 0, while rank 1's child is gone; return what was read here, and the answers."""
    board, read, answers = Board(communicator), [], []
    with Feeder(Partition(_batches(read), {"data": _SPECS}), communicator.rank, (0, 1), fed=True) as feeder:
        if communicator.rank == 0:
            feeder.want(board, stream)
        elif gone == "ended":
            board.mine.state = DONE
        else:
            feeder.leave()
        for _ in range(3):
            board.round()
            feeder.spool(board, lambda: None)
            if (answer := feeder.answer(board)) is not None:
                told, spools = answer
                answers.append([their["feeds"]["data"]["rows"] for their in told["everyones"]])
                assert all(their["ended"] for their in told["everyones"])
                for spool in spools:
                    spool.close()
    return read, answers


@pytest.mark.parametrize("gone", ["left", "ended"])
def test_a_stream_goes_on_without_a_worker_that_is_gone_whose_rows_stay_unread(gone: str) -> None:
    asking, other = run_threads("tcp", 2, lambda communicator: _take_turns(communicator, True, gone))
    assert asking == ([0, 1, 2], [[15, 0]])
    assert other == ([], [])


def test_rows_that_are_wanted_whole_count_on_every_worker_whether_it_is_gone_or_not() -> None:
    asking, other = run_threads("tcp", 2, lambda communicator: _take_turns(communicator, False, "ended"))
    assert asking == ([0, 1, 2], [[15, 15]])
    assert other == ([0, 1, 2], [])


def _lose_one(communicator: Communicator, stream: bool, value: int | None) -> list[Any]:
    """Ask for a piece on both ranks; rank 0's child is lost before it has its answer. Return the answers."""
    column = pa.array([value] * 5, pa.int64())
    batch = pa.RecordBatch.from_pydict({"x": column, ROW_ID: pa.array(range(5), pa.int64())})
    board, answers = Board(communicator), []
    with Feeder(Partition([batch], {"data": _SPECS}), communicator.rank, (0, 1), fed=True) as feeder:
        feeder.want(board, stream)
        for turn in range(4):
            board.round()
            feeder.spool(board, lambda: None)
            if communicator.rank == 0 and turn == 0:
                board.mine.state = DONE
                feeder.lose(board)
            if (answer := feeder.answer(board)) is not None:
                told, spools = answer
                answers.append([their["feeds"]["data"]["rows"] for their in told["everyones"]])
                for spool in spools:
                    spool.close()
                if turn < 2:
                    feeder.want(board, stream)
    return answers


@pytest.mark.parametrize("stream", [True, False])
def test_others_read_on_without_a_worker_that_was_lost_while_it_waited_for_rows(stream: bool) -> None:
    lost, other = run_threads("tcp", 2, lambda communicator: _lose_one(communicator, stream, 7))
    # The first piece was spooled on both.
    assert (lost, other) == ([], [[5, 5], [0, 0]])


def test_faults_in_the_rows_are_told_by_another_where_the_first_that_asked_is_lost() -> None:
    _, other = run_threads("tcp", 2, lambda communicator: _lose_one(communicator, False, None))
    assert isinstance(other, DataError)
    assert "10 nulls in the 10 rows" in str(other)
