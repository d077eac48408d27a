"""What goes to the nodes through Spark's own channel, pickled; and which part of it cannot go there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from sparktf.distribute.custom_objects import Imported
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


def portable(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return custom objects as they go to nodes: those of modules by name, the others as they are.

    A library that only the driver has puts its objects into the registry when it is imported, and pickled as they are
    they would fail on a node whose model needs none of them.
    """
    return {key: _reference(value) or value for key, value in objects.items()}


def _reference(value: Any) -> Imported | None:
    from pyspark.cloudpickle.cloudpickle import list_registry_pickle_by_value

    module, name = str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", ""))
    by_value = list_registry_pickle_by_value()  # type: ignore[no-untyped-call]
    parents = {module.rsplit(".", up)[0] for up in range(module.count(".") + 1)}
    if module == "__main__" or module not in sys.modules or parents & by_value:
        return None
    try:
        found = attrgetter(name)(sys.modules[module])
    except AttributeError:
        return None
    return Imported(module, name) if found is value else None
