"""From a model's raw outputs to the columns of a scored DataFrame.

Pure: numpy in, Arrow out, with the Spark types that go with it. MLlib's conventions hold: ``prediction`` is a
double, ``probability`` and ``rawPrediction`` have one entry a class, two classes for one sigmoid unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import types as T

from sparktf.errors import DataError, ParamError
from sparktf.ml.signature import BINARY, MULTICLASS, VALUES, ModelSignature

PREDICTION, PROBABILITY, RAW, OUTPUT = "prediction", "probability", "rawPrediction", "output"

_SPARK_TYPES: dict[str, T.DataType] = {
    "float16": T.FloatType(),
    "bfloat16": T.FloatType(),
    "float32": T.FloatType(),
    "float64": T.DoubleType(),
    "int8": T.ByteType(),
    "uint8": T.ShortType(),
    "int16": T.ShortType(),
    "uint16": T.IntegerType(),
    "int32": T.IntegerType(),
    "uint32": T.LongType(),
    "int64": T.LongType(),
    "bool": T.BooleanType(),
    "string": T.StringType(),
}
_ARROW_TYPES: dict[str, pa.DataType] = {
    "float": pa.float32(),
    "double": pa.float64(),
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
}
# Where a probability is smaller, its log would be -inf, which no evaluator can use.
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class OutputField:
    """One column to produce.

    Parameters
    ----------
    field : str
        Its name inside the struct that the UDF returns.
    column : str
        Its name in the DataFrame.
    role : str
        ``"prediction"``, ``"probability"``, ``"rawPrediction"``, or ``"output"`` for a raw output.
    output : int
        Which of the model's outputs it comes from.
    depth : int
        Array levels around one element; 0 for a scalar.
    element : str
        Spark's simple name of the element type.
    """

    field: str
    column: str
    role: str
    output: int
    depth: int
    element: str

    @property
    def is_vector(self) -> bool:
        """Whether the column is an MLlib vector in the DataFrame."""
        return self.role in (PROBABILITY, RAW)

    @property
    def spark_type(self) -> T.DataType:
        """The type inside the UDF's struct; vectors are arrays there."""
        kind: T.DataType = next(t for t in _SPARK_TYPES.values() if t.simpleString() == self.element)
        for _ in range(self.depth):
            kind = T.ArrayType(kind)
        return kind


def plan_outputs(
    signature: ModelSignature,
    prediction: str = "prediction",
    probability: str = "probability",
    raw_prediction: str = "rawPrediction",
    mapping: dict[str, str] | None = None,
) -> list[OutputField]:
    """Decide which columns a model gives.

    Parameters
    ----------
    signature : ModelSignature
        What the model gives, and how the output that predictions come from is to be read.
    prediction, probability, raw_prediction : str
        Column names; an empty one switches the column off. The last two exist for classification only.
    mapping : dict of str to str, optional
        ``{model output: column}`` for raw outputs.

    Raises
    ------
    ParamError
        The mapping names an output the model does not have, or two columns have one name.
    """
    first = signature.outputs[signature.predicted]
    depth = 0 if signature.kind != VALUES or first.shape in ((), (1,)) else len(first.shape)
    element = "string" if first.dtype == "string" else "double"
    place = signature.predicted
    fields = [OutputField(PREDICTION, prediction, PREDICTION, place, depth, element)]
    if signature.kind != VALUES:
        fields.append(OutputField(PROBABILITY, probability, PROBABILITY, place, 1, "double"))
        fields.append(OutputField(RAW, raw_prediction, RAW, place, 1, "double"))
    names = [spec.name for spec in signature.outputs]
    for name, column in (mapping or {}).items():
        if name not in names:
            raise ParamError(f"outputMapping: expected outputs of the model, {', '.join(names)}. Received: {name!r}")
        index = names.index(name)
        spec = signature.outputs[index]
        kind = _SPARK_TYPES.get(spec.dtype)
        if kind is None:
            raise ParamError(f"outputMapping: output {name!r} is {spec.dtype}, which Spark has no type for")
        fields.append(OutputField(f"output_{index}", column, OUTPUT, index, len(spec.shape), kind.simpleString()))
    fields = [field for field in fields if field.column]
    columns = [field.column for field in fields]
    if len(set(columns)) < len(columns):
        raise ParamError(f"expected a different name for every output column. Received: {', '.join(columns)}")
    return fields


def result_type(fields: list[OutputField]) -> T.DataType:
    """Return the type that the UDF gives: a struct, or the field itself where it is the only one."""
    if len(fields) == 1:
        return fields[0].spark_type
    return T.StructType([T.StructField(field.field, field.spark_type) for field in fields])


def to_result(
    signature: ModelSignature, fields: list[OutputField], outputs: list[np.ndarray], valid: np.ndarray | None
) -> pa.Array:
    """Return one value of :func:`result_type` a row.

    Parameters
    ----------
    signature : ModelSignature
    fields : list of OutputField
    outputs : list of numpy.ndarray
        The model's outputs for the valid rows, batch dimension first.
    valid : numpy.ndarray of bool or None
        Which rows have been scored; the others get nulls. None: all.
    """
    derived = _derive(signature, outputs[signature.predicted], {field.role for field in fields})
    arrays = []
    for field in fields:
        values = derived[field.role] if field.role != OUTPUT else outputs[field.output]
        arrays.append(nested_array(values, field.depth, _ARROW_TYPES[field.element], valid))
    # Spark spends as long on a struct around a double as on the double.
    if len(arrays) == 1:
        return arrays[0]
    return pa.StructArray.from_arrays(arrays, names=[field.field for field in fields])


def nested_array(values: np.ndarray, depth: int, element: pa.DataType, valid: np.ndarray | None = None) -> pa.Array:
    """Return a numpy array of shape ``(rows, ...)`` as Arrow lists ``depth`` levels deep.

    Parameters
    ----------
    values : numpy.ndarray
        The valid rows only. With ``depth`` 0, one value a row.
    depth : int
        Lists around one element; the array has ``depth + 1`` dimensions.
    element : pyarrow.DataType
    valid : numpy.ndarray of bool or None
        Length of the result; a null stands where it is False. None: no nulls.
    """
    if depth == 0:
        return _scalars(values.reshape(-1), element, valid)
    if values.size > np.iinfo(np.int32).max:
        raise DataError(
            f"an output of {values.size:,} values in {len(values):,} rows is more than Arrow's lists hold. "
            "Lower predictBatchSize and spark.sql.execution.arrow.maxRecordsPerBatch"
        )
    array = _scalars(values.reshape(-1), element, None)
    for level in range(depth, 1, -1):
        array = pa.ListArray.from_arrays(_even_offsets(int(np.prod(values.shape[:level])), values.shape[level]), array)
    if valid is None:
        return pa.ListArray.from_arrays(_even_offsets(len(values), values.shape[1]), array)
    offsets = np.zeros(len(valid) + 1, np.int32)
    np.cumsum(valid * np.int32(values.shape[1]), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), array, mask=pa.array(~valid))


def _scalars(values: np.ndarray, element: pa.DataType, valid: np.ndarray | None) -> pa.Array:
    if element == pa.string():
        values = np.array([v.decode() if isinstance(v, bytes) else v for v in values], object)
    else:
        values = values.astype(element.to_pandas_dtype(), copy=False)
    if valid is None:
        return pa.array(values, element)
    spread = np.zeros(len(valid), values.dtype)
    spread[valid] = values
    return pa.array(spread, element, mask=~valid)


def _even_offsets(rows: int, length: int) -> pa.Array:
    return pa.array(np.arange(rows + 1, dtype=np.int32) * np.int32(length))


def _derive(signature: ModelSignature, scores: np.ndarray, roles: set[str]) -> dict[str, np.ndarray]:
    """Return prediction, probability and rawPrediction as far as they are wanted.

    ``scores`` is the output that predictions come from: ``(rows, classes)``, ``(rows, 1)`` or ``(rows,)``.
    """
    if signature.kind == VALUES:
        return {PREDICTION: scores}
    if not roles & {PROBABILITY, RAW}:
        return {PREDICTION: _labels(signature, scores)}
    scores = scores.astype(np.float64)
    if signature.kind == BINARY:
        probability, raw = _binary(scores.reshape(-1), signature.logits)
    elif signature.logits:
        probability, raw = _softmax(scores), scores
    else:
        probability, raw = scores, np.log(np.maximum(scores, _TINY))
    return {PREDICTION: _labels(signature, scores), PROBABILITY: probability, RAW: raw}


def _labels(signature: ModelSignature, scores: np.ndarray) -> np.ndarray:
    """Return the predicted class as float64; NaN where a score is NaN, as no class is right then."""
    if signature.kind == MULTICLASS:
        labels = scores.argmax(axis=1).astype(np.float64)
        return np.where(np.isnan(scores).any(axis=1), np.nan, labels)
    flat = scores.reshape(-1)
    # As in MLlib, a tie goes to class 0.
    return np.where(np.isnan(flat), np.nan, flat > (0.0 if signature.logits else 0.5))


def _binary(scores: np.ndarray, logits: bool) -> tuple[np.ndarray, np.ndarray]:
    if not logits:
        probability = np.stack([1.0 - scores, scores], axis=1)
        return probability, np.log(np.maximum(probability, _TINY))
    # exp of a negative number only, so that it cannot overflow.
    small = np.exp(-np.abs(scores))
    positive = np.where(scores >= 0, 1.0, small) / (1.0 + small)
    negative = np.where(scores >= 0, small, 1.0) / (1.0 + small)
    return np.stack([negative, positive], axis=1), np.stack([-scores, scores], axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return result
