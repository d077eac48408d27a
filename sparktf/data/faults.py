"""Counting what a column may not hold, and saying so once, with totals.

A null or a NaN is rarely alone: naming the first and stopping would make the user find them one run at a
time. So a reader goes on counting over the whole partition, and all workers' counts can be added up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from sparktf.data.columns import ColumnSpec
from sparktf.errors import DataError


@dataclass
class Faults:
    """Totals of one column over some of its rows.

    Parameters
    ----------
    rows : int
        Rows that were read.
    nulls, nans, negatives, unfit : int
        Values of each kind.
    places : tuple of int
        Nulls and NaN by the column that was packed at each place of a row; empty where none were seen.
    """

    rows: int = 0
    nulls: int = 0
    nans: int = 0
    negatives: int = 0
    unfit: int = 0
    places: tuple[int, ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything has been counted."""
        return bool(self.nulls or self.nans or self.negatives or self.unfit)

    def count_values(self, values: np.ndarray, spec: ColumnSpec) -> None:
        """Count NaN, negative weights and values that the tensor's dtype cannot hold.

        Parameters
        ----------
        values : numpy.ndarray
            Flat, of the incoming dtype.
        spec : ColumnSpec
            What the model wants of the column.
        """
        if values.size == 0 or spec.kind == "id":
            return
        # np.min is NaN exactly where a value is, and takes half the time of np.isnan(...).any().
        smallest = values.min() if values.dtype.kind == "f" or spec.kind == "weight" else None
        refused = not spec.nullable and spec.kind != "value"
        if smallest is not None and smallest != smallest and refused:
            self.nans += int(np.isnan(values).sum())
        if spec.kind == "weight" and smallest is not None and not smallest >= 0:
            self.negatives += int((values < 0).sum())
        self.unfit += count_unfit(values, spec.numpy_dtype, nan_counted=refused)

    def locate(self, places: np.ndarray, parts: int) -> None:
        """Count faults by their place in a row of packed columns."""
        self.places = _added(self.places, np.bincount(places, minlength=parts).tolist())

    def __add__(self, other: Faults) -> Faults:
        """Give the totals over both's rows."""
        return Faults(
            self.rows + other.rows,
            self.nulls + other.nulls,
            self.nans + other.nans,
            self.negatives + other.negatives,
            self.unfit + other.unfit,
            _added(self.places, other.places),
        )

    def _by_part(self, spec: ColumnSpec) -> str:
        if not self.places:
            return ""
        named = [f"{n:,} in {part!r}" for n, part in zip(self.places, spec.parts, strict=True) if n]
        return f": {', '.join(named)}"

    def describe(self, spec: ColumnSpec, where: str) -> str:
        """Say what a column holds and what it should.

        Parameters
        ----------
        spec : ColumnSpec
        where : str
            What has been counted over: ``"the DataFrame"``.
        """
        found = [
            f"{n:,} {what}"
            for n, what in (
                (self.nulls, "nulls" if self.nulls > 1 else "null"),
                (self.nans, "NaN"),
                (self.negatives, "negative values"),
                (self.unfit, f"values that {spec.dtype} cannot hold"),
            )
            if n
        ]
        return (
            f"column {spec.source!r} ({spec.kind}) holds {' and '.join(found)} in the {self.rows:,} rows of "
            f"{where}{self._by_part(spec)}. Expected: {_expected(self, spec)}"
        )


def raise_if_any(found: Iterable[tuple[ColumnSpec, Faults]], where: str) -> None:
    """Raise one error with every total, a line for each column that has any.

    Parameters
    ----------
    found : iterable of (ColumnSpec, Faults)
    where : str
        What has been counted over: ``"the DataFrame"``.

    Raises
    ------
    DataError
        Anything has been counted.
    """
    lines = [faults.describe(spec, where) for spec, faults in found if faults.any]
    if lines:
        raise DataError("\n".join(lines))


def _added(one: Iterable[int], other: Iterable[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))


def count_unfit(values: np.ndarray, dtype: np.dtype, *, nan_counted: bool) -> int:
    """Count values that a cast to an integer or bool tensor would change.

    Floating tensors take anything; a label of 1.5 for an int64 input would silently become 1.
    """
    if np.can_cast(values.dtype, dtype) or dtype.kind not in "iub":
        return 0
    if dtype.kind == "b":
        return int(((values != 0) & (values != 1) & ~_nan(values, nan_counted)).sum())
    limits = np.iinfo(dtype)
    if values.dtype.kind == "f":
        wide = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        # A dtype's maximum may not be a float, but the power of two above it is.
        fits = (wide == np.floor(wide)) & (wide >= float(limits.min)) & (wide < float(limits.max) + 1.0)
        return int((~fits & ~_nan(values, nan_counted)).sum())
    if int(values.min()) >= limits.min and int(values.max()) <= limits.max:
        return 0
    exact = values.astype(object)
    return int(((exact < limits.min) | (exact > limits.max)).sum())


def _nan(values: np.ndarray, nan_counted: bool) -> np.ndarray | np.bool_:
    return np.isnan(values) if nan_counted and values.dtype.kind == "f" else np.bool_(False)


def _expected(faults: Faults, spec: ColumnSpec) -> str:
    fixes = []
    if faults.nulls or faults.nans:
        fixes.append("no nulls and no NaN; fill or drop them before (df.na.fill, df.na.drop, pyspark.ml's Imputer)")
    if faults.negatives:
        fixes.append("weights of zero or more")
    if faults.unfit:
        fixes.append(f"values of the model's dtype {spec.dtype}; cast or round the column before")
    return "; ".join(fixes)
