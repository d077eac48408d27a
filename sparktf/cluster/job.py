"""What every node of a job is told; frozen, and sent with the task through Spark's own channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sparktf.cluster.control import ControlAddress
from sparktf.data.columns import ColumnSpec
from sparktf.distribute.buckets import FIRST_BYTES
from sparktf.distribute.fit import FitSettings
from sparktf.transport import Settings

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
        The driver's Keras registry, as `sparktf.cluster.pickling.portable` gives it.
    callbacks : tuple of keras.callbacks.Callback
    feed : Feed
    """

    model_fn: Callable[[], Any] | None
    custom_objects: Mapping[str, Any]
    callbacks: tuple[Any, ...]
    feed: Feed


@dataclass(frozen=True, kw_only=True)
class Job:
    """What nodes of every kind are told.

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
    threads : int
        TensorFlow threads of a node; 0: cores by nodes.
    executor_cores : int
        Cores of one executor; 0 where not known.
    result_limit : int or None
        Bytes that a job's result may have, where large things come back as rows of it; None for any number.
    """

    job_id: str
    world_size: int
    secret: bytes = field(repr=False)
    control: ControlAddress | None = None
    protocol: str
    compression: str
    timeout: float
    versions: Mapping[str, str]
    threads: int
    executor_cores: int
    result_limit: int | None = None

    @property
    def transport_settings(self) -> Settings:
        """What a node's communicators are told."""
        return Settings.from_environment()

    @property
    def transport(self) -> str:
        """The protocol of the tasks' communicator."""
        return "auto" if self.protocol == GRPC else self.protocol


@dataclass(frozen=True, kw_only=True)
class TrainJob(Job):
    """A fit, as every node sees it.

    Parameters
    ----------
    settings : FitSettings
    program : bytes
        A pickled `Program`.
    archive : Payload or None
        None where the program's function makes the model.
    log_dir : str or None
        Where the chief logs for TensorBoard.
    tensorboard : bool
        Run the server beside the chief.
    gradient_bytes : int
        Of all gradients of one step; 0 where the driver cannot know, as the model is made or built on the nodes.
    num_ps : int
        Parameter servers: the last ranks. 0: workers train in lockstep.
    max_staleness : int or None
        As for `sparktf.distribute.client.ParameterClient`.
    """

    settings: FitSettings
    program: bytes = field(repr=False)
    archive: Payload | None = field(repr=False, default=None)
    log_dir: str | None = None
    tensorboard: bool = False
    gradient_bytes: int = 0
    num_ps: int = 0
    max_staleness: int | None = None

    @property
    def transport_settings(self) -> Settings:
        """What a node's communicators are told: how much memory a step's gradients will take, where that is known."""
        # Two sets of buffers alternate (`sparktf.distribute.exchange`). Servers hold other shares.
        later_bytes = 0 if self.num_ps or self.over_grpc else 2 * self.gradient_bytes
        return replace(super().transport_settings, later_bytes=later_bytes)

    @property
    def workers(self) -> range:
        """The ranks that have rows."""
        return range(self.num_workers)

    @property
    def servers(self) -> range:
        """The ranks of the parameter servers."""
        return range(self.num_workers, self.world_size)

    @property
    def num_workers(self) -> int:
        """The nodes that have rows: the first ranks."""
        return self.world_size - self.num_ps

    @property
    def over_grpc(self) -> bool:
        """Whether gradients go over TensorFlow's own collectives; a lone worker sends none."""
        return self.protocol == GRPC and self.world_size > 1

    @property
    def small_model(self) -> bool:
        """Whether the model is known to fit one bucket of gradients; on the driver and in a node."""
        return 0 < self.gradient_bytes <= FIRST_BYTES
