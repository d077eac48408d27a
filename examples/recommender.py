"""Learn who likes which film: a recommender from ratings, as a Spark ML Pipeline.

A rating is a row of a user, an item and a number of stars. MLlib's StringIndexer gives users and items numbers; two
ShardedEmbedding layers turn each number into a vector that is learned. How well two vectors fit, and how generous a
user and how liked an item is, make the rating. In a fit each worker holds a part of both tables, so that these may be
larger than a machine; here they are small. Ratings are made up: some items are rated by nearly everybody, most by few.
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

TASTES = 3


def ratings(spark: SparkSession, args: argparse.Namespace) -> DataFrame:
    """Return made-up ratings: ``user`` and ``item``, text, and ``rating``, 0.5 to 5 stars in halves."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(args.seed)
    user = random.integers(0, args.users, args.ratings)
    # By Zipf's law, the n-th of them is rated about 1/n as often as the first.
    popularity = 1 / np.arange(1, args.items + 1)
    item = random.choice(args.items, args.ratings, p=popularity / popularity.sum())

    generosity, quality = random.normal(0, 0.4, args.users), random.normal(0, 0.4, args.items)
    wants, offers = random.normal(0, 0.7, (args.users, TASTES)), random.normal(0, 0.7, (args.items, TASTES))
    stars = 3.2 + generosity[user] + quality[item] + np.sum(wants[user] * offers[item], axis=1)
    stars += random.normal(0, 0.4, args.ratings)
    columns = {
        "user": [f"user {number}" for number in user],
        "item": [f"film {number}" for number in item],
        "rating": np.clip(np.round(stars * 2) / 2, 0.5, 5).astype("float32"),
    }
    return spark.createDataFrame(pa.table(columns)).cache()


def recommender(users: int, items: int, mean: float) -> keras.Model:
    """Return a compiled model of two tables of so many rows, which begins with the mean rating."""
    with quiet_stderr():
        import keras

        from sparktf.distribute import ShardedEmbedding

    keras.utils.set_random_seed(7)
    user, item = (keras.Input((), dtype="int64", name=name) for name in ("user", "item"))
    likes, is_like = ShardedEmbedding(users, 8, name="users")(user), ShardedEmbedding(items, 8, name="items")(item)
    # The sum of both vectors is what user and item add on their own, their product what they add together.
    both = keras.layers.concatenate([likes, is_like, keras.layers.multiply([likes, is_like])])
    stars = keras.layers.Dense(1, bias_initializer=keras.initializers.Constant(mean))(both)
    model = keras.Model({"user": user, "item": item}, stars)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def pipeline(args: argparse.Namespace, mean: float) -> Pipeline:
    """Return the stages from text to a predicted rating."""
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import StringIndexer

    # Who was not among the training rows gets one number more than there are: the vector of a stranger.
    index = StringIndexer(inputCols=["user", "item"], outputCols=["user_id", "item_id"], handleInvalid="keep")
    estimator = TFEstimator(
        model=recommender(args.users + 1, args.items + 1, mean),
        inputMapping={"user": "user_id", "item": "item_id"},
        labelCol="rating",
        batchSize=args.batch_size,
        epochs=args.epochs,
        numWorkers=args.workers,
    )
    return Pipeline(stages=[index, estimator])


def main() -> None:
    from pyspark.ml.evaluation import RegressionEvaluator
    from pyspark.sql import functions as F

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--ratings", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2, help="TensorFlow nodes; each takes a task slot of Spark")
    parser.add_argument("--batch_size", type=int, default=64, help="rows of a worker in a step")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=7, help="of the ratings")
    args = parser.parse_args()

    spark = local_session(f"local[{args.workers}]", "recommender")
    training, held_out = ratings(spark, args).randomSplit([0.8, 0.2], seed=7)
    mean = training.agg(F.avg("rating")).first()[0]
    fitted = pipeline(args, mean).fit(training)
    summary = fitted.stages[-1].summary
    print(f"learned from {summary.rows:,} ratings on {summary.worldSize} workers: {summary.rowsPerSecond:,.0f} rows/s")

    evaluator = RegressionEvaluator(labelCol="rating", metricName="rmse")
    of_the_mean = evaluator.evaluate(held_out.withColumn("prediction", F.lit(mean)))
    error = evaluator.evaluate(fitted.transform(held_out))
    print("error on ratings held out, in stars, and that of always saying the mean rating:")
    print(f"rmse {error:.2f} (mean rating {of_the_mean:.2f})")


if __name__ == "__main__":
    main()
