"""Train a network on real digits whose two layers are on two devices of this machine."""

from __future__ import annotations

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

BATCH, EPOCHS = 64, 8


class Stage:
    """A layer and its optimizer, on one device."""

    def __init__(self, device, layer, inputs):
        self.device, self.layer, self.optimizer = device, layer, keras.optimizers.Adam(5e-3)
        with tf.device(device):
            layer.build((None, inputs))
            self.variables = layer.trainable_variables
            self.optimizer.build(self.variables)

    def forward(self, values):
        with tf.device(self.device):
            return self.layer(values)

    def update(self, gradients):
        with tf.device(self.device):
            self.optimizer.apply(gradients, self.variables)


def main(devices):
    tf.config.set_soft_device_placement(True)  # a machine without such devices does with what it has
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    training = tf.data.Dataset.from_tensor_slices((images[300:], labels[300:])).shuffle(2000, seed=7).batch(BATCH)

    keras.utils.set_random_seed(7)
    first = Stage(devices[0], keras.layers.Dense(256, "relu"), inputs=64)
    second = Stage(devices[1], keras.layers.Dense(10), inputs=256)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = second.forward(first.forward(images))
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, [first.variables, second.variables])
        first.update(gradients[0])
        second.update(gradients[1])
        return loss

    for epoch in range(EPOCHS):
        losses = [step(*batch) for batch in training]
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    print(f"weights on {first.variables[0].value.device} and {second.variables[0].value.device}")
    logits = second.forward(first.forward(images[:300]))
    return float(tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(labels[:300], logits)))


if __name__ == "__main__":
    accuracy = main(["/GPU:0", "/GPU:1"])
    print(f"accuracy {accuracy:.3f}")
