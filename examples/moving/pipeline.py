"""MNIST as a Spark ML stage: `TFEstimator` and `TFModel` in place of TensorFlowOnSpark's classes of the same names.

There the estimator ran a program that wrote its model to a directory, and the model read it from there. Here the
estimator takes a compiled model and gives it back trained; a SavedModel of any origin scores as well.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras
    from pyspark.sql import DataFrame, SparkSession

    from sparktf import TFModel


def compiled() -> keras.Model:
    import keras
    from keras import layers

    keras.utils.set_random_seed(7)
    probability = layers.Dense(10, "softmax", name="softmax")
    model = keras.Sequential([layers.Input((784,), name="pixels"), layers.Dense(128, "relu"), probability])
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(rows: DataFrame, args: argparse.Namespace) -> TFModel:
    """Fit; leave the trained model as a SavedModel in ``args.export_dir`` too."""
    from sparktf import TFEstimator

    estimator = TFEstimator(modelFn=compiled, featuresCol="image", labelCol="label")
    estimator.setBatchSize(args.batch_size).setEpochs(args.epochs).setNumWorkers(args.cluster_size)
    fitted = estimator.fit(rows)
    fitted.model.export(args.export_dir, verbose=False)
    return fitted


def score(rows: DataFrame, args: argparse.Namespace) -> DataFrame:
    """Score with the SavedModel: each output that ``outputMapping`` names becomes a column."""
    from sparktf import TFModel

    model = TFModel.fromSavedModel(args.export_dir, signature="serving_default")
    return model.setInputMapping({"pixels": "image"}).setOutputMapping({"output_0": "scores"}).transform(rows)


def accuracy(spark: SparkSession, args: argparse.Namespace) -> tuple[float, float]:
    """Return the fitted model's accuracy on rows that it has not seen, and the SavedModel's."""
    from digits import digits
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.sql import functions as F

    training, held_out = digits(spark).randomSplit([0.8, 0.2], seed=7)
    fitted = train(training, args)
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
    best = F.expr("array_position(scores, array_max(scores)) - 1").cast("double")
    from_file = score(held_out, args).select("label", best.alias("prediction"))
    return evaluator.evaluate(fitted.transform(held_out)), evaluator.evaluate(from_file)


if __name__ == "__main__":
    from sparktf import local_session

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64, help="rows of a worker in a step")
    parser.add_argument("--cluster_size", type=int, default=2, help="workers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--export_dir", default="mnist_export")
    arguments = parser.parse_args()
    session = local_session(f"local[{arguments.cluster_size}]")
    print("accuracy {:.3f}, of the SavedModel {:.3f}".format(*accuracy(session, arguments)))
