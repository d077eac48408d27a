"""What a protocol brings: one link to every peer. The collectives are built on nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod

from sparktf.transport.contract import Array


class Gone(Exception):
    """The connection to a peer ended or broke."""

    def __init__(self, peer: int, detail: str) -> None:
        super().__init__(detail)
        self.peer = peer


class Silent(Exception):
    """A peer let the timeout pass; `doing` says whether we were sending or receiving."""

    def __init__(self, peer: int, doing: str) -> None:
        super().__init__(doing)
        self.peer = peer


class Link(ABC):
    """The way to and from one peer, in order and without loss.

    Data travels in pieces. The header and the view of one `send` or `post` are two pieces, those of no bytes none.
    The peer receives the same pieces in the same order, each by one `fill` or `take` of the same length, so that a
    link may cut long ones into whatever its memory holds, alike at both ends.

    One thread uses a link at a time, but for `shutdown`. Every method but `shutdown` and `close` raises `Gone` where
    the peer or the connection is lost and `Silent` where the timeout passes without progress; the link is dead from
    then on.

    Attributes
    ----------
    peer : int
        The rank at the other end.
    sends_alone : bool
        What was posted is sent whatever its thread does meanwhile. Else only while that waits in a link of this kind.
    """

    peer: int
    sends_alone = True

    @abstractmethod
    def send(self, header: bytes, view: memoryview) -> None:
        """Send a header and a view; return when the memory of both may be changed.

        It may wait for the peer to receive, once more has been sent than the link can hold (64 KiB always fit).
        """

    @abstractmethod
    def post(self, view: memoryview, header: bytes = b"") -> None:
        """Begin to send a header and a view of any length, and return without waiting for the peer.

        The view's memory must keep its contents until `flush`, or until the peer is known to have it.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when the memory of all that was posted may be changed."""

    @abstractmethod
    def fill(self, view: memoryview) -> None:
        """Receive one piece into the caller's memory."""

    @abstractmethod
    def take(self, nbytes: int) -> memoryview:
        """Receive one piece, of at most the communicator's ``chunk_bytes``, into the link's own memory.

        Returns
        -------
        memoryview
            `nbytes` bytes, aligned for any dtype; valid until the next `fill` or `take` of this link.
        """

    def offer(self, array: Array) -> None:  # noqa: B027
        """Let the peer place pieces of its array straight into this one, where the protocol can do that."""

    def accept(self, array: Array) -> None:  # noqa: B027
        """Take the peer's offer: what it said by `offer` is where `place` puts pieces of `array`."""

    def place(self, view: memoryview) -> None:
        """Begin to send, as `post` does, a piece that the peer will `fill` into the same stretch of its own array."""
        self.post(view)

    def set_timeout(self, seconds: float) -> None:  # noqa: B027
        """Wait for so many seconds from now on; called while nobody uses the link. What is closed stays as it is."""

    @abstractmethod
    def shutdown(self) -> None:
        """Make every call, pending and later, raise `Gone`; called by any thread, perhaps more than once."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; called once, when nobody uses the link. What was sent still arrives."""
