"""Run a program that dies with the process that started it: ``python -m sparktf.cluster.leash PARENT PROGRAM ...``.

For programs that cannot ask for it themselves, as `sparktf.cluster.child` does. To ask between fork and exec (Popen's
``preexec_fn``) is not safe in a process with threads, and TensorFlow's has many.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends, however that happens (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def job_environment() -> dict[str, str]:
    """Return the environment of a child: the modules that Spark shipped with a job are on this process's path only."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p and not _lies_unpacked(p))}


def _lies_unpacked(path: str) -> bool:
    """Tell the zip within an installed pyspark: what is in a zip Python compiles anew each time, for half a second."""
    archive = Path(path)
    if archive.name != "pyspark.zip" or len(archive.parents) < 4:
        return False
    return (archive.parents[2] / "__init__.py").is_file() and str(archive.parents[3]) in sys.path


def leashed(command: list[str]) -> list[str]:
    """Return the command that runs `command` and ends with the calling process, however that ends.

    The kernel watches the thread that starts it, not the process: start it from one that stays.
    """
    return [sys.executable, "-m", "sparktf.cluster.leash", str(os.getpid()), *command]


def main(parent: int, command: list[str]) -> None:
    """Become `command`; the signal at a parent's death outlives exec."""
    die_with_parent()
    # A parent that ended before that sends none.
    if os.getppid() == parent:
        os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
