"""Parameter servers: pushes a second against the memory's bound, and rows a second with a slow worker against in step.

The first part runs servers and workers as processes. A push is a message with gradients for all weights, an update by
plain SGD, and a message with all weights back. The bound is what a server's memory cannot do without, by one thread of
this machine: a copy in, the update, a copy into the answer, a copy out.

In the second, four workers are threads that compute by sleeping, one of them for twice as long: the protocol is
measured, not the machine. In step they sum their gradients by an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np

from sparktf.distribute.client import ParameterClient
from sparktf.distribute.pair import Part
from sparktf.distribute.server import ServerReport, serve
from sparktf.transport import Communicator, connect
from sparktf.transport.testing import FileExchange, MemoryExchange, results_of_threads

MIB = 1 << 20
WORKERS, BATCH = 4, 32


def sgd() -> Any:
    import keras

    return keras.optimizers.SGD(1e-3)


def parts_of(nbytes: int) -> list[Part]:
    return [Part(f"layer_{i}/kernel", (nbytes // 4 // 8 // 256, 256), "float32") for i in range(8)]


def started(communicators: Sequence[Communicator], worker: int, nbytes: int, max_staleness: int | None) -> Any:
    """Return a client whose servers have all weights, and gradients for it."""
    parts = parts_of(nbytes)
    zeros = [np.zeros(part.shape, np.float32) for part in parts]
    client = ParameterClient(communicators, worker, max_staleness)
    client.start(parts, zeros, "SGD", split=True)
    return client, zeros


def pair(protocol: str, directory: str, worker: int, server: int, side: int) -> Communicator:
    place = Path(directory, f"{worker}-{server}")
    place.mkdir(exist_ok=True)
    exchange = FileExchange(place, side, 2)
    return connect(protocol, rank=side, size=2, exchange=exchange, secret=b"benchmark", timeout=300.0, host="127.0.0.1")


def serve_in_process(protocol: str, directory: str, server: int, workers: int) -> None:
    serve([pair(protocol, directory, worker, server, 1) for worker in range(workers)], sgd(), 300.0)


def push_in_process(
    protocol: str, directory: str, worker: int, servers: int, nbytes: int, seconds: float, told: Any
) -> None:
    communicators = [pair(protocol, directory, worker, server, 0) for server in range(servers)]
    client, gradients = started(communicators, worker, nbytes, None)
    with client:
        for _ in range(3):
            client.push(gradients, 1e-3)
        client.pull()
        began, pushes = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            client.push(gradients, 1e-3)
            pushes += 1
        client.pull()
        told.put(pushes / (time.perf_counter() - began))


def pushes_a_second(protocol: str, workers: int, servers: int, nbytes: int, seconds: float) -> float:
    """Return how many times a second all weights are updated, by all workers together."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=serve_in_process, args=(protocol, directory, server, workers), daemon=True)
            for server in range(servers)
        ] + [
            context.Process(
                target=push_in_process, args=(protocol, directory, worker, servers, nbytes, seconds, told), daemon=True
            )
            for worker in range(workers)
        ]
        for process in processes:
            process.start()
        try:
            return sum(told.get(timeout=120) for _ in range(workers))
        finally:
            for process in processes:
                process.join(20)
                process.kill()


def memory_bound(nbytes: int) -> float:
    """Return how many pushes a second one thread's memory accesses would allow."""
    sent, received, weights, answer, arrived = (np.ones(nbytes // 4, np.float32) for _ in range(5))
    times = []
    for _ in range(7):
        began = time.perf_counter()
        np.copyto(received, sent)
        # The update in one pass, as TensorFlow makes it: pieces stay in the cache between the two operations.
        for start in range(0, weights.size, 1 << 14):
            piece = slice(start, start + (1 << 14))
            weights[piece] -= received[piece] * np.float32(1e-3)
        np.copyto(answer, weights)
        np.copyto(arrived, answer)
        times.append(time.perf_counter() - began)
    return 1 / statistics.median(times)


def measure_pushes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    nbytes = arguments.mebibytes * MIB
    results = []
    for protocol in arguments.protocols:
        for workers, servers in arguments.layouts:
            rates, shares = [], []
            for _ in range(arguments.rounds):
                # Both within one round: the machine's own speed drifts.
                bound = memory_bound(nbytes)
                rates.append(pushes_a_second(protocol, workers, servers, nbytes, arguments.seconds))
                shares.append(rates[-1] / bound)
            rate, share = statistics.median(rates), statistics.median(shares)
            print(
                f"{protocol}, {workers} workers, {servers} servers, {arguments.mebibytes} MiB: {rate:.1f} pushes/s, "
                f"{share:.2f} of the memory's bound for one server",
                flush=True,
            )
            results.append({"protocol": protocol, "workers": workers, "servers": servers, "rate": rate, "share": share})
    return results


def seconds_of(worker: int, workers: int, step: float) -> float:
    """Return how long a worker computes: the last of several for twice as long."""
    return step * (2 if workers > 1 and worker == workers - 1 else 1)


def in_step(step: float, seconds: float, nbytes: int) -> list[float]:
    """Return each worker's steps a second where all wait for each other."""
    steps = int(seconds / (2 * step))

    def main(communicator: Communicator) -> float:
        gradient = communicator.allocate(nbytes // 4, np.float32)
        communicator.all_reduce(gradient)
        began = time.perf_counter()
        for _ in range(steps):
            time.sleep(seconds_of(communicator.rank, WORKERS, step))
            communicator.all_reduce(gradient, "mean")
        return steps / (time.perf_counter() - began)

    return results_of_threads("tcp", WORKERS, main)


def at_ones_own_pace(workers: int, step: float, seconds: float, nbytes: int, max_staleness: int | None) -> list[float]:
    """Return each worker's steps a second on one parameter server."""
    ends: dict[tuple[int, int], Communicator] = {}

    def join(worker: int, side: int, exchange: Any) -> None:
        ends[worker, side] = connect(
            "tcp", rank=side, size=2, exchange=exchange, secret=b"benchmark", timeout=300.0, host="127.0.0.1"
        )

    with ThreadPoolExecutor(2) as both:
        for worker in range(workers):
            meeting = MemoryExchange(2)
            list(both.map(lambda side, w=worker, m=meeting: join(w, side, m.of(side)), (0, 1)))
    all_there = threading.Barrier(workers)

    def work(worker: int) -> float:
        client, gradients = started([ends[worker, 0]], worker, nbytes, max_staleness)
        with client:
            all_there.wait(60)
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                time.sleep(seconds_of(worker, workers, step))
                if client.overlaps:
                    client.pull()
                client.push(gradients, 1e-3)
                if not client.overlaps:
                    client.pull()
                steps += 1
            rate = steps / (time.perf_counter() - began)
            client.finish()
            return rate

    with ThreadPoolExecutor(workers + 1) as threads:
        server = threads.submit(serve, [ends[worker, 1] for worker in range(workers)], sgd(), 300.0)
        rates = list(threads.map(work, range(workers)))
        report: ServerReport = server.result(60)
    assert not report.lost
    return rates


def measure_slow_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    step, seconds, nbytes = arguments.step / 1e3, arguments.seconds, arguments.kibibytes * 1024
    kinds: dict[str, Callable[[], list[float]]] = {
        "sync": lambda: in_step(step, seconds, nbytes),
        "async": lambda: at_ones_own_pace(WORKERS, step, seconds, nbytes, None),
        "staleness 4": lambda: at_ones_own_pace(WORKERS, step, seconds, nbytes, 4),
        "staleness 0": lambda: at_ones_own_pace(WORKERS, step, seconds, nbytes, 0),
        "alone": lambda: at_ones_own_pace(1, step, seconds, nbytes, None),
    }
    rounds = [{kind: measure() for kind, measure in kinds.items()} for _ in range(arguments.rounds)]
    rows = {kind: statistics.median(sum(r[kind]) for r in rounds) * BATCH for kind in kinds}
    ratio = statistics.median(sum(r["async"]) / sum(r["sync"]) for r in rounds)
    kept = statistics.median(min(r["async"][:-1]) / r["alone"][0] for r in rounds)
    for kind, rate in rows.items():
        print(f"one of {WORKERS} at half speed, {arguments.kibibytes} KiB, {kind}: {rate:.0f} rows/s", flush=True)
    print(f"async / sync: {ratio:.2f}; slowest of the others by its speed alone: {kept:.2f}", flush=True)
    return {"rows": rows, "ratio": ratio, "kept": kept}


def layout(text: str) -> tuple[int, int]:
    """Return how many workers and servers a word like "2x4" says."""
    workers, servers = text.split("x")
    return int(workers), int(servers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument("--parts", nargs="*", default=["slow worker", "pushes"], choices=["slow worker", "pushes"])
    parser.add_argument("--protocols", nargs="*", default=["tcp", "shm"])
    parser.add_argument(
        "--layouts",
        nargs="*",
        type=layout,
        default=[(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4)],
        help="workers x servers",
    )
    parser.add_argument("--mebibytes", type=int, default=64, help="of weights in the first part")
    parser.add_argument("--kibibytes", type=int, default=256, help="of weights in the second")
    parser.add_argument("--step", type=float, default=20.0, help="milliseconds that a worker computes")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    measures: dict[str, Callable[[argparse.Namespace], Any]] = {
        "slow worker": measure_slow_worker,
        "pushes": measure_pushes,
    }
    figures = {part: measures[part](arguments) for part in arguments.parts}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
