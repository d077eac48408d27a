"""Train continuously on a stream: each micro-batch of a Structured Streaming query goes on where the last one ended."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sparktf import TFEstimator, TFModel, local_session
from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame, SparkSession

ROWS, FILES = 1500, 4


def write_files(directory: Path) -> None:
    """Write 1,500 real digits as the files of a stream."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for number, rows in enumerate(np.array_split(np.arange(ROWS), FILES)):
        table = pa.table({"features": list(images[rows].astype("float32") / 16), "label": labels[rows]})
        pq.write_table(table, directory / f"{number}.parquet")


def small_network() -> keras.Model:
    """Return a compiled network for digits of 64 pixels."""
    with quiet_stderr():
        import keras

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    model.compile(keras.optimizers.Adam(5e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class Learner:
    """Trains on one micro-batch after the other; for ``foreachBatch``.

    Attributes
    ----------
    fitted : TFModel or None
        After the last micro-batch.
    """

    def __init__(self, estimator: TFEstimator) -> None:
        self._estimator = estimator
        self.fitted: TFModel | None = None

    def __call__(self, batch: DataFrame, number: int) -> None:
        """Train on a micro-batch, from the weights and the optimizer's state that the last one left."""
        if self.fitted is not None:
            self._estimator.setModel(self.fitted.model)
        self.fitted = self._estimator.fit(batch)
        steps = int(self.fitted.model.optimizer.iterations)
        summary = self.fitted.summary
        loss = summary.history["loss"].iloc[-1]
        print(f"micro-batch {number}: {summary.rows} rows, loss {loss:.3f}, {steps} steps so far", flush=True)


def learn(spark: SparkSession, directory: Path) -> TFModel:
    """Train on the files of a directory as a stream of one file at a time; return the model."""
    learner = Learner(TFEstimator(model=small_network(), numWorkers=2, epochs=4, batchSize=16, verbose=0))
    stream = spark.readStream.schema("features array<float>, label long").option("maxFilesPerTrigger", 1)
    # A stream without end has trigger(processingTime="1 minute") here, and a checkpointLocation that outlives it.
    query = (
        stream.parquet(str(directory / "digits"))
        .writeStream.foreachBatch(learner)
        .option("checkpointLocation", str(directory / "checkpoint"))
        .trigger(availableNow=True)
        .start()
    )
    query.awaitTermination()
    assert learner.fitted is not None  # there were files
    return learner.fitted


def main() -> None:
    import numpy as np
    from sklearn.datasets import load_digits

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "digits").mkdir()
        write_files(directory / "digits")
        model = learn(local_session("local[2]"), directory).model
    images, labels = (rows[ROWS:] for rows in load_digits(return_X_y=True))
    found = np.argmax(model.predict(images / 16, verbose=0), axis=1)
    print(f"accuracy {np.mean(found == labels):.3f}")


if __name__ == "__main__":
    main()
