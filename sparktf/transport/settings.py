"""What a protocol can be told beyond `connect`'s arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self, TypeVar

from sparktf.errors import ParamError

_Default = TypeVar("_Default", int, None)


@dataclass(frozen=True)
class Settings:
    """Choices that each rank may make for itself.

    Attributes
    ----------
    tls : bool
        Encrypt what travels, by protocol ``"tcp"``: the same on every rank. Needs the extra ``tls``.
    host_id : str or None
        What is equal for ranks that may share memory; None: the machine's boot id. Ranks of equal identity are tried.
    rdma_device : str or None
        The RDMA device's name, as ``ibv_devices`` lists it; None: the first one with an active port.
    rdma_port : int
        The device's port, counted from 1.
    rdma_gid_index : int or None
        The entry of the port's GID table; None: a RoCE v2 one where there is one.
    later_bytes : int
        What will be asked of `Communicator.allocate` later, as far as it is known. RDMA locks such memory, and whether
        it may is checked before anything begins.
    """

    tls: bool = False
    host_id: str | None = None
    rdma_device: str | None = None
    rdma_port: int = 1
    rdma_gid_index: int | None = None
    later_bytes: int = 0

    def __post_init__(self) -> None:
        if self.rdma_device == "":
            raise ParamError("Expected rdma_device to be a device's name, or None. Received: ''.")
        if self.rdma_port < 1:
            raise ParamError(f"Expected rdma_port to be 1 or more. Received: {self.rdma_port!r}.")
        if self.rdma_gid_index is not None and self.rdma_gid_index < 0:
            raise ParamError(f"Expected rdma_gid_index to be 0 or more, or None. Received: {self.rdma_gid_index!r}.")

    @classmethod
    def from_environment(cls) -> Self:
        """Read the choices that are a matter of the machine.

        ``SPARKTF_TLS`` (0 or 1), ``SPARKTF_RDMA_DEVICE``, ``SPARKTF_RDMA_PORT`` and ``SPARKTF_RDMA_GID_INDEX``; on a
        cluster by ``spark.executorEnv.SPARKTF_TLS`` and so on.

        Raises
        ------
        ParamError
            A variable holds what cannot be meant.
        """
        tls = _whole("SPARKTF_TLS", 0)
        if tls not in (0, 1):
            raise ParamError(f"Expected the environment's SPARKTF_TLS to be 0 or 1. Received: {tls}.")
        return cls(
            tls=bool(tls),
            rdma_device=os.environ.get("SPARKTF_RDMA_DEVICE"),
            rdma_port=_whole("SPARKTF_RDMA_PORT", 1),
            rdma_gid_index=_whole("SPARKTF_RDMA_GID_INDEX", None),
        )


def _whole(name: str, default: _Default) -> int | _Default:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise ParamError(f"Expected the environment's {name} to be a whole number. Received: {text!r}.")
    return int(text)
