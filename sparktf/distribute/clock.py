"""Which rows each rank holds in the current step, as TensorFlow arithmetic that also works inside a graph."""

from __future__ import annotations

from typing import Any

from sparktf.data.batches import StepPlan


class StepClock:
    """Counts an epoch's steps inside the graph and tells how many rows each step has.

    The count lives in a TensorFlow variable, so that it is right also where one call of Keras's train function
    runs several steps (``steps_per_execution``).

    Parameters
    ----------
    plan : StepPlan
        The rows of all ranks and the rows per worker and step.
    rank : int
        This rank.
    """

    def __init__(self, plan: StepPlan, rank: int) -> None:
        import tensorflow as tf

        self._rank = rank
        self._batch_size = plan.batch_size
        self._rows = tf.constant(plan.rows, dtype=tf.int64)
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step_in_epoch")

    def reset(self) -> None:
        """Start a new epoch."""
        self._step.assign(0)

    @property
    def step(self) -> int:
        """The step of the epoch that is under way, or was last; from 1."""
        return int(self._step)

    def tick(self) -> tuple[Any, Any]:
        """Begin a step.

        Returns
        -------
        local_rows, global_rows : tensors of int64, scalar
            This rank's rows in the step (0 where it has run out of rows) and those of all ranks.
        """
        import tensorflow as tf

        first = self._step.read_value() * self._batch_size
        rows = tf.clip_by_value(self._rows - first, 0, self._batch_size)
        with tf.control_dependencies([rows]):
            self._step.assign_add(1)
        return rows[self._rank], tf.reduce_sum(rows)
