"""Parameter servers and their workers as threads of one process, over a real transport."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from sparktf.distribute.asynchronous import push_and_pull
from sparktf.distribute.client import ParameterClient
from sparktf.distribute.server import ServerReport, serve
from sparktf.transport import Communicator, connect
from sparktf.transport.testing import SECRET, FileExchange, MemoryExchange

# Keras seeds Python's and numpy's generators, which all threads share.
MAKING = threading.Lock()

# Longer than any test: a worker may compute as long as it likes.
_SERVER_SECONDS = 3600.0


@dataclass(frozen=True)
class Served:
    """What came of it: each worker's return value or error, each server's report or error."""

    workers: list[Any]
    servers: list[ServerReport]

    def raise_first(self) -> Served:
        for outcome in (*self.servers, *self.workers):
            if isinstance(outcome, BaseException):
                raise outcome
        return self


def connected(protocol: str, workers: int, servers: int, timeout: float) -> tuple[list[Any], list[Any]]:
    """Return each worker's communicators, by server, and each server's, by worker."""
    pairs: dict[tuple[int, int, int], Communicator] = {}

    def join(worker: int, server: int, rank: int, exchange: Any, seconds: float) -> None:
        pairs[worker, server, rank] = _meet(exchange, rank, seconds, protocol)

    with ThreadPoolExecutor(2) as both:
        for worker in range(workers):
            for server in range(servers):
                meeting = MemoryExchange(2)
                ends = [
                    both.submit(join, worker, server, rank, meeting.of(rank), seconds)
                    for rank, seconds in enumerate((timeout, _SERVER_SECONDS))
                ]
                for end in ends:
                    end.result(30)
    ours = [[pairs[worker, server, 0] for server in range(servers)] for worker in range(workers)]
    theirs = [[pairs[worker, server, 1] for worker in range(workers)] for server in range(servers)]
    return ours, theirs


def train(
    main: Callable[[int, Any], Any],
    optimizer: Callable[[], Any],
    *,
    workers: int = 2,
    servers: int = 1,
    protocol: str = "tcp",
    max_staleness: int | None = None,
    compression: str = "none",
    timeout: float = 60.0,
    guest: Path | None = None,
) -> Served:
    """Run ``main(worker, optimizer)`` on every worker, with an optimizer that pushes and pulls.

    `guest` is the directory of one more worker, in a process of its own, that runs `train_in_process`.
    """
    ours, theirs = connected(protocol, workers, servers, timeout)
    if guest is not None:
        theirs[0].append(_meet(FileExchange(guest, 1, 2), 1, _SERVER_SECONDS))
    outcomes: dict[tuple[str, int], Any] = {}

    def run(role: str, number: int, function: Callable[[], Any]) -> None:
        try:
            outcomes[role, number] = function()
        except BaseException as error:
            outcomes[role, number] = error

    def work(worker: int) -> Any:
        client = ParameterClient(ours[worker], worker, max_staleness, compression)
        # Tables are left before their servers are.
        with client, ExitStack() as closing:
            return main(worker, push_and_pull(optimizer(), client, closing=closing))

    roles = {("worker", w): partial(work, w) for w in range(workers)}
    roles |= {("server", s): lambda s=s: serve(theirs[s], optimizer(), timeout) for s in range(servers)}
    threads = [threading.Thread(target=run, args=(*role, function), daemon=True) for role, function in roles.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "it hangs"
    return Served([outcomes["worker", w] for w in range(workers)], [outcomes["server", s] for s in range(servers)])


def _meet(exchange: Any, rank: int, timeout: float, protocol: str = "tcp") -> Communicator:
    return connect(protocol, rank=rank, size=2, exchange=exchange, secret=SECRET, timeout=timeout, host="127.0.0.1")


def train_in_process(directory: str) -> None:
    """Be worker 1 of a server in another process, until killed."""
    communicator = _meet(FileExchange(Path(directory), 0, 2), 0, 60.0)
    client = ParameterClient([communicator], 1, max_staleness=1)
    train_forever(push_and_pull(keras.optimizers.SGD(0.05), client))


def train_forever(optimizer: Any) -> None:
    """Fit a linear model on ones without end."""
    model = regression(1)
    model.compile(optimizer, "mse")
    model.fit(np.ones((16, 6)), np.ones((16, 3)), epochs=1 << 30, verbose=0)


def regression(seed: int, features: int = 6) -> keras.Model:
    """Return a linear model with weights of that seed, not compiled."""
    with MAKING:
        keras.utils.set_random_seed(seed)
        return keras.Sequential([keras.Input((features,)), keras.layers.Dense(3, name="out")])
