"""Mutual proof, over a connected socket, that both ends hold the job's secret.

Four frames, each at most a few KiB::

    initiator -> acceptor   HELLO      32 random bytes, identity as JSON
    acceptor  -> initiator  CHALLENGE  32 random bytes, identity as JSON
    initiator -> acceptor   PROOF      HMAC-SHA256(secret, role, both nonces, both identities)
    acceptor  -> initiator  PROOF      the same with the other role

The acceptor proves itself last: a stranger that connects learns nothing made from the secret. The proofs
cover both identities, so neither can be changed on the way; the role in them keeps a proof from being sent
back. This authenticates the connection's ends; what travels afterwards is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import ssl
import time
from typing import Any

from sparktf.errors import HandshakeError, PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.framing import recv_frame, send_frame

NONCE_BYTES = 32
# An identity is a handful of short fields; a stranger must not make us allocate more.
FRAME_LIMIT = 4096

_HELLO, _CHALLENGE, _PROOF, _REFUSED = range(1, 5)
_LABEL = b"sparktf handshake 1"

Identity = dict[str, Any]

# What a handshake fails of where the peer ends the connection; every `TransportError` is a `ConnectionError`, too.
_HUNG_UP = (PeerLostError, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


def initiate(sock: socket.socket, secret: bytes, identity: Identity, deadline: float) -> Identity:
    """Prove the secret as the side that connected, and have the other side prove it.

    Parameters
    ----------
    sock : socket
        Connected; its timeout is overwritten. The caller closes it where this raises.
    secret : bytes
        The job's secret.
    identity : dict
        What to tell the peer about ourselves; JSON values only.
    deadline : float
        Absolute time, as of ``time.monotonic()``, at which to give up.

    Returns
    -------
    dict
        The identity that the peer has proven. Whether it is the one wanted is the caller's check.

    Raises
    ------
    HandshakeError
        The peer holds another secret, refused ours, is no such peer at all, or was too slow.
    """
    try:
        nonce, own = secrets.token_bytes(NONCE_BYTES), _encode(identity)
        _send(sock, _HELLO, nonce + own, deadline)
        peer_nonce, theirs = _split(_recv(sock, _CHALLENGE, deadline))
        transcript = _transcript(nonce, peer_nonce, own, theirs)
        _send(sock, _PROOF, _proof(secret, b"initiate", transcript), deadline)
        _verify(secret, b"accept", transcript, _recv(sock, _PROOF, deadline))
        return _decode(theirs)
    except HandshakeError:
        raise
    except TransportError as exc:
        raise HandshakeError(f"The peer did not finish the handshake: {exc}") from exc


def accept(sock: socket.socket, secret: bytes, identity: Identity, deadline: float) -> Identity:
    """Prove the secret as the side that was connected to; as `initiate` otherwise."""
    try:
        peer_nonce, theirs = _split(_recv(sock, _HELLO, deadline))
        nonce, own = secrets.token_bytes(NONCE_BYTES), _encode(identity)
        _send(sock, _CHALLENGE, nonce + own, deadline)
        transcript = _transcript(peer_nonce, nonce, theirs, own)
        proof = _recv(sock, _PROOF, deadline)
        try:
            _verify(secret, b"initiate", transcript, proof)
        except HandshakeError as exc:
            _send(sock, _REFUSED, b"the secrets differ", deadline)
            raise exc
        _send(sock, _PROOF, _proof(secret, b"accept", transcript), deadline)
        return _decode(theirs)
    except HandshakeError:
        raise
    except TransportError as exc:
        raise HandshakeError(f"The peer did not finish the handshake: {exc}") from exc


def hung_up(error: HandshakeError) -> bool:
    """Tell whether the peer has refused nothing, but ended the connection: it has ended, or has lost its patience."""
    return isinstance(error.__cause__, _HUNG_UP)


def too_slow(error: HandshakeError) -> bool:
    """Tell whether the peer has refused nothing, but not finished in time."""
    return isinstance(error.__cause__, TimeoutError)


def _send(sock: socket.socket, kind: int, payload: bytes, deadline: float) -> None:
    send_frame(sock, kind, payload, _left(deadline))


def _recv(sock: socket.socket, expected: int, deadline: float) -> bytes:
    kind, payload = recv_frame(sock, _left(deadline), FRAME_LIMIT)
    if kind == _REFUSED:
        raise HandshakeError(
            f"The peer refused this process: {payload[:200].decode(errors='replace')}. "
            "Both ends must be given the same job secret."
        )
    if kind != expected:
        raise HandshakeError(f"Expected a handshake frame of kind {expected}. Received: kind {kind}.")
    return payload


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeoutError("The time allowed has ended.")
    return left


def _split(payload: bytes) -> tuple[bytes, bytes]:
    if len(payload) < NONCE_BYTES:
        raise HandshakeError(f"Expected a nonce of {NONCE_BYTES} bytes. Received: {len(payload)} bytes in all.")
    return payload[:NONCE_BYTES], payload[NONCE_BYTES:]


def _transcript(initiator_nonce: bytes, acceptor_nonce: bytes, initiator: bytes, acceptor: bytes) -> bytes:
    # Lengths in front keep two different pairs of identities from giving the same bytes.
    parts = (initiator_nonce, acceptor_nonce, initiator, acceptor)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _proof(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.new(secret, b"|".join((_LABEL, role, transcript)), hashlib.sha256).digest()


def _verify(secret: bytes, role: bytes, transcript: bytes, received: bytes) -> None:
    if not hmac.compare_digest(_proof(secret, role, transcript), received):
        raise HandshakeError(
            "The peer does not hold this job's secret: it belongs to another job, or is a stranger. "
            "Both ends must be given the same secret."
        )


def _encode(identity: Identity) -> bytes:
    return json.dumps(identity, sort_keys=True).encode()


def _decode(data: bytes) -> Identity:
    try:
        identity = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise HandshakeError(f"Expected the peer's identity as JSON. Received: {data[:200]!r}.") from exc
    if not isinstance(identity, dict):
        raise HandshakeError(f"Expected the peer's identity as a JSON object. Received: {data[:200]!r}.")
    return identity
