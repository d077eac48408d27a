"""What every node of a training job is told; frozen, and sent with the task through Spark's own channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparktf.cluster.control import ControlAddress
from sparktf.data.columns import ColumnSpec
from sparktf.distribute.buckets import FIRST_BYTES
from sparktf.distribute.fit import FitSettings

GRPC = "grpc"

Pack = Callable[[dict[str, Any]], Any]


class Feed(Protocol):
    """How the columns of the feed fill a model; planned on the driver, completed where the model is."""

    def specs(self, model: Any) -> list[ColumnSpec]:
        """Return one spec a column of the feed."""

    def packs(self, model: Any) -> tuple[Pack, Pack]:
        """Return what arranges inputs, and labels, as the model takes them."""


class Payload(Protocol):
    """A model's archive on its way to the workers."""

    @property
    def message_bytes(self) -> int:
        """What it adds to the message that submits the job."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the archive's bytes, on a worker."""

    def close(self) -> None:
        """Take back what was sent, on the driver."""


@dataclass(frozen=True)
class Program:
    """What a node trains: unpickled late, so that TensorFlow is imported only once the node has set it up.

    Parameters
    ----------
    model_fn : callable or None
        Makes the model where the job has no archive.
    custom_objects : mapping of str to object
        The driver's Keras registry.
    callbacks : tuple of keras.callbacks.Callback
    feed : Feed
    """

    model_fn: Callable[[], Any] | None
    custom_objects: Mapping[str, Any]
    callbacks: tuple[Any, ...]
    feed: Feed


@dataclass(frozen=True)
class TrainJob:
    """A fit, as every node sees it.

    Parameters
    ----------
    job_id : str
        Unique; part of every handshake.
    world_size : int
    secret : bytes
        Known to this job's nodes and driver only.
    control : ControlAddress or None
        None where nodes cannot reach the driver (Spark Connect).
    protocol : str
        One of the transport's, or ``"grpc"``: TensorFlow's own collectives for the gradients.
    compression : str
        How the communicator's gradients travel.
    timeout : float
        Seconds without progress.
    versions : mapping of str to str
        The driver's.
    settings : FitSettings
    threads : int
        TensorFlow threads of a node; 0: cores by nodes.
    executor_cores : int
        Cores of one executor; 0 where not known.
    program : bytes
        A pickled `Program`.
    result_limit : int or None
        Bytes that a job's result may have, where the trained model is part of it; None for any number.
    archive : Payload or None
        None where the program's function makes the model.
    """

    job_id: str
    world_size: int
    secret: bytes = field(repr=False)
    control: ControlAddress | None
    protocol: str
    compression: str
    timeout: float
    versions: Mapping[str, str]
    settings: FitSettings
    threads: int
    executor_cores: int
    program: bytes = field(repr=False)
    result_limit: int | None = None
    archive: Payload | None = field(repr=False, default=None)

    @property
    def over_grpc(self) -> bool:
        """Whether gradients go over TensorFlow's own collectives; a lone worker sends none."""
        return self.protocol == GRPC and self.world_size > 1

    @property
    def transport(self) -> str:
        """The communicator's protocol."""
        return "auto" if self.protocol == GRPC else self.protocol

    @property
    def small_model(self) -> bool:
        """Whether the model is known to fit one bucket of gradients; on the driver and in a node."""
        return self.archive is not None and 0 < self.archive.message_bytes <= FIRST_BYTES
