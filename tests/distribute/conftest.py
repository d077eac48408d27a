"""Ranks are threads of one process here, and every one of them waits inside TensorFlow's operations."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import tensorflow as tf

# A rank holds a thread of this pool while it waits for the others in its reduce; with fewer threads than waiting
# operations none of them would ever go on.
tf.config.threading.set_inter_op_parallelism_threads(32)
