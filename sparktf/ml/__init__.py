"""Spark ML stages: :class:`TFEstimator` trains a Keras model from a DataFrame, :class:`TFModel` scores.

A *stage* is a part of a ``pyspark.ml.Pipeline``. The *archive* of a model is its ``.keras`` file. A stage is
*saved* as Spark ML metadata plus its archive.
"""
