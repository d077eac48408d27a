"""Will this advertisement be clicked? A wide and deep model on rows like those of Criteo, as a Spark ML Pipeline.

Each row has 13 numbers and 26 categories, text of which a few values are frequent and most are rare. The wide part is
a linear model of categories and of a pair of them: it remembers what goes together. MLlib's FeatureHasher makes one
sparse vector of them all. The deep part generalises: it looks up a learned vector for each category in a
ShardedEmbedding, which hashes text itself, and goes on with these and the numbers.

By default training is asynchronous: workers send gradients to a parameter server and wait for nobody. The vectors live
on the server as well, which sends a worker those that its batch names. ``--mode sync`` trains without a server.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sparktf import TFEstimator, local_session
from sparktf.quiet import quiet_stderr

if TYPE_CHECKING:
    import keras
    from pyspark.ml import Pipeline
    from pyspark.sql import DataFrame, SparkSession

NUMBERS = [f"i{n}" for n in range(1, 14)]
CATEGORIES = [f"c{n}" for n in range(1, 27)]
PAIR = "c1_and_c2"
HASHED = 4096
"""Numbers in the wide part's vector. It is dense in a batch: for millions take ``ShardedEmbedding(rows, 1)``."""


def impressions(spark: SparkSession, rows: int, seed: int) -> DataFrame:
    """Return made-up rows: ``i1`` to ``i13``, counts; ``c1`` to ``c26``, text; ``label``, 1 where it was clicked."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(seed)
    columns, score = {}, np.full(rows, -1.0)
    for number, name in enumerate(NUMBERS):
        counts = random.lognormal(1.0, 1.5, rows).astype("int64")
        columns[name] = counts.astype("float32")
        score += 0.3 * (-1) ** number * (np.log1p(counts) - 1.3) / (1 + number)
    drawn = {}
    for number, name in enumerate(CATEGORIES):
        kinds = (4, 20, 100, 1000, 10_000)[number % 5]
        drawn[name] = (random.zipf(1.3, rows) - 1) % kinds
        columns[name] = [f"{number:02x}{kind:06x}" for kind in drawn[name]]
        score += random.normal(0, 0.4, kinds)[drawn[name]]
    # What neither of the two tells alone.
    score += random.normal(0, 1.0, (4, 20))[drawn["c1"], drawn["c2"]]
    columns["label"] = (random.random(rows) < 1 / (1 + np.exp(-score))).astype("float32")
    return spark.createDataFrame(pa.table(columns)).cache()


def wide_and_deep() -> keras.Model:
    """Return the compiled model; its one output is a logit."""
    with quiet_stderr():
        import keras

        from sparktf.distribute import ShardedEmbedding

    keras.utils.set_random_seed(7)
    hashed = keras.Input((HASHED,), name="hashed")
    numbers = keras.Input((len(NUMBERS),), name="numbers")
    categories = keras.Input((len(CATEGORIES),), dtype="string", name="categories")
    vectors = ShardedEmbedding(50_000, 8, hashing=True, name="vectors")(categories)
    deep = keras.layers.concatenate([keras.layers.Flatten()(vectors), keras.ops.log1p(numbers)])
    for units in (64, 32):
        deep = keras.layers.Dense(units, "relu")(deep)
    wide = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="wide")(hashed)
    click = keras.layers.add([wide, keras.layers.Dense(1, name="deep")(deep)])
    model = keras.Model([hashed, numbers, categories], click)
    model.compile(keras.optimizers.Adagrad(0.05), keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def pipeline(args: argparse.Namespace) -> Pipeline:
    """Return the stages from a row's own columns to the probability of a click."""
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import FeatureHasher, SQLTransformer

    pair = SQLTransformer(statement=f"SELECT *, concat(c1, c2) AS {PAIR} FROM __THIS__")
    hasher = FeatureHasher(inputCols=[*CATEGORIES, PAIR], outputCol="hashed", numFeatures=HASHED)
    estimator = TFEstimator(
        model=wide_and_deep(),
        inputMapping={"hashed": "hashed", "numbers": NUMBERS, "categories": CATEGORIES},
        batchSize=args.batch_size,
        epochs=args.epochs,
        numWorkers=args.workers,
        mode=args.mode,
        numPs=args.servers,
    )
    return Pipeline(stages=[pair, hasher, estimator])


def main() -> None:
    from pyspark.ml.evaluation import BinaryClassificationEvaluator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["async", "sync"], default="async")
    parser.add_argument("--servers", type=int, default=1, help="parameter servers of --mode async")
    parser.add_argument("--workers", type=int, default=2, help="TensorFlow nodes that compute")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch_size", type=int, default=128, help="rows of a worker in a step")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7, help="of the rows")
    args = parser.parse_args()

    # A server takes a task slot of Spark, as a worker does.
    spark = local_session(f"local[{args.workers + args.servers}]", "wide_and_deep")
    training, held_out = impressions(spark, args.rows, args.seed).randomSplit([0.8, 0.2], seed=7)
    fitted = pipeline(args).fit(training)
    print(fitted.stages[-1].summary)
    area = BinaryClassificationEvaluator(metricName="areaUnderROC").evaluate(fitted.transform(held_out))
    print(f"area under the ROC curve on rows held out; guessing has 0.5:\nauc {area:.3f}")


if __name__ == "__main__":
    main()
