"""Gradients cut into buckets, in the order in which a backward pass gives them; pure arithmetic.

As in Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020: a backward pass
goes from the last variable to the first, so buckets do too, and a bucket is sent while the pass goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Small, so that sending begins early.
FIRST_BYTES = 1 << 20
# Large enough that a transfer is bound by bandwidth; a few of them still overlap with a backward pass.
BUCKET_BYTES = 25 << 20
# TensorFlow takes memory as it is where it begins on such a boundary (EIGEN_MAX_ALIGN_BYTES), and copies it otherwise.
ALIGN_BYTES = 64


@dataclass(frozen=True)
class Place:
    """Where one gradient lies in its bucket: elements `start` to `stop`."""

    gradient: int
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together.

    Attributes
    ----------
    dtype : numpy.dtype
        What they are summed in: half precision in single, in which the ranks' shares add up to 1.
    places : tuple of Place
        Each begins on a boundary of `ALIGN_BYTES`.
    size : int
        Elements, gaps included.
    """

    dtype: np.dtype[Any]
    places: tuple[Place, ...]
    size: int


def sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return what gradients of a dtype are summed in."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def gradient_bytes(model: Any) -> int:
    """Return how many bytes the dense gradients of a model's step take; 0 where that is not known.

    Those of Keras's embeddings are sparse, and sent by the rows that a batch has.

    Parameters
    ----------
    model : keras.Model or None
        One that was never built has no weights yet.
    """
    import keras

    if model is None or not model.built:
        return 0
    tables = {id(layer.embeddings) for layer in model._flatten_layers() if isinstance(layer, keras.layers.Embedding)}
    dense = [v for v in model.trainable_variables if id(v) not in tables]
    return sum(math.prod(v.shape) * (8 if v.dtype == "float64" else 4) for v in dense)


def plan_buckets(gradients: Sequence[tuple[np.dtype[Any], int]], first_bytes: int, bucket_bytes: int) -> list[Bucket]:
    """Cut an optimizer's gradients into buckets, the last variable's first.

    Parameters
    ----------
    gradients : sequence of (dtype, elements)
        In the order of the variables.
    first_bytes, bucket_bytes : int
        A bucket that has reached so many bytes takes no more gradients.

    Returns
    -------
    list of Bucket
        In the order in which they are filled; at least one, if only of nothing.
    """
    done: list[Bucket] = []
    open_: dict[np.dtype[Any], tuple[list[Place], int]] = {}
    for gradient in reversed(range(len(gradients))):
        dtype, elements = gradients[gradient]
        dtype = sum_dtype(dtype)
        places, size = open_.pop(dtype, ([], 0))
        places = [*places, Place(gradient, size, size + elements)]
        size = _aligned(size + elements, dtype)
        if size * dtype.itemsize >= (bucket_bytes if done else first_bytes):
            done.append(Bucket(dtype, tuple(places), size))
        else:
            open_[dtype] = (places, size)
    done += [Bucket(dtype, tuple(places), size) for dtype, (places, size) in open_.items()]
    return done or [Bucket(np.dtype(np.float32), (), 0)]


def _aligned(elements: int, dtype: np.dtype[Any]) -> int:
    step = ALIGN_BYTES // dtype.itemsize
    return -(-elements // step) * step
