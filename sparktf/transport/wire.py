"""The header in front of every operation's data: it turns calls that do not match into errors, not hangs."""

from __future__ import annotations

import struct

from sparktf.transport.contract import Array
from sparktf.transport.reduction import dtype_code

# Magic, kind, dtype, reduction or root; operation number, rows, payload bytes.
_HEADER = struct.Struct("<HBBHxxQQQ")
_MAGIC = 0x5F54
_KINDS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "send", "allocate")

HEADER_BYTES = _HEADER.size


def pack_header(
    kind: str,
    array: Array,
    number: int,
    variant: int = 0,
    *,
    rows: int | None = None,
    nbytes: int | None = None,
) -> bytes:
    """Return the header of one operation.

    Parameters
    ----------
    kind : str
        The operation's name.
    array : ndarray
        What is sent; gives the dtype, and rows and bytes where they are not given.
    number : int
        Running number of the operation among those that these ranks share.
    variant : int
        What else ranks must agree in: the reduction's code, or the root.
    """
    return _HEADER.pack(
        _MAGIC,
        _KINDS.index(kind),
        dtype_code(array.dtype),
        variant,
        number,
        array.size if rows is None else rows,
        array.nbytes if nbytes is None else nbytes,
    )


def header_rows(header: bytes, row_bytes: int) -> int:
    """Return how many rows a header announces, 0 where they do not make up the bytes that it announces."""
    rows, nbytes = _HEADER.unpack(header)[5:]
    return int(rows) if rows * row_bytes == nbytes else 0


def describe_header(header: bytes) -> str:
    """Return a header in words, for messages."""
    magic, kind, dtype, variant, number, rows, nbytes = _HEADER.unpack(header)
    if magic != _MAGIC or kind >= len(_KINDS):
        return "bytes that begin no operation"
    return f"{_KINDS[kind]} number {number} of {rows} rows, {nbytes} bytes (dtype {dtype}, variant {variant})"
