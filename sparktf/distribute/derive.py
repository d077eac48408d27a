"""Exchange an object's class for one derived from it, and back.

Keras finds a class again by name when it loads a saved model; the derived class bears the names of the original, so
that a model saved in the middle of a fit (by ModelCheckpoint) loads as the plain one.
"""

from __future__ import annotations

from typing import Any


def derive(obj: Any, mixin: type) -> None:
    """Give `obj` a class whose bases are `mixin` and its present class.

    Parameters
    ----------
    obj : object
        A Keras model or optimizer; changed in place.
    mixin : type
        Its methods come before those of the object's class.
    """
    import keras

    original = type(obj)
    derived = type(
        original.__name__,
        (mixin, original),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "_sparktf_original": original,
        },
    )
    _name_alike(keras, original, derived)
    object.__setattr__(obj, "__class__", derived)


def restore(obj: Any) -> None:
    """Give `obj` back the class it had before `derive`."""
    from keras.src.saving import object_registration  # the way from object to name is not public

    derived = type(obj)
    object.__setattr__(obj, "__class__", derived._sparktf_original)
    # Workers outlive fits, and each fit derives its own classes.
    object_registration.GLOBAL_CUSTOM_NAMES.pop(derived, None)


def plain_class(obj: Any) -> type:
    """Return the class of an object without what `derive` has mixed in."""
    return getattr(type(obj), "_sparktf_original", type(obj))


def _name_alike(keras: Any, original: type, derived: type) -> None:
    name = keras.saving.get_registered_name(original)
    objects = keras.saving.get_custom_objects()
    if ">" not in name or objects.get(name) is not original:
        return
    package, _, short = name.partition(">")
    del objects[name]
    keras.saving.register_keras_serializable(package, short)(derived)
    objects[name] = original
