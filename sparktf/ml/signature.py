"""What a Keras model takes and gives, read from the model once and kept as plain data.

A :class:`ModelSignature` is JSON-able and knows no TensorFlow: a driver plans scoring jobs from it. Shapes
are those of one row: the batch dimension is left out, an open dimension is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from sparktf.errors import PersistenceError

if TYPE_CHECKING:
    import keras

MULTICLASS = "multiclass"
BINARY = "binary"
VALUES = "values"

# Activations whose results are probabilities, whatever the loss was told.
_PROBABILITIES = {"softmax", "sigmoid", "hard_sigmoid"}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Parameters
    ----------
    name : str
        The name that inputMapping, labelMapping and outputMapping use.
    shape : tuple of int or None
        One row's shape; ``()`` is a scalar.
    dtype : str
        ``"float32"``, ``"int64"``, ``"string"``, ...
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class ModelSignature:
    """Inputs, outputs, and how the output that predictions come from is to be read.

    Parameters
    ----------
    inputs, outputs : tuple of TensorSpec
        In the model's own order; scoring goes by the names.
    kind : str
        ``"multiclass"``: a row of class scores; ``"binary"``: one score, two classes; ``"values"``: numbers
        as they are (regression, and whatever the loss does not tell).
    logits : bool
        The scores are logits, not probabilities.
    predicted : int
        The place among the outputs of the one that predictions come from: the first with a loss.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: str = VALUES
    logits: bool = False
    predicted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the signature as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the signature that :meth:`to_dict` gave, also after a way through JSON."""

        def specs(items: Any) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(i["name"], tuple(i["shape"]), i["dtype"]) for i in items)

        inputs, outputs = specs(values["inputs"]), specs(values["outputs"])
        return cls(inputs, outputs, str(values["kind"]), bool(values["logits"]), int(values.get("predicted", 0)))

    @classmethod
    def of(cls, model: keras.Model) -> Self:
        """Read a built model's signature; the kind comes from its compiled loss.

        Raises
        ------
        PersistenceError
            The model was never built, so that its shapes are not known.
        """
        specs, losses = output_specs(model), output_losses(model)
        structure, order = _outputs(model), list(range(len(specs)))
        if isinstance(structure, Mapping) and set(structure) == {spec.name for spec in specs}:
            order.sort(key=lambda place: list(structure).index(specs[place].name))
        # Of the outputs with a loss the first that the model's author wrote.
        chosen = next((place for place in order if losses[place] is not None), order[0])
        kind, from_logits = _classify(losses[chosen], specs[chosen].shape)
        is_logits = from_logits and last_activation(model, chosen) not in _PROBABILITIES
        outputs = tuple(specs[place] for place in order)
        return cls(input_specs(model), outputs, kind, is_logits, order.index(chosen))


def input_specs(model: keras.Model) -> tuple[TensorSpec, ...]:
    """Return a built model's inputs in the order of ``keras.tree.flatten`` (dicts sorted by key).

    Names are the keys where the model takes a dict, else the Input layers' names; for a subclassed model, the
    names of ``call``'s arguments.
    """
    return tuple(TensorSpec(name, _row_shape(t.shape), _dtype(t)) for name, t in _named(_inputs(model)))


def output_specs(model: keras.Model) -> tuple[TensorSpec, ...]:
    """Return a built model's outputs in the order of ``keras.tree.flatten`` (dicts sorted by key).

    Names are the keys where the model gives a dict, else Keras's ``output_names``.
    """
    structure = _outputs(model)
    named = _named(structure)
    names = list(getattr(getattr(model, "_functional", None) or model, "output_names", None) or [])
    if not isinstance(structure, Mapping) and len(names) == len(named):
        named = list(zip(names, [t for _, t in named], strict=True))
    elif not isinstance(structure, Mapping):
        plain = ["output"] if len(named) == 1 else [f"output_{i}" for i in range(len(named))]
        named = list(zip(plain, [t for _, t in named], strict=True))
    return tuple(TensorSpec(name, _row_shape(t.shape), _dtype(t)) for name, t in named)


def last_activation(model: keras.Model, place: int = 0) -> str:
    """Return the name of the activation that makes an output; ``""`` where it cannot be seen.

    Parameters
    ----------
    model : keras.Model
    place : int
        The output's, in the order of `output_specs`.
    """
    tensors = [tensor for _, tensor in _named(_outputs(model))] if getattr(model, "outputs", None) else []
    history = getattr(tensors[place], "_keras_history", None) if place < len(tensors) else None
    if history is None:
        return ""
    operation = history.operation
    if getattr(operation, "outputs", None) and hasattr(operation, "layers"):
        return last_activation(operation, history.tensor_index)
    activation = getattr(operation, "activation", None)
    if activation is not None:
        return str(getattr(activation, "__name__", type(activation).__name__)).lower()
    # The Softmax layer, and keras.ops.softmax or sigmoid used as the last step of a functional model.
    return type(operation).__name__.lower()


def _inputs(model: keras.Model) -> Any:
    if (structure := _functional_structure(model, "inputs")) is not None:
        return structure
    import keras

    shapes = getattr(model, "_build_shapes_dict", None)
    if not model.built or not shapes:
        raise PersistenceError(
            f"the inputs of model {model.name!r} are not known. Expected a model with Input layers, or one "
            "that was built or called once on data"
        )

    def tensor(name: str, shape: Any) -> Any:
        if isinstance(shape, Mapping):
            return {key: tensor(key, value) for key, value in shape.items()}
        return keras.KerasTensor(tuple(shape), dtype=model.input_dtype, name=name)

    # Keras names the one argument of call() "input_shape", several "<argument>_shape".
    tensors = {key.removesuffix("_shape"): tensor(key.removesuffix("_shape"), s) for key, s in shapes.items()}
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _outputs(model: keras.Model) -> Any:
    if (structure := _functional_structure(model, "outputs")) is not None:
        return structure
    inputs = _inputs(model)
    several = isinstance(inputs, Mapping) and len(getattr(model, "_build_shapes_dict", {})) > 1
    return model.compute_output_spec(**inputs) if several else model.compute_output_spec(inputs)


def _functional_structure(model: keras.Model, side: str) -> Any:
    """Return the inputs or outputs of a Functional or Sequential model as it is called, None for others."""
    tensors = getattr(model, side, None)
    if not tensors:
        return None
    # Keras has no public name for the structure (list or dict) around its list of tensors.
    functional = getattr(model, "_functional", None) or model
    plain = tensors[0] if len(tensors) == 1 else tensors
    return getattr(functional, f"_{side}_struct", plain)


def _named(structure: Any) -> list[tuple[str, Any]]:
    """Return names and tensors of a structure in the order of ``keras.tree.flatten``: dicts sorted by key."""
    import keras

    pairs = keras.tree.flatten_with_path(structure)
    return [(str(path[-1]) if path and isinstance(path[-1], str) else t.name, t) for path, t in pairs]


def _row_shape(shape: Any) -> tuple[int | None, ...]:
    return tuple(None if d is None else int(d) for d in tuple(shape)[1:])


def _dtype(tensor: Any) -> str:
    return str(getattr(tensor.dtype, "name", tensor.dtype))


def output_losses(model: keras.Model) -> list[Any]:
    """Return each output's loss as the user gave it to ``compile``, None where it has none.

    In the order of `output_specs`: several outputs may have the same name.
    """
    import keras

    structure = _outputs(model)
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    loss = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    if not keras.tree.is_nested(loss):
        return [loss] * len(paths)
    flat = keras.tree.flatten(loss)
    if isinstance(loss, Mapping) and len(paths) > 1:
        if isinstance(structure, Mapping):
            return [_at(loss, path) for path in paths]
        return [loss.get(spec.name) for spec in output_specs(model)]
    # Keras asks for no name where there is one output.
    return [flat[place] if place < len(flat) else None for place in range(len(paths))]


def _at(given: Any, path: Sequence[Any]) -> Any:
    """Follow a path into what was given for a structure of outputs; what is given for a part counts for all of it."""
    for key in path:
        if isinstance(given, Mapping):
            given = given.get(key)
        elif isinstance(given, list | tuple):
            given = given[key] if key < len(given) else None
    return given


def _classify(loss: Any, shape: tuple[int | None, ...]) -> tuple[str, bool]:
    """Return the kind of output and whether the loss was told that it gets logits."""
    import keras

    if isinstance(loss, str):
        # Keras resolves aliases ("bce") to its function; names of custom losses stay custom.
        loss = keras.losses.get(loss)
    classes = keras.losses
    multiclass = {
        classes.CategoricalCrossentropy: classes.categorical_crossentropy,
        classes.SparseCategoricalCrossentropy: classes.sparse_categorical_crossentropy,
        classes.CategoricalFocalCrossentropy: classes.categorical_focal_crossentropy,
    }
    binary = {
        classes.BinaryCrossentropy: classes.binary_crossentropy,
        classes.BinaryFocalCrossentropy: classes.binary_focal_crossentropy,
    }
    from_logits = bool(getattr(loss, "from_logits", False))
    if _is_one_of(loss, multiclass) and len(shape) == 1 and (shape[0] or 0) > 1:
        return MULTICLASS, from_logits
    if _is_one_of(loss, binary) and shape in ((), (1,)):
        return BINARY, from_logits
    return VALUES, from_logits


def _is_one_of(loss: Any, known: Mapping[Any, Any]) -> bool:
    return isinstance(loss, tuple(known)) or any(loss is function for function in known.values())
