"""Every exception that sparktf raises on purpose, by what the caller can do about it.

::

    SparktfError
    ├── ParamError (ValueError)          a Param or an argument is wrong: change the call
    ├── DataError (ValueError)           a column or a row does not fit the model: change the data or the mapping
    ├── ClusterError (RuntimeError)      the job could not run on this cluster: change the cluster or numWorkers
    │   ├── SlotsError                   too few task slots for a barrier stage
    │   ├── VersionError                 driver and executors run different versions
    │   └── NodeError                    a node failed; carries its rank and its own traceback
    ├── TransportError (ConnectionError) nodes could not talk to each other
    │   ├── ProtocolError                a protocol that does not exist or is not available here
    │   ├── HandshakeError               a peer was refused: another job, a wrong secret, a wrong world
    │   ├── PeerLostError                a peer went away or told us that it failed
    │   └── TransportTimeoutError (TimeoutError)  no progress within the time allowed
    ├── DriftError (RuntimeError)        ranks that must hold equal weights do not
    └── PersistenceError (RuntimeError)  a stage or a model cannot be saved or loaded
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


class SparktfError(Exception):
    """Base of everything that sparktf raises on purpose.

    Attributes
    ----------
    remote_traceback : str
        Of the process that raised it first, where that was another one; else empty.
    """

    remote_traceback: str = ""


class ParamError(SparktfError, ValueError):
    """A Param or an argument has a value that cannot work."""


class DataError(SparktfError, ValueError):
    """A column or a row does not fit what the model wants."""


class ClusterError(SparktfError, RuntimeError):
    """The job could not be run on this cluster."""


class SlotsError(ClusterError):
    """There are fewer task slots than a barrier stage needs."""


class VersionError(ClusterError):
    """The driver and an executor run versions that do not fit together."""


class NodeError(ClusterError):
    """A node failed.

    Parameters
    ----------
    message : str
        What happened, for people; holds the node's own traceback where there is one.
    rank : int or None
        The node's rank; None where it could not be known.
    remote_traceback : str
        The traceback as the node printed it; empty where the node was killed.
    """

    def __init__(self, message: str, rank: int | None = None, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.remote_traceback = remote_traceback


class TransportError(SparktfError, ConnectionError):
    """Nodes could not talk to each other."""


class ProtocolError(TransportError):
    """A protocol that does not exist, or is not available on this machine."""


class HandshakeError(TransportError):
    """A peer was refused: another job, a wrong secret, a wrong world, another version."""


class PeerLostError(TransportError):
    """A peer went away, or told us that it failed.

    Parameters
    ----------
    message : str
        What was lost, in which operation.
    peer : int or None
        The peer's rank; None where it could not be known.
    reason : str
        What the peer itself said before it left; empty where it said nothing.
    """

    def __init__(self, message: str, peer: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.peer = peer
        self.reason = reason


def lost_peer(error: BaseException) -> dict[str, object]:
    """Return the peer and reason of a `PeerLostError`, JSON-able; of others, whose attributes may be anything, none."""
    told = error if isinstance(error, PeerLostError) else None
    return {"peer": told.peer, "reason": told.reason} if told is not None else {"peer": None, "reason": ""}


class TransportTimeoutError(TransportError, TimeoutError):
    """A peer made no progress within the time allowed."""


class DriftError(SparktfError, RuntimeError):
    """Ranks that must hold equal weights hold different ones."""


class PersistenceError(SparktfError, RuntimeError):
    """A stage or a model cannot be saved or loaded as asked."""


def located(error: SparktfError, where: str) -> SparktfError:
    """Return an error that is like this one, and whose message begins with where it happened."""
    again = copy.copy(error)
    again.args = (f"{where}: {error}", *error.args[1:])
    return again


def told_error(told: Mapping[str, Any], rank: int) -> SparktfError:
    """Make an error of what a node's own process told of it.

    Parameters
    ----------
    told : mapping
        ``"kind"``, its qualified name; ``"message"``, ``"traceback"``; of a lost peer ``"peer"`` and ``"reason"``.
    rank : int
        The node's.

    Returns
    -------
    SparktfError
        sparktf's own errors as they were, with the process's traceback as ``remote_traceback``; of others a
        `NodeError`.
    """
    known = own_error(told["kind"])
    if known is PeerLostError:
        return PeerLostError(told["message"], told["peer"], told["reason"])
    if known is NodeError:
        return NodeError(told["message"], rank, told["traceback"])
    if known is not None:
        rebuilt = known(told["message"])
        # The place in the program, for the driver to show; this process's own tells nothing.
        rebuilt.remote_traceback = told["traceback"]
        return rebuilt
    message = f"{told['kind'].removeprefix('builtins.')}: {told['message']}\n\n{told['traceback']}"
    return NodeError(message, rank, told["traceback"])


def own_error(name: str) -> type[SparktfError] | None:
    """Return the exception of this module that a qualified name stands for; None for any other name."""
    module, _, short = name.rpartition(".")
    found = globals().get(short) if module == __name__ else None
    return found if isinstance(found, type) and issubclass(found, SparktfError) else None
