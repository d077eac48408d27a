"""The three forms that a column's values take between Arrow and the spool's files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dense:
    """Rows of equal length: ``values`` is flat, C order, ``rows * size`` long."""

    values: np.ndarray


@dataclass(frozen=True)
class Bytes:
    """Strings: ``lengths`` (int64, one a value) and their bytes, one after the other (uint8)."""

    lengths: np.ndarray
    data: np.ndarray


@dataclass(frozen=True)
class Vectors:
    """MLlib vectors as they come: a dense row has no indices, a sparse one as many as values.

    ``value_lengths`` and ``index_lengths`` are int64, one a row; ``values`` float64, ``indices`` int32.
    """

    value_lengths: np.ndarray
    index_lengths: np.ndarray
    values: np.ndarray
    indices: np.ndarray


Block = Dense | Bytes | Vectors
