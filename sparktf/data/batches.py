"""Which rows make which step: plain arithmetic, equal on every rank that is given equal numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparktf.errors import ParamError


@dataclass(frozen=True)
class StepPlan:
    """The steps of one epoch, over all ranks (global).

    Every rank takes the same number of steps. A rank's batches are full ones, one short one, and then ones
    without rows; nothing is padded.

    Parameters
    ----------
    rows : tuple of int
        Training rows of each rank.
    batch_size : int
        Rows per worker and step.

    Raises
    ------
    ParamError
        Fewer than one row a step, no rank, or a negative number of rows.
    """

    rows: tuple[int, ...]
    batch_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(int(n) for n in self.rows))
        if self.batch_size < 1:
            raise ParamError(f"Expected a batch size of at least 1. Received: {self.batch_size}")
        if not self.rows or min(self.rows) < 0:
            raise ParamError(f"Expected one number of rows, zero or more, for each rank. Received: {self.rows}")

    @property
    def steps(self) -> int:
        """Steps of every rank in an epoch; 0 where there are no rows at all."""
        return -(-max(self.rows) // self.batch_size)

    def local_rows(self, step: int, rank: int) -> int:
        """Rows of one rank's batch at a step, counted from 0 within the epoch."""
        return min(max(self.rows[rank] - step * self.batch_size, 0), self.batch_size)

    def global_rows(self, step: int) -> int:
        """Rows of all ranks' batches at a step: the K of the gradient's mean."""
        return sum(self.local_rows(step, rank) for rank in range(len(self.rows)))


def epoch_order(rows: int, *, shuffle: bool, seed: int, epoch: int, rank: int) -> np.ndarray:
    """Order a rank's rows for one epoch.

    Parameters
    ----------
    rows : int
        The rank's training rows.
    shuffle : bool
        Whether to permute; else the order is that of the data.
    seed, epoch, rank : int
        What the permutation depends on, and nothing else: no global generator is touched.

    Returns
    -------
    numpy.ndarray
        A permutation of ``range(rows)``, int64.
    """
    if not shuffle:
        return np.arange(rows, dtype=np.int64)
    # SeedSequence takes no negative numbers; two's complement keeps every seed distinct.
    entropy = [part % 2**64 for part in (seed, epoch, rank)]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
    return generator.permutation(rows).astype(np.int64, copy=False)
