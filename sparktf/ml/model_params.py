"""The Params of TFModel, which TFEstimator has as well, as mixins in Spark ML's manner.

They are plain Python Params: nothing in the JVM stands behind them, so the same objects work on classic Spark
and on Spark Connect. ``None`` stands for "not given": setting a Param to None brings its default back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from pyspark.ml.param import Param, Params
from pyspark.ml.param.shared import (
    HasFeaturesCol,
    HasInputCols,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
)

from sparktf.ml import converters as to


def make_param(name: str, doc: str, converter: Callable[[Any], Any]) -> Param[Any]:
    """Return a class-level Param."""
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class _QuietParams(Params):
    """Params whose explanations stay short and whose errors stay ours."""

    def _set(self, **kwargs: Any) -> Self:
        """Set Params by name; None clears, so that the default is in force again."""
        for name, value in kwargs.items():
            if value is None:
                self.clear(self.getParam(name))
            else:
                super()._set(**{name: value})
        return self

    def set(self, param: Param[Any], value: Any) -> None:
        """Set one Param of this object.

        Raises
        ------
        ParamError
            The value is out of range.
        TypeError
            The value is of the wrong kind.
        """
        # Spark's own set() turns every ValueError into a plain one, which would lose ParamError.
        self._shouldOwn(param)
        self._set(**{param.name: value})

    def explainParam(self, param: str | Param[Any]) -> str:
        """Explain one Param: its name, documentation, default and current value in a short form."""
        resolved = self._resolveParam(param)
        values = []
        if self.hasDefault(resolved):
            values.append(f"default: {to.describe(self._defaultParamMap[resolved])}")
        if self.isSet(resolved):
            values.append(f"current: {to.describe(self._paramMap[resolved])}")
        return f"{resolved.name}: {resolved.doc} ({', '.join(values) or 'undefined'})"

    def _get(self, param: Param[Any]) -> Any:
        """Return a Param's value, None where it has neither value nor default."""
        return self.getOrDefault(param) if self.isDefined(param) else None


class _TFModelParams(
    _QuietParams, HasFeaturesCol, HasInputCols, HasPredictionCol, HasProbabilityCol, HasRawPredictionCol
):
    """What a model must know to score: where its inputs come from and where its outputs go."""

    inputCols = make_param(
        "inputCols",
        "several columns, packed in this order into the model's one input; takes the place of featuresCol.",
        to.column_list("inputCols"),
    )
    inputMapping = make_param(
        "inputMapping",
        "{model input: column or list of columns}, for models with several inputs.",
        to.column_mapping("inputMapping", several=True),
    )
    outputMapping = make_param(
        "outputMapping",
        "{model output: column}: raw outputs of the model, of any shape, as (nested) arrays.",
        to.column_mapping("outputMapping"),
    )
    predictBatchSize = make_param(
        "predictBatchSize",
        "rows in one forward pass when scoring (1 or more).",
        to.integer("predictBatchSize", 1),
    )

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(inputMapping=None, outputMapping=None, predictBatchSize=8192, inputCols=None)

    def setFeaturesCol(self, value: str) -> Self:
        """Set featuresCol."""
        return self._set(featuresCol=value)

    def setInputCols(self, value: Sequence[str] | None) -> Self:
        """Set inputCols."""
        return self._set(inputCols=value)

    def setInputMapping(self, value: Mapping[str, str | list[str]] | None) -> Self:
        """Set inputMapping."""
        return self._set(inputMapping=value)

    def getInputMapping(self) -> dict[str, str | list[str]] | None:
        """Return inputMapping, None where it was not given."""
        mapping: dict[str, str | list[str]] | None = self._get(self.inputMapping)
        return mapping

    def setPredictionCol(self, value: str) -> Self:
        """Set predictionCol; an empty string switches the column off."""
        return self._set(predictionCol=value)

    def setProbabilityCol(self, value: str) -> Self:
        """Set probabilityCol; an empty string switches the column off."""
        return self._set(probabilityCol=value)

    def setRawPredictionCol(self, value: str) -> Self:
        """Set rawPredictionCol; an empty string switches the column off."""
        return self._set(rawPredictionCol=value)

    def setOutputMapping(self, value: Mapping[str, str] | None) -> Self:
        """Set outputMapping."""
        return self._set(outputMapping=value)

    def getOutputMapping(self) -> dict[str, str] | None:
        """Return outputMapping, None where it was not given."""
        mapping: dict[str, str] | None = self._get(self.outputMapping)
        return mapping

    def setPredictBatchSize(self, value: int) -> Self:
        """Set predictBatchSize."""
        return self._set(predictBatchSize=value)

    def getPredictBatchSize(self) -> int:
        """Return predictBatchSize, in rows."""
        return int(self._get(self.predictBatchSize))
