"""Ranks in processes of limited memory, which train a table of four times the limit; see `test_table_memory`."""

from __future__ import annotations

import resource
import threading
from typing import Any

import numpy as np

from sparktf.transport import Communicator

RANKS, BATCH = 8, 1024
DIM, ROWS = 512, 1 << 20
TABLE_BYTES = ROWS * DIM * 4
LIMIT_BYTES = TABLE_BYTES // 4
"""What a process may take beyond what TensorFlow, its threads and a first small fit have taken."""


def train_within_the_limit(communicator: Communicator) -> None:
    """Train a small table, then, within the limit, the large one; check each row of this rank's part.

    Every row is looked up once, by one of the ranks, and the gradient of each of its numbers is the same.
    """
    # Thread stacks count as a whole from the start.
    threading.stack_size(1 << 20)
    _fit(communicator, 4 * BATCH * communicator.size)
    limit = _data_bytes() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    layer = _fit(communicator, ROWS)
    # The chief has the whole table, in files that it maps; others have their parts.
    rows = layer.access if communicator.rank == 0 else layer.access.shard
    mine = np.arange(ROWS) if communicator.rank == 0 else np.arange(communicator.rank, ROWS, communicator.size)
    for part in np.array_split(mine, 256):
        np.testing.assert_allclose(rows.lookup(part) - layer.spec.new_rows(part), 1.0, atol=1e-5)
    communicator.barrier()


def train_alone_within_the_limit(communicator: Communicator) -> None:
    """Try to train the large table, where it does not fit."""
    _fit(communicator, 4 * BATCH)
    limit = _data_bytes() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    _fit(communicator, ROWS)


def _fit(communicator: Communicator, rows: int) -> Any:
    import keras
    import tensorflow as tf

    from sparktf.distribute import ShardedEmbedding
    from sparktf.distribute.build import build_model
    from sparktf.distribute.fit import FitSettings, RankRows
    from sparktf.distribute.lockstep import fit_rank

    layer = ShardedEmbedding(rows, DIM, seed=1, name="large")
    ids = keras.Input((), dtype="int64")
    model = keras.Model(ids, keras.ops.mean(layer(ids), axis=-1))
    # |y - p| has a slope of -1 / (DIM * global batch) in each number, as y is far above.
    model.compile(keras.optimizers.SGD(float(DIM * BATCH * communicator.size)), "mae")
    share = rows // communicator.size

    def training(order: Any, steps: int) -> Any:
        # Its rows in an order that has nothing to do with where they live.
        first = tf.constant(communicator.rank * share, tf.int64)
        data = tf.data.Dataset.range(share).batch(BATCH)
        data = data.map(lambda n: (first + (n * 7919) % share, tf.fill(tf.shape(n), 1000.0)))
        options = tf.data.Options()
        # No threads of its own, which would come within the limit.
        options.threading.private_threadpool_size, options.autotune.enabled = 1, False
        return data.apply(tf.data.experimental.assert_cardinality(steps)).with_options(options)

    build_model(model, (tf.zeros(0, tf.int64), tf.zeros(0)))
    settings = FitSettings(batch_size=BATCH, epochs=1, shuffle=False, seed=0)
    counts = RankRows((share,) * communicator.size, (0,) * communicator.size)
    fit_rank(model, communicator, counts, training, None, settings)
    return layer


def _data_bytes() -> int:
    """Return what RLIMIT_DATA counts of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
