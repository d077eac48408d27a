"""Train a small network on real digits asynchronously: workers and a parameter server, led by the chief."""

from __future__ import annotations

import keras
import tensorflow as tf
from one_machine import run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH, STEPS = 32, 400


def main():
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if resolver.task_type != "chief":
        server = tf.distribute.Server(
            resolver.cluster_spec(), job_name=resolver.task_type, task_index=resolver.task_id, protocol="grpc"
        )
        server.join()
        return None
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    images, test_images, labels, test_labels = train_test_split(images, labels, test_size=300, random_state=0)

    with strategy.scope():
        keras.utils.set_random_seed(7)
        model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)

    def batches():
        training = tf.data.Dataset.from_tensor_slices((images, labels))
        return training.shuffle(2000).repeat().batch(BATCH)

    def replica_step(images, labels):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, model(images), from_logits=True)
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    @tf.function
    def step(iterator):
        return strategy.run(replica_step, next(iterator))

    iterator = iter(coordinator.create_per_worker_dataset(batches))
    for _ in range(STEPS):
        loss = coordinator.schedule(step, (iterator,))
    coordinator.join()
    print(f"loss {loss.fetch():.3f} in the last of {STEPS} steps")
    return float(tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(test_labels, model(test_images))))


if __name__ == "__main__":
    accuracy = run(main, chief=1, worker=2, ps=1)
    print(f"accuracy {accuracy:.3f}")
