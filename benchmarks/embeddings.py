"""Sharded tables: rows a second and bytes on the wire, against a dense all-reduce of the same table, and joined slices.

A step looks up the ids of a batch (Zipf, as categories are), has a gradient for each of them, and updates the table by
SGD. Three ways, by the same processes over the same protocol, in interleaved rounds:

- sharded: rows live on one process each; what a batch names is fetched, gradients go back (`ShardedEmbedding`);
- dense: every process has the table, and the gradient of all rows is summed by an all-reduce;
- slices: every process has the table, and the gradients of touched rows are sent to everybody (what a fit does with
  Keras's own Embedding).

Bytes are payload bytes that a process sends in a step; of sharded ones those of its requests and of the answers to
them, which over all processes is the same. TensorFlow takes no part.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparktf.distribute.sparse_optimizers import sparse_optimizer
from sparktf.distribute.table_access import LocalTable, TableAccess, summed
from sparktf.distribute.table_exchange import TableGroup
from sparktf.distribute.table_rows import RowInitializer, TableSpec
from sparktf.transport import Communicator, connect
from sparktf.transport.testing import FileExchange

RATE = 0.1
SGD = sparse_optimizer("SGD", {"momentum": 0.0})
Step = Callable[[np.ndarray], None]


def batches(rank: int, rows: int, batch: int) -> Callable[[], np.ndarray]:
    """Return what gives a step's ids, each once, as a layer looks them up: those of a batch, Zipf over the table."""
    rng = np.random.default_rng(rank)
    return lambda: np.unique((rng.zipf(1.1, batch) - 1) % rows)


def sharded(table: TableAccess) -> Step:
    table.use(SGD)

    def step(ids: np.ndarray) -> None:
        rows = table.lookup(ids)
        table.push(ids, rows, 0.5, RATE)
        table.commit()

    return step


def dense(communicator: Communicator, rows: int, dim: int) -> Step:
    weights, gradient = np.zeros((rows, dim), np.float32), communicator.allocate((rows, dim), np.float32)

    def step(ids: np.ndarray) -> None:
        gradient.fill(0)
        gradient[ids] = weights[ids]
        communicator.all_reduce(gradient)
        gradient.__imul__(np.float32(RATE))
        weights.__isub__(gradient)

    return step


def slices(communicator: Communicator, rows: int, dim: int) -> Step:
    weights = np.zeros((rows, dim), np.float32)

    def step(ids: np.ndarray) -> None:
        everyones = zip(communicator.all_gather(ids), communicator.all_gather(weights[ids]), strict=True)
        touched, total = summed(list(everyones), dim)
        weights[touched] -= np.float32(RATE) * total

    return step


def measure(protocol: str, directory: str, rank: int, ranks: int, options: dict[str, int], told: Any) -> None:
    exchange = FileExchange(Path(directory), rank, ranks)
    rows, dim, batch, seconds = (options[name] for name in ("rows", "dim", "batch", "seconds"))
    with connect(
        protocol, rank=rank, size=ranks, exchange=exchange, secret=b"benchmark", timeout=120.0, host="127.0.0.1"
    ) as communicator:
        spec = TableSpec(rows, dim, 0, RowInitializer("RandomUniform", -0.05, 0.05))
        with TableGroup(communicator, [LocalTable(spec, "table")]) as group:
            ways: dict[str, tuple[Step, Callable[[], int]]] = {
                "sharded": (sharded(group.tables[0]), lambda: group.moved_bytes),
                "dense": (dense(communicator, rows, dim), lambda: communicator.stats.bytes_sent),
                "slices": (slices(communicator, rows, dim), lambda: communicator.stats.bytes_sent),
            }
            draw = batches(rank, rows, batch)
            for _ in range(options["rounds"]):
                for way, (step, sent) in ways.items():
                    told.put((way, *timed(communicator, step, draw, sent, seconds)))


def timed(
    communicator: Communicator, step: Step, draw: Callable[[], np.ndarray], sent: Callable[[], int], seconds: float
) -> tuple[float, float, float]:
    """Return this rank's touched rows a second, bytes a step, and touched rows a step; all ranks take equal steps."""
    step(draw())
    communicator.barrier()
    began = time.perf_counter()
    step(draw())
    # Of the slowest: one number of steps for all.
    taken = communicator.all_reduce(np.array([time.perf_counter() - began]), op="max")[0]
    steps = max(2, min(500, int(seconds / taken)))
    ids = [draw() for _ in range(min(steps, 20))]
    communicator.barrier()
    before, began = sent(), time.perf_counter()
    for number in range(steps):
        step(ids[number % len(ids)])
    communicator.barrier()
    passed, after = time.perf_counter() - began, sent()
    touched = sum(len(ids[number % len(ids)]) for number in range(steps))
    return touched / passed, (after - before) / steps, touched / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--protocol", default="tcp")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for batch in given.batch:
        for rows in given.rows:
            options = {**vars(given), "rows": rows, "batch": batch}
            told = context.Queue()
            with tempfile.TemporaryDirectory() as directory:
                arguments = [
                    (given.protocol, directory, rank, given.ranks, options, told) for rank in range(given.ranks)
                ]
                processes = [context.Process(target=measure, args=a, daemon=True) for a in arguments]
                for process in processes:
                    process.start()
                found = [told.get(timeout=300) for _ in range(given.ranks * given.rounds * 3)]
                for process in processes:
                    process.join(20)
            for way in ("sharded", "dense", "slices"):
                mine = [entry[1:] for entry in found if entry[0] == way]
                rate, sent, touched = (statistics.median(column) for column in zip(*mine, strict=True))
                line = {"table": rows, "batch": batch, "way": way, "touched rows a step and rank": round(touched)}
                rates = {"rows/s of all ranks": round(rate * given.ranks), "bytes sent a step and rank": round(sent)}
                print(json.dumps({**line, **rates, "bytes a touched row": round(sent / touched, 1)}), flush=True)


if __name__ == "__main__":
    main()
