"""The rows of a run: each once, and the same number of batches on every worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktf.data.columns import ColumnSpec
from sparktf.errors import DataError, ParamError
from sparktf.program.feeder import ROW_ID, Partition
from sparktf.program.ingest import Batching, Ingest

_SPECS = (ColumnSpec("x", (), "int64", "x", "value"), ColumnSpec("v", (None,), "float32", "v", "value"))


def _arrow(rows: Sequence[int], size: int = 7) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        part = list(rows[start : start + size])
        yield pa.RecordBatch.from_pydict(
            {
                "x": pa.array(part, pa.int64()),
                "v": pa.array([[float(r), 1.0] for r in part], pa.list_(pa.float32())),
                ROW_ID: pa.array(part, pa.int64()),
            }
        )


class _Workers:
    """Partitions of several workers in one process; pieces are taken by all at once, as tasks do."""

    def __init__(self, rows: Sequence[Sequence[int]], limit: int = 64) -> None:
        self._partitions = [Partition(_arrow(part), {"data": _SPECS}) for part in rows]
        self._limit = limit
        self._pieces: list[Any] = []
        self._taken = [0] * len(rows)
        self.ingests = [Ingest(["data"], rank, self._next(rank)) for rank in range(len(rows))]

    def _next(self, rank: int) -> Any:
        def next_piece(stream: bool) -> Any:
            number = self._taken[rank]
            self._taken[rank] += 1
            if number == len(self._pieces):
                limit = self._limit if stream else None
                pieces = [partition.next_piece(limit, lambda: None)["data"] for partition in self._partitions]
                told = [
                    {"ended": partition.ended, "feeds": {"data": piece.told}}
                    for partition, piece in zip(self._partitions, pieces, strict=True)
                ]
                self._pieces.append((told, pieces))
            told, pieces = self._pieces[number]
            return told, {"data": pieces[rank].spool}

        return next_piece


def _dealt(rows: Sequence[int]) -> list[list[int]]:
    starts = np.cumsum([0, *rows])
    return [list(range(a, b)) for a, b in pairwise(starts)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 9), st.booleans(), st.booleans())
def test_every_row_comes_once_and_all_workers_take_as_many_steps(
    rows: list[int], batch_size: int, shuffle: bool, stream: bool
) -> None:
    workers = _Workers(_dealt(rows))
    batching = Batching(batch_size, shuffle=shuffle, seed=3)
    # One step of each in turn: a worker that stopped early would be seen.
    steps = list(zip(*[ingest.batches(None, batching, stream) for ingest in workers.ingests], strict=True))
    seen = [int(x) for step in steps for batch in step for x in batch["x"]]
    assert sorted(seen) == list(range(sum(rows)))
    assert all(len(batch["x"]) <= batch_size for step in steps for batch in step)
    assert all(batch["v"].shape == (len(batch["x"]), 2) for step in steps for batch in step)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 9))
def test_padded_batches_are_full_and_hold_every_row(rows: list[int], batch_size: int) -> None:
    workers = _Workers(_dealt(rows))
    batches = [list(ingest.batches(None, Batching(batch_size, pad=True), False)) for ingest in workers.ingests]
    assert len({len(mine) for mine in batches}) == 1
    assert all(len(batch["x"]) == batch_size for mine in batches for batch in mine)
    assert {int(x) for mine in batches for batch in mine for x in batch["x"]} == set(range(sum(rows)))


def test_without_the_remainder_all_batches_are_full_on_every_worker() -> None:
    workers = _Workers(_dealt([10, 7]))
    for ingest in workers.ingests:
        assert [len(b["x"]) for b in ingest.batches(None, Batching(3, drop_remainder=True), False)] == [3, 3]


def test_epochs_differ_in_order_and_hold_the_same_rows() -> None:
    (ingest,) = _Workers(_dealt([20])).ingests
    seen = [int(x) for b in ingest.batches(None, Batching(20, shuffle=True, repeat=2), False) for x in b["x"]]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]


def test_a_dataset_gives_dicts_of_tensors_and_shuffles_each_iteration_anew() -> None:
    (ingest,) = _Workers(_dealt([10])).ingests
    dataset = ingest.dataset(None, Batching(4, shuffle=True), False)
    assert set(dataset.element_spec) == {"x", "v"}
    epochs = [np.concatenate([b["x"].numpy() for b in dataset]) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert list(epochs[0]) != list(epochs[1])
    assert dataset.cardinality().numpy() == 3


def test_a_worker_without_rows_gets_batches_of_none_in_the_others_shapes() -> None:
    workers = _Workers([[0, 1, 2], []])
    shapes = [b["v"].shape for b in workers.ingests[1].dataset(None, Batching(2), False).as_numpy_iterator()]
    assert shapes == [(0, 2), (0, 2)]


def test_a_stream_that_is_left_early_is_not_read_to_its_end() -> None:
    read = []

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in _arrow(range(1000)):
            read.append(batch.num_rows)
            yield batch

    partition = Partition(batches(), {"data": _SPECS})

    def next_piece(stream: bool) -> Any:
        piece = partition.next_piece(200 if stream else None, lambda: None)["data"]
        return [{"ended": partition.ended, "feeds": {"data": piece.told}}], {"data": piece.spool}

    ingest = Ingest(["data"], 0, next_piece)
    dataset = ingest.dataset(None, Batching(5), stream=True)
    assert next(iter(dataset))["x"].numpy().tolist() == [0, 1, 2, 3, 4]
    assert sum(read) < 50


def test_an_empty_dataframe_gives_no_batches() -> None:
    for stream in (False, True):
        (ingest,) = _Workers([[]]).ingests
        assert list(ingest.batches(None, Batching(2), stream)) == []
        (ingest,) = _Workers([[]]).ingests
        assert list(ingest.dataset(None, Batching(2), stream)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"batch_size": 1, "repeat": 0},
        {"batch_size": 1, "pad": True, "drop_remainder": True},
    ],
)
def test_batches_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParamError):
        Batching(**wrong)


def test_padding_needs_a_row_on_every_worker() -> None:
    workers = _Workers([[0, 1, 2], []])
    with pytest.raises(DataError, match="at least one row for every worker"):
        next(workers.ingests[0].batches(None, Batching(2, pad=True), False))


def test_a_dataframe_that_is_not_there_is_named() -> None:
    (ingest,) = _Workers([[1]]).ingests
    with pytest.raises(ParamError, match=r"'data'.*'train'"):
        ingest.dataset("train", Batching(2), False)


def test_a_stream_on_some_workers_only_is_refused() -> None:
    reads_as_it_comes, wants_all = _Workers(_dealt([20, 20])).ingests
    next(reads_as_it_comes.batches(None, Batching(1), True))
    with pytest.raises(ParamError, match="stream: expected the same on all workers"):
        next(wants_all.batches(None, Batching(1), False))


def test_a_stream_is_read_once() -> None:
    (ingest,) = _Workers([[1]]).ingests
    list(ingest.batches(None, Batching(1), True))
    for stream in (False, True):
        with pytest.raises(ParamError, match="once"):
            list(ingest.batches(None, Batching(1), stream))
