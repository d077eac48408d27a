"""A wide and deep model of who earns more than 50,000, trained on parameter servers: `tf.estimator`'s wide_deep.

``DNNLinearCombinedClassifier`` has become a Keras model, its feature columns Keras's preprocessing layers, and
``train_and_evaluate`` a ``fit`` whose optimizer sends gradients to the servers. The CSV files that each node parsed are
a DataFrame that Spark feeds; it also scores the result. Rows are made up in the manner of the census.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame, SparkSession

    from sparktf.program.context import Context

# Numbers, each with what is much of it.
NUMERIC = {"age": 50.0, "education_num": 16.0, "capital_gain": 10_000.0, "hours_per_week": 50.0}
TEXT = {"workclass": 8, "education": 16, "marital_status": 6, "occupation": 14}


def census(spark: SparkSession, rows: int) -> DataFrame:
    """Return rows of the columns above and ``label``: 1 for more than 50,000."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(7)
    kinds = {name: random.integers(0, count, rows) for name, count in TEXT.items()}
    numbers = {
        "age": random.integers(17, 80, rows),
        "education_num": kinds["education"] + 1,
        "capital_gain": np.where(random.random(rows) < 0.1, random.integers(0, 15_000, rows), 0),
        "hours_per_week": random.integers(20, 60, rows),
    }
    score = 0.25 * (kinds["education"] - 10) + 0.05 * (numbers["hours_per_week"] - 40) + numbers["capital_gain"] / 3000
    score += 2.0 * (kinds["marital_status"] == 1) - 0.003 * (numbers["age"] - 48) ** 2
    # Some occupations pay for education, some do not: the pair tells, neither alone.
    score += random.normal(0, 1.5, (TEXT["education"], TEXT["occupation"]))[kinds["education"], kinds["occupation"]]
    texts = {name: [f"{name} {kind}" for kind in drawn] for name, drawn in kinds.items()}
    label = random.random(rows) < 1 / (1 + np.exp(-score))
    floats = {name: drawn.astype("float32") for name, drawn in numbers.items()}
    return spark.createDataFrame(pa.table({**floats, **texts, "label": label.astype("float32")}))


def wide_deep() -> keras.Model:
    """Return the model; it takes the columns as they are."""
    import keras
    from keras import layers

    numbers = {name: keras.Input((1,), name=name) for name in NUMERIC}
    texts = {name: keras.Input((1,), dtype="string", name=name) for name in TEXT}
    # One bit a value. Hashing is for columns of unknown values; StringLookup takes a vocabulary.
    indicators = [layers.Hashing(64, output_mode="one_hot")(text) for text in texts.values()]
    age = layers.Discretization([18.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0, 60.0, 65.0])(numbers["age"])
    crossed = [
        layers.HashedCrossing(1000, output_mode="one_hot")([texts["education"], texts["occupation"]]),
        layers.HashedCrossing(1000, output_mode="one_hot")([age, texts["occupation"]]),
    ]
    wide = layers.Dense(1, kernel_initializer="zeros", name="wide")(layers.concatenate([*indicators, *crossed]))

    vector = layers.Flatten()(layers.Embedding(1000, 8)(layers.Hashing(1000)(texts["occupation"])))
    scaled = [layers.Rescaling(1 / much)(numbers[name]) for name, much in NUMERIC.items()]
    deep = layers.concatenate([*scaled, *indicators, vector])
    for units in (100, 75, 50, 25):
        deep = layers.Dense(units, "relu")(deep)
    probability = layers.Activation("sigmoid")(layers.add([wide, layers.Dense(1, name="deep")(deep)]))
    return keras.Model({**numbers, **texts}, probability)


def main_fun(args: argparse.Namespace, ctx: Context) -> Any:
    """Train on this node, or serve; a worker returns its last epoch's loss."""
    import keras

    optimizer = keras.optimizers.Adagrad(0.05)
    if ctx.job_name == "ps":
        return ctx.parameter_server(optimizer)
    keras.utils.set_random_seed(7)
    model = wide_deep()
    model.compile(ctx.distributed_optimizer(optimizer, mode="async"), "binary_crossentropy")
    rows = ctx.dataset(args.batch_size, shuffle=True, seed=7, drop_remainder=True)
    batches = rows.map(lambda row: (row, row.pop("label")))
    history = model.fit(batches, epochs=args.epochs, shuffle=False, verbose=2 if ctx.is_chief else 0)
    ctx.export(model, args.model, overwrite=True)
    return float(history.history["loss"][-1])


def area(spark: SparkSession, args: argparse.Namespace) -> float:
    """Train; return the area under the ROC curve of rows that no worker has seen. The model is in ``args.model``."""
    from pyspark.ml.evaluation import BinaryClassificationEvaluator

    from sparktf import TFModel, run

    training, held_out = census(spark, args.rows).randomSplit([0.8, 0.2], seed=7)
    workers = args.cluster_size - args.num_ps
    run(main_fun, args, spark=spark, num_workers=workers, num_ps=args.num_ps, dataset=training)
    model = TFModel.fromKeras(args.model, inputMapping={name: name for name in (*NUMERIC, *TEXT)})
    return float(BinaryClassificationEvaluator().evaluate(model.transform(held_out)))


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=40, help="rows of a worker in a step")
    parser.add_argument("--cluster_size", type=int, default=3, help="workers and servers")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--model", default="wide_deep.keras", help="where the chief leaves the trained model")
    parser.add_argument("--num_ps", type=int, default=1, help="how many of them are parameter servers")
    parser.add_argument("--rows", type=int, default=10_000)
    arguments = parser.parse_args()
    session = local_session(f"local[{arguments.cluster_size}]")
    print(f"auc {area(session, arguments):.3f}")
