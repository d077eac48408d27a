"""The calling side of a mesh's connections, as `doorman` is the one that answers."""

from __future__ import annotations

import socket
import time

from sparktf.errors import HandshakeError, PeerLostError, TransportError, TransportTimeoutError
from sparktf.transport.doorman import Group
from sparktf.transport.handshake import hung_up, initiate, too_slow

# The kernel doubles the number and cuts it to net.core.[rw]mem_max. Enough for 100 Gbit/s over 0.1 ms; what waits in
# larger ones leaves the processor's caches, which cost a fifth of the rate between two processes, half among four.
_SOCKET_BUFFER = 1024 * 1024
# How often to call again, and what a peer that hangs up at once is given to come to itself.
_REDIALS = 3
_PAUSE_SECONDS = 0.1


def reach(address: tuple[str, int], group: Group, channel: str, peer: int) -> socket.socket:
    """Connect to a lower rank and shake hands; again where it hangs up, as on a stranger that says nothing.

    A machine that stood still for a while (a virtual one that was paused, a stopped process) finds that a peer has
    given up its handshake. Where the peer has ended instead, the next attempt is refused.

    Parameters
    ----------
    address : (str, int)
        Where the peer listens.
    group : Group
        What to prove, and until when.
    channel : str
        Which of the connections this is.
    peer : int
        The rank that must answer.

    Returns
    -------
    socket
        Connected and proven, encrypted where the group is; the caller's to close.

    Raises
    ------
    HandshakeError
        The peer holds another secret or belongs to another world.
    PeerLostError
        The peer has ended.
    TransportTimeoutError
        It did not answer in time.
    TransportError
        The network does not lead there.
    """
    for _ in range(_REDIALS):
        try:
            return _attempt(address, group, channel, peer)
        except PeerLostError as exc:
            if not isinstance(exc.__cause__, HandshakeError):
                raise
        time.sleep(_PAUSE_SECONDS)
    return _attempt(address, group, channel, peer)


def _attempt(address: tuple[str, int], group: Group, channel: str, peer: int) -> socket.socket:
    where = f"rank {peer} at {address[0]}:{address[1]}"
    left = group.deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeoutError(f"Expected to reach {where} in time; the time allowed has ended.")
    try:
        sock = _dial(address, left)
    except TimeoutError as exc:
        raise TransportTimeoutError(f"Expected {where} to answer within {left:.1f} s.") from exc
    except ConnectionError as exc:
        # Refused, or ended before it was accepted; it listened when it told its address.
        raise PeerLostError(
            f"Expected to reach {where}: {exc}. The node has ended, or a firewall is in between.", peer
        ) from exc
    except OSError as exc:
        raise TransportError(
            f"Expected to reach {where}: {exc}. The network does not lead there, or a firewall is in between."
        ) from exc
    try:
        theirs = initiate(sock, group.secret, group.identity(channel, peer), group.deadline)
        if group.check(theirs) != peer:
            raise HandshakeError(f"Expected rank {peer} at {address}. Received: rank {theirs['rank']}.")
        return group.secure(sock, theirs, group.deadline, server=False)
    except HandshakeError as exc:
        sock.close()
        message = f"Handshake with {where} failed. {exc}"
        if hung_up(exc):
            raise PeerLostError(message, peer) from exc
        if too_slow(exc):
            raise TransportTimeoutError(message) from exc
        raise HandshakeError(message) from exc
    except BaseException:
        sock.close()
        raise


def _dial(address: tuple[str, int], timeout: float) -> socket.socket:
    family, kind, number, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, number)
    try:
        # Before connecting, as the window's scale is agreed then.
        set_buffers(sock)
        sock.settimeout(timeout)
        sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock


def set_buffers(sock: socket.socket) -> None:
    """Give a socket the kernel's buffers that carry tensors; before it connects or listens."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
