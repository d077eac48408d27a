"""A node's child process: started in a group of its own, ended with its task, its output and its CPU time at hand."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, BinaryIO, Self

from sparktf.program import wire

_TERMINATE_SECONDS = 2.0


class ChildProcess:
    """A Python process that runs a module, joined to this one by two socket pairs and two pipes. A context manager.

    Parameters
    ----------
    module : str
        Run with the descriptors of its ends of the socket pairs and of `result` as arguments.
    result : BinaryIO
        A file that the child writes.
    environment : mapping of str to str
        In place of this process's own.

    Attributes
    ----------
    frames : socket
        For frames, both ways.
    descriptors : socket
        For open files, to the child.
    outputs : dict of str to binary file
        ``"stdout"`` and ``"stderr"``, unblocking and unbuffered; none once it is closed.
    """

    def __init__(self, module: str, result: BinaryIO, environment: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as theirs:
            self.frames, frames = _pair(on_failure, theirs)
            self.descriptors, descriptors = _pair(on_failure, theirs)
            inherited = (frames.fileno(), descriptors.fileno(), result.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, inherited)],
                pass_fds=inherited,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # What has been read must not lie in a buffer, where select() does not see it.
                bufsize=0,
                # What the program starts itself ends with it.
                start_new_session=True,
            )
            on_failure.push(lambda *_: self._kill())
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "sparktf.program.guard", str(self.pid)],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # It outlives this process by a moment, whatever that was killed by.
                start_new_session=True,
            )
            on_failure.pop_all()
        self._closed = False
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.outputs: dict[str, IO[bytes]] = {"stdout": self._process.stdout, "stderr": self._process.stderr}
        for output in self.outputs.values():
            os.set_blocking(output.fileno(), False)

    @property
    def pid(self) -> int:
        """The process's id, which is its group's and its session's as well."""
        return self._process.pid

    def send_descriptors(self, descriptors: Sequence[int]) -> None:
        """Send open files; one that is gone gets none."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for start in range(0, len(descriptors), wire.DESCRIPTORS):
                socket.send_fds(self.descriptors, [b"."], list(descriptors[start : start + wire.DESCRIPTORS]))

    def status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def end(self) -> str:
        """Return, in words, how the process ended, or that it has only closed its connection."""
        status = self.status()
        if status is None:
            return "closed its connection"
        if status >= 0:
            return f"exit status {status}"
        return f"killed by signal {-status}" + (", perhaps for its memory" if status == -signal.SIGKILL else "")

    def cpu_seconds(self) -> float:
        """Return the CPU time that the processes of the child's session have used so far."""
        ticks = 0
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                # A process may end between the two.
                with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                    # proc(5): behind the command's closing parenthesis come state, ppid, pgrp, session; utime and stime
                    # are the line's fields 14 and 15.
                    fields = file.read().rpartition(b")")[2].split()
                    if int(fields[3]) == self.pid:
                        ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stopped(self) -> bool:
        """Tell whether the process is stopped (SIGSTOP, a debugger)."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        return False

    def close(self) -> None:
        """End the process and all of its group, and close what joins it to this one. May be called twice."""
        if self._closed:
            # By then the group's number may be another's.
            return
        self._closed = True
        for sock in (self.frames, self.descriptors):
            sock.close()
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            # A stopped process takes a signal only once it goes on.
            self._signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERMINATE_SECONDS)
        self._kill()
        self._guard.kill()
        # Closes its input as well.
        self._guard.communicate()
        for output in self.outputs.values():
            output.close()
        self.outputs.clear()

    def _kill(self) -> None:
        # Others of the group may be left when the first is gone.
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _pair(on_failure: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, others = socket.socketpair()
    return on_failure.enter_context(ours), theirs.enter_context(others)
