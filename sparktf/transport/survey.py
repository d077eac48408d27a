"""What ranks tell each other between connecting and the first operation: an all-gather of small facts."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from sparktf.errors import HandshakeError, PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.framing import recv_frame, send_frame
from sparktf.transport.lookout import Lookout
from sparktf.transport.mesh import Mesh

_FACTS = 1
_LIMIT = 64 * 1024
# Who has told its facts to all may give up for a reason that a slower rank's facts hold as well, and tell better; after
# this long without any, ranks look who has ended. Within the two seconds after which a killed one is to be reported.
_QUIET_SECONDS = 1.0
# How long to wait, after a data connection has ended, for the control connection to say why.
_WORD_SECONDS = 0.5


def share(mesh: Mesh, rank: int, facts: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    """Give every rank the facts of all, over the authenticated data connections.

    Parameters
    ----------
    mesh : Mesh
        Connected; no operation has begun.
    rank : int
        This rank.
    facts : dict
        JSON values, less than 64 KiB in all.
    deadline : float
        Absolute time, as of ``time.monotonic()``.

    Returns
    -------
    list of dict
        By rank.

    Raises
    ------
    TransportError, HandshakeError
        A peer is lost or late, or says what cannot be read.
    """
    told = share_with_each(mesh, dict.fromkeys(mesh.data, facts), deadline)
    return [facts if peer == rank else told[peer] for peer in range(len(told) + 1)]


def share_with_each(mesh: Mesh, facts: Mapping[int, dict[str, Any]], deadline: float) -> dict[int, dict[str, Any]]:
    """Give each peer what is meant for it alone; return what each has told this rank. Otherwise as `share`."""
    for peer, sock in sorted(mesh.data.items()):
        with _blaming(mesh, peer):
            send_frame(sock, _FACTS, json.dumps(facts[peer]).encode(), _left(deadline))
    result: dict[int, dict[str, Any]] = {}
    while missing := mesh.data.keys() - result.keys():
        for peer in _await_any(mesh, missing, deadline):
            with _blaming(mesh, peer):
                kind, payload = recv_frame(mesh.data[peer], _left(deadline), _LIMIT)
            result[peer] = _parse(kind, payload, peer)
    return result


def _await_any(mesh: Mesh, missing: Set[int], deadline: float) -> list[int]:
    """Return those of the missing peers that have something to say; raise where anybody has ended meanwhile."""
    peers = {mesh.data[peer].fileno(): peer for peer in missing}
    poll = select.poll()
    for descriptor in peers:
        poll.register(descriptor, select.POLLIN)
    while not (heard := poll.poll(1000 * min(_QUIET_SECONDS, _left(deadline)))):
        if time.monotonic() >= deadline:
            raise TransportTimeoutError(
                f"connecting: expected rank(s) {', '.join(map(str, sorted(missing)))} to say within the timeout what "
                "they have. They are stopped or far too busy, or the network does not lead there any more."
            )
        _look(mesh)
    return sorted(peers[descriptor] for descriptor, _ in heard)


def _look(mesh: Mesh) -> None:
    """Raise `PeerLostError` where a peer has ended, with the rank that it blames where it has said so."""
    Lookout((), mesh.control, mesh.left).look(set())


@contextmanager
def _blaming(mesh: Mesh, peer: int) -> Iterator[None]:
    """Name the peer in what a connection to it raises, or the one whose end has made it give up."""
    try:
        yield
    except PeerLostError as exc:
        until = time.monotonic() + _WORD_SECONDS
        while time.monotonic() < until:
            _look(mesh)
            time.sleep(0.01)
        raise _named(exc, peer) from exc
    except TransportError as exc:
        raise _named(exc, peer) from exc


def _parse(kind: int, payload: bytes, peer: int) -> dict[str, Any]:
    try:
        facts = json.loads(payload) if kind == _FACTS else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise HandshakeError(
            f"Expected facts from rank {peer}. Received: {payload[:200]!r}. "
            "Do all ranks use the same protocol and version?"
        )
    return facts


def _left(deadline: float) -> float:
    # A peer that has sent already is heard even at the last moment.
    return max(0.001, deadline - time.monotonic())


def _named(exc: TransportError, peer: int) -> TransportError:
    message = f"connecting: rank {peer}: {exc}"
    if isinstance(exc, PeerLostError):
        return PeerLostError(message, peer)
    return TransportTimeoutError(message) if isinstance(exc, TransportTimeoutError) else TransportError(message)
