"""A step with gradients sent in buckets while the backward pass runs, by a step with one reduce at its end.

Two processes of one computing thread train a VGG-shaped model: most weights lie in its dense layers, whose gradients
come first. Bucketed and whole steps alternate within one pair of processes; the ratio is taken per round, and its
median is printed, beside the step without any communication. The two are joined by a link (network namespaces; needs
root), whose rate is to be such that communication takes about half of the step with one reduce.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from link import slow_link

from sparktf.distribute import buckets
from sparktf.distribute.optimizer import distribute_optimizer, restore_optimizer
from sparktf.distribute.reducer import GradientReducer
from sparktf.transport import Communicator, connect
from sparktf.transport.testing import FileExchange

if TYPE_CHECKING:
    import keras

WORLD, BATCH, STEPS = 2, 16, 4


def vgg(width: int, dense: int) -> keras.Model:
    import keras

    layers: list[Any] = [keras.Input((32, 32, 3))]
    for block in range(3):
        for _ in range(2):
            layers.append(keras.layers.Conv2D(width << block, 3, padding="same", activation="relu"))
        layers.append(keras.layers.MaxPooling2D())
    layers += [keras.layers.Flatten(), *(keras.layers.Dense(dense, "relu") for _ in range(2)), keras.layers.Dense(10)]
    model = keras.Sequential(layers, name="vgg")
    model.compile(keras.optimizers.SGD(0.001), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def step_of(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """Return a training step, traced anew."""
    import tensorflow as tf

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    inputs = tf.constant(x), tf.constant(y)

    def run() -> None:
        # Reading the loss waits for the step's end.
        step(*inputs).numpy()

    return run


def traced(
    model: keras.Model, data: tuple[np.ndarray, np.ndarray], reducer: GradientReducer | None
) -> Callable[[], None]:
    """Return a step that reduces as `buckets` says at this moment; without a reducer, one that does not."""
    if reducer is not None:
        distribute_optimizer(model.optimizer, reducer, lambda: 0.5)
    step = step_of(model, *data)
    step()
    if reducer is not None:
        restore_optimizer(model.optimizer)
    return step


def seconds(step: Callable[[], None], communicator: Communicator) -> float:
    communicator.barrier()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - began) / STEPS


def rank_main(rank: int, directory: str, args: argparse.Namespace) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.inter)
    import keras

    keras.utils.set_random_seed(rank)
    model = vgg(args.width, args.dense)
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(rank)
    data = rng.random((BATCH, 32, 32, 3), dtype=np.float32), rng.integers(0, 10, BATCH)
    exchange = FileExchange(Path(directory), rank, WORLD)
    with (
        connect(
            args.protocol, rank=rank, size=WORLD, exchange=exchange, secret=b"benchmark", host=args.host
        ) as communicator,
        GradientReducer(communicator) as in_buckets,
        GradientReducer(communicator) as at_the_end,
    ):
        alone = traced(model, data, None)
        bucketed = traced(model, data, in_buckets)
        buckets.FIRST_BYTES = buckets.BUCKET_BYTES = 1 << 40
        whole = traced(model, data, at_the_end)
        rounds = [
            {
                name: seconds(step, communicator)
                for name, step in (("alone", alone), ("bucketed", bucketed), ("whole", whole))
            }
            for _ in range(args.rounds)
        ]
    if rank == 0:
        weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        print(json.dumps({"megabytes": weights * 4 / 1e6, "protocol": communicator.protocol, "rounds": rounds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", default="tcp")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inter", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dense", type=int, default=2048)
    parser.add_argument("--gigabits", type=float, default=5.0, help="rate of the link; 0 for the loopback device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--directory")
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.rank, args.directory, args)
        return
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        ends: Any = ([[], []], [args.host] * WORLD)
        if args.gigabits:
            ends = stack.enter_context(slow_link(int(args.gigabits * 1e9)))
        ranks = []
        for rank, (prefix, host) in enumerate(zip(*ends, strict=True)):
            own = ["--directory", directory, "--host", host, "--rank", str(rank)]
            command = [*prefix, sys.executable, __file__, *sys.argv[1:], *own]
            ranks.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
            stack.callback(ranks[-1].kill)
        output = [process.communicate(timeout=500)[0] for process in ranks]
    told = json.loads(output[0].splitlines()[-1])
    ratio = statistics.median(r["bucketed"] / r["whole"] for r in told["rounds"])
    medians = {name: statistics.median(r[name] for r in told["rounds"]) * 1e3 for name in told["rounds"][0]}
    where = f"{args.gigabits:g} Gbit/s" if args.gigabits else "loopback"
    print(
        f"overlap, {told['protocol']}, {where}, {told['megabytes']:.0f} MB of gradients: ratio {ratio:.2f}, "
        f"{medians['bucketed']:.0f} ms a step in buckets ({medians['whole']:.0f} ms with one reduce at the end, "
        f"{medians['alone']:.0f} ms without)"
    )


if __name__ == "__main__":
    main()
