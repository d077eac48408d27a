"""Groups of real ranks on this machine, for tests and benchmarks: threads, or processes to be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sparktf.transport.contract import Communicator
from sparktf.transport.registry import connect
from sparktf.transport.settings import Settings

SECRET = b"a secret of tests, 32 bytes long"
SLOWNESS = float(os.environ.get("SPARKTF_TEST_SLOWNESS", "1"))
"""How many times slower than real hardware this machine computes: timeouts and bounds on time are multiplied by it.

For emulated machines only; see ``tests/rdma/vm.py``.
"""

# Every wait of a test ends, whatever is broken; later than a virtual machine stands still that its host has paused.
_PATIENCE = 180.0 * SLOWNESS


class MemoryExchange:
    """The rendezvous of ranks that are threads of one process.

    Parameters
    ----------
    size : int
        How many ranks come.
    """

    def __init__(self, size: int) -> None:
        self._entries: list[bytes] = [b""] * size
        self._met = threading.Barrier(size)
        self.calls = [0] * size

    def of(self, rank: int) -> Callable[[bytes], list[bytes]]:
        """Return the function that this rank gives to `connect`."""

        def exchange(entry: bytes) -> list[bytes]:
            self.calls[rank] += 1
            self._entries[rank] = entry
            self._met.wait(_PATIENCE)
            return list(self._entries)

        return exchange

    def give_up(self) -> None:
        """Wake the ranks that wait for one that failed before it came."""
        self._met.abort()


class FileExchange:
    """The rendezvous of ranks that are processes and share a directory.

    Parameters
    ----------
    directory : Path
        Exists, and is empty before the first rank comes.
    rank, size : int
        This rank, and how many come.
    """

    def __init__(self, directory: Path, rank: int, size: int) -> None:
        self._directory, self._rank, self._size = directory, rank, size

    def __call__(self, entry: bytes) -> list[bytes]:
        """Put this rank's entry in and wait for all others'."""
        part = self._directory / f"{self._rank}.part"
        part.write_bytes(entry)
        # Renaming is atomic: nobody reads half an entry.
        part.rename(self._directory / str(self._rank))
        files = [self._directory / str(rank) for rank in range(self._size)]
        deadline = time.monotonic() + _PATIENCE
        while not all(file.exists() for file in files):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Not all of {self._size} ranks came to {self._directory}.")
            time.sleep(0.005)
        return [file.read_bytes() for file in files]


def run_threads(
    protocol: str,
    size: int,
    main: Callable[[Communicator], Any],
    *,
    timeout: float = 90.0,
    secrets: list[bytes] | None = None,
    settings: Sequence[Settings] | None = None,
) -> list[Any]:
    """Run ``main(communicator)`` on every rank of a group of threads.

    `secrets` and `settings` are by rank; `timeout` is multiplied by `SLOWNESS`.

    Returns
    -------
    list
        By rank: what `main` returned, or the exception that it or `connect` raised.
    """
    meeting = MemoryExchange(size)
    outcomes: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        secret = SECRET if secrets is None else secrets[rank]
        try:
            with connect(
                protocol,
                rank=rank,
                size=size,
                exchange=meeting.of(rank),
                secret=secret,
                timeout=timeout * SLOWNESS,
                host="127.0.0.1",
                settings=None if settings is None else settings[rank],
            ) as communicator:
                outcomes[rank] = main(communicator)
        except BaseException as exc:
            if meeting.calls[rank] == 0:
                meeting.give_up()
            outcomes[rank] = exc

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(_PATIENCE)
        if thread.is_alive():
            raise TimeoutError(f"Rank {rank} of {size} did not end within {_PATIENCE} s; the others: {outcomes}.")
    return outcomes


def results_of_threads(protocol: str, size: int, main: Callable[[Communicator], Any], **options: Any) -> list[Any]:
    """Run ``main(communicator)`` as `run_threads` does, on ranks of which none may fail.

    Returns
    -------
    list
        By rank: what `main` returned.

    Raises
    ------
    BaseExceptionGroup
        What the ranks that failed have raised, all of it: the first of them may only have heard of another's failure.
    """
    outcomes = run_threads(protocol, size, main, **options)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if failures:
        raise BaseExceptionGroup(f"{len(failures)} of {size} ranks over {protocol} failed", failures)
    return outcomes


class Rank:
    """One rank in a process of its own, seen from the test.

    Attributes
    ----------
    pid : int
        Its process id.
    """

    def __init__(self, process: Any, reports: Connection) -> None:
        self._process = process
        self._reports = reports
        self.pid: int = process.pid

    def report(self, timeout: float = _PATIENCE) -> dict[str, Any]:
        """Return the next thing the rank has said."""
        if not self._reports.poll(timeout):
            raise TimeoutError(f"Process {self.pid} said nothing for {timeout} s.")
        said: dict[str, Any] = json.loads(self._reports.recv_bytes())
        return said

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def exit_code(self, timeout: float) -> int | None:
        """Wait for the process to end by itself; return its exit code, None where it still runs."""
        self._process.join(timeout)
        code: int | None = self._process.exitcode
        return code

    def end(self) -> None:
        """Kill the process where it still runs, and wait for it."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.join(_PATIENCE)
        self._reports.close()


@contextmanager
def processes(
    protocol: str, size: int, main: Callable[[Communicator], None], directory: Path, timeout: float
) -> Iterator[list[Rank]]:
    """Run ``main(communicator)`` on every rank of a group of processes.

    Each rank reports ``{"event": "connected"}`` and, where that or `main` raises, ``{"event": "failed", "error",
    "peer", "reason", "message", "at"}``; ``at`` is ``time.monotonic()``, one clock for all processes.

    Parameters
    ----------
    main : callable
        A module-level function.
    directory : Path
        An empty directory for the rendezvous.
    timeout : float
        Seconds, multiplied by `SLOWNESS`.
    """
    context = multiprocessing.get_context("spawn")
    ranks: list[Rank] = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (protocol, rank, size, main, directory, timeout, theirs)
            process = context.Process(target=_process_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            ranks.append(Rank(process, ours))
        yield ranks
    finally:
        for member in ranks:
            member.end()


def _process_main(
    protocol: str,
    rank: int,
    size: int,
    main: Callable[[Communicator], None],
    directory: Path,
    timeout: float,
    reports: Connection,
) -> None:
    exchange = FileExchange(directory, rank, size)
    options: dict[str, Any] = {"secret": SECRET, "timeout": timeout * SLOWNESS, "host": "127.0.0.1"}
    try:
        with connect(protocol, rank=rank, size=size, exchange=exchange, **options) as communicator:
            reports.send_bytes(b'{"event": "connected"}')
            main(communicator)
    except Exception as exc:
        failure = {
            "event": "failed",
            "error": type(exc).__name__,
            "peer": getattr(exc, "peer", None),
            "reason": getattr(exc, "reason", ""),
            "message": str(exc),
            "at": time.monotonic(),
        }
        reports.send_bytes(json.dumps(failure).encode())
