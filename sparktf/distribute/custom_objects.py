"""Keras's registry of custom objects, taken from the driver and held in a worker for the time of a job."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
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


@dataclass(frozen=True)
class Imported:
    """A custom object that a process finds by importing it, if it can."""

    module: str
    name: str


def resolved(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Find what `Imported` stands for; leave out what this process cannot import, which `why_missing` tells of."""
    found = {key: _find(value) for key, value in objects.items()}
    return {key: value for key, value in found.items() if not isinstance(value, Exception)}


def why_missing(name: str, objects: Mapping[str, Any]) -> str:
    """Return why a class or function that Keras could not locate is not here; empty where nothing is known of it.

    Parameters
    ----------
    name : str
        The class's or function's.
    objects : mapping of str to object
        As a job carries them.
    """
    for key, value in objects.items():
        if key.rpartition(">")[2] == name and isinstance(value, Imported):
            error = _find(value)
            if isinstance(error, Exception):
                return (
                    f"the driver has {name!r} from the module {value.module!r}, which cannot be imported here "
                    f"({type(error).__name__}: {error}). Install that package on the executors, send it with "
                    "spark.addArtifacts(path, pyfile=True), or call pyspark.cloudpickle.register_pickle_by_value on it"
                )
    return ""


def _find(value: Any) -> Any:
    """Return a custom object, or the exception with which it cannot be had."""
    if not isinstance(value, Imported):
        return value
    try:
        return attrgetter(value.name)(importlib.import_module(value.module))
    except Exception as error:  # a module may fail in any way where what it needs is not there, such as a GPU
        return error


@contextmanager
def registered(objects: Mapping[str, Any]) -> Iterator[None]:
    """Hold custom objects in Keras's registry of this process, and put back what stood there at exit.

    For Spark's Python workers, which outlive jobs: a class that came by pickle must be found by
    ``keras.saving.get_registered_name`` now, and must not be there for the next job. What is registered
    inside the block by others (a library imported there) stays.

    Parameters
    ----------
    objects : mapping of str to class or callable
        As :func:`custom_objects` returns it, or with `Imported` values; keys are ``"package>name"``.
    """
    import keras
    from keras.src.saving import object_registration  # the way back from object to name is not public

    objects = resolved(objects)
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
