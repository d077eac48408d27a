"""Workers that train at their own pace on parameter servers, over real transports."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import servers
import tensorflow as tf

from sparktf.distribute import pair
from sparktf.distribute.asynchronous import push_and_pull
from sparktf.distribute.client import ParameterClient
from sparktf.distribute.gate import Gate
from sparktf.distribute.meeting import unpack_brought
from sparktf.distribute.pair import Part
from sparktf.distribute.rates import Rates
from sparktf.distribute.served import ServedVariables
from sparktf.distribute.server import serve
from sparktf.errors import HandshakeError, ParamError, PeerLostError, TransportTimeoutError
from sparktf.transport.testing import processes


@pytest.fixture(autouse=True)
def two_pushes_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with models whose gradients are large."""
    monkeypatch.setattr(pair, "LARGE_BYTES", 0)


def _data(seed: int = 0, rows: int = 256) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype("float32")
    return x, (x @ rng.normal(size=(6, 3)) + 1).astype("float32")


def _fit(x: np.ndarray, y: np.ndarray, workers: int, epochs: int, batch: int = 16, **kwargs: Any) -> Callable[..., Any]:
    """Return a worker's main: fit a linear model on every n-th row; it returns the model."""

    def main(worker: int, optimizer: Any) -> keras.Model:
        model = servers.regression(worker)
        model.compile(optimizer, "mse", **kwargs)
        assert not model.jit_compile
        mine = slice(worker, None, workers)
        model.fit(x[mine], y[mine], batch_size=batch, epochs=epochs, shuffle=False, verbose=0)
        return model

    return main


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_asynchronous_sgd_comes_as_near_as_sync_on_a_convex_problem(workers: int, seed: int) -> None:
    x, y = _data(seed)
    main = _fit(x, y, workers, epochs=20, batch=8)
    served = servers.train(main, lambda: keras.optimizers.SGD(0.02), workers=workers).raise_first()
    (report,) = served.servers
    assert report.updates == sum(report.pushes) == 20 * 256 // 8
    # Mode "sync" is one process on the global batch.
    sync = servers.regression(0)
    sync.compile(keras.optimizers.SGD(0.02), "mse")
    sync.fit(x, y, batch_size=8 * workers, epochs=20, shuffle=False, verbose=0)
    reached = np.mean((sync(x) - y) ** 2)
    for model in served.workers:
        error = np.mean((model(x) - y) ** 2)
        assert error < 1e-3
        assert error < reached + 1e-3


def test_all_workers_end_with_the_same_weights() -> None:
    x, y = _data()
    served = servers.train(
        _fit(x, y, 3, epochs=2), lambda: keras.optimizers.SGD(0.05), workers=3, servers=2
    ).raise_first()
    for model in served.workers[1:]:
        for ours, theirs in zip(model.get_weights(), served.workers[0].get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_all_workers_get_the_weights_of_the_end_though_one_begins_anew_before_another_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = _data()
    went_on = threading.Event()
    finished = Gate.finished

    def late(gate: Gate, end: int, seconds: float) -> bool:
        reached = finished(gate, end, seconds)
        if reached and threading.current_thread().name == "sparktf-serve-1":
            assert went_on.wait(30)
        return reached

    monkeypatch.setattr(Gate, "finished", late)
    # The first push of a fit has been answered when its second begins.
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: went_on.set() if batch == 2 else None)

    def main(worker: int, optimizer: Any) -> list[np.ndarray]:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=64, epochs=1, verbose=0)
        ended = model.get_weights()
        model.fit(x, y, batch_size=64, epochs=1, verbose=0, callbacks=[note])
        return ended

    first, second = servers.train(main, lambda: keras.optimizers.SGD(0.05)).raise_first().workers
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


_OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)),
    "decay, clipped by value": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1, clipvalue=0.2),
    "clipped by norm": lambda: keras.optimizers.RMSprop(0.05, clipnorm=0.1),
}


@pytest.mark.parametrize(("name", "protocol"), [*((name, "tcp") for name in _OPTIMIZERS), ("momentum", "shm")])
def test_no_staleness_is_one_process_on_the_global_batch(name: str, protocol: str) -> None:
    x, y = _data()
    main = _fit(x, y, 2, epochs=3)
    served = servers.train(main, _OPTIMIZERS[name], servers=2, max_staleness=0, protocol=protocol).raise_first()
    assert [report.updates for report in served.servers] == [24, 24]
    one = servers.regression(0)
    one.compile(_OPTIMIZERS[name](), "mse")
    before = one.get_weights()
    one.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0)
    assert np.abs(one.get_weights()[0] - before[0]).max() > 1e-2
    for ours, theirs in zip(served.workers[1].get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_steps_executed_together_keep_their_order(compression: str) -> None:
    x, y = _data()
    fit = _fit(x, y, 2, epochs=3, steps_per_execution=4)
    sent: dict[int, int] = {}

    def main(worker: int, optimizer: Any) -> keras.Model:
        model = fit(worker, optimizer)
        sent[worker] = sum(lane.stats.bytes_sent for lane in optimizer._sparktf_client.lanes)
        return model

    served = servers.train(
        main, lambda: keras.optimizers.SGD(0.05), max_staleness=0, compression=compression
    ).raise_first()
    one = servers.regression(0)
    one.compile(keras.optimizers.SGD(0.05), "mse")
    one.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0)
    tolerance = 1e-5 if compression == "none" else 1e-2
    for ours, theirs in zip(served.workers[0].get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    # Pushes: a request of 32 bytes, 6 x 3 and 3 gradients, each variable's on a boundary of 64 bytes.
    assert 24 * (32 + (192 if compression == "none" else 128)) <= sent[1] < 24 * (32 + 192) + 1000
    assert compression == "none" or sent[1] < 24 * (32 + 128) + 1000


def test_rounds_of_one_worker_may_come_before_those_of_two() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> keras.Model:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        if worker == 0:
            model.fit(x, y, batch_size=32, epochs=1, verbose=0)
        else:
            optimizer.build(model.trainable_variables)
            optimizer.finalize_variable_values(model.trainable_variables)
        model.fit(x[worker::2], y[worker::2], batch_size=32, epochs=1, verbose=0)
        return model

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05), max_staleness=0, compression="bf16").raise_first()
    assert served.servers[0].pushes == (8 + 4, 4)
    assert served.servers[0].updates == 8 + 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Lamb(0.05),
        lambda: keras.optimizers.Adafactor(0.1),
        lambda: keras.optimizers.Muon(0.05),
        lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.05),
    ],
    ids=["Lamb", "Adafactor", "Muon", "global norm"],
)
def test_what_looks_at_a_whole_is_given_it_on_two_servers(make: Callable[[], Any]) -> None:
    x, y = _data()
    served = servers.train(_fit(x, y, 1, epochs=2), make, workers=1, servers=2, max_staleness=0).raise_first()
    one = servers.regression(0)
    one.compile(make(), "mse")
    one.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(served.workers[0].get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_state_and_schedule_live_on_the_server() -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(keras.optimizers.Adam(keras.optimizers.schedules.PiecewiseConstantDecay([9], [0.1, 0.0])))
        return made[-1]

    x, y = _data()
    served = servers.train(_fit(x, y, 2, epochs=2), make).raise_first()
    (on_server,) = [o for o in made if not hasattr(o, "_sparktf_client")]
    assert int(on_server.iterations.numpy()) == served.servers[0].updates == 32
    assert float(on_server.learning_rate) == 0.0
    state = [v for v in on_server.variables if "momentum" in v.path]
    assert state
    assert all(np.abs(v.numpy()).max() > 0 for v in state)
    for worker in made:
        if worker is not on_server:
            assert [v.name for v in worker.variables] == ["iteration"]
            assert int(worker.iterations.numpy()) == 32


def test_a_rate_set_by_the_chiefs_callback_reaches_the_server() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> list[np.ndarray]:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=32, epochs=1, verbose=0)
        before = model.get_weights()
        model.optimizer.learning_rate = 0.0
        model.fit(x, y, batch_size=32, epochs=1, verbose=0)
        return [np.abs(a - b).max() for a, b in zip(before, model.get_weights(), strict=True)]

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05), workers=1).raise_first()
    assert served.workers[0] == [0.0, 0.0]


def test_the_rate_of_the_next_worker_counts_once_the_chief_has_left() -> None:
    x, y = _data()
    # Rows that no weights fit, so that every update changes them.
    y += np.random.default_rng(1).normal(size=y.shape)

    def main(worker: int, optimizer: Any) -> bool:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=32, epochs=1, verbose=0)
        model.optimizer.learning_rate = 0.0
        for _ in range(200 * worker):
            before = model.get_weights()
            model.fit(x[:32], y[:32], batch_size=32, epochs=1, verbose=0)
            if all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)):
                return True
        return False

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05)).raise_first()
    assert served.workers == [False, True]


def test_the_rate_is_that_of_the_lowest_worker_that_is_there_and_is_set_when_it_changes() -> None:
    followed: list[float] = []
    rates = Rates(3, followed.append)
    rates.tell(1, 0.5)
    assert followed == []
    for worker, rate in [(0, 0.1), (0, 0.1), (1, 0.2), (0, float("nan")), (0, 0.3)]:
        rates.tell(worker, rate)
    assert followed == [0.1, 0.3]
    rates.leave(0)
    assert followed == [0.1, 0.3, 0.2]
    # The next has told nothing yet.
    rates.leave(1)
    rates.leave(2)
    assert followed == [0.1, 0.3, 0.2]


def test_the_staleness_allowed_is_never_exceeded_by_a_faster_worker() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> None:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        pause = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.01 * worker))
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[pause])

    (report,) = servers.train(main, lambda: keras.optimizers.SGD(0.05), max_staleness=2).raise_first().servers
    assert report.lead == 2
    assert report.pushes == (32, 32)


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
@pytest.mark.parametrize("max_staleness", [None, 0])
def test_nothing_is_allocated_or_registered_after_the_first_step(protocol: str, max_staleness: int | None) -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> list[int]:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        counts: list[int] = []
        client = optimizer._sparktf_client

        def count(batch: int, logs: Any) -> None:
            assert len(client.lanes) == len(client.communicators) * (1 if max_staleness == 0 else 2)
            counts.append(sum(lane.stats.registrations for lane in client.lanes))

        note = keras.callbacks.LambdaCallback(on_train_batch_end=count)
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[note])
        return counts

    served = servers.train(
        main, lambda: keras.optimizers.Adam(), servers=2, protocol=protocol, max_staleness=max_staleness
    ).raise_first()
    for counts in served.workers:
        assert len(counts) == 32
        assert len(set(counts)) == 1


@pytest.mark.parametrize(("max_staleness", "under_way"), [(0, 1), (1, 1), (2, 2), (None, 2)])
def test_a_worker_waits_once_as_many_pushes_are_under_way_as_staleness_allows(
    max_staleness: int | None, under_way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, apply = threading.Event(), ServedVariables.apply
    monkeypatch.setattr(ServedVariables, "apply", lambda self, pushes: go_on.wait(30) and apply(self, pushes))
    ours, theirs = servers.connected("tcp", 1, 1, 30.0)
    ones = [np.ones(3, np.float32)]
    with ThreadPoolExecutor(2) as threads:
        server = threads.submit(serve, theirs[0], keras.optimizers.SGD(0.5), 30.0)
        with ParameterClient(ours[0], 0, max_staleness) as client:
            client.start([Part("w", (3,), "float32")], [np.zeros(3, np.float32)], "SGD", split=False)
            for _ in range(under_way):
                client.push(ones, 0.5)
            one_more = threads.submit(client.push, ones, 0.5)
            assert not wait([one_more], 0.5).done
            go_on.set()
            one_more.result(30)
            ((weights,),) = client.finish()
            np.testing.assert_array_equal(weights, np.full(3, -0.5 * (under_way + 1)))
    assert server.result(30).pushes == (under_way + 1,)


def test_pulled_weights_stay_as_they_are_until_the_next_push(monkeypatch: pytest.MonkeyPatch) -> None:
    may_apply, apply = threading.Semaphore(0), ServedVariables.apply
    monkeypatch.setattr(
        ServedVariables, "apply", lambda self, pushes: may_apply.acquire(timeout=60) and apply(self, pushes)
    )
    ours, theirs = servers.connected("tcp", 1, 1, 60.0)
    with ThreadPoolExecutor(1) as threads:
        server = threads.submit(serve, theirs[0], keras.optimizers.SGD(0.5), 60.0)
        with ParameterClient(ours[0], 0) as client:
            client.start([Part("w", (3,), "float32")], [np.zeros(3, np.float32)], "SGD", split=False)
            for pushed in range(4):
                client.push([np.ones(3, np.float32)], 0.5)
                ((weights,),) = client.pull()
                may_apply.release()
                (under_way,) = client._in_flight._under_way
                assert wait(under_way.futures, 60).not_done == set()
                # The answer has come, but was not taken.
                np.testing.assert_array_equal(weights, np.full(3, -0.5 * pushed))
    server.result(60)


def test_a_worker_of_which_one_connection_breaks_is_lost_as_a_whole_though_it_waits_in_a_meeting() -> None:
    ours, theirs = servers.connected("tcp", 2, 1, 60.0)
    parts, zeros, ones = [Part("w", (3,), "float32")], [np.zeros(3, np.float32)], [np.ones(3, np.float32)]
    with ThreadPoolExecutor(2) as threads:
        server = threads.submit(serve, theirs[0], keras.optimizers.SGD(0.5), 60.0)
        with ParameterClient(ours[0], 0) as chief, ParameterClient(ours[1], 1) as other:
            chief.start(parts, zeros, "SGD", split=False)
            other.start(parts, zeros, "SGD", split=False)
            other.push(ones, 0.5)
            meeting = threads.submit(other.meet, b"other")
            time.sleep(0.3)
            other.lanes[-1].abort("its cable is cut")
            # Else the chief might come to the meeting before the server has heard of it.
            with pytest.raises(PeerLostError, match="parameter server 0: "):
                meeting.result(60)
            chief.push(ones, 0.5)
            assert unpack_brought(chief.meet(b"chief"))[0] == b"chief"
            # All that are there have finished.
            ((weights,),) = chief.finish()
            np.testing.assert_array_equal(weights, np.full(3, -1))
        assert server.result(60).lost == (1,)


def test_a_loop_of_ones_own_and_sparse_gradients() -> None:
    def main(worker: int, optimizer: Any) -> tuple[np.ndarray, np.ndarray]:
        table = keras.Variable(np.full((5, 2), worker, "float32"), name="table")
        unused = keras.Variable(np.ones(3, "float32"), name="unused")

        @tf.function
        def step(rows: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.gather(table.value, rows))
            (gradient,) = tape.gradient(loss, [table.value])
            assert isinstance(gradient, tf.IndexedSlices)
            optimizer.apply_gradients([(gradient, table), (None, unused)])

        for _ in range(2):
            step(tf.constant([1, 3, 3]))
        optimizer.finalize_variable_values([table, unused])
        return table.numpy(), unused.numpy()

    served = servers.train(main, lambda: keras.optimizers.SGD(0.5)).raise_first()
    for table, unused in served.workers:
        np.testing.assert_array_equal(table, [[0, 0], [-2, -2], [0, 0], [-4, -4], [0, 0]])
        np.testing.assert_array_equal(unused, [1, 1, 1])


def test_half_precision_skips_its_steps_on_the_worker() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> keras.Model:
        with servers.MAKING:
            keras.utils.set_random_seed(worker)
            model = keras.Sequential(
                [keras.Input((6,)), keras.layers.Dense(3, dtype=keras.DTypePolicy("mixed_float16"))]
            )
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**40), "mse")
        model.fit(x, y, batch_size=16, epochs=6, verbose=0)
        return model

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05)).raise_first()
    # Such a scale overflows until it has been halved often enough.
    assert all(0 < pushes < 96 for pushes in served.servers[0].pushes)
    assert np.mean((np.asarray(served.workers[0](x), np.float32) - y) ** 2) < 1e-2


def test_a_model_saved_in_between_loads_as_the_plain_one(tmp_path: Path) -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> np.ndarray:
        model = _fit(x, y, 1, epochs=1)(worker, optimizer)
        model.save(tmp_path / "model.keras")
        return model(x).numpy()

    predicted = servers.train(main, lambda: keras.optimizers.Adam(0.05), workers=1).raise_first().workers[0]
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    np.testing.assert_allclose(loaded(x), predicted, rtol=1e-6)
    loaded.fit(x, y, verbose=0)


def test_workers_with_other_models_are_refused() -> None:
    def main(worker: int, optimizer: Any) -> None:
        model = servers.regression(worker, features=6 + worker)
        model.compile(optimizer, "mse")
        model.fit(np.ones((8, 6 + worker)), np.ones((8, 3)), verbose=0)

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05))
    assert isinstance(served.servers[0], HandshakeError)
    assert "out/kernel of float32 (7, 3)" in str(served.servers[0])
    assert any(isinstance(outcome, PeerLostError) and "same model" in str(outcome) for outcome in served.workers)


def test_another_optimizer_on_the_server_is_refused() -> None:
    made = iter([keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.1)])
    x, y = _data()
    served = servers.train(_fit(x, y, 1, epochs=1), lambda: next(made), workers=1)
    assert {type(o) for o in (*served.workers, *served.servers)} == {HandshakeError, PeerLostError}
    assert "same optimizer" in str(served.workers[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: keras.optimizers.SGD(gradient_accumulation_steps=2), "gradient_accumulation_steps"),
        (lambda: keras.optimizers.SGD(use_ema=True), "use_ema"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "LossScaleOptimizer"),
        (lambda: object(), "keras.optimizers"),
    ],
)
def test_optimizers_that_cannot_live_on_servers_are_refused(make: Callable[[], Any], words: str) -> None:
    served = servers.train(lambda worker, optimizer: None, make, workers=1)
    for outcome in (*served.workers, *served.servers):
        assert isinstance(outcome, ParamError)
        assert words in str(outcome)


def test_a_constraint_and_too_many_servers_are_refused() -> None:
    def constrained(worker: int, optimizer: Any) -> None:
        variable = keras.Variable(np.ones(3), name="w")
        variable.constraint = keras.constraints.NonNeg()
        optimizer.build([variable])

    def too_small(worker: int, optimizer: Any) -> None:
        optimizer.build([keras.Variable(1.0, name="w")])

    for main, count, words in ((constrained, 1, "constraint"), (too_small, 2, "Take fewer servers")):
        served = servers.train(main, lambda: keras.optimizers.SGD(0.1), workers=1, servers=count)
        assert isinstance(served.workers[0], ParamError)
        assert words in str(served.workers[0])


def test_one_that_does_not_come_is_named_after_the_timeout() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> None:
        if worker == 1:
            optimizer.build(servers.regression(1).trainable_variables)
            time.sleep(12)
            return
        _fit(x, y, 1, epochs=1)(worker, optimizer)

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05), max_staleness=0, timeout=5.0)
    assert isinstance(served.servers[0], TransportTimeoutError)
    assert "update of worker 1 within 5 s" in str(served.servers[0])
    assert "update of worker 1" in str(served.workers[0])


def test_a_worker_that_leaves_without_training_is_not_waited_for() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> Any:
        return _fit(x, y, 1, epochs=2)(worker, optimizer) if worker == 0 else None

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05), max_staleness=0, timeout=5.0).raise_first()
    assert served.servers[0].pushes == (32, 0)


def test_a_chief_that_leaves_without_training_is_an_error_where_another_waits_for_its_weights() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> Any:
        return _fit(x, y, 1, epochs=1)(worker, optimizer) if worker == 1 else None

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05))
    assert isinstance(served.servers[0], HandshakeError)
    assert "worker 0, the chief, to train" in str(served.workers[1])


def test_a_chief_that_does_not_begin_is_named_after_the_timeout() -> None:
    x, y = _data()

    def main(worker: int, optimizer: Any) -> Any:
        if worker == 0:
            time.sleep(10)
        return _fit(x, y, 1, epochs=1)(worker, optimizer)

    served = servers.train(main, lambda: keras.optimizers.SGD(0.05), timeout=4.0)
    assert isinstance(served.servers[0], TransportTimeoutError)
    assert "weights of worker 0, the chief, within 4 s" in str(served.workers[1])


def _trains_or_serves(communicator: Any) -> None:
    """Train without end where the rank is the worker's, else serve."""
    from sparktf.distribute.server import serve

    if communicator.rank == 1:
        serve([communicator], keras.optimizers.SGD(0.05), 60.0)
        return
    client = ParameterClient([communicator], 0)
    with pytest.raises(tf.errors.OpError, match="parameter server 0: "):
        servers.train_forever(push_and_pull(keras.optimizers.SGD(0.05), client))
    assert client.failure is not None
    raise client.failure


def test_a_killed_server_is_a_clear_error_on_the_worker_within_ten_seconds(tmp_path: Path) -> None:
    with processes("tcp", 2, _trains_or_serves, tmp_path, timeout=60.0) as (worker, server):
        assert worker.report()["event"] == server.report()["event"] == "connected"
        time.sleep(5)
        began = time.monotonic()
        server.signal(signal.SIGKILL)
        failure = worker.report()
    assert failure["error"] == "PeerLostError"
    assert failure["message"].startswith("parameter server 0: ")
    assert failure["at"] - began < 10


def test_a_killed_worker_leaves_the_others_training(tmp_path: Path) -> None:
    x, y = _data()
    process = multiprocessing.get_context("spawn").Process(
        target=servers.train_in_process, args=(str(tmp_path),), daemon=True
    )
    process.start()

    def main(worker: int, optimizer: Any) -> Any:
        model = servers.regression(worker)
        model.compile(optimizer, "mse")
        kill = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: process.kill() if epoch == 1 else None)
        model.fit(x, y, batch_size=16, epochs=12, verbose=0, callbacks=[kill])
        return float(np.mean((model(x) - y) ** 2))

    try:
        served = servers.train(
            main, lambda: keras.optimizers.SGD(0.05), workers=1, max_staleness=1, guest=tmp_path
        ).raise_first()
    finally:
        process.kill()
        process.join(30)
    assert served.servers[0].lost == (1,)
    assert served.servers[0].pushes[0] == 12 * 16
    assert served.servers[0].pushes[1] > 0
    assert served.workers[0] < 0.1
