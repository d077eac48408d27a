"""A node that hangs where no driver hears it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest

from sparktf.cluster import watchdog
from sparktf.cluster.control import ControlClient
from sparktf.cluster.watchdog import Watchdog
from sparktf.errors import NodeError


def training() -> ControlClient:
    """Return the control connection, to nobody, of a node that has made progress just now."""
    control = ControlClient()
    control.progress({"step": 1})
    return control


def test_what_hangs_is_interrupted_and_named_and_the_signal_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    began = time.monotonic()
    with (
        pytest.raises(NodeError, match=r"rank 2: no progress for 0.3 s \(timeout\)") as raised,
        Watchdog(2, training(), 0.3, 0.3),
    ):
        threading.Event().wait(60)
    assert time.monotonic() - began < 20.0
    assert raised.value.rank == 2
    assert "threading.Event().wait(60)" in "".join(traceback.format_tb(raised.value.__traceback__))
    assert signal.getsignal(signal.SIGUSR2) == before
    assert "sparktf-watchdog" not in {thread.name for thread in threading.enumerate()}


def test_what_goes_on_is_left_alone() -> None:
    control, words = training(), 0
    with Watchdog(0, control, 2.0, 2.0):
        while words < 20:
            time.sleep(0.2)
            control.alive()
            words += 1
    # Twice as long as it may be silent, and to the end.
    assert words == 20


def test_what_cannot_be_interrupted_ends_with_its_process_and_every_threads_traceback() -> None:
    program = """
import time
from sparktf.cluster import watchdog
from sparktf.cluster.control import ControlClient

def stubborn():
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue

watchdog._GRACE_SECONDS = 0.3
control = ControlClient()
control.progress({"step": 1})
with watchdog.Watchdog(1, control, 0.3, 0.3):
    stubborn()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "rank 1: no progress for 0.3 s (timeout): its program hangs" in ended.stderr
    assert "in stubborn" in ended.stderr


def test_an_interruption_that_is_lost_is_tried_again() -> None:
    program = """
import contextlib, time
from sparktf.cluster import watchdog
from sparktf.cluster.control import ControlClient
from sparktf.errors import NodeError

watchdog._GRACE_SECONDS = 2.0
control = ControlClient()
control.progress({"step": 1})
try:
    with watchdog.Watchdog(0, control, 0.3, 0.3):
        with contextlib.suppress(NodeError):
            time.sleep(60)
        time.sleep(60)
except NodeError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "rank 0: no progress for 0.3 s (timeout): its program hangs\n")


@pytest.mark.parametrize("words", [0, 1])
def test_a_node_that_does_not_train_yet_has_the_time_that_tensorflows_import_and_tracing_take(
    monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    monkeypatch.setattr(watchdog, "START_SECONDS", 1.5)
    control = ControlClient()
    for _ in range(words):
        control.alive()
    began = time.monotonic()
    with pytest.raises(NodeError, match="rank 0"), Watchdog(0, control, 0.5, 0.5):
        threading.Event().wait(60)
    assert 1.9 <= time.monotonic() - began < 20.0


def test_a_node_in_another_thread_than_the_main_one_is_left_alone() -> None:
    ended: list[bool] = []

    def node() -> None:
        with Watchdog(0, training(), 0.1, 0.1):
            time.sleep(0.5)
        ended.append(True)

    thread = threading.Thread(target=node, daemon=True)
    thread.start()
    thread.join(20)
    assert ended == [True]


def test_a_control_connection_knows_when_its_node_said_a_word_last_even_where_nobody_hears_it() -> None:
    control = ControlClient()
    assert (control.moved_at(), control.training()) == (None, False)
    control.alive()
    first = control.moved_at()
    assert first is not None
    assert not control.training()
    control.progress({"step": 1})
    assert (control.moved_at() or 0.0) >= first
    assert control.training()
