"""What `ctx` lends a program's Keras optimizer: the mean of all gradients, or parameter servers."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from sparktf.errors import ParamError
from sparktf.program import wire
from sparktf.program.job import ProgramJob
from sparktf.program.link import TaskLink
from sparktf.program.pairs import check_mode, connect_servers
from sparktf.transport import Communicator


class Training:
    """One node's part in training whatever optimizers its program has. A context manager.

    Parameters
    ----------
    job : ProgramJob
    link : TaskLink
    rank : int
    host : str
        The address of this node that the others reach.
    ring : object or None
        TensorFlow's cluster, where gradients go over its own ring.
    """

    def __init__(self, job: ProgramJob, link: TaskLink, rank: int, host: str, ring: Any) -> None:
        self._job, self._link, self._rank, self._host, self._ring = job, link, rank, host, ring
        self._closing = ExitStack()
        self._paired = False

    def optimizer(
        self,
        optimizer: Any,
        communicator: Communicator,
        mode: str,
        max_staleness: int | None,
        compression: str | None,
    ) -> Any:
        """Distribute an optimizer; see `Context.distributed_optimizer`."""
        from sparktf.distribute.mean import gradient_mean

        check_mode(mode, max_staleness)
        compression = compression or self._job.compression
        if mode == "async":
            return self._asynchronous(optimizer, max_staleness, compression)
        if communicator.size == 1:
            return optimizer
        reducer = self._closing.enter_context(self._reducer(communicator, compression))
        return gradient_mean(optimizer, communicator, reducer, self._closing)

    def _asynchronous(self, optimizer: Any, max_staleness: int | None, compression: str) -> Any:
        from sparktf.distribute.asynchronous import push_and_pull
        from sparktf.distribute.client import ParameterClient
        from sparktf.distribute.served import check_optimizer

        if self._paired:
            raise ParamError("Expected one optimizer with mode='async' in a program, received a second one.")
        check_optimizer(optimizer)
        client = ParameterClient(self._pairs(), self._rank, max_staleness, compression)
        # Before, servers wait for this node to meet them.
        self._link.tell(wire.PAIRED)
        return push_and_pull(optimizer, self._closing.enter_context(client), closing=self._closing)

    def serve_parameters(self, optimizer: Any) -> Any:
        """Be a parameter server; see `Context.parameter_server`."""
        from sparktf.distribute.server import serve

        return serve(self._pairs(), optimizer, self._job.timeout)

    def _pairs(self) -> list[Communicator]:
        self._paired = True
        return connect_servers(self._job, self._link, self._rank, self._host)

    def _reducer(self, communicator: Communicator, compression: str) -> Any:
        from sparktf.distribute.grpc import GrpcReducer
        from sparktf.distribute.reducer import GradientReducer

        if self._ring is not None:
            return GrpcReducer(communicator, self._job.timeout)
        return GradientReducer(communicator, compression)

    def close(self) -> None:
        """Let go of what optimizers were given, in good order. May be called twice."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What was entered for an optimizer leaves at once, too, where there is an error.
        self._closing.__exit__(kind, error, traceback)
