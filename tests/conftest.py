"""What all tests share: one real Spark session, and a check that nothing is left behind.

A process holds one SparkContext, so each group of tests with a Spark of another kind (``local_cluster``,
``connect``) overrides ``spark`` in its own conftest and runs in a pytest of its own; see ``make test``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports TensorFlow, here or in a worker.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import psutil
import pytest

from sparktf.session import local_session

TEMPORARY = Path(tempfile.mkdtemp(prefix="sparktf-tests-"))
"""All temporary files of this run, of Python and of Spark: what is left in it is ours."""

os.environ["TMPDIR"] = str(TEMPORARY)
tempfile.tempdir = str(TEMPORARY)

_TESTS = Path(__file__).parent
# Workers import the functions that a test module hands to Spark, by the name that pytest gave the module.
_FOUND_HERE = [str(_TESTS.parent), str(_TESTS), *(str(p) for p in sorted(_TESTS.iterdir()) if p.is_dir())]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOUND_HERE, *filter(None, [os.environ.get("PYTHONPATH")])])

# Java's optimizing compiler takes a quarter of all CPU time here, and what it makes is never run for long.
_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

SPARK_SETTINGS: dict[str, object] = {
    "spark.driver.extraJavaOptions": _JAVA_OPTIONS,
    "spark.executor.extraJavaOptions": _JAVA_OPTIONS,
    "spark.executorEnv.PYTHONPATH": os.environ["PYTHONPATH"],
    "spark.local.dir": str(TEMPORARY / "spark"),
    "spark.sql.warehouse.dir": str(TEMPORARY / "warehouse"),
    # A stage that asks for too many slots fails in seconds, not in ten minutes.
    "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "1s",
    "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": 3,
}


@pytest.fixture(scope="session")
def spark_settings() -> dict[str, object]:
    """Return what every session of the tests is started with, for drivers in processes of their own."""
    return dict(SPARK_SETTINGS)


@pytest.fixture(scope="session")
def spark_conf_dir() -> str:
    """Return a directory for SPARK_CONF_DIR: the same Java for programs that start a Spark of their own."""
    directory = TEMPORARY / "conf"
    directory.mkdir()
    (directory / "spark-defaults.conf").write_text(f"spark.driver.extraJavaOptions {_JAVA_OPTIONS}\n")
    return str(directory)


@pytest.fixture(scope="session")
def start_spark() -> Iterator[Callable[..., Any]]:
    """Start the process's one session as asked for; it is stopped after the last test."""
    sessions = []

    def start(master: str, **options: Any) -> Any:
        session = local_session(master, "sparktf-tests", **{**SPARK_SETTINGS, **options})
        sessions.append(session)
        return session

    yield start
    for session in sessions:
        session.stop()


@pytest.fixture(scope="session")
def spark(start_spark: Callable[..., Any]) -> Any:
    """Return a session of four task slots in one process."""
    return start_spark("local[4]")


@pytest.fixture(scope="session", autouse=True)
def no_tuner() -> Iterator[None]:
    """Iterate over every tf.data.Dataset of the tests, also Keras's own over arrays, without TensorFlow's tuner.

    The tuner of an iterator sleeps for as long as that has lived, up to a minute. When the iterator is collected, at
    any time and in any thread, it is woken, and goes back to sleep where it looks before it has been cancelled.
    """
    if "tensorflow" not in sys.modules:
        yield
        return
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    iterate = tf.data.Dataset.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.data.Dataset, "__iter__", lambda dataset: iterate(dataset.with_options(options)))
        yield


def pytest_sessionfinish() -> None:
    """Remove the run's temporary files."""
    shutil.rmtree(TEMPORARY, ignore_errors=True)


@pytest.fixture
def no_leftovers() -> Iterator[Callable[[], dict[str, set[str]]]]:
    """Fail a test that leaves a process, a socket or a file behind; Spark's own are not counted.

    Yields a function that returns what is left at the moment, by kind, for tests that look in between.
    """
    before = _inventory()

    def left() -> dict[str, set[str]]:
        return {kind: found - before[kind] for kind, found in _inventory().items()}

    yield left
    # The kernel and a peer that says goodbye take a moment. What is there at every look has been left; what comes and
    # goes meanwhile is Spark's, or that of others who use the machine.
    remaining = left()
    deadline = time.monotonic() + 10.0
    while any(remaining.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
        remaining = {kind: remaining[kind] & found for kind, found in left().items()}
    told = {kind: sorted(found) for kind, found in remaining.items() if found}
    assert not told, f"left behind: {told}"


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Fail the very test that leaves one of sparktf's threads running in this process, not a later one that looks."""
    before = set(threading.enumerate())

    def left() -> list[str]:
        return [
            thread.name
            for thread in threading.enumerate()
            if thread not in before and thread.name.startswith("sparktf-")
        ]

    yield
    deadline = time.monotonic() + 10.0
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left(), f"threads left behind: {left()}"


def _inventory() -> dict[str, set[str]]:
    this = psutil.Process()
    family = [this, *this.children(recursive=True)]
    return {"processes": _processes(family), "sockets": _sockets(family), "files": _files(family)}


def _processes(family: list[psutil.Process]) -> set[str]:
    return {
        f"{process.pid} {' '.join(_command(process))}"
        for process in family
        if not _is_helper(process) and _status(process) not in (None, psutil.STATUS_ZOMBIE)
    }


def _sockets(family: list[psutil.Process]) -> set[str]:
    """Return the TCP sockets of all Python processes, but for those that lead to the JVM."""
    jvms = [process for process in family if _is_java(process)]
    spark_ports = {c.laddr.port for process in jvms for c in _connections(process)}
    return {
        f"{process.pid} {c.status} {c.laddr.port}" + (f" to {c.raddr.port}" if c.raddr else "")
        for process in family
        if not _is_java(process) and not _is_daemon(process)
        for c in _connections(process)
        if c.status != psutil.CONN_TIME_WAIT and not (c.raddr and c.raddr.port in spark_ports)
    }


def _files(family: list[psutil.Process]) -> set[str]:
    """Return our files in the temporary directory, Spark's local directories in it, and shared memory."""
    found = {str(p) for p in TEMPORARY.rglob("*") if "sparktf" in p.name or "spool" in p.name}
    shared = {str(p) for p in Path("/dev/shm").glob("*sparktf*")}
    return found | (shared - _mapped_by_others(family) if shared else shared)


def _mapped_by_others(family: list[psutil.Process]) -> set[str]:
    """Return the files that processes have mapped which are none of ours; all of a machine share its memory."""
    ours = {process.pid for process in family}
    mapped = set()
    for pid in set(psutil.pids()) - ours:
        # It may be gone by now, or another user's.
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped |= {line[line.index("/") :] for line in lines if "/" in line}
    return mapped


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections(kind="tcp")
    except psutil.Error:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.Error:
        return None


def _is_java(process: psutil.Process) -> bool:
    return any(word.startswith("org.apache.spark.") for word in _command(process))


def _is_helper(process: psutil.Process) -> bool:
    """Tell Spark's own processes and multiprocessing's tracker, which outlive a job by design."""
    words = " ".join(_command(process))
    return _is_java(process) or "pyspark.daemon" in words or "pyspark/daemon" in words or "resource_tracker" in words


def _is_daemon(process: psutil.Process) -> bool:
    """Tell the one process that forks Spark's Python workers: it listens as long as Spark runs."""
    try:
        parent = process.parent()
    except psutil.Error:
        return False
    return "pyspark.daemon" in " ".join(_command(process)) and parent is not None and _is_java(parent)
