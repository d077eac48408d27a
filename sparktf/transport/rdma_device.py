"""The RDMA device of this machine: found and opened, or said what is missing.

Devices are reached through pyverbs, the bindings that come with rdma-core. They must fit the machine's libibverbs, so
they are the distribution's business and are imported only when RDMA is asked for.
"""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumType
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparktf.errors import ProtocolError, SparktfError, TransportError
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
        e = constants(enums)
    except ModuleNotFoundError as exc:
        raise ProtocolError(f"pyverbs is not installed. Protocol 'rdma' needs it: {exc}. {_INSTALL}") from exc
    except Exception as exc:
        # Not ImportError alone: a module that was compiled against another one raises ValueError or AttributeError,
        # and must not end a job of "auto", which never asked for it.
        raise ProtocolError(
            f"protocol 'rdma' needs pyverbs, which is installed but does not fit this Python or libibverbs ({exc}). "
            f"{_INSTALL}"
        ) from exc
    finally:
        # Importing pyverbs calls logging.basicConfig, which would print every log line of the program.
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
    return SimpleNamespace(addr=addr, cq=cq, device=device, mr=mr, pd=pd, qp=qp, wr=wr, e=e, Error=PyverbsError)


def constants(module: Any) -> SimpleNamespace:
    """Return a module's ``IBV_`` constants, be they its own or members of its enumerations.

    Which of the two they are depends on the Cython that pyverbs was built with: from 3.1 on, the latter.
    """
    found = {name: int(value) for name, value in vars(module).items() if name.startswith("IBV_")}
    for kind in vars(module).values():
        if isinstance(kind, EnumType):
            members: Mapping[str, Any] = kind.__members__
            found |= {name: int(value) for name, value in members.items()}
    return SimpleNamespace(**found)


@contextmanager
def refusals(doing: str, advice: str = "") -> Iterator[None]:
    """Turn what pyverbs raises into our own error, which says what was being done.

    Whatever it raises: a pyverbs that does not fit its machine fails in ways of its own.
    """
    try:
        yield
    except SparktfError:
        raise
    except Exception as exc:
        raise TransportError(f"{doing} failed: {exc}. {advice}".rstrip()) from exc


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


def check_locked_memory(links: int, arrays: int = 0) -> None:
    """Raise `ProtocolError` where the process may not lock as much memory as is needed.

    Parameters
    ----------
    links : int
        Bytes for the links to all peers.
    arrays : int
        Bytes of arrays, as far as they are known.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and links + arrays > soft and not _may_lock_any():
        more = f"and {math.ceil(arrays / 2**20)} MiB for gradients" if arrays else "and more for arrays allocated by it"
        raise ProtocolError(
            f"protocol 'rdma' needs {links / 2**20:.0f} MiB of locked memory for its links, {more}. "
            f"{locked_memory_limit()}"
        )


def locked_memory_limit() -> str:
    """Return what this process may lock, and how to raise it."""
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


def open_device(verbs: SimpleNamespace, settings: Settings) -> tuple[Any, str, Port]:
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
        try:
            # A container may see the host's devices and not be allowed to open them.
            context = verbs.device.Context(name=name)
        except Exception as exc:
            refused.append(f"{name} cannot be opened: {exc}")
            continue
        try:
            return context, name, _port(verbs, context, settings)
        except Exception as exc:
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
