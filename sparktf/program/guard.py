"""End a process group when the process that started this one is gone: ``python -m sparktf.program.guard GROUP``.

A child asks the kernel to end it with its task; what a program has started itself asks for nothing. Where the task is
killed, as Spark does with one that is cancelled, nobody else is left to end those.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main(group: int) -> None:
    """Wait until nobody holds the other end of this process's standard input, then kill the group."""
    sys.stdin.buffer.read()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
