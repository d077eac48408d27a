"""Train on one DataFrame and check the result on another, on two nodes that Spark feeds with both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparktf import local_session, run

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from sparktf.program.context import Context


def digits(spark: SparkSession) -> DataFrame:
    """Return 1,797 real digits: ``pixels``, 64 numbers from 0 to 1, and ``label``, 0 to 9."""
    import pyarrow as pa
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return spark.createDataFrame(pa.table({"pixels": list(images.astype("float32") / 16), "label": labels}))


def main(epochs: int, ctx: Context) -> float:
    """Train; return the accuracy on all validation rows, those of the other workers included."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(7)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(ctx.distributed_optimizer(keras.optimizers.Adam(5e-3)), loss)

    # Shuffled here, anew in each epoch, so that Keras need not.
    rows = ctx.dataset(32, "train", shuffle=True, drop_remainder=True)
    model.fit(rows.map(lambda row: (row["pixels"], row["label"])), epochs=epochs, shuffle=False, verbose=0)

    right_of_all = np.zeros(2)
    for batch in ctx.batches(100, "validation"):
        found = model.predict_on_batch(batch["pixels"]).argmax(axis=1)
        right_of_all += [(found == batch["label"]).sum(), len(found)]
    ctx.communicator.all_reduce(right_of_all)
    right, count = right_of_all
    ctx.report(validated=int(count), accuracy=right / count)
    return float(right / count)


if __name__ == "__main__":
    training, validation = digits(local_session("local[2]")).randomSplit([0.8, 0.2], seed=7)
    accuracy = run(main, 8, num_workers=2, dataset={"train": training, "validation": validation})[0]
    print(f"accuracy {accuracy:.3f}")
