"""Train on real digits by two groups of two devices: each network is split over its group, and both learn as one."""

from __future__ import annotations

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

from sparktf import run

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


class Network:
    """Two stages on the two devices of a group."""

    def __init__(self, devices):
        keras.utils.set_random_seed(7)  # all groups begin with the same weights
        first = Stage(devices[0], keras.layers.Dense(256, "relu"), inputs=64)
        second = Stage(devices[1], keras.layers.Dense(10), inputs=256)
        self.stages = [first, second]

    def forward(self, values):
        for stage in self.stages:
            values = stage.forward(values)
        return values

    def gradients(self, images, labels):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, self.forward(images), from_logits=True)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, [stage.variables for stage in self.stages])


def main(groups, ctx):
    if not ctx.is_chief:
        return ctx.serve()
    tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(ctx.cluster_spec), job_name="chief")
    tf.config.set_soft_device_placement(True)  # a machine without such devices does with what it has
    images, labels = load_digits(return_X_y=True)
    images = images.astype("float32") / 16
    training = tf.data.Dataset.from_tensor_slices((images[300:], labels[300:])).shuffle(2000, seed=7)
    batches = training.batch(BATCH, drop_remainder=True)
    networks = [Network(devices) for devices in groups]

    @tf.function
    def step(images, labels):
        shares = zip(tf.split(images, len(networks)), tf.split(labels, len(networks)), strict=True)
        results = [network.gradients(*share) for network, share in zip(networks, shares, strict=True)]
        for number, gradients in enumerate(zip(*(gradients for _, gradients in results), strict=True)):
            means = [tf.add_n(parts) / len(networks) for parts in zip(*gradients, strict=True)]
            for network in networks:
                network.stages[number].update(means)
        return tf.add_n([loss for loss, _ in results]) / len(networks)

    for epoch in range(EPOCHS):
        losses = [step(*batch) for batch in batches]
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    print("weights on", *(stage.variables[0].value.device for network in networks for stage in network.stages))
    logits = networks[-1].forward(images[:300])
    return float(tf.reduce_mean(keras.metrics.sparse_categorical_accuracy(labels[:300], logits)))


if __name__ == "__main__":
    groups = [["/job:chief/task:0", "/job:worker/task:0"], ["/job:worker/task:1", "/job:worker/task:2"]]
    accuracy = run(main, groups, num_workers=4)[0]
    print(f"accuracy {accuracy:.3f}")
