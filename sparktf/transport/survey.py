"""What ranks tell each other between connecting and the first operation: an all-gather of small facts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from sparktf.errors import HandshakeError, PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.framing import recv_frame, send_frame
from sparktf.transport.mesh import Mesh

_FACTS = 1
_LIMIT = 64 * 1024


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
        try:
            send_frame(sock, _FACTS, json.dumps(facts[peer]).encode(), _left(deadline))
        except TransportError as exc:
            raise _named(exc, peer) from exc
    result: dict[int, dict[str, Any]] = {}
    for peer, sock in sorted(mesh.data.items()):
        try:
            kind, payload = recv_frame(sock, _left(deadline), _LIMIT)
        except TransportError as exc:
            raise _named(exc, peer) from exc
        result[peer] = _parse(kind, payload, peer)
    return result


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
