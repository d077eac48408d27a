"""What the model wants of a column: its per-row shape, its dtype and its part in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from sparktf.errors import ParamError

KINDS = ("feature", "label", "weight", "validation", "id", "value")
STRING = "string"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Give the numpy dtype of a tensor's dtype name; `object` for strings.

    ``bfloat16`` and the 8-bit floats are known to numpy only once ``ml_dtypes`` has been imported.

    Raises
    ------
    ParamError
        No such dtype.
    """
    if name == STRING:
        return np.dtype(object)
    try:
        found: np.dtype[Any] = np.dtype(name)
    except TypeError:
        import ml_dtypes

        extended = getattr(ml_dtypes, name, None)
        if extended is None:
            raise ParamError(
                f"Expected the name of a tensor dtype such as 'float32', 'int64', 'bool' or 'string'. "
                f"Received: {name!r}"
            ) from None
        found = np.dtype(extended)
    return found


@dataclass(frozen=True)
class ColumnSpec:
    """One column of the feed, as the model wants it.

    A row's values, however nested they arrive (a scalar, a list, lists of lists, an MLlib vector), are
    flattened in C order and have to be exactly ``prod(shape)`` values.

    Parameters
    ----------
    name : str
        The column's name in the Arrow batches.
    shape : tuple of (int or None)
        One row's shape: ``()`` a scalar, ``(28, 28, 1)`` an image. None is any length, fixed by the first
        row that is read; all rows have to agree.
    dtype : str
        Name of the tensor's dtype at the batch: ``"float32"``, ``"int64"``, ``"bool"``, ``"string"``, ...
    source : str
        The user's column or columns, for messages: ``"features"`` or ``"a, b, c"``.
    kind : {"feature", "label", "weight", "validation", "id", "value"}
        The column's part. NaN is refused in features, labels and weights, a negative value in weights; "value" is for
        programs that know themselves what to do with NaN.
    nullable : bool
        Whether nulls are taken: they become NaN, an empty string or False. Not for integers, which have no
        value to spare, nor for weights.
    parts : tuple of str
        The user's columns where each is one value of the row, in order: faults are then told by column.

    Raises
    ------
    ParamError
        A field has a value that cannot work.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    source: str
    kind: str = "feature"
    nullable: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ParamError("Expected a column name. Received: an empty one")
        object.__setattr__(self, "shape", tuple(self.shape))
        if any(d is not None and (type(d) is not int or d < 1) for d in self.shape):
            raise ParamError(
                f"column {self.source!r}: expected a shape of positive lengths or None. Received: {self.shape}"
            )
        if self.kind not in KINDS:
            raise ParamError(f"column {self.source!r}: expected a kind of {', '.join(KINDS)}. Received: {self.kind!r}")
        dtype = self.numpy_dtype
        if self.nullable and (dtype.kind in "iu" or self.kind in ("weight", "id")):
            raise ParamError(
                f"column {self.source!r}: a {self.kind} of dtype {self.dtype} has no value for a null. "
                "Expected: a float, bool or string feature or label, or nullable=False"
            )

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the column's batches; `object` for strings."""
        return numpy_dtype(self.dtype)

    @property
    def size(self) -> int | None:
        """Values in one row; None where a length is open."""
        known = [d for d in self.shape if d is not None]
        return prod(known) if len(known) == len(self.shape) else None

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON can hold them."""
        return {**asdict(self), "shape": list(self.shape), "parts": list(self.parts)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ColumnSpec:
        """Rebuild a spec from what `to_dict` gave."""
        return cls(**{**fields, "shape": tuple(fields["shape"]), "parts": tuple(fields.get("parts", ()))})


def resolve_shape(shape: tuple[int | None, ...], size: int, nesting: tuple[int, ...]) -> tuple[int, ...] | None:
    """Fill the open lengths of a shape from the first row.

    Parameters
    ----------
    shape : tuple of (int or None)
        What the model wants.
    size : int
        Values in the row.
    nesting : tuple of int
        The row's own lengths, outermost first; ``()`` for a scalar.

    Returns
    -------
    tuple of int or None
        The shape without open lengths; None where the row does not fit.
    """
    open_lengths = sum(d is None for d in shape)
    known = prod(d for d in shape if d is not None)
    if open_lengths == 0:
        return tuple(d for d in shape if d is not None) if known == size else None
    if open_lengths == 1:
        if size == 0 or size % known:
            return None
        return tuple(size // known if d is None else d for d in shape)
    if len(nesting) != len(shape) or prod(nesting) != size or size == 0:
        return None
    filled = tuple(n if d is None else d for d, n in zip(shape, nesting, strict=True))
    return filled if prod(filled) == size else None


def is_permuted(shape: Iterable[int], nesting: Iterable[int]) -> bool:
    """Tell whether nested lengths contradict the shape although the number of values agrees.

    Lengths of one say nothing, so they are left out: 28 x 28 fits (28, 28, 1), and 784 flat values fit both;
    but 3 x 32 x 32 (channels first) does not fit (32, 32, 3), and reshaping would scramble it silently.
    """
    wanted = [d for d in shape if d != 1]
    given = [d for d in nesting if d != 1]
    return len(given) > 1 and len(given) == len(wanted) and given != wanted
