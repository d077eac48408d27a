"""The rows that Spark feeds to a program: a ``tf.data.Dataset`` or plain numpy, in step with the other workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparktf.cluster.spooling import fill_shapes
from sparktf.data.batches import StepPlan, epoch_order
from sparktf.data.spool import Spool
from sparktf.errors import DataError, ParamError

Batch = dict[str, np.ndarray]
NextPiece = Callable[[bool], tuple[list[dict[str, Any]], dict[str, Spool]]]


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Parameters
    ----------
    batch_size : int
        Rows per worker and step.
    shuffle : bool
        A full permutation of this worker's rows, another one each epoch.
    seed : int
    repeat : int or None
        Times that every row is given; None: without end.
    pad : bool
        Fill short batches up with this worker's first rows, so that all have `batch_size` rows.
    drop_remainder : bool
        Leave out what does not fill a batch on every worker.

    Raises
    ------
    ParamError
    """

    batch_size: int
    shuffle: bool = False
    seed: int = 0
    repeat: int | None = 1
    pad: bool = False
    drop_remainder: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ParamError(f"batch_size: expected an integer of at least 1, received {self.batch_size!r}.")
        if self.repeat is not None and (not isinstance(self.repeat, int) or self.repeat < 1):
            raise ParamError(f"repeat: expected an integer of at least 1, or None (no end), received {self.repeat!r}.")
        if self.pad and self.drop_remainder:
            raise ParamError("Expected pad or drop_remainder, received both.")

    def steps(self, rows: Sequence[int]) -> int:
        """Return the batches of one epoch, the same on every worker.

        Parameters
        ----------
        rows : sequence of int
            Of each worker.

        Raises
        ------
        DataError
            A worker without rows has nothing to pad with.
        """
        if self.drop_remainder:
            return min(rows) // self.batch_size
        if self.pad and 0 in rows and max(rows) > 0:
            raise DataError(
                f"pad: expected at least one row for every worker, received {list(rows)}. Use fewer workers, or feed "
                "more rows."
            )
        return StepPlan(tuple(rows), self.batch_size).steps

    def order(self, spool: Spool, steps: int, epoch: int, rank: int) -> np.ndarray:
        """Return the spool's row indices of one epoch, int64, for `steps` batches."""
        permuted = epoch_order(spool.rows, shuffle=self.shuffle, seed=self.seed, epoch=epoch, rank=rank)
        order = spool.order[permuted]
        if self.pad and spool.rows:
            # numpy repeats from the start.
            order = np.resize(order, steps * self.batch_size)
        chosen: np.ndarray = order[: steps * self.batch_size]
        return chosen


class Ingest:
    """The DataFrames of a run, as one worker sees them.

    Parameters
    ----------
    names : sequence of str
        Of the DataFrames.
    rank : int
        This worker's number among the workers.
    next_piece : callable
        Gives the next piece of this worker's rows; see `TaskLink.next_piece`.
    leave : callable
        Called where a program leaves a stream before its end.
    """

    def __init__(
        self, names: Sequence[str], rank: int, next_piece: NextPiece, leave: Callable[[], None] = lambda: None
    ) -> None:
        self._names = list(names)
        self._rank = rank
        self._next_piece, self._leave = next_piece, leave
        self._whole: tuple[list[dict[str, Any]], dict[str, Spool]] | None = None
        self._streamed = False

    def batches(self, name: str | None, batching: Batching, stream: bool) -> Iterator[Batch]:
        """Yield one dict of arrays by column name a step; see `Context.batches`."""
        if stream:
            yield from self._stream(name, batching)
            return
        spool, rows = self._rows(name)
        steps = batching.steps(rows)
        epoch = 0
        while batching.repeat is None or epoch < batching.repeat:
            if steps == 0:
                return
            order = batching.order(spool, steps, epoch, self._rank)
            for step in range(steps):
                yield _take(spool, order[step * batching.batch_size : (step + 1) * batching.batch_size])
            epoch += 1

    def dataset(self, name: str | None, batching: Batching, stream: bool) -> Any:
        """Return a tf.data.Dataset of dicts of tensors by column name; see `Context.dataset`."""
        from sparktf.data.tfdata import iterator_dataset, training_dataset

        if stream:
            return iterator_dataset(self._stream(name, batching))
        spool, rows = self._rows(name)
        steps = batching.steps(rows)
        started = iter(range(2**62))

        def order() -> np.ndarray:
            return batching.order(spool, steps, next(started), self._rank)

        # Epochs are counted over all iterations, so that each of Keras's own epochs is shuffled anew.
        dataset = training_dataset(spool, order, batching.batch_size, steps, features=list(spool.columns), pack=dict)
        dataset = dataset.map(lambda columns: columns)
        return dataset if batching.repeat == 1 else dataset.repeat(batching.repeat)

    def _rows(self, name: str | None) -> tuple[Spool, list[int]]:
        chosen = self._choose(name)
        if self._streamed:
            raise ParamError("Expected the data to be read once as a stream, received a second request for it.")
        if self._whole is None:
            everyones, spools = self._next_piece(False)
            if not all(told["ended"] for told in everyones):
                raise ParamError("stream: expected the same on all workers, received stream=True on some only.")
            for fed, spool in spools.items():
                fill_shapes(spool, [told["feeds"][fed] for told in everyones])
            self._whole = everyones, spools
        everyones, spools = self._whole
        return spools[chosen], [told["feeds"][chosen]["rows"] for told in everyones]

    def _stream(self, name: str | None, batching: Batching) -> Iterator[Batch]:
        chosen = self._choose(name)
        if len(self._names) > 1 or self._whole is not None or self._streamed:
            raise ParamError("stream=True: expected a run with one DataFrame, which is read once.")
        if batching.repeat != 1 or batching.pad or batching.drop_remainder:
            raise ParamError("stream=True: expected no repeat, pad or drop_remainder; a stream is read once, as it is.")
        self._streamed = True
        number, ended = 0, False
        try:
            while not ended:
                everyones, spools = self._next_piece(True)
                ended = all(told["ended"] for told in everyones)
                with spools[chosen] as spool:
                    fill_shapes(spool, [told["feeds"][chosen] for told in everyones])
                    steps = batching.steps([told["feeds"][chosen]["rows"] for told in everyones])
                    order = batching.order(spool, steps, number, self._rank)
                    for step in range(steps):
                        yield _take(spool, order[step * batching.batch_size : (step + 1) * batching.batch_size])
                number += 1
        finally:
            # What the others ask for from now on need not be read here.
            if not ended:
                self._leave()

    def _choose(self, name: str | None) -> str:
        if name is None and len(self._names) == 1:
            return self._names[0]
        if name not in self._names:
            has = ", ".join(map(repr, self._names)) or "none: run(..., dataset=df) feeds one"
            raise ParamError(f"name: expected one of the run's DataFrames ({has}), received {name!r}.")
        return name

    def close(self) -> None:
        """Give the data's disk space back."""
        if self._whole is not None:
            for spool in self._whole[1].values():
                spool.close()
            self._whole = None


def _take(spool: Spool, indices: np.ndarray) -> Batch:
    if spool.rows:
        return spool.take(indices)
    # It learnt from the others how long its rows would be.
    return {name: np.empty((0, *map(int, filter(None, s.shape))), s.numpy_dtype) for name, s in spool.columns.items()}
