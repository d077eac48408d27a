"""Asynchronous training on a parameter server over RDMA: what it computes, and that it registers memory once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sparktf.transport import Communicator, connect
from sparktf.transport.testing import SECRET, MemoryExchange

WORKERS, STEPS, ROWS, RATE = 2, 12, 16, 0.01
# Under emulation the server takes minutes to trace its update.
SECONDS = 900.0
_RANDOM = np.random.default_rng(4)
# Large enough that messages go from registered memory to registered memory, and are no copies in a queue's slots.
X = _RANDOM.normal(size=(WORKERS, STEPS, ROWS, 512)).astype("float32")
SHAPES = ((512, 300), (300,))
TRUTH = _RANDOM.normal(size=SHAPES[0]).astype("float32") / 16
START = [np.zeros(shape, np.float32) for shape in SHAPES]


def connected(protocol: str) -> tuple[list[Communicator], list[Communicator]]:
    """Return each worker's communicator with the server, and the server's with each worker."""
    ours, theirs = [], []
    with ThreadPoolExecutor(2) as both:
        for _ in range(WORKERS):
            meeting = MemoryExchange(2)

            def join(side: int, meeting: Any = meeting) -> Communicator:
                return connect(
                    protocol,
                    rank=side,
                    size=2,
                    exchange=meeting.of(side),
                    secret=SECRET,
                    timeout=SECONDS,
                    host="127.0.0.1",
                )

            worker, server = both.map(join, (0, 1))
            ours.append(worker)
            theirs.append(server)
    return ours, theirs


def gradients(weights: list[list[Any]], x: Any) -> list[Any]:
    """Return those of half the mean squared error of a linear model, for the rows of a step."""
    (kernel,), (bias,) = weights
    error = (x @ kernel + bias - x @ TRUTH) / len(x)
    return [x.T @ error, error.sum(0)]


def train(protocol: str, max_staleness: int | None) -> tuple[list[Any], list[list[int]], Any]:
    """Fit a linear model; return every worker's weights and registrations by step, and the server's report."""
    import keras

    from sparktf.distribute.client import ParameterClient
    from sparktf.distribute.meeting import Meeting
    from sparktf.distribute.pair import Part
    from sparktf.distribute.server import serve

    ours, theirs = connected(protocol)
    parts = [Part(f"out/{i}", shape, "float32") for i, shape in enumerate(SHAPES)]
    outcomes: list[Any] = [None] * (WORKERS + 1)

    def work(worker: int) -> tuple[list[Any], list[int]]:
        with ParameterClient(ours[worker : worker + 1], worker, max_staleness) as client:
            client.start(parts, START, "SGD", split=True)
            counts = []
            for step in range(STEPS):
                weights = client.pull()
                client.push(gradients(weights, X[worker, step]), RATE)
                counts.append(sum(end.stats.registrations for end in (*client.lanes, theirs[worker])))
            weights = [np.concatenate(rows) for rows in client.finish()]
            assert Meeting(client, worker, WORKERS).all_gather_bytes(b"%d" % worker) == [b"0", b"1"]
            return weights, counts

    def run(place: int, main: Callable[[], Any]) -> None:
        try:
            outcomes[place] = main()
        except BaseException as error:
            outcomes[place] = error

    mains = [lambda w=w: work(w) for w in range(WORKERS)]
    mains.append(lambda: serve(theirs, keras.optimizers.SGD(RATE, momentum=0.5), SECONDS))
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(mains)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it hangs"
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [weights for weights, _ in outcomes[:-1]], [counts for _, counts in outcomes[:-1]], outcomes[-1]


@pytest.mark.timeout(1100)
def test_a_parameter_server_over_rdma_gives_the_weights_of_one_over_tcp() -> None:
    (over_rdma, counts, report), (over_tcp, _, _) = train("rdma", 0), train("tcp", 0)
    assert report.updates == STEPS
    for weights in over_rdma:
        for ours, theirs in zip(weights, over_tcp[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    before, after = (np.abs(kernel - TRUTH).mean() for kernel in (START[0], over_rdma[0][0]))
    assert after < 0.9 * before
    for registered in counts:
        # All of it is there before the second push.
        assert registered[0] > 0
        assert registered[1:] == registered[1:2] * (STEPS - 1)


@pytest.mark.timeout(600)
def test_workers_at_their_own_pace_over_rdma_end_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two pushes of a worker under way, as with large gradients.
    monkeypatch.setattr("sparktf.distribute.pair.LARGE_BYTES", 0)
    (first, second), counts, report = train("rdma", None)
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert report.pushes == (STEPS, STEPS)
    for registered in counts:
        assert registered[1:] == registered[1:2] * (STEPS - 1)
