"""Converters of Param values: what a Param accepts, and what it says to everything else.

A converter gets whatever the caller gave and returns the value that is kept. It raises ``TypeError`` for
the wrong kind of value and :class:`~sparktf.errors.ParamError` for one that is out of range; both name the
Param, what was expected and what was received. Converters are idempotent: Spark ML runs them again on every
``copy``.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparktf.errors import ParamError
from sparktf.transport.registry import check_timeout


def wrong_type(name: str, expected: str, value: Any) -> TypeError:
    """Return the error for a value of the wrong kind; the caller raises it."""
    return TypeError(f"{name}: expected {expected}. Received: {value!r} of type {type(value).__name__}")


def integer(name: str, minimum: int | None = None) -> Callable[[Any], int]:
    """Accept a whole number, numpy's too, not less than ``minimum``."""

    def convert(value: Any) -> int:
        # bool is an int to Python, and batchSize=True a mistake to everybody else.
        whole = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
        if not (whole and math.isfinite(value) and float(value).is_integer()):
            raise wrong_type(name, "a whole number", value)
        result = int(value)
        if minimum is not None and result < minimum:
            raise ParamError(f"{name}: expected a whole number, {minimum} or more. Received: {result}")
        return result

    return convert


def positive_seconds(name: str) -> Callable[[Any], float]:
    """Accept a number of seconds greater than zero, a week at most."""

    def convert(value: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
            raise wrong_type(name, "a number of seconds", value)
        result = float(value)
        check_timeout(result, name)
        return result

    return convert


def boolean(name: str) -> Callable[[Any], bool]:
    """Accept True and False, numpy's too."""

    def convert(value: Any) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise wrong_type(name, "True or False", value)
        return bool(value)

    return convert


def path(name: str) -> Callable[[Any], str]:
    """Accept a path, as text or of pathlib; not an empty one."""

    def convert(value: Any) -> str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            raise wrong_type(name, "a path", value)
        if not text:
            raise ParamError(f"{name}: expected a path, or None. Received: {value!r}")
        return str(text)

    return convert


def choice(
    name: str,
    available: Sequence[str],
    aliases: Mapping[str, str] | None = None,
) -> Callable[[Any], str]:
    """Accept one of a few words.

    Parameters
    ----------
    name : str
        The Param.
    available : sequence of str
        The words that work.
    aliases : mapping of str to str, optional
        Other words for available ones.
    """
    known = ", ".join(repr(word) for word in available)

    def convert(value: Any) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, f"one of {known}", value)
        value = (aliases or {}).get(value, value)
        if value not in available:
            raise ParamError(f"{name}: expected one of {known}. Received: {value!r}")
        return str(value)

    return convert


def verbosity(value: Any) -> str | int:
    """Accept ``"auto"`` or Keras's 0 (silent), 1 (progress bar), 2 (one line an epoch)."""
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, numbers.Integral | np.bool_) and int(value) in (0, 1, 2):
        return int(value)
    raise ParamError(f"verbose: expected 'auto', 0, 1 or 2. Received: {value!r}")


def column_mapping(name: str, several: bool = False) -> Callable[[Any], dict[str, Any]]:
    """Accept ``{name in the model: column}``, and ``{name: [columns]}`` where ``several`` is true."""
    expected = "a dict of {name in the model: column" + (" or list of columns}" if several else "}")

    def column(value: Any) -> str | list[str]:
        if isinstance(value, str) and value:
            return str(value)
        is_list = several and isinstance(value, list | tuple) and len(value) > 0
        if is_list and all(isinstance(item, str) and item for item in value):
            return [str(item) for item in value]
        raise wrong_type(name, expected, value)

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise wrong_type(name, expected, value)
        if not value:
            raise ParamError(f"{name}: expected at least one entry, or None. Received: {{}}")
        for key in value:
            if not isinstance(key, str):
                raise wrong_type(name, expected, value)
        return {str(key): column(item) for key, item in value.items()}

    return convert


def column_list(name: str) -> Callable[[Any], list[str]]:
    """Accept a non-empty list of column names."""

    def convert(value: Any) -> list[str]:
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise wrong_type(name, "a list of column names", value)
        if not all(isinstance(item, str) and item for item in value):
            raise wrong_type(name, "a list of column names", value)
        if not len(value):
            raise ParamError(f"{name}: expected at least one column, or None. Received: []")
        return [str(item) for item in value]

    return convert


def keras_model(value: Any) -> Any:
    """Accept a ``keras.Model``, compiled or not; it is kept as it is, never copied and never changed."""
    # Whoever holds a Keras model has imported keras; importing it here would cost seconds to say no.
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(value, keras.Model):
        return value
    if type(value).__module__.split(".")[0] == "tf_keras":
        raise TypeError("model: expected a Keras 3 model (import keras). Received: a tf_keras (Keras 2) model")
    if callable(value):
        raise TypeError(f"model: expected a keras.Model. Received: {value!r}. Give functions as modelFn")
    raise wrong_type("model", "a keras.Model", value)


def model_function(value: Any) -> Callable[[], Any]:
    """Accept a function of no arguments; that it returns a compiled model shows when it is called."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(value, keras.Model):
        raise TypeError(
            "modelFn: expected a function of no arguments that returns a compiled keras.Model. "
            f"Received: the model {value.name!r} itself. Give it as model"
        )
    if not callable(value):
        raise wrong_type("modelFn", "a function of no arguments that returns a compiled keras.Model", value)
    return value  # type: ignore[no-any-return]  # callable() narrows Any to a callable of unknown result


def callback_list(value: Any) -> list[Any]:
    """Accept one Keras callback or a list of them."""
    keras = sys.modules.get("keras")
    callbacks = list(value) if isinstance(value, list | tuple) else [value]
    for callback in callbacks:
        if keras is None or not isinstance(callback, keras.callbacks.Callback):
            raise wrong_type("callbacks", "keras.callbacks.Callback objects", callback)
    return callbacks


def describe(value: Any) -> str:
    """Return a short text for a Param's value: models by name and size, functions and callbacks by name."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(value, keras.Model):
        size = f"{value.count_params():,} parameters" if value.built else "not built"
        return f"{type(value).__name__} {value.name!r} ({size})"
    if isinstance(value, list) and keras is not None:
        # A callback's repr may hold a model's; class names say enough.
        value = [type(item).__name__ if isinstance(item, keras.callbacks.Callback) else item for item in value]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return str(value)
