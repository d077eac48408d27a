"""Protocols by name, imported when they are asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from sparktf.errors import HandshakeError, ParamError, ProtocolError
from sparktf.transport.contract import Communicator
from sparktf.transport.mesh import Exchange
from sparktf.transport.ports import bare_host
from sparktf.transport.settings import Settings
from sparktf.transport.solo import SoloCommunicator

_LOG = logging.getLogger("sparktf.transport")

# A week, which the system calls behind can still express.
_LONGEST_TIMEOUT = 7 * 24 * 3600

_PROTOCOLS = {
    "auto": "sparktf.transport.auto:connect",
    "tcp": "sparktf.transport.tcp:connect",
    "shm": "sparktf.transport.shm:connect",
    "rdma": "sparktf.transport.rdma:connect",
}
# Names that other systems use.
_ALIASES = {"grpc_rdma": "rdma"}


class Connector(Protocol):
    """The function that joins a group of at least two by one protocol; arguments as `connect` has checked them."""

    def __call__(
        self,
        *,
        rank: int,
        size: int,
        exchange: Exchange,
        secret: bytes,
        timeout: float,
        host: str | None,
        settings: Settings,
    ) -> Communicator:
        """Return the rank's communicator, connected."""
        ...


def protocols() -> tuple[str, ...]:
    """Return the names that `connect` takes."""
    return tuple(_PROTOCOLS)


def check_timeout(seconds: float, name: str = "timeout") -> None:
    """Raise `ParamError` where a time in seconds is not one that nodes can wait for."""
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ParamError(
            f"{name}: expected seconds, greater than 0 and at most {_LONGEST_TIMEOUT}. Received: {seconds!r}"
        )


def connect(
    protocol: str,
    *,
    rank: int,
    size: int,
    exchange: Exchange,
    secret: bytes,
    timeout: float = 60.0,
    host: str | None = None,
    settings: Settings | None = None,
) -> Communicator:
    """Join a group; every rank calls this.

    Parameters
    ----------
    protocol : str
        One of `protocols()` (``"grpc_rdma"`` means ``"rdma"``), or a backend of your own as
        ``"package.module:function"``; the same on every rank.
        ``"auto"`` logs what it picked to ``sparktf.transport``.
    rank, size : int
        This process's number and how many there are.
    exchange : callable
        ``bytes -> list[bytes]``: gives every rank what all ranks put in, ordered by rank. Called exactly
        once.
    secret : bytes
        Known to this job's processes only; not empty. 32 random bytes are a good one.
    timeout : float
        Seconds without progress after which an operation fails; also the time that each step of connecting may take.
    host : str or None
        The address that this rank listens on and tells the others. None: the address of the machine's name,
        or 127.0.0.1 where that has none.
    settings : Settings or None
        Choices for single protocols; None: those of the environment (`Settings.from_environment`), else the default.

    Returns
    -------
    Communicator
        Use it in a ``with`` block.

    Raises
    ------
    ParamError
        An argument cannot work.
    ProtocolError
        There is no such protocol, or it is not available on this machine.
    HandshakeError, TransportTimeoutError, TransportError
        The group could not be connected; nothing is left open on this rank.
    """
    protocol = _ALIASES.get(protocol, protocol)
    target = _PROTOCOLS.get(protocol, protocol)
    if ":" not in target:
        known = ", ".join(repr(name) for name in protocols())
        raise ProtocolError(f"Expected protocol to be one of {known}. Received: {protocol!r}.")
    if not (isinstance(size, int) and isinstance(rank, int) and 0 <= rank < size):
        raise ParamError(f"Expected integers with 0 <= rank < size. Received: rank={rank!r}, size={size!r}.")
    if not isinstance(secret, bytes) or not secret:
        raise ParamError(f"Expected secret to be bytes, not empty. Received: {type(secret).__name__}.")
    check_timeout(timeout)
    if host in ("", "0.0.0.0", "::"):
        raise ParamError(
            f"Expected host to be an address that the other nodes can reach. Received: {host!r}. "
            "Pass None for the address of this machine's name."
        )
    # Spark puts IPv6 addresses into brackets.
    host = None if host is None else bare_host(host)
    settings = settings or Settings.from_environment()
    if settings.tls and protocol not in ("tcp", "auto"):
        raise ProtocolError(
            f"Expected protocol 'tcp' for tls=True, the only one that can encrypt. Received: {protocol!r}."
        )
    if size == 1:
        entries = exchange(b"")
        if len(entries) != 1:
            raise HandshakeError(f"Expected the exchange to give 1 entry (size). Received: {len(entries)}.")
        communicator: Communicator = SoloCommunicator("tcp" if protocol == "auto" else protocol)
    else:
        module, _, attribute = target.partition(":")
        try:
            connector: Connector = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as exc:
            raise ProtocolError(
                f"Expected protocol {protocol!r} to be a function that can be imported, as 'package.module:function'. "
                f"Received: {exc}. Is the package installed on every node?"
            ) from exc
        communicator = connector(
            rank=rank,
            size=size,
            exchange=exchange,
            secret=secret,
            timeout=timeout,
            host=host,
            settings=settings,
        )
    communicator.timeout = timeout
    communicator.another = _connect_as(protocol, secret=secret, timeout=timeout, host=host, settings=settings)
    if protocol == "auto":
        _LOG.info("protocol 'auto' is %r: %s", communicator.protocol, communicator.reason)
    else:
        communicator.reason = communicator.reason or f"protocol={protocol!r} was asked for"
    return communicator


def _connect_as(protocol: str, **kept: Any) -> Callable[..., Communicator]:
    """Return `connect` with some arguments; unlike a partial, it does not tell the secret to whoever prints it."""

    def another(**given: Any) -> Communicator:
        return connect(protocol, **{**kept, **given})

    return another
