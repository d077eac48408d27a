"""An opened RDMA device with the memory that it may reach."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparktf.errors import TransportError
from sparktf.transport.contract import Array
from sparktf.transport.rdma_device import load_verbs, locked_memory_limit, open_device, refusals
from sparktf.transport.settings import Settings

# pyverbs 44 does not tell a channel's descriptor: it is found as the one that has come with the channel.
_OPENING = threading.Lock()
_TRIES = 20


@dataclass(frozen=True)
class Region:
    """Memory that the device may reach.

    Attributes
    ----------
    array : ndarray
        The bytes, uint8; held here, as the registration itself keeps only the address.
    address : int
        Where they begin.
    registration : object
        pyverbs's MR, with the local and the remote key.
    """

    array: Array
    address: int
    registration: Any

    @property
    def lkey(self) -> int:
        """The key by which this rank's own work requests name the region."""
        return int(self.registration.lkey)

    @property
    def rkey(self) -> int:
        """The key that lets a peer write into the region."""
        return int(self.registration.rkey)

    @property
    def here(self) -> tuple[int, int]:
        """Address and local key, as a work request wants them."""
        return self.address, self.lkey

    def holds(self, address: int, nbytes: int) -> bool:
        """Return whether a stretch of memory lies wholly in the region."""
        return self.address <= address and address + nbytes <= self.address + self.array.nbytes


class Adapter:
    """An opened device with its protection domain.

    Parameters
    ----------
    settings : Settings
        Which device, port and GID.

    Raises
    ------
    ProtocolError
        What is missing: pyverbs, the device, an active port, a GID.

    Attributes
    ----------
    verbs : namespace
        pyverbs, as `load_verbs` gives it.
    context, domain : object
        pyverbs's opened device, and the protection domain of all that is made on it.
    name : str
        The device's name.
    port : Port
        The port that is used.
    statuses : dict of int to str
        The names of error completions.
    """

    def __init__(self, settings: Settings) -> None:
        self.verbs = load_verbs()
        with _OPENING, refusals("opening an RDMA device"):
            self.context, self.name, self.port = open_device(self.verbs, settings)
        with refusals(f"opening {self.name}"):
            self.domain = self.verbs.pd.PD(self.context)
        self._registrations: list[Any] = []
        e = self.verbs.e
        self.statuses = {
            value: name for name, value in vars(e).items() if name.startswith("IBV_WC_") and "_ERR" in name
        }

    def allocate(self, nbytes: int, *, remote: bool) -> Region:
        """Allocate zeroed, page-aligned memory and register it.

        Parameters
        ----------
        nbytes : int
            More than 0.
        remote : bool
            Whether peers that are told the key may write into it.

        Raises
        ------
        TransportError
            The system refuses, mostly for the limit on locked memory.
        """
        # Shared with forked children rather than copied on write: the device goes on to see the parent's pages.
        return self.register(np.frombuffer(mmap.mmap(-1, nbytes), np.uint8), remote=remote)

    def register(self, array: Array, *, remote: bool) -> Region:
        """Register memory that is there already, as `allocate` does; it must live as long as the adapter."""
        address, nbytes = address_of(array), array.nbytes
        e = self.verbs.e
        access = e.IBV_ACCESS_LOCAL_WRITE | (e.IBV_ACCESS_REMOTE_WRITE if remote else 0)
        with refusals(f"registering {nbytes} bytes with {self.name}", locked_memory_limit()):
            registration = self.verbs.mr.MR(self.domain, nbytes, access, address)
        self._registrations.append(registration)
        return Region(array, address, registration)

    def close(self) -> None:
        """End all registrations and close the device; queues must have been closed. Memory in use lives on."""
        for registration in self._registrations:
            registration.close()
        self.domain.close()
        with _OPENING:
            self.context.close()


def address_of(array: Array) -> int:
    """Return the address of an array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def open_channel(adapter: Adapter) -> tuple[Any, int]:
    """Return a completion channel and its descriptor, which does not block.

    pyverbs holds the GIL while it waits for an event, so it must never wait.

    Raises
    ------
    TransportError
        The device refuses, or the descriptor could not be told from others.
    """
    for _ in range(_TRIES):
        with _OPENING:
            before = _event_descriptors()
            with refusals(f"making a completion channel on {adapter.name}"):
                channel = adapter.verbs.cq.CompChannel(adapter.context)
            descriptors = {channel.fd} if hasattr(channel, "fd") else _event_descriptors() - before
        if len(descriptors) == 1:
            (descriptor,) = descriptors
            os.set_blocking(descriptor, False)
            return channel, descriptor
        # Another part of the program has closed one, whose number is now ours, or has opened another.
        close_channel(channel)
    raise TransportError(
        f"Expected one new descriptor of a completion channel of {adapter.name}. Received: none or several, "
        f"{_TRIES} times; does another part of the program open and close RDMA devices all the time?"
    )


def close_channel(channel: Any) -> None:
    """Close a completion channel; nobody who opens one mistakes its number for a new one."""
    with _OPENING:
        channel.close()


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found
