"""Keras's registry of custom objects, taken from the driver and held in a worker for the time of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def custom_objects() -> dict[str, Any]:
    """Return a snapshot of Keras's registry of custom classes and functions: ``{"package>name": object}``.

    Without sparktf's own, which are imported where a model is loaded: to unpickle one would import Keras before a
    worker has set it up.
    """
    import keras

    registry = keras.saving.get_custom_objects().items()
    return {name: value for name, value in registry if not _ours(value)}


def _ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("sparktf.")


@contextmanager
def registered(objects: Mapping[str, Any]) -> Iterator[None]:
    """Hold custom objects in Keras's registry of this process, and put back what stood there at exit.

    For Spark's Python workers, which outlive jobs: a class that came by pickle must be found by
    ``keras.saving.get_registered_name`` now, and must not be there for the next job. What is registered
    inside the block by others (a library imported there) stays.

    Parameters
    ----------
    objects : mapping of str to class or callable
        As :func:`custom_objects` returns it; keys are ``"package>name"``.
    """
    import keras
    from keras.src.saving import object_registration  # the way back from object to name is not public

    tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
        (keras.saving.get_custom_objects(), dict(objects)),
        (object_registration.GLOBAL_CUSTOM_NAMES, {value: name for name, value in objects.items()}),
    ]
    before = [{key: table[key] for key in added if key in table} for table, added in tables]
    for table, added in tables:
        table.update(added)
    try:
        yield
    finally:
        for (table, added), old in zip(tables, before, strict=True):
            for key in added:
                table.pop(key, None)
            table.update(old)
