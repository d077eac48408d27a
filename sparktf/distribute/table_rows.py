"""What the rows of a table are before anything has changed them: a function of the seed and the row alone.

A row's numbers come from a generator that starts at a hash of the two (SplitMix64; Steele, Lea, Flood, "Fast Splittable
Pseudorandom Number Generators", 2014). So they are the same on whichever node the row lives, and in whatever order rows
are asked for, and a row that nobody has changed need not be stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from sparktf.errors import ParamError

Array = np.ndarray[Any, Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KINDS = {
    "RandomUniform": ("minval", "maxval"),
    "RandomNormal": ("mean", "stddev"),
    "Constant": ("value",),
    "Zeros": (),
    "Ones": (),
}
# A float32 holds integers up to here, so that a 24-bit number by this one is uniform, and never rounds to 1.
_STEP = np.float32(2.0**-24)
_LOW_BITS = np.uint64((1 << 24) - 1)


@dataclass(frozen=True)
class RowInitializer:
    """How the numbers of a new row are distributed.

    Parameters
    ----------
    kind : str
        The name of a class of `keras.initializers`: RandomUniform, RandomNormal, Constant, Zeros, Ones.
    first, second : float
        Its parameters in the order of Keras's: minval and maxval, mean and stddev, value.
    """

    kind: str
    first: float = 0.0
    second: float = 0.0

    @classmethod
    def of(cls, kind: str, config: dict[str, Any]) -> Self:
        """Make one from the name and the configuration of a Keras initializer; its seed is not looked at.

        Raises
        ------
        ParamError
            It is none of those that there are.
        """
        if kind not in _KINDS:
            raise ParamError(
                f"embeddings_initializer: expected one of {', '.join(_KINDS)} of keras.initializers, received {kind}."
            )
        return cls(kind, *(float(config[name]) for name in _KINDS[kind]))

    def rows(self, seed: int, ids: Array, dim: int) -> Array:
        """Return new rows.

        Parameters
        ----------
        seed : int
            Of the table.
        ids : ndarray of int64, (n,)
        dim : int

        Returns
        -------
        ndarray of float32, (n, dim)
        """
        shape = (len(ids), dim)
        if self.kind == "RandomUniform":
            drawn = (_numbers(seed, ids, dim) >> np.uint64(40)).astype(np.float32) * _STEP
            return np.float32(self.first) + np.float32(self.second - self.first) * drawn
        if self.kind == "RandomNormal":
            return np.float32(self.first) + np.float32(self.second) * _normal(_numbers(seed, ids, dim))
        return np.full(shape, {"Constant": self.first, "Zeros": 0.0, "Ones": 1.0}[self.kind], np.float32)


@dataclass(frozen=True)
class TableSpec:
    """A table as a whole, wherever its rows live.

    Parameters
    ----------
    rows, dim : int
    seed : int
    initial : RowInitializer
    """

    rows: int
    dim: int
    seed: int
    initial: RowInitializer

    def __post_init__(self) -> None:
        for name in ("rows", "dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParamError(f"{name}: expected an integer of at least 1, received {value!r}.")

    def new_rows(self, ids: Array) -> Array:
        """Return the rows of some ids as nobody has changed them: float32, (n, dim)."""
        return self.initial.rows(self.seed, ids, self.dim)

    def describe(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return asdict(self)

    @classmethod
    def described(cls, told: dict[str, Any]) -> Self:
        """Make one of what `describe` returned."""
        return cls(**{**told, "initial": RowInitializer(**told["initial"])})


def _numbers(seed: int, ids: Array, dim: int) -> Array:
    """Return 64 random bits for every element of some rows."""
    start = _mixed(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    with np.errstate(over="ignore"):
        states = _mixed(start + ids.astype(np.uint64) * _GOLDEN)
        steps = np.arange(1, dim + 1, dtype=np.uint64) * _GOLDEN
        return _mixed(states[:, np.newaxis] + steps)


def _mixed(numbers: Array) -> Array:
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = numbers ^ (numbers >> np.uint64(31))
    return mixed


def _normal(numbers: Array) -> Array:
    """Turn random bits into standard normal numbers (Box, Muller, 1958)."""
    high = ((numbers >> np.uint64(40)).astype(np.float32) + np.float32(1)) * _STEP
    low = (numbers & _LOW_BITS).astype(np.float32) * _STEP
    drawn: Array = np.sqrt(np.float32(-2) * np.log(high)) * np.cos(np.float32(2 * np.pi) * low)
    return drawn
