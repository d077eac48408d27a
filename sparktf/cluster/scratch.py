"""Scratch directories of workers, which Spark may kill at any moment."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SECONDS = 30.0
# It makes the directory itself, so that there is none before somebody watches over it.
_KEEPER = 'mkdir -m 700 -- "$1" && echo made && { read -r line; rm -rf -- "$1"; }'


def local_directory() -> str:
    """Return one of Spark's local directories, where executors are meant to keep scratch data."""
    for directory in os.environ.get("SPARK_LOCAL_DIRS", "").split(","):
        if directory and os.path.isdir(directory) and os.access(directory, os.W_OK):
            return directory
    return tempfile.gettempdir()


@contextmanager
def scratch_directory(prefix: str) -> Iterator[str]:
    """Make a private directory (mode 0700) that is removed when the block ends, or this process is killed.

    Spark kills the workers of a query that is cancelled, or of which another task has failed, with SIGKILL. A shell
    makes the directory and reads from a pipe, which the kernel closes when this process ends, however it does.

    Raises
    ------
    OSError
        The directory cannot be made.
    """
    # mkdir takes no name that is there already, so that nobody else's directory is ever removed.
    directory = os.path.join(local_directory(), prefix + os.urandom(8).hex())
    # In a group of its own: what a terminal sends to this process's group is not meant for the shell.
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "sh", directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    with keeper:
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        if not keeper.stdout.readline():
            raise OSError(f"cannot make the directory {directory!r}: {keeper.stderr.read().decode().strip()}")
        try:
            yield directory
        finally:
            # A line, for the pipe's end does not come while a process that was forked meanwhile holds it, too.
            with suppress(subprocess.TimeoutExpired):
                keeper.communicate(b"remove\n", _SECONDS)
            # Where the shell was killed itself, or is too slow.
            keeper.kill()
            shutil.rmtree(directory, ignore_errors=True)
