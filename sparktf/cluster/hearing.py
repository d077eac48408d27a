"""What a child process says over a socket pair, and that it has ended, whoever else holds the pair's other end."""

from __future__ import annotations

import select
import socket
import subprocess
import time

from sparktf.errors import PeerLostError, TransportTimeoutError
from sparktf.transport.framing import recv_frame

# A child that ends closes the socket, which is heard of at once; only where a process of its own keeps it open does it
# take as long as this.
_LOOK_SECONDS = 1.0


def hear(
    sock: socket.socket, child: subprocess.Popen[bytes], timeout: float | None, frame_seconds: float, limit: int
) -> tuple[int, bytes]:
    """Receive a child's next frame.

    Parameters
    ----------
    sock : socket
        Our end of the socket pair.
    child : Popen
    timeout : float or None
        Seconds until a frame begins; None waits as long as the child lives.
    frame_seconds : float
        Seconds that a frame which has begun may take.
    limit : int
        Largest payload in bytes that is accepted.

    Returns
    -------
    (int, bytes)
        Kind and payload.

    Raises
    ------
    PeerLostError
        The child has ended, and all that it said has been heard.
    TransportTimeoutError
        It said nothing for `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        # In this order: its last words come before its end.
        ended = child.poll() is not None
        left = _LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))
        if poll.poll(0 if ended else left * 1000):
            return recv_frame(sock, frame_seconds, limit)
        if ended:
            raise PeerLostError("The child process has ended.")
        if deadline is not None and time.monotonic() >= deadline:
            raise TransportTimeoutError(f"Expected a word of the child process within {timeout} s.")
