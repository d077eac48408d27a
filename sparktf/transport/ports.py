"""Ports kept for servers that start later, such as TensorFlow's, which take a number and not a socket."""

from __future__ import annotations

import errno
import socket
from types import TracebackType
from typing import Self

from sparktf.errors import TransportError


def bare_host(host: str) -> str:
    """Return a host as sockets take it: an IPv6 address without brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def host_and_port(host: str, port: int) -> str:
    """Return a server's address as one word, an IPv6 address in brackets (RFC 3986)."""
    host = bare_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class HeldPort:
    """A free TCP port that stays this job's own until it is closed, also while a server listens on it.

    The socket is bound and never listens. So the kernel gives the port to nobody who asks for any, refuses those that
    ask for this one, and lets in a server that sets ``SO_REUSEADDR`` before it binds, as gRPC does: there is no moment
    at which the port is free. Close it once the server serves, or at the end.

    Parameters
    ----------
    host : str
        The address of this machine to hold the port on.

    Raises
    ------
    TransportError
        The machine has no such address, or no free port.
    """

    def __init__(self, host: str) -> None:
        sock: socket.socket | None = None
        try:
            family, kind, number, _, address = socket.getaddrinfo(bare_host(host), 0, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(family, kind, number)
            # Without it on both sockets no server could bind beside this one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as exc:
            if sock is not None:
                sock.close()
            raise TransportError(
                f"Expected to hold a port on {host!r}, which this machine refuses: {exc}. "
                "Pass an address of this machine that the other nodes can reach."
            ) from exc
        self._sock = sock
        self.port: int = sock.getsockname()[1]

    def taken(self) -> bool:
        """Tell whether somebody listens on the port, in this process or another."""
        with socket.socket(self._sock.family, self._sock.type, self._sock.proto) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(self._sock.getsockname())
            except OSError as exc:
                return exc.errno == errno.EADDRINUSE
        return False

    def close(self) -> None:
        """Let the port go; what listens on it by then keeps it."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
