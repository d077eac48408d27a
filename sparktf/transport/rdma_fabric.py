"""A rank's links over RDMA to some of its peers: one device, its queues and its registered memory, made together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from sparktf.errors import HandshakeError, ProtocolError, TransportError
from sparktf.transport.contract import Array
from sparktf.transport.mesh import Mesh
from sparktf.transport.rdma_adapter import Adapter, Region
from sparktf.transport.rdma_device import check_locked_memory, refusals
from sparktf.transport.rdma_inbox import SLOTS
from sparktf.transport.rdma_link import RdmaLink
from sparktf.transport.rdma_queue import Card, Completions
from sparktf.transport.settings import Settings
from sparktf.transport.survey import share_with_each

# Slots of links that are in no ring of reductions: they carry small arrays, and what is sent point to point.
FAR_SLOT_BYTES = 128 * 1024
# Completions that a link can have outstanding: its send queue and its receive queue, and some to spare.
_COMPLETIONS = 8 * SLOTS
# What a peer that has left may delay `drain`, where its own reliability does not.
_DRAIN_SECONDS = 2.0


class Fabric:
    """The RDMA side of a communicator; every rank of its world makes one.

    Parameters
    ----------
    rank : int
        This rank.
    mesh : Mesh
        Connections to all others, by which they tell each other what RDMA needs to know. It remains the caller's.
    slots : dict of int to int
        By peer that is to be linked: the bytes of a slot, equal at both ends.
    timeout : float
        Seconds without progress, and that connecting may take.
    settings : Settings
        Which device to use.
    on_quiet : callable
        See `RdmaLink`.

    Attributes
    ----------
    links : dict of int to RdmaLink
        By peer.

    Raises
    ------
    ProtocolError
        This rank or another lacks what RDMA needs, or cannot reach a third; says which rank, and what. Every rank
        raises it, and the mesh can be used for another protocol.
    """

    def __init__(
        self,
        rank: int,
        mesh: Mesh,
        slots: Mapping[int, int],
        timeout: float,
        settings: Settings,
        on_quiet: Callable[[], None],
    ) -> None:
        self.links: dict[int, RdmaLink] = {}
        self._regions: list[Region] = []
        self._timeout, self._on_quiet = timeout, on_quiet
        deadline = time.monotonic() + timeout
        with ExitStack() as resources, ExitStack() as undo:
            told = _together(mesh, rank, deadline, lambda: self._open_links(slots, settings, resources, undo))
            cards = {peer: _read_card(told[peer], peer) for peer in slots}
            _together(mesh, rank, deadline, lambda: self._connect(cards))
            # Nobody may write before the other side's queue pair leads back.
            _together(mesh, rank, deadline, lambda: self._try_out((time.monotonic() + deadline) / 2))
            # Links belong to the communicator from now on.
            undo.pop_all()
            self._resources = resources.pop_all()

    @property
    def registrations(self) -> int:
        """Pieces of memory that the links have registered: slots at either end."""
        return 2 * len(self.links)

    def allocate(self, nbytes: int) -> Array:
        """Return zeroed memory, more than 0 bytes of it, that links send from and peers write into without a copy."""
        region = self._adapter.allocate(nbytes, remote=True)
        self._regions.append(region)
        return region.array

    def register(self, array: Array) -> None:
        """Let links send from memory, and peers write into it, without a copy; it must live as long as the fabric.

        Raises
        ------
        TransportError
            The system refuses, mostly for the limit on locked memory.
        """
        self._regions.append(self._adapter.register(array, remote=True))

    def drain(self) -> None:
        """Wait until what was sent is in the peers' memory, or will never be."""
        for link in self.links.values():
            link.drain(_DRAIN_SECONDS)

    def peer_left(self, peer: int) -> None:
        """Hear that a peer has said goodbye; one that is not linked is no concern of the fabric's."""
        if peer in self.links:
            self.links[peer].peer_left()

    def close(self) -> None:
        """Close queues and the device; links must have been closed. Memory in use lives on."""
        self._resources.close()
        self._regions.clear()

    def _open_links(
        self, slots: Mapping[int, int], settings: Settings, resources: ExitStack, undo: ExitStack
    ) -> dict[int, dict[str, Any]]:
        """Make a link to every peer; return what each of them must know of its own."""
        check_locked_memory(sum(map(link_bytes, slots.values())), settings.later_bytes)
        self._adapter = Adapter(settings)
        resources.callback(self._adapter.close)
        longest = max(slots.values(), default=0)
        if self._adapter.port.longest_request < longest:
            raise ProtocolError(
                f"Expected {self._adapter.name} to take work requests of {longest} bytes. "
                f"Received: max_msg_sz {self._adapter.port.longest_request}."
            )
        completions = Completions(self._adapter, _COMPLETIONS * max(1, len(slots)))
        resources.callback(completions.close)
        for peer, slot_bytes in slots.items():
            link = RdmaLink(self._adapter, completions, self._regions, peer, slot_bytes, self._timeout, self._on_quiet)
            undo.callback(link.close)
            self.links[peer] = link
        return {peer: {"card": link.card.to_json()} for peer, link in self.links.items()}

    def _connect(self, cards: Mapping[int, Card]) -> dict[int, dict[str, Any]]:
        for peer, link in self.links.items():
            link.connect(cards[peer])
        return {}

    def _try_out(self, deadline: float) -> dict[int, dict[str, Any]]:
        """Find out whether every peer can be reached: an active port may be one of another network."""
        for link in self.links.values():
            link.probe()
        for link in self.links.values():
            link.await_probe(deadline)
        return {}


def link_bytes(slot_bytes: int) -> int:
    """Return how much memory a link locks: slots to receive into, and slots to send from."""
    return 2 * SLOTS * slot_bytes


def _together(
    mesh: Mesh, rank: int, deadline: float, step: Callable[[], Mapping[int, dict[str, Any]]]
) -> dict[int, dict[str, Any]]:
    """Take a step on every rank and tell each peer the facts that it gives; where it fails on one, raise on all.

    Returns
    -------
    dict of int to dict
        By peer: the facts that it told this rank.

    Raises
    ------
    ProtocolError
        With the rank and its trouble.
    """
    nothing: dict[str, Any] = {}
    try:
        with refusals("setting up RDMA"):
            facts = {**dict.fromkeys(mesh.data, nothing), **step()}
    except TransportError as exc:
        nothing = {"trouble": str(exc)}
        facts = dict.fromkeys(mesh.data, nothing)
    told = share_with_each(mesh, facts, deadline)
    # Of several, each rank hears the same one.
    for peer, theirs in sorted({**told, rank: nothing}.items()):
        if "trouble" in theirs:
            raise ProtocolError(f"rank {peer} cannot use RDMA: {theirs['trouble']}")
    return told


def _read_card(facts: dict[str, Any], peer: int) -> Card:
    fields = facts.get("card")
    if not isinstance(fields, dict):
        raise HandshakeError(f"Expected a card of rank {peer}'s queue pair. Received: {str(facts)[:200]}.")
    return Card.from_json(fields)
