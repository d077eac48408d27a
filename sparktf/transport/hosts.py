"""Which ranks share a machine's memory: by the machine's identity, and by trying."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktf.errors import HandshakeError, TransportError
from sparktf.transport.mesh import Mesh
from sparktf.transport.segment import Segment
from sparktf.transport.survey import share

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Hosts:
    """The ranks of a world by machine.

    Attributes
    ----------
    groups : list of list of int
        Ranks that share memory, in order; groups in the order of their first rank.
    staging : dict of int to Segment
        By rank: the staging memory of this rank and of those on its machine.
    trouble : str
        Why ranks of one machine do not share memory; empty where they do.
    """

    groups: list[list[int]]
    staging: dict[int, Segment]
    trouble: str

    def group_of(self, rank: int) -> list[int]:
        """Return the ranks on this rank's machine, itself included."""
        return next(group for group in self.groups if rank in group)


def host_identity() -> str:
    """Return what is equal for processes of one machine only; empty where it cannot be known."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return ""


def find_hosts(mesh: Mesh, rank: int, host_id: str, staging_bytes: int, timeout: float) -> Hosts:
    """Find out together who shares memory with whom, and map each other's staging memory.

    Equal identities are not enough: containers of one machine may have different file systems. So each rank opens the
    files of all that seem to be on its machine, and a machine counts as one only if all of its ranks could.

    Parameters
    ----------
    mesh : Mesh
        Connected; no operation has begun.
    rank : int
        This rank.
    host_id : str
        This machine's identity.
    staging_bytes : int
        Size of every rank's staging memory.
    timeout : float
        Seconds for all of it.

    Raises
    ------
    TransportError, HandshakeError
        As `sparktf.transport.survey.share`.
    """
    deadline = time.monotonic() + timeout
    own, trouble = _create(staging_bytes)
    try:
        path = own.path if own is not None else ""
        told = share(mesh, rank, {"host": host_id, "path": path, "trouble": trouble}, deadline)
        near = [peer for peer, facts in enumerate(told) if peer == rank or (host_id and facts.get("host") == host_id)]
        staging: dict[int, Segment] = {} if own is None else {rank: own}
        for peer in near:
            if peer != rank and not trouble:
                trouble = _attach(staging, peer, told[peer], staging_bytes)
        # Whoever has answered this has everything open.
        verdicts = share(mesh, rank, {"trouble": trouble}, deadline)
    finally:
        if own is not None:
            own.unlink()
    groups = _group([str(facts.get("host")) for facts in told], [str(facts.get("trouble")) for facts in verdicts])
    mine = next(group for group in groups if rank in group)
    return Hosts(
        groups,
        {peer: segment for peer, segment in staging.items() if peer in mine},
        next((str(facts["trouble"]) for facts in verdicts if facts.get("trouble")), ""),
    )


def _create(nbytes: int) -> tuple[Segment | None, str]:
    try:
        return Segment.create(nbytes), ""
    except TransportError as exc:
        return None, str(exc)


def _attach(staging: dict[int, Segment], peer: int, facts: dict[str, Any], nbytes: int) -> str:
    """Map a peer's staging memory; return why it could not be done, if so."""
    path = facts.get("path")
    if not path:
        return str(facts.get("trouble"))
    if not isinstance(path, str):
        raise HandshakeError(f"Expected a path from rank {peer}. Received: {path!r}.")
    try:
        staging[peer] = Segment.attach(path, nbytes)
    except OSError as exc:
        return f"rank {peer}'s shared memory cannot be opened ({exc}): containers must share /dev/shm (docker: --ipc)"
    return ""


def _group(identities: list[str], troubles: list[str]) -> list[list[int]]:
    """Group ranks by machine; those of a machine where one met trouble stay alone."""
    machines: dict[str, list[int]] = {}
    for rank, identity in enumerate(identities):
        # Ranks that know no identity are each on a machine of their own.
        machines.setdefault(identity or f"unknown {rank}", []).append(rank)
    groups: list[list[int]] = []
    for ranks in machines.values():
        whole = not any(troubles[rank] for rank in ranks)
        groups += [ranks] if whole else [[rank] for rank in ranks]
    return sorted(groups)
