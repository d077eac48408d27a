"""The feed of a fit: which columns leave the DataFrame, in which form, and which of the model's tensors they fill.

Planned on the driver from the Params and the schema; sent with the job, so that a node can complete it where only the
node has the model (``modelFn``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparktf.cluster.schema import TEXT, ColumnType
from sparktf.data.columns import STRING, ColumnSpec
from sparktf.errors import DataError, ParamError
from sparktf.ml.inputs import FeedColumn, check_kind, fill_inputs, pair
from sparktf.ml.signature import TensorSpec

if TYPE_CHECKING:
    import keras
    from pyspark.sql import Column

ID, WEIGHT, VALIDATION = "id", "weight", "validation"


@dataclass(frozen=True)
class Feed:
    """Everything that leaves the DataFrame for a fit.

    Parameters
    ----------
    inputs, labels : tuple of FeedColumn
    weight, validation : ColumnType or None
    """

    inputs: tuple[FeedColumn, ...]
    labels: tuple[FeedColumn, ...]
    weight: ColumnType | None = None
    validation: ColumnType | None = None

    def for_model(self, model: keras.Model) -> Feed:
        """Return this feed with what the model takes written into it, where the driver has the model.

        Raises
        ------
        ParamError, DataError
            As `specs`; and where the number of values in a row, as far as the schema tells, is not what an input takes.
        """
        filled = replace(self, inputs=fill_inputs(self.inputs, model_inputs(model)))
        filled.specs(model)
        filled.packs(model)
        return filled

    def expressions(self) -> list[Column]:
        """Return the columns to select from the DataFrame, without the row's id."""
        from pyspark.sql import functions as F

        selected = [c.expression(sparse=True).alias(c.name) for c in (*self.inputs, *self.labels)]
        if self.weight is not None:
            selected.append(F.col(self.weight.sql).cast("float").alias(WEIGHT))
        if self.validation is not None:
            selected.append(F.col(self.validation.sql).alias(VALIDATION))
        return selected

    def specs(self, model: keras.Model) -> list[ColumnSpec]:
        """Say how each column of the feed becomes a tensor of a model.

        Parameters
        ----------
        model : keras.Model

        Raises
        ------
        ParamError
            A name in inputMapping or labelMapping is not one of the model's.
        DataError
            Columns cannot fill an input.
        """
        specs = [_input_spec(c, t) for c, t in pair(self.inputs, model_inputs(model))]
        specs += [_label_spec(c) for c in self.labels]
        if self.weight is not None:
            specs.append(ColumnSpec(WEIGHT, (), "float32", self.weight.column, "weight"))
        if self.validation is not None:
            specs.append(ColumnSpec(VALIDATION, (), "bool", self.validation.column, "validation"))
        specs.append(ColumnSpec(ID, (), "int64", ID, "id"))
        return specs

    def packs(self, model: keras.Model) -> tuple[Callable[[dict[str, Any]], Any], Callable[[dict[str, Any]], Any]]:
        """Return two functions that arrange tensors by feed name: as the model takes inputs, and its loss labels."""
        pairs = pair(self.inputs, model_inputs(model))
        names = [c.name for c, _ in pairs]
        structure = _structure(model, "inputs")
        if structure is None:
            targets = [c.target or c.name for c in self.inputs]
            pack = _single(names[0]) if len(names) == 1 else _by_key(dict(zip(targets, names, strict=True)))
        else:
            pack = _like(structure, names)
        return pack, self._pack_labels(model)

    def _pack_labels(self, model: keras.Model) -> Callable[[dict[str, Any]], Any]:
        known, wanting = output_names(model), _outputs_with_loss(model)
        by_target = {str(c.target): c.name for c in self.labels}
        if len(self.labels) == 1 and self.labels[0].target is None:
            if len(wanting) > 1:
                raise ParamError(
                    f"Expected labelMapping for a model with losses on {len(wanting)} outputs ({', '.join(wanting)}), "
                    f"received only labelCol={self.labels[0].source!r}."
                )
            if len(known) < 2 or not wanting or _computes_loss_itself(model):
                return _single(self.labels[0].name)
            by_target = {wanting[0]: self.labels[0].name}
        unknown = sorted(set(by_target) - set(known)) if known else []
        if unknown:
            raise ParamError(
                f"labelMapping: expected outputs of the model, {', '.join(known)}; received {', '.join(unknown)}."
            )
        if len(set(wanting)) < len(wanting):
            raise ParamError(
                "labelMapping: expected a name of its own for every output with a loss, received "
                f"{', '.join(wanting)}. Let the model give a dict of outputs."
            )
        structure = _structure(model, "outputs")
        if structure is not None and len(by_target) == len(known):
            return _like(structure, [by_target[name] for name in known])
        if structure is None or not wanting or _computes_loss_itself(model):
            return _by_key(by_target)
        unlabelled = [name for name in known if name not in by_target]
        wanted = {**dict.fromkeys(_outputs_with_metrics(model, known), "metric"), **dict.fromkeys(wanting, "loss")}
        if missing := [f"{name} (a {wanted[name]})" for name in unlabelled if name in wanted]:
            raise ParamError(
                f"Expected a label for every output with a loss or metric, received none for {', '.join(missing)}. "
                "Name its column in labelMapping."
            )
        # Keras pairs labels with outputs by their places where some have none. Nothing looks at those that fill up.
        spare = next(iter(by_target.values()))
        return _like(structure, [by_target.get(name, spare) for name in known])


def model_inputs(model: keras.Model) -> tuple[TensorSpec, ...]:
    """Return the inputs of a model with Input layers, in order; empty for a subclassed one."""
    from sparktf.ml.signature import input_specs

    return input_specs(model) if getattr(model, "inputs", None) else ()


def output_names(model: keras.Model) -> list[str]:
    """Return the names of a model's outputs; empty for a subclassed one."""
    from sparktf.ml.signature import output_specs

    return [spec.name for spec in output_specs(model)] if getattr(model, "outputs", None) else []


def _outputs_with_loss(model: keras.Model) -> list[str]:
    """Return the names of the outputs with a compiled loss, one as often as several have it."""
    from sparktf.ml.signature import output_losses

    names = output_names(model)
    return [name for name, loss in zip(names, output_losses(model), strict=True) if loss is not None] if names else []


def _computes_loss_itself(model: keras.Model) -> bool:
    """Tell whether a model's own code looks at its labels, in whatever form it expects them."""
    import keras

    return any(getattr(type(model), name) is not getattr(keras.Model, name) for name in ("train_step", "compute_loss"))


def _outputs_with_metrics(model: keras.Model, names: Sequence[str]) -> list[str]:
    """Return the outputs that compiled metrics are for; as Keras has it, metrics in no structure are for all."""
    # Keras has no public name for what compile was given.
    compiled = getattr(model, "_compile_metrics", None)
    given = [m for kind in ("metrics", "weighted_metrics") if (m := getattr(compiled, f"_user_{kind}", None))]
    found: set[str] = set()
    for metrics in given:
        if isinstance(metrics, Mapping):
            found |= {name for name in names if metrics.get(name)}
        elif len(metrics) == len(names) > 1:
            found |= {name for name, one in zip(names, metrics, strict=True) if one}
        else:
            found |= set(names)
    return [name for name in names if name in found]


def _input_spec(column: FeedColumn, tensor: TensorSpec | None) -> ColumnSpec:
    if tensor is None:
        text = any(c.kind == TEXT for c in column.columns)
        integral = all(c.integral for c in column.columns)
        dtype = STRING if text else "int64" if integral else "float32"
        return ColumnSpec(column.name, _open_shape(column, scalar=(1,)), dtype, column.source, parts=column.parts)
    check_kind(column, tensor)
    return ColumnSpec(column.name, tensor.shape, tensor.dtype, column.source, parts=column.parts)


def _label_spec(column: FeedColumn) -> ColumnSpec:
    import keras

    (label,) = column.columns
    if label.kind == TEXT:
        raise DataError(f"label {label.column!r}: expected numbers, received text. Index it first (StringIndexer).")
    dtype = "int64" if label.integral else keras.config.floatx()
    return ColumnSpec(column.name, _open_shape(column, scalar=()), dtype, column.source, "label")


def _open_shape(column: FeedColumn, scalar: tuple[int, ...]) -> tuple[int | None, ...]:
    if len(column.columns) > 1:
        sizes = [c.size for c in column.columns]
        return (None,) if any(size is None for size in sizes) else (sum(size or 0 for size in sizes),)
    depth = column.columns[0].depth
    return scalar if depth == 0 else (None,) * depth


def _structure(model: keras.Model, side: str) -> Any:
    from sparktf.ml.signature import _functional_structure

    return _functional_structure(model, side)


def _single(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors[name]


def _by_key(names: Mapping[str, str]) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: {key: tensors[name] for key, name in names.items()}


def _like(structure: Any, names: Sequence[str]) -> Callable[[dict[str, Any]], Any]:
    import keras

    return lambda tensors: keras.tree.pack_sequence_as(structure, [tensors[name] for name in names])
