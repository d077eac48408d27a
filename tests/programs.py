"""Programs for the tests of `sparktf.run`; a module, as executors import what tests hand to Spark."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import urllib.error
from typing import Any

import numpy as np


def who(args: Any, ctx: Any) -> dict[str, Any]:
    """Tell all that a node knows of itself."""
    return {
        "args": args,
        "rank": ctx.rank,
        "world_size": ctx.world_size,
        "job_name": ctx.job_name,
        "task_index": ctx.task_index,
        "is_chief": ctx.is_chief,
        "cluster_spec": ctx.cluster_spec,
        "protocol": ctx.protocol,
        "tf_config": os.environ.get("TF_CONFIG"),
        "pid": os.getpid(),
        "log_dir": ctx.log_dir,
    }


def total(args: Any, ctx: Any) -> float:
    """Sum a number over the compute nodes; servers serve."""
    if ctx.job_name == "ps":
        ctx.serve()
        return -1.0
    return float(ctx.communicator.all_reduce(np.array([ctx.rank + 1.0]))[0])


def joins_a_server(args: Any, ctx: Any) -> str:
    """Serve as plain TensorFlow programs do, and never look at `ctx`."""
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if resolver.task_type == "chief":
        tf.config.experimental_connect_to_cluster(resolver.cluster_spec(), job_name="chief", protocol="grpc")
        with tf.device("/job:worker/task:0"):
            product = tf.linalg.matmul([[2.0]], [[3.0]])
        assert "/job:worker" in product.device
        return str(float(product[0, 0]))
    server = tf.distribute.Server(
        resolver.cluster_spec(), job_name=resolver.task_type, task_index=resolver.task_id, protocol="grpc"
    )
    server.join()
    return "joined"


def rows(args: Any, ctx: Any) -> list[tuple[int, int]]:
    """Return the batches' lengths and the sum of a column, of each named DataFrame."""
    found = []
    for name in args or [None]:
        batches = list(ctx.batches(4, name))
        found.append((len(batches), int(sum(batch["x"].sum() for batch in batches))))
    return found


def reads_as_tensorflow(args: Any, ctx: Any) -> dict[str, tuple[str, tuple[int | None, ...], Any]]:
    """Return dtype, shape and first value of every column."""
    dataset = ctx.dataset(2, args)
    first = next(iter(dataset))
    spec = dataset.element_spec
    return {n: (spec[n].dtype.name, tuple(spec[n].shape), first[n].numpy().tolist()[0]) for n in spec}


def streams_a_little(args: Any, ctx: Any) -> int:
    """Stop after one batch of a stream."""
    return int(next(ctx.batches(10, stream=True))["x"].sum())


def one_leaves(args: bool, ctx: Any) -> int:
    """Read all rows, as a stream or not, but for the chief, who leaves early and waits for others; return how many."""
    rows = 0
    for batch in ctx.batches(10, stream=args):
        rows += len(batch["x"])
        if ctx.is_chief:
            break
    ctx.communicator.barrier()
    return rows


def takes_batches(args: bool, ctx: Any) -> list[list[int]]:
    """Return a column of all batches, read as a stream or not."""
    return [batch["x"].tolist() for batch in ctx.batches(4, stream=args)]


def trains(args: Any, ctx: Any) -> tuple[list[Any], float]:
    """Keras's own fit on fed rows, with gradients averaged over the workers; return weights and the last loss."""
    import keras

    # Workers begin with weights of their own: the chief's count.
    keras.utils.set_random_seed(ctx.rank)
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile(ctx.distributed_optimizer(keras.optimizers.SGD(0.1)), "mse")
    assert model.jit_compile is False
    batches = ctx.dataset(8, repeat=1, drop_remainder=True)
    history = model.fit(batches.map(lambda row: (row["x"], row["y"])), epochs=args, verbose=0)
    if ctx.is_chief:
        model.save(os.environ["SPARKTF_TEST_MODEL"]) if "SPARKTF_TEST_MODEL" in os.environ else None
    return [w.tolist() for w in model.get_weights()], history.history["loss"][-1]


def speaks(args: Any, ctx: Any) -> None:
    """Say something in every way that there is."""
    import logging

    print("to stdout")
    print("to stderr", file=sys.stderr)
    logging.getLogger("mine").info("to the log")
    # As numpy gets strings from tensors.
    ctx.report(step=7, loss=np.float32(0.5), note=np.array(b"on", object), words=np.array([b"caf\xe9"], object))
    time.sleep(args or 0)
    os.write(1, b"no end of line")


def fails_on_rank(args: int, ctx: Any) -> None:
    """Raise on one rank, and wait for a minute on the others."""
    if ctx.rank == args:
        print("my last words")
        raise ValueError(f"exploded on {args} at {time.time()}")
    time.sleep(60)


def dies_on_rank(args: int, ctx: Any) -> None:
    """Be killed on one rank, and wait for a minute on the others."""
    if ctx.rank == args:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hangs(args: Any, ctx: Any) -> None:
    """Do nothing, for long."""
    time.sleep(600)


def goes_on(args: float, ctx: Any) -> str:
    """Take longer than the timeout, with a word now and then."""
    for _ in range(int(args * 2)):
        time.sleep(0.5)
        print("on")
    return "done"


def returns_much(args: list[int], ctx: Any) -> np.ndarray:
    """Return an array of as many bytes as is said for each rank."""
    return np.full(args[ctx.rank], ctx.rank + 1, np.uint8)


def cannot_be_returned(args: Any, ctx: Any) -> Any:
    """Return what cannot be pickled."""
    return threading.Lock()


def leaves(args: Any, ctx: Any) -> None:
    """End as programs of the command line do."""
    sys.exit(args)


def starts_a_process(args: Any, ctx: Any) -> int:
    """Leave a process of its own behind."""
    import subprocess

    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]).pid


def never_stops_serving(args: Any, ctx: Any) -> str:
    """Serve without asking whether the workers are done."""
    if ctx.job_name == "ps":
        time.sleep(600)
    return ctx.job_name


def evaluates(args: float, ctx: Any) -> str:
    """Work for some seconds; wait, as an evaluator, for the workers' end."""
    if ctx.is_chief:
        goes_on(args, ctx)
    while ctx.job_name == "evaluator" and not ctx.workers_done:
        time.sleep(0.05)
    return f"{ctx.job_name} {ctx.workers_done}"


def exports(args: str, ctx: Any) -> tuple[str, str | None]:
    """Export a model in both ways, and once more; return where it is, and what was said to the last."""
    import keras

    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    ctx.export(model, f"{args}/saved")
    path = ctx.export(model, f"{args}/model.keras")
    try:
        ctx.export(model, path)
    except ValueError as error:
        return path, str(error)
    return path, None


def takes_a_port(args: Any, ctx: Any) -> str:
    """Try to take the port that is kept for this node, then let TensorFlow have it."""
    import socket

    import tensorflow as tf

    host, port = ctx.cluster_spec["chief"][0].rsplit(":", 1)
    with socket.socket() as thief:
        try:
            thief.bind((host, int(port)))
            return "taken"
        except OSError as error:
            refused = type(error).__name__
    server = tf.distribute.Server(tf.train.ClusterSpec(ctx.cluster_spec), job_name="chief", task_index=0)
    return f"{refused}, then {server.target.rpartition(':')[2] == port}"


_LISTENS = """
import socket, sys, time
with socket.socket() as thief:
    # As servers do; so it may bind beside the socket that holds the port, and TensorFlow no longer beside it.
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    thief.bind((sys.argv[1], int(sys.argv[2])))
    thief.listen()
    print("listens", flush=True)
    time.sleep(300)
"""


def loses_its_port(args: tuple[str, str], ctx: Any) -> None:
    """Start TensorFlow's server, on the worker while another process listens on its port; a file tells since when."""
    import subprocess

    import tensorflow as tf

    how, path = args
    if not ctx.is_chief:
        command = [sys.executable, "-c", _LISTENS, *ctx.cluster_spec["worker"][0].rsplit(":", 1)]
        thief = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert thief.stdout is not None
        assert thief.stdout.readline() == b"listens\n"
        with open(path, "w") as file:
            file.write(f"{ctx.cluster_spec['worker'][0]} {time.time()}")
    if how == "strategy":
        tf.distribute.MultiWorkerMirroredStrategy()
    else:
        ctx.serve()


def notes_its_pid(args: str, ctx: Any) -> None:
    """Write the process's id to a file of its rank in a directory, and wait for long."""
    with open(f"{args}/new-{ctx.rank}", "w") as file:
        file.write(str(os.getpid()))
    # It appears when it is complete.
    os.rename(file.name, f"{args}/pid-{ctx.rank}")
    time.sleep(600)


def tells_its_pid(args: Any, ctx: Any) -> None:
    """Print the process's id, and wait for long."""
    print(f"pid {os.getpid()}")
    time.sleep(600)


def ends_badly(args: Any, ctx: Any) -> int:
    """Close the standard output on the chief, and leave a thread that keeps the process; others take their time."""
    if ctx.is_chief:
        print("closing")
        sys.stdout.close()
        threading.Thread(target=time.sleep, args=(60,)).start()
    else:
        goes_on(4, ctx)
    return int(ctx.rank)


def dies_and_leaves_a_fork(args: Any, ctx: Any) -> None:
    """Fork, and end at once; what is forked holds all that was open."""
    if os.fork() == 0:
        time.sleep(60)
    os._exit(7)


def reports_often(args: int, ctx: Any) -> float:
    """Report from one node while the other is silent; return the seconds that it took."""
    started = time.monotonic()
    if ctx.is_chief:
        for step in range(args):
            ctx.report(step=step)
    return time.monotonic() - started


def one_reads(args: int, ctx: Any) -> int:
    """Read the rows on one rank only."""
    return sum(len(batch["x"]) for batch in ctx.batches(10)) if ctx.rank == args else 0


def asks_wrongly(args: Any, ctx: Any) -> None:
    """Ask for batches of no rows."""
    ctx.dataset(0)


def shows_tensorboard(args: str, ctx: Any) -> str:
    """Log until a file appears."""
    import tensorflow as tf

    with tf.summary.create_file_writer(ctx.log_dir).as_default():
        tf.summary.scalar("loss", 0.25, step=1)
        tf.summary.flush()
    deadline = time.monotonic() + 60
    while not os.path.exists(args) and time.monotonic() < deadline:
        time.sleep(0.1)
    return str(ctx.log_dir)


def sees_gpus(args: Any, ctx: Any) -> str | None:
    """Return the GPUs that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def trains_asynchronously(args: dict[str, Any], ctx: Any, epochs: int = 10, callbacks: Any = ()) -> Any:
    """Digits, each worker at its own pace on a parameter server; return the accuracy on held-out rows."""
    import keras
    from sklearn.datasets import load_digits

    optimizer = keras.optimizers.Adam(args.get("rate", 5e-3))
    if ctx.job_name == "ps":
        return ctx.parameter_server(optimizer)
    images, labels = load_digits(return_X_y=True)
    # They come in the order of their writers: in that order, whether those of others are read is a matter of luck.
    order = np.random.default_rng(0).permutation(len(labels))
    training, held_out = order[300 + ctx.rank :: ctx.num_workers], order[:300]
    keras.utils.set_random_seed(ctx.rank)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    optimizer = ctx.distributed_optimizer(optimizer, mode="async", max_staleness=args.get("max_staleness"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(
        images[training] / 16, labels[training], batch_size=32, epochs=epochs, verbose=0, callbacks=list(callbacks)
    )
    return model.evaluate(images[held_out] / 16, labels[held_out], verbose=0)[1]


def trains_a_table(args: dict[str, Any], ctx: Any) -> Any:
    """A recommender whose table is on the parameter servers; return what a worker predicts, and of how many updates."""
    import keras
    import tensorflow as tf

    from sparktf.distribute import ShardedEmbedding

    optimizer = keras.optimizers.Adagrad(0.3)
    if ctx.job_name == "ps":
        return ctx.parameter_server(optimizer)
    table = ShardedEmbedding(1000, 4, seed=3, hashing=True, name="table")
    layers = [keras.Input((2,), dtype="string"), table, keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(ctx.distributed_optimizer(optimizer, mode="async", max_staleness=args["max_staleness"]), "mse")
    rows = ctx.dataset(10, drop_remainder=True).map(lambda row: (row["words"], row["y"]))
    model.fit(rows, epochs=args["epochs"], verbose=0)
    ctx.export(model, args["path"])
    updates = max(piece.updates for piece in table.access.pieces())
    return updates, model.predict(tf.constant(args["words"]), verbose=0)[:, 0].tolist()


def asks_for_async(args: dict[str, Any], ctx: Any) -> None:
    """Ask for what `args` say, in a run without servers."""
    import keras

    ctx.distributed_optimizer(keras.optimizers.SGD(0.1), **args)


def breaks_in_training(args: dict[str, Any], ctx: Any) -> Any:
    """Break one rank after its first epoch, as ``args["how"]`` says; a file tells when."""
    import keras

    def end() -> None:
        if ctx.rank == args["rank"]:
            with open(args["when"], "w") as file:
                file.write(str(time.time()))
            if args["how"] == "raise what is not JSON":
                raise urllib.error.URLError(OSError("exploded"))
            if args["how"] == "raise what nobody catches":
                raise KeyboardInterrupt("exploded")
            if args["how"] == "exit":
                os._exit(0)
            os.kill(os.getpid(), getattr(signal, args["how"]))

    on_epoch = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: end() if epoch == 1 else None)
    found = trains_asynchronously({}, ctx, callbacks=[on_epoch])
    if args.get("meet") and ctx.job_name != "ps":
        ctx.communicator.barrier()
    return found


def dies_before_training(args: int, ctx: Any) -> Any:
    """Be killed on one rank before it has met its servers, while the others train."""
    if ctx.rank == args:
        os.kill(os.getpid(), signal.SIGKILL)
    return trains_asynchronously({}, ctx)


def dies_beside_its_servers(args: int, ctx: Any) -> Any:
    """Be killed on one rank once it has met its servers, and train nothing on the others."""
    import keras

    optimizer = keras.optimizers.SGD(0.1)
    if ctx.job_name == "ps":
        return ctx.parameter_server(optimizer)
    ctx.distributed_optimizer(optimizer, mode="async")
    if ctx.rank == args:
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx.rank


def protocols_of_servers(args: Any, ctx: Any) -> Any:
    """Return by which protocol each server is reached."""
    import keras

    optimizer = keras.optimizers.SGD(0.1)
    if ctx.job_name == "ps":
        return ctx.parameter_server(optimizer)
    ctx.distributed_optimizer(optimizer, mode="async")
    return [communicator.protocol for communicator in optimizer._sparktf_client.communicators]


def server_dies(args: str, ctx: Any) -> None:
    """Kill the parameter server while the worker trains without end; a file tells when."""

    def die() -> None:
        with open(args, "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if ctx.job_name == "ps":
        threading.Timer(5.0, die).start()
    trains_asynchronously({}, ctx, epochs=1 << 20)
