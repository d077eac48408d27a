"""Spark ML stages: :class:`TFEstimator` trains a Keras model from a DataFrame, :class:`TFModel` scores.

A *stage* is a part of a ``pyspark.ml.Pipeline``. The *archive* of a model is its ``.keras`` file. A stage is
*saved* as Spark ML metadata plus its archive.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparktf.ml.estimator import TFEstimator
    from sparktf.ml.model import TFModel

__all__ = ["TFEstimator", "TFModel"]

_HOMES = {"TFEstimator": "sparktf.ml.estimator", "TFModel": "sparktf.ml.model"}


def __getattr__(name: str) -> Any:
    """Import a stage when it is first used: a worker that only scores needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
