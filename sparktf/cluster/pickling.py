"""What goes to the nodes through Spark's own channel, pickled; and which part of it cannot go there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparktf.errors import ParamError


def pickled(what: Any, parts: Mapping[str, Any]) -> bytes:
    """Pickle what nodes run.

    Parameters
    ----------
    what : object
    parts : mapping of str to object
        What users gave of it, by the names that they know; looked at only to tell which of them is at fault.

    Raises
    ------
    ParamError
        Naming the part that cannot be pickled.
    """
    try:
        return _dumps(what)
    except Exception as error:  # any object's own way of being pickled may fail in any way
        culprit = next((name for name, part in parts.items() if not _picklable(part)), " or ".join(parts))
        raise ParamError(
            f"{culprit}: expected what can be pickled and sent to the nodes, received {type(error).__name__}: {error}. "
            "Make models, sessions, locks, connections and open files on the node."
        ) from error


def _picklable(part: Any) -> bool:
    try:
        _dumps(part)
    except Exception:  # as above
        return False
    return True


def _dumps(what: Any) -> bytes:
    from pyspark import cloudpickle

    return bytes(cloudpickle.dumps(what))  # type: ignore[no-untyped-call]
