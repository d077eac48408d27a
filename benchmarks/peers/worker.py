"""One rank of one contender of `benchmarks/transport.py`: reads runs from standard input, answers on standard output.

A run is a line ``{"nbytes", "iterations"}``; the answer ``{"seconds", "cpu"}``: wall-clock seconds and CPU seconds of
this process for one all-reduce (sum of float32), the mean of the iterations after one that does not count.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Operation = Callable[[], object]
# Given a number of float32, prepares one operation on as many.
Contender = Callable[[int], Operation]


def ours(protocol: str, rank: int, size: int, directory: str, *, allocated: bool = False) -> Contender:
    from sparktf import transport
    from sparktf.transport.testing import SECRET, FileExchange

    exchange = FileExchange(Path(directory), rank, size)
    host = os.environ.get("BENCH_HOST", "127.0.0.1")
    comm = transport.connect(protocol, rank=rank, size=size, exchange=exchange, secret=SECRET, timeout=60, host=host)

    def prepare(length: int) -> Operation:
        array = comm.allocate(length, np.float32) if allocated else np.zeros(length, np.float32)
        # Sums of sums stay what they are; pages that were never written would all be one.
        array[:] = 0
        return lambda: comm.all_reduce(array)

    return prepare


def gloo(rank: int, size: int, directory: str) -> Contender:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{directory}/gloo", rank=rank, world_size=size)

    def prepare(length: int) -> Operation:
        array = torch.full((length,), 0.0)
        return lambda: dist.all_reduce(array)

    return prepare


def grpc(rank: int, size: int, directory: str) -> Contender:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    host = os.environ.get("BENCH_HOST", "127.0.0.1")
    with socket.create_server((host, 0)) as holder:
        port = holder.getsockname()[1]
    own = Path(directory, f"{rank}.part")
    own.write_text(f"{host}:{port}")
    own.rename(Path(directory, str(rank)))
    files = [Path(directory, str(peer)) for peer in range(size)]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    cluster = {"worker": [file.read_text() for file in files]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})
    import tensorflow as tf

    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.RING
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)

    def prepare(length: int) -> Operation:
        array = tf.fill([length], np.float32(0))

        @tf.function
        def step() -> tf.Tensor:
            def replica() -> tf.Tensor:
                return tf.distribute.get_replica_context().all_reduce("sum", array, options)

            return strategy.run(replica)

        return lambda: step()

    return prepare


def memory_bound(rank: int, size: int, directory: str) -> Contender:
    """Do the additions and copies that shared memory cannot do without, with nobody waiting for anybody."""
    from sparktf.transport.reduction import shard_bounds
    from sparktf.transport.segment import Segment
    from sparktf.transport.testing import FileExchange

    meetings = iter(range(1000))

    def prepare(length: int) -> Operation:
        place = Path(directory, f"meeting{next(meetings)}")
        place.mkdir(exist_ok=True)
        own = Segment.create(4 * length)
        paths = FileExchange(place, rank, size)(own.path.encode())
        parts = [Segment.attach(path.decode(), 4 * length).array.view(np.float32) for path in paths]
        parts[rank] = own.array.view(np.float32)
        after = Path(directory, f"attached{place.name}")
        after.mkdir(exist_ok=True)
        FileExchange(after, rank, size)(b"")
        own.unlink()
        parts[rank][:] = 0
        bounds = shard_bounds(length, size)

        def operation() -> None:
            mine = slice(*bounds[rank])
            for peer in range(size):
                if peer != rank:
                    np.add(parts[rank][mine], parts[peer][mine], out=parts[rank][mine])
            for peer in range(size):
                if peer != rank:
                    np.copyto(parts[rank][slice(*bounds[peer])], parts[peer][slice(*bounds[peer])])

        return operation

    return prepare


def raw_tcp(rank: int, size: int, directory: str) -> Contender:
    """Send and receive around a ring what an all-reduce must, and do nothing with it."""
    from sparktf.transport.testing import FileExchange

    with socket.create_server(("127.0.0.1", 0)) as listener:
        ports = FileExchange(Path(directory), rank, size)(str(listener.getsockname()[1]).encode())
        right = socket.create_connection(("127.0.0.1", int(ports[(rank + 1) % size])))
        left, _ = listener.accept()

    def prepare(length: int) -> Operation:
        nbytes = 2 * (size - 1) * 4 * length // size
        data, target = bytes(min(nbytes, 1 << 20)), memoryview(bytearray(min(nbytes, 1 << 20)))

        def send() -> None:
            for start in range(0, nbytes, len(data)):
                right.sendall(memoryview(data)[: min(len(data), nbytes - start)])

        def operation() -> None:
            sender = threading.Thread(target=send)
            sender.start()
            left_over = nbytes
            while left_over:
                left_over -= left.recv_into(target, min(len(target), left_over))
            sender.join()

        return operation

    return prepare


def serve(contender: Contender) -> None:
    """Answer runs until standard input ends."""
    operation: Operation = lambda: None  # noqa: E731
    length = -1
    print("ready", flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        if run["nbytes"] // 4 != length:
            length = run["nbytes"] // 4
            operation = contender(length)
        operation()
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(run["iterations"]):
            operation()
        seconds, spent = time.perf_counter() - begin, time.process_time() - cpu
        print(json.dumps({"seconds": seconds / run["iterations"], "cpu": spent / run["iterations"]}), flush=True)


def main() -> None:
    kind, rank, size, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    contenders: dict[str, Callable[[], Contender]] = {
        "tcp": lambda: ours("tcp", rank, size, directory),
        "shm": lambda: ours("shm", rank, size, directory, allocated=True),
        "shm, any array": lambda: ours("shm", rank, size, directory),
        "rdma": lambda: ours("rdma", rank, size, directory, allocated=True),
        "rdma, any array": lambda: ours("rdma", rank, size, directory),
        "gloo": lambda: gloo(rank, size, directory),
        "grpc": lambda: grpc(rank, size, directory),
        "memory": lambda: memory_bound(rank, size, directory),
        "raw tcp": lambda: raw_tcp(rank, size, directory),
    }
    serve(contenders[kind]())


if __name__ == "__main__":
    main()
