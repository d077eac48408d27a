"""The RDMA device of this machine: what is missing where there is none, and the opened device with its memory.

Devices are reached through pyverbs, the bindings that come with rdma-core. They must fit the machine's libibverbs, so
they are the distribution's business and are imported only when RDMA is asked for.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparktf.errors import ProtocolError, TransportError
from sparktf.transport.contract import Array
from sparktf.transport.settings import Settings

_INSTALL = (
    "On Debian and Ubuntu: apt-get install python3-pyverbs ibverbs-providers rdma-core; for a virtual environment of "
    "the same Python version, link /usr/lib/python3/dist-packages/pyverbs into a directory on PYTHONPATH. "
    "Elsewhere: the distribution's pyverbs, or pip install 'sparktf[rdma]' where its version is that of rdma-core."
)
# Linux's number of the capability that lifts the limit on locked memory.
_CAP_IPC_LOCK = 14
# Longer work requests gain nothing, and Soft-RoCE moves all the data of one before it comes back.
_LONGEST_REQUEST = 1024 * 1024
# pyverbs 44 does not tell a channel's descriptor: it is found as the one that has come with the channel.
_OPENING = threading.Lock()


@cache
def load_verbs() -> SimpleNamespace:
    """Import pyverbs; return its modules by name, and its constants as ``e``.

    Raises
    ------
    ProtocolError
        It is not installed, or does not fit this machine; says what to do.
    """
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        from pyverbs import addr, cq, device, mr, pd, qp, wr
        from pyverbs.pyverbs_error import PyverbsError

        try:
            from pyverbs import enums
        except ImportError:
            # Renamed in rdma-core 56.
            from pyverbs import libibverbs_enums as enums
    except ModuleNotFoundError as exc:
        raise ProtocolError(f"protocol 'rdma' needs pyverbs, which is not installed ({exc}). {_INSTALL}") from exc
    except ImportError as exc:
        raise ProtocolError(
            f"protocol 'rdma' needs pyverbs, which is installed but does not fit this Python or libibverbs ({exc}). "
            f"{_INSTALL}"
        ) from exc
    finally:
        # Importing pyverbs calls logging.basicConfig, which would print every log line of the program.
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
    return SimpleNamespace(addr=addr, cq=cq, device=device, mr=mr, pd=pd, qp=qp, wr=wr, e=enums, Error=PyverbsError)


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

    def holds(self, address: int, nbytes: int) -> bool:
        """Return whether a stretch of memory lies wholly in the region."""
        return self.address <= address and address + nbytes <= self.address + self.array.nbytes


@dataclass(frozen=True)
class Port:
    """A device's port as `Settings` chose it.

    Attributes
    ----------
    number : int
        Counted from 1.
    gid_index : int
        The GID that is used, as an entry of the port's table.
    gid : str
        The GID itself: the port's address.
    lid : int
        The port's address in an InfiniBand subnet; 0 on Ethernet.
    mtu : int
        The active MTU, by its number in ``enum ibv_mtu``.
    longest_request : int
        Bytes of the longest work request.
    """

    number: int
    gid_index: int
    gid: str
    lid: int
    mtu: int
    longest_request: int


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
    """

    def __init__(self, settings: Settings) -> None:
        self.verbs = load_verbs()
        with _OPENING:
            self.context, self.name, self.port = _open(self.verbs, settings)
        with refusals(self.verbs, f"opening {self.name}"):
            self.domain = self.verbs.pd.PD(self.context)
        self._registrations: list[Any] = []

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
        array = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        address = address_of(array)
        e = self.verbs.e
        access = e.IBV_ACCESS_LOCAL_WRITE | (e.IBV_ACCESS_REMOTE_WRITE if remote else 0)
        with refusals(self.verbs, f"registering {nbytes} bytes with {self.name}", _locked_memory()):
            registration = self.verbs.mr.MR(self.domain, nbytes, access, address)
        self._registrations.append(registration)
        return Region(array, address, registration)

    def close(self) -> None:
        """End all registrations and close the device; queues must have been closed. Memory in use lives on."""
        for registration in self._registrations:
            registration.close()
        self.domain.close()
        self.context.close()


@contextmanager
def refusals(verbs: SimpleNamespace, doing: str, advice: str = "") -> Iterator[None]:
    """Turn what pyverbs raises into our own error, which says what was being done."""
    try:
        yield
    except verbs.Error as exc:
        raise TransportError(f"{doing} failed: {exc}. {advice}".rstrip()) from exc


def address_of(array: Array) -> int:
    """Return the address of an array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def check_locked_memory(needed: int) -> None:
    """Raise `ProtocolError` where the process may not lock as much memory as the links to all peers take."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and needed > soft and not _may_lock_any():
        raise ProtocolError(
            f"protocol 'rdma' needs {needed / 2**20:.0f} MiB of locked memory for its links, and more for arrays "
            f"allocated by it. {_locked_memory()}"
        )


def _locked_memory() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.1f} MiB"
    return (
        f"This process may lock: {limit} (ulimit -l). Raise it by memlock in /etc/security/limits.conf, "
        "LimitMEMLOCK=infinity of a systemd unit, or --ulimit memlock=-1 of a container."
    )


def _may_lock_any() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line for line in lines if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_IPC_LOCK & 1)


def _open(verbs: SimpleNamespace, settings: Settings) -> tuple[Any, str, Port]:
    """Return the opened device, its name and its port."""
    names = _device_names(verbs)
    wanted = names if settings.rdma_device is None else [settings.rdma_device]
    if not names or wanted[0] not in names:
        raise ProtocolError(
            f"protocol 'rdma' needs an RDMA device{'' if names else ', and this machine has none'}. "
            f"Expected: {settings.rdma_device or 'any'}. Received: {', '.join(names) or 'no device'}. "
            "`ibv_devices` lists them; a device of the host needs /dev/infiniband in a container."
        )
    refused = []
    for name in wanted:
        context = verbs.device.Context(name=name)
        try:
            return context, name, _port(verbs, context, settings)
        except (ProtocolError, verbs.Error) as exc:
            refused.append(f"{name}: {exc}")
            context.close()
    raise ProtocolError(f"protocol 'rdma' needs an active port of an RDMA device. Received: {'; '.join(refused)}.")


def _device_names(verbs: SimpleNamespace) -> list[str]:
    try:
        return sorted(device.name.decode() for device in verbs.device.get_device_list())
    except verbs.Error:
        # What it raises on a machine whose kernel has no RDMA at all.
        return []


def _port(verbs: SimpleNamespace, context: Any, settings: Settings) -> Port:
    number = settings.rdma_port
    attributes = context.query_port(number)
    if attributes.state != verbs.e.IBV_PORT_ACTIVE:
        raise ProtocolError(f"port {number} is not active (state {attributes.state}); is its link up?")
    index = settings.rdma_gid_index
    if index is None:
        index = _best_gid(verbs, context, number)
    longest = min(_LONGEST_REQUEST, attributes.max_msg_sz)
    gid = str(context.query_gid(number, index))
    return Port(number, index, gid, attributes.lid, int(attributes.active_mtu), longest)


def _best_gid(verbs: SimpleNamespace, context: Any, port: int) -> int:
    """Return the index of a RoCE v2 GID, of an IPv4 address where there is one; else of any GID."""
    v2 = verbs.e.IBV_GID_TYPE_ROCE_V2
    entries = [entry for entry in context.query_gid_table(1024) if entry.port_num == port]
    if not entries:
        raise ProtocolError(f"port {port} has no GID; does its network interface have an address?")
    ranked = [
        (entry.gid_type != v2, not _is_ipv4(str(context.query_gid(port, entry.gid_index))), entry.gid_index)
        for entry in entries
    ]
    return int(min(ranked)[-1])


def _is_ipv4(gid: str) -> bool:
    return gid.startswith("0000:0000:0000:0000:0000:ffff:")


def open_channel(adapter: Adapter) -> tuple[Any, int]:
    """Return a completion channel and its descriptor, which does not block.

    pyverbs holds the GIL while it waits for an event, so it must never wait.
    """
    with _OPENING:
        before = _event_descriptors()
        channel = adapter.verbs.cq.CompChannel(adapter.context)
        descriptor = getattr(channel, "fd", None)
        if descriptor is None:
            (descriptor,) = _event_descriptors() - before
    os.set_blocking(descriptor, False)
    return channel, descriptor


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found
