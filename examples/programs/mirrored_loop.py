"""Train a small network on real digits with a custom loop under ``MultiWorkerMirroredStrategy``."""

from __future__ import annotations

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

from sparktf import run

BATCH, EPOCHS = 64, 12


def main(args, ctx):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    training = tf.data.Dataset.from_tensor_slices((images[300:], labels[300:]))
    batches = strategy.experimental_distribute_dataset(training.shuffle(2000, seed=7).batch(BATCH))

    with strategy.scope():
        keras.utils.set_random_seed(7)
        model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
        optimizer = keras.optimizers.Adam(5e-3)
        optimizer.build(model.trainable_variables)

    def replica_step(images, labels):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, model(images), from_logits=True)
            loss = tf.nn.compute_average_loss(losses, global_batch_size=BATCH)
        optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    @tf.function
    def step(images, labels):
        return strategy.reduce("sum", strategy.run(replica_step, (images, labels)), axis=None)

    for epoch in range(EPOCHS):
        losses = [step(*batch) for batch in batches]
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    return float(tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(labels[:300], model(images[:300]))))


if __name__ == "__main__":
    accuracy = run(main, num_workers=2)[0]
    print(f"accuracy {accuracy:.3f}")
