"""What a node prints, on its way to the driver: whole lines, and no more of them than a screen can take."""

from __future__ import annotations

import select
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import IO, Any, TextIO

from sparktf.cluster.control import ControlClient

# A line of more characters is cut.
LINE_CHARACTERS = 4000
# Of one node: so many lines at once, and so many a second in the long run.
BURST_LINES, LINES_A_SECOND = 1000, 200.0
_READ_BYTES = 1 << 16
# Between two looks at whether a child has ended.
_LOOK_SECONDS = 0.02


class LineReader:
    """Cuts a stream of bytes into lines, and leaves lines out where there are too many.

    Parameters
    ----------
    clock : callable, optional
        Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rest = b""
        self._left_out = 0
        self._allowed = float(BURST_LINES)
        self._at = clock()

    def feed(self, data: bytes) -> list[str]:
        """Take bytes; return the lines that are complete by now, as text without their ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_CHARACTERS:
            # Whoever prints without an end of line must not fill this process's memory.
            lines, self._rest = [*lines, self._rest], b""
        return self._admit(lines)

    def end(self) -> list[str]:
        """Return what is left when the stream has ended."""
        rest, self._rest = self._rest, b""
        lines = self._admit([rest] if rest else [])
        return lines + self._gap()

    def _admit(self, lines: list[bytes]) -> list[str]:
        now = self._clock()
        self._allowed = min(float(BURST_LINES), self._allowed + (now - self._at) * LINES_A_SECOND)
        self._at = now
        count = min(len(lines), int(self._allowed))
        self._allowed -= count
        admitted = (self._gap() if count else []) + [_text(line) for line in lines[:count]]
        self._left_out += len(lines) - count
        return admitted

    def _gap(self) -> list[str]:
        count, self._left_out = self._left_out, 0
        return [f"[{count:,} lines left out here]"] if count else []


def _text(line: bytes) -> str:
    # A bar that moves redraws itself after a carriage return: its last state counts.
    text = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
    more = len(text) - LINE_CHARACTERS
    return text if more <= 0 else f"{text[:LINE_CHARACTERS]} [{more:,} characters more]"


class OutputForwarder:
    """Sends what a child prints to the driver, from its task.

    Parameters
    ----------
    outputs : dict of str to binary file
        The child's pipes by name, unblocking; those that have ended are closed and taken out.
    control : ControlClient
    name : str
        How the node is called, in the executor's log.
    """

    def __init__(self, outputs: dict[str, IO[bytes]], control: ControlClient, name: str) -> None:
        self._outputs, self._control, self._name = outputs, control, name
        self._readers = {stream: LineReader() for stream in outputs}
        self._reports = LineReader()

    def forward(self, ready: Collection[Any]) -> bool:
        """Forward what can be read of those that are ready; return whether there was anything."""
        found = False
        for stream, output in list(self._outputs.items()):
            if output not in ready:
                continue
            if (data := output.read(_READ_BYTES)) is None:
                continue
            found = found or bool(data)
            if data:
                self.show(stream, self._readers[stream].feed(data))
            else:
                # The end; its descriptor would be ready for ever.
                self.show(stream, self._readers[stream].end())
                self._outputs.pop(stream).close()
        return found

    def drain(self, seconds: float, ended: Callable[[], bool]) -> None:
        """Wait some seconds for the child's end, and forward all that it prints until then.

        Parameters
        ----------
        seconds : float
        ended : callable
            Tells whether the child has ended; processes that it has left behind may hold its pipes.
        """
        deadline = time.monotonic() + seconds
        gone, ready = False, [*self._outputs.values()]
        while (ready or not gone) and (left := deadline - time.monotonic()) > 0:
            gone = ended()
            ready = select.select(list(self._outputs.values()), [], [], 0 if gone else min(left, _LOOK_SECONDS))[0]
            self.forward(ready)
        for stream, reader in self._readers.items():
            self.show(stream, reader.end())
        self.show("stdout", self._reports.end())

    def report(self, values: dict[str, Any]) -> None:
        """Send values that the program reports, as a line; no more of them than of its other lines."""
        line = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        self.show("stdout", self._reports.feed(f"{line}\n".encode()))

    def show(self, stream: str, lines: list[str]) -> None:
        """Send lines to the driver; to the executor's log where that cannot be reached (Spark Connect)."""
        if not lines:
            return
        if self._control.connected:
            self._control.progress({stream: lines})
        else:
            sys.stderr.write("".join(f"[{self._name}] {line}\n" for line in lines))


class OutputPrinter:
    """Prints what the nodes of a run print and report, marked with who says it. Called from other threads.

    Parameters
    ----------
    name : callable
        From a rank to how it is called.
    stdout, stderr : text stream, optional
        This process's by default.
    """

    def __init__(self, name: Callable[[int], str], stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self._name = name
        self._streams = {"stdout": stdout, "stderr": stderr}
        self._lock = threading.Lock()

    def __call__(self, rank: int, report: dict[str, Any]) -> None:
        """Print one report: ``{"stdout": [lines]}`` or ``{"stderr": [lines]}``."""
        for name in ("stdout", "stderr"):
            self._print(name, rank, report.get(name, []))

    def _print(self, name: str, rank: int, lines: list[str]) -> None:
        if lines:
            # Looked up late, so that what captures the standard streams has them.
            stream = self._streams[name] or (sys.stdout if name == "stdout" else sys.stderr)
            with self._lock:
                stream.write("".join(f"[{self._name(rank)}] {line}\n" for line in lines))
                stream.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
