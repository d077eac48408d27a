"""Memory that processes of one host share: a file without a name, mapped by all of them."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from sparktf.errors import TransportError
from sparktf.transport.contract import Array

_LOG = logging.getLogger("sparktf.transport")

_MEMORY = Path("/dev/shm")
_ADVICE = (
    "Give the container a larger /dev/shm (docker: --shm-size; Kubernetes: an emptyDir of medium Memory mounted "
    "there), or use protocol='tcp'"
)
# Longest path that is told to peers.
PATH_BYTES = 256


class Segment:
    """A shared file, mapped.

    Attributes
    ----------
    path : str
        Where it is, until `unlink`.
    array : ndarray
        All its bytes. The memory is given back once nothing refers to it; there is nothing to close.
    """

    def __init__(self, path: str, descriptor: int, nbytes: int) -> None:
        self.path = path
        # Faulted in now rather than in the middle of the first operation.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self.array: Array = np.frombuffer(mmap.mmap(descriptor, nbytes, flags), np.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Make a zeroed file of 0600 with a random name; the caller unlinks it once its peers have it.

        In ``/dev/shm`` where that has room for it (in containers it is often small), else in the directory for
        temporary files, with a warning in the log: what is shared then goes through a disk's cache, and to the disk.

        Raises
        ------
        TransportError
            Neither has room.
        """
        nbytes = max(1, nbytes)
        refusals = []
        for directory in (_MEMORY, Path(tempfile.gettempdir())):
            path = str(directory / f"sparktf-{secrets.token_hex(16)}")
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                refusals.append(f"{directory}: {exc.strerror}")
                continue
            try:
                # Reserved, not only sized: a page that finds no room later would kill the process (SIGBUS).
                os.posix_fallocate(descriptor, 0, nbytes)
                segment = cls(path, descriptor, nbytes)
                if refusals:
                    _warn(nbytes, directory, refusals[0])
                return segment
            except BaseException as exc:
                os.unlink(path)
                if not isinstance(exc, OSError):
                    raise
                refusals.append(f"{directory}: {exc.strerror}")
            finally:
                os.close(descriptor)
        raise TransportError(
            f"Expected room for {nbytes} bytes of memory to share. Received: {'; '.join(refusals)}. {_ADVICE}, or "
            "point TMPDIR to a directory with room."
        )

    @classmethod
    def attach(cls, path: str, nbytes: int) -> Segment:
        """Map a peer's file.

        Raises
        ------
        OSError
            There is no such file here, or it may not be opened, or it is another.
        """
        nbytes = max(1, nbytes)
        if "\0" in path:
            raise OSError(f"{path!r} is no path")
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size != nbytes:
                raise OSError(f"{path} has {size} bytes, expected {nbytes}")
            return cls(path, descriptor, nbytes)
        finally:
            os.close(descriptor)

    @property
    def in_memory(self) -> bool:
        """Whether its file is one of memory, not of a disk."""
        return Path(self.path).parent == _MEMORY

    def unlink(self) -> None:
        """Take away the name, so that nothing is left whatever happens; whoever attached last does it as well."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)


def on_disk(segments: Iterable[Segment]) -> str:
    """Return words for the end of a communicator's reason where memory is a disk's; none where it is memory."""
    directories = sorted({str(Path(segment.path).parent) for segment in segments if not segment.in_memory})
    if not directories:
        return ""
    return f"; what ranks share lies in files of {', '.join(directories)}, for {_MEMORY} has too little room"


def _warn(nbytes: int, directory: Path, refusal: str) -> None:
    free = "none"
    with suppress(OSError):
        free = f"{shutil.disk_usage(_MEMORY).free / 2**20:.0f} MiB"
    _LOG.warning(
        "%.1f MiB of shared memory lie in a file of %s, which can be many times slower: %s, of which %s is free. %s.",
        nbytes / 2**20,
        directory,
        refusal,
        free,
        _ADVICE,
    )


def pack_path(path: str) -> bytes:
    """Return a path as a piece of fixed length.

    Raises
    ------
    TransportError
        It is too long.
    """
    packed = os.fsencode(path)
    if len(packed) > PATH_BYTES:
        raise TransportError(
            f"Expected a path of at most {PATH_BYTES} bytes for shared memory. Received: {path!r}. Set TMPDIR to a "
            "shorter one."
        )
    return packed.ljust(PATH_BYTES, b"\0")


def unpack_path(packed: bytes | bytearray) -> str:
    """Return the path that `pack_path` packed."""
    return os.fsdecode(bytes(packed).rstrip(b"\0"))
