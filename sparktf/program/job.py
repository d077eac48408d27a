"""What every node of a run is told; frozen, and sent with the task through Spark's own channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparktf.cluster.job import GRPC, Job
from sparktf.data.columns import ColumnSpec
from sparktf.program.roles import Roles


@dataclass(frozen=True, kw_only=True)
class ProgramJob(Job):
    """A run, as every node sees it.

    Parameters
    ----------
    program : bytes
        The pickled pair of the user's function and its arguments; unpickled in the child only, after TensorFlow has
        been set up.
    roles : Roles
    feeds : mapping of str to tuple of ColumnSpec
        The columns of each named DataFrame; empty where the program reads its data itself.
    cluster : bool
        Nodes form one TensorFlow cluster; else each is on its own.
    tensorboard : bool
        One runs beside the chief.
    log_dir : str or None
    search_path : tuple of str
        Directories to look for modules in, behind the node's own.
    sources : mapping of str to str
        The text of files that the user's functions come from, by name; see `sparktf.program.sources`.
    """

    program: bytes = field(repr=False)
    roles: Roles
    feeds: Mapping[str, tuple[ColumnSpec, ...]]
    cluster: bool = True
    tensorboard: bool = False
    log_dir: str | None = None
    search_path: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def transport(self) -> str:
        """The protocol of the tasks' communicator: a few bytes now and then, which any network carries."""
        return "tcp"

    @property
    def data_transport(self) -> str:
        """The protocol of the program's own communicators: between workers, and with parameter servers."""
        return "auto" if self.protocol == GRPC else self.protocol
