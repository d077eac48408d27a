"""Values of a search's grid that are not JSON: each stands there in an estimator of its own, which Spark ML can save.

Spark's writers of tuned models write a grid's values as JSON, except those that are stages, which they save as such.
`ParamGridBuilder` runs a Param's converter on what it is given: that of ``model``, ``modelFn`` and ``callbacks`` puts
it into a TFEstimator, and setting the Param takes it out again. So a model is saved, and what is Python code is refused
with the estimator's own words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparktf.ml import converters as to

# What accepts each of them.
NOT_JSON: dict[str, Callable[[Any], Any]] = {
    "model": to.keras_model,
    "modelFn": to.model_function,
    "callbacks": to.callback_list,
}


def held(name: str) -> Callable[[Any], Any]:
    """Return the converter of one of these Params: it puts a value into an estimator."""

    def convert(value: Any) -> Any:
        from sparktf.ml.estimator import TFEstimator

        if isinstance(value, TFEstimator):
            return value
        # Keyword by keyword, as for users: an unset Param keeps its default.
        return TFEstimator(**{name: NOT_JSON[name](value)})

    return convert


def taken_out(name: str, value: Any) -> Any:
    """Return one of these Params' value as it is to be kept, whether it was given by itself or stood in a grid."""
    from sparktf.ml.estimator import TFEstimator

    if isinstance(value, TFEstimator) and value.isSet(name):
        return value.getOrDefault(name)
    return NOT_JSON[name](value)
