"""Distributed TensorFlow inside Apache Spark.

``TFEstimator`` trains a Keras model on a DataFrame's partitions and is an ordinary Spark ML stage;
``TFModel`` scores with the result; ``run`` starts any TensorFlow program on Spark's executors; ``local_session``
makes a Spark session on one machine. Importing this package imports neither TensorFlow nor pyspark: each comes
with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparktf._version import __version__

if TYPE_CHECKING:
    from sparktf.ml import TFEstimator, TFModel
    from sparktf.program.run import run
    from sparktf.session import local_session

__all__ = ["TFEstimator", "TFModel", "__version__", "local_session", "run"]

_HOMES = {
    "TFEstimator": "sparktf.ml",
    "TFModel": "sparktf.ml",
    "local_session": "sparktf.session",
    "run": "sparktf.program.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
