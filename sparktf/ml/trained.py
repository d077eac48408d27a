"""A trained model as the driver knows it: its archive, and what was read from it so far."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparktf.errors import ParamError
from sparktf.ml.archive import ModelArchive
from sparktf.ml.signature import ModelSignature, TensorSpec
from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    import keras


class Trained:
    """What copies of a TFModel share.

    Parameters
    ----------
    archive : ModelArchive
    signature : ModelSignature or None
        None: read from the archive when first needed.
    objects : mapping
        Keras's registry of custom objects, as it was when the model was made.
    saved_signature : str
        Which signature to call, for a SavedModel.
    """

    def __init__(
        self,
        archive: ModelArchive,
        signature: ModelSignature | None,
        objects: Mapping[str, Any],
        saved_signature: str,
    ) -> None:
        self.archive = archive
        self.objects = dict(objects)
        self.saved_signature = saved_signature
        self._signature = signature
        self._model: Any = None
        self._lock = threading.RLock()

    @property
    def model(self) -> keras.Model:
        """The Keras model; loaded once."""
        with self._lock:
            if self._model is None:
                self._model = self.archive.load(custom_objects=self.objects)
            return self._model

    def check(self, safe_mode: bool) -> None:
        """Rebuild the model now, so that what is missing or refused shows early; keep it."""
        with self._lock:
            self._model = self.archive.load(custom_objects=self.objects, safe_mode=safe_mode)

    @property
    def signature(self) -> ModelSignature:
        """What the model takes and gives; may load it."""
        with self._lock:
            if self._signature is None:
                self._signature = ModelSignature.of(self.model)
            return self._signature


def saved_signature(path: str, name: str) -> ModelSignature:
    """Read one signature of a TensorFlow SavedModel directory.

    Raises
    ------
    ParamError
        It has no such signature.
    """
    with quiet_stderr():
        import tensorflow as tf
    signatures = tf.saved_model.load(path).signatures
    if name not in signatures:
        raise ParamError(
            f"signature: expected one of the SavedModel's, {', '.join(signatures) or '(there are none)'}. "
            f"Received: {name!r}"
        )
    function = signatures[name]

    def specs(tensors: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(key, tuple(t.shape.as_list()[1:]) if t.shape.rank else (), t.dtype.name)
            for key, t in tensors.items()
        )

    return ModelSignature(specs(function.structured_input_signature[1]), specs(function.structured_outputs))
