"""What a fit logs for TensorBoard, and the server beside its chief."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from sparktf.cluster.job import TrainJob
from sparktf.cluster.tensorboard import TensorBoard, writable_log_dir
from sparktf.errors import ClusterError

_LOG = logging.getLogger("sparktf.cluster")

# Beside nodes that import TensorFlow, it may import it too.
_START_SECONDS = 120.0

Report = Callable[[dict[str, Any]], None]


class FitLogs:
    """One rank's part in logging a fit; nothing but on the chief, and where it was asked for.

    Leaving it stops the server.

    Parameters
    ----------
    job : TrainJob
    callbacks : sequence of keras.callbacks.Callback
        The user's; a TensorBoard of theirs says where to look where the job does not.
    rank : int
    host : str, optional
        Where the server listens; by default where Spark finds this task's executor.

    Attributes
    ----------
    job : TrainJob
        The same, with the log directory that is in use.
    url : str
        The server's; empty where there is none.
    notices : list of str
        What went wrong with it, for people.

    Raises
    ------
    ClusterError
        The log directory cannot be written.
    """

    def __init__(self, job: TrainJob, callbacks: Sequence[Any], rank: int, host: str | None = None) -> None:
        self.job = job
        self.url = ""
        self.notices: list[str] = []
        self._server: TensorBoard | None = None
        if rank == 0 and job.tensorboard:
            # Ranks that wait for this one do not wait longer than the job's timeout.
            patience = min(_START_SECONDS, job.timeout / 2)
            self._server = TensorBoard(job.log_dir or _users_log_dir(callbacks), host or executor_host(), patience)
            self.job = replace(job, log_dir=self._server.log_dir)
        elif rank == 0 and job.log_dir is not None:
            self.job = replace(job, log_dir=writable_log_dir(job.log_dir))

    def announce(self, report: Report) -> Report:
        """Wait for the server and tell its URL; return what reports progress and looks after the server as well.

        Raises
        ------
        ClusterError
            The server does not come up.
        """
        if self._server is None:
            return report
        self.url = self._server.wait()
        _LOG.info("TensorBoard is at %s", self.url)
        report({"tensorboard": self.url})

        def report_and_look(progress: dict[str, Any]) -> None:
            self._look()
            report(progress)

        return report_and_look

    def _look(self) -> None:
        """Take down that the server has died: hours of training must not end with a screen."""
        if self._server is None or self.notices:
            return
        try:
            self._server.check()
        except ClusterError as error:
            _LOG.warning("the fit goes on without TensorBoard: %s", error)
            self.notices.append(f"The fit went on without TensorBoard. {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()


def executor_host() -> str:
    """Return the address of this barrier task's executor as the whole cluster knows it, without the port."""
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    return str(context.getTaskInfos()[context.partitionId()].address).rsplit(":", 1)[0]


def with_tensorboard(callbacks: Sequence[Any], log_dir: str | None) -> list[Any]:
    """Return the callbacks and one that logs into `log_dir`, where that is given and none of them is a TensorBoard."""
    import keras

    if log_dir is None or _users_log_dir(callbacks) is not None:
        return list(callbacks)
    return [*callbacks, keras.callbacks.TensorBoard(log_dir)]


def _users_log_dir(callbacks: Sequence[Any]) -> str | None:
    import keras

    found = (str(c.log_dir) for c in callbacks if isinstance(c, keras.callbacks.TensorBoard))
    return next(found, None)
