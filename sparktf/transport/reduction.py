"""Pure arithmetic of collectives: supported dtypes, shard and chunk bounds, reductions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from sparktf.errors import ParamError
from sparktf.transport.contract import Array

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
OPS = ("sum", "mean", "max", "min")
COMPRESSIONS = ("none", "bf16")
_UFUNCS = {"sum": np.add, "mean": np.add, "max": np.maximum, "min": np.minimum}
_INTEGERS = tuple(np.dtype(kind) for kind in ("int8", "uint8", "int32", "int64", "bool"))
_FLOATS = (*(np.dtype(kind) for kind in ("float16", "float32", "float64")), BFLOAT16)
# What stands for a dtype in a message's header: a fixed list, so that ranks of one version agree.
_CODES = {dtype: code for code, dtype in enumerate((*_INTEGERS, *_FLOATS), start=1)}


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Return the number that stands for a dtype on the wire."""
    return _CODES[dtype]


def op_code(op: str, compression: str = "none") -> int:
    """Return the number that stands for a reduction on the wire, and how it is encoded; 0 is kept for "none"."""
    return OPS.index(op) + 1 + (COMPRESSIONS.index(compression) << 8)


def check_array(array: Array, *, written: bool) -> None:
    """Raise `ParamError` where an array cannot be transferred.

    Parameters
    ----------
    array : ndarray
        What the caller of an operation gave.
    written : bool
        Whether the operation writes into it.
    """
    if not isinstance(array, np.ndarray):
        raise ParamError(f"Expected a numpy.ndarray. Received: {type(array).__name__}. Convert it with numpy.asarray.")
    check_dtype(array.dtype)
    if written and not array.flags.writeable:
        raise ParamError(
            "Expected a writable array, as the result is put into it. Received: a read-only one. Pass a copy."
        )


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Raise `ParamError` where arrays of a dtype cannot be transferred."""
    if dtype not in _CODES:
        known = ", ".join(known.name for known in _CODES)
        raise ParamError(f"Expected an array of one of the dtypes {known}. Received: {dtype}. Cast it.")


def check_op(op: str, dtype: np.dtype[Any]) -> None:
    """Raise `ParamError` where a reduction does not exist, or not for this dtype."""
    if op not in OPS:
        raise ParamError(f"Expected op to be one of {', '.join(OPS)}. Received: {op!r}.")
    if op == "mean" and dtype not in _FLOATS:
        raise ParamError(
            f"Expected a floating dtype for op='mean'. Received: {dtype}. Use op='sum' and divide, or cast."
        )


def check_gathered(array: Array, out: object) -> None:
    """Raise `ParamError` where an array has no rows, and is to be received into the rows of another."""
    if out is not None and array.ndim == 0:
        raise ParamError("Expected an array of at least one axis where out is given. Received: a scalar.")


def check_rows(array: Array, rows: int, like: Array) -> Array:
    """Return an array to receive rows into; raise `ParamError` where it does not hold them."""
    shape = (rows, *like.shape[1:])
    if array.shape != shape or array.dtype != like.dtype or not array.flags.c_contiguous:
        raise ParamError(
            f"Expected out({rows}) to give a contiguous array of {like.dtype} and shape {shape}. "
            f"Received: {array.dtype} and shape {array.shape}."
        )
    return array


def check_compression(compression: str, op: str, dtype: np.dtype[Any]) -> None:
    """Raise `ParamError` where an encoding does not exist, or not for this reduction."""
    if compression not in COMPRESSIONS:
        raise ParamError(f"Expected compression to be one of {', '.join(COMPRESSIONS)}. Received: {compression!r}.")
    if compression != "none" and (dtype != np.float32 or op not in ("sum", "mean")):
        raise ParamError(
            f"Expected a sum or mean of float32 for compression={compression!r}. Received: {op!r} of {dtype}. Use "
            "compression='none'."
        )


def combine(op: str, left: Array, right: Array, out: Array) -> None:
    """Reduce two arrays of equal shape and dtype into `out`, which may be one of them."""
    _UFUNCS[op](left, right, out=out)


def finish(op: str, array: Array, size: int) -> None:
    """Turn what `combine` has gathered from `size` ranks into the result, in place."""
    if op == "mean":
        # The divisor in the array's own dtype: a Python int would widen bfloat16.
        np.divide(array, array.dtype.type(size), out=array)


def shard_bounds(length: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of every rank's shard of `length` elements, as ``numpy.array_split`` has them."""
    each, extra = divmod(length, size)
    starts = [rank * each + min(rank, extra) for rank in range(size + 1)]
    return list(pairwise(starts))


def chunk_bounds(start: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks of at most `longest` elements."""
    for begin in range(start, stop, longest):
        yield begin, min(begin + longest, stop)


def as_bytes(flat: Array) -> memoryview:
    """Return a contiguous one-dimensional array's memory as bytes, without a copy."""
    return flat.view(np.uint8).data
