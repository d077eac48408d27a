"""A run on the driver: watched, ended on request, and what its nodes returned read in."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparktf.cluster.launch import temporary_directory
from sparktf.cluster.submit import Outcome, cancel, node_error, submit
from sparktf.errors import ClusterError, NodeError, SparktfError
from sparktf.program.feeds import plan_error
from sparktf.program.job import ProgramJob
from sparktf.program.output import OutputPrinter
from sparktf.program.roles import Roles
from sparktf.program.task import DIGEST, LOST, RESULT, program_task

_LOG = logging.getLogger("sparktf.program")

# Between two attempts to cancel a run's Spark jobs.
_CANCEL_SECONDS = 1.0


class RunHandle:
    """A run that goes on while the driver does something else. Made by `run` with ``wait=False``.

    Attributes
    ----------
    tensorboard_url : str or None
        Where TensorBoard is, once it is up and as long as the run lasts.
    """

    def __init__(self, spark: Any, frame: Any, job: ProgramJob, profile: Any) -> None:
        self._spark, self._frame, self._job, self._profile = spark, frame, job, profile
        self._printer = OutputPrinter(job.roles.describe)
        self._thread: threading.Thread | None = None
        self._results: list[Any] | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self.tensorboard_url: str | None = None

    def run(self) -> list[Any]:
        """Run in this thread; return the results."""
        job, roles = self._job, self._job.roles
        with temporary_directory() as directory:
            paths = {rank: os.path.join(directory, f"result-{rank}") for rank in range(roles.world_size)}
            try:
                outcome = submit(
                    self._frame,
                    program_task,
                    job,
                    message_bytes=len(job.program),
                    file_paths=paths,
                    on_progress=self._show,
                    node_name=lambda rank: roles.describe(rank).capitalize(),
                    profile=self._profile,
                )
            except NodeError as error:
                if (refused := plan_error(error)) is not None:
                    raise refused from None
                raise
            return _results(outcome, roles, paths)

    def start(self) -> RunHandle:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name=f"sparktf-run-{self._job.job_id}", daemon=True)
        self._thread.start()
        return self

    def done(self) -> bool:
        """Whether the run has ended, well or not."""
        return self._thread is not None and not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> list[Any]:
        """Wait for the run's end; return what `run` returns, or raise what it raises.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait.

        Raises
        ------
        TimeoutError
            The run goes on.
        ClusterError
            It was cancelled by `stop`.
        """
        self._join(timeout)
        if not self.done():
            raise TimeoutError(f"Expected the run to end within {timeout} s; it goes on.")
        if self._error is not None:
            raise self._error
        assert self._results is not None  # one of the two is set when the thread ends
        return self._results

    def stop(self, timeout: float = 30.0) -> None:
        """End all nodes, and wait up to `timeout` seconds until they are gone. A run that has ended stays as it is."""
        deadline = time.monotonic() + timeout
        self._stopped = True
        while not self.done() and (left := deadline - time.monotonic()) > 0:
            # Again and again: a run that has just begun may have no job yet.
            cancel(self._spark, f"sparktf-{self._job.job_id}")
            self._join(min(left, _CANCEL_SECONDS))

    def _join(self, timeout: float | None) -> None:
        assert self._thread is not None  # `run` gives out only handles that have started
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._results = self.run()
        except BaseException as error:  # raised again by result()
            self._error = error
            if self._stopped:
                # Whichever node was heard of first has failed of nothing but that.
                self._error = ClusterError("The run was cancelled: RunHandle.stop() was called before it had ended.")
                self._error.__cause__ = error

    def _show(self, rank: int, report: dict[str, Any]) -> None:
        if "tensorboard" in report:
            self.tensorboard_url = report["tensorboard"]
            print(f"TensorBoard: {self.tensorboard_url}", flush=True)
        self._printer(rank, report)


def _results(outcome: Outcome, roles: Roles, paths: Mapping[int, str]) -> list[Any]:
    found: dict[int, list[Any]] = {}
    for row in sorted(outcome.rows, key=lambda row: (row["rank"], row["part"])):
        found.setdefault(row["rank"], []).append(row)
    missing = sorted(set(range(roles.world_size)) - set(found))
    if missing and outcome.failure is not None:
        raise _failure(outcome, roles)
    if missing:
        raise ClusterError(f"Expected a result from {roles.world_size} nodes, received none from {missing}.")
    in_files = {rank for rank, rows in found.items() if any(row["name"] == DIGEST for row in rows)}
    if in_files - outcome.received and outcome.failure is not None:
        # A file did not arrive here, whatever its node believes: the driver's disk is full, say.
        raise _failure(outcome, roles)
    for rank, rows in found.items():
        if rows[0]["name"] == LOST:
            _LOG.warning(
                "%s was lost: its process ended before main returned (%s). The others went on without it; its result "
                "is None.",
                roles.describe(rank).capitalize(),
                bytes(rows[0]["payload"]).decode(),
            )
    return [_result(found[rank], rank, outcome.received, paths[rank]) for rank in range(roles.world_size)]


def _failure(outcome: Outcome, roles: Roles) -> SparktfError:
    assert outcome.failure is not None  # the caller has looked
    return node_error(outcome.failure, lambda rank: roles.describe(rank).capitalize())


def _result(rows: Sequence[Any], rank: int, received: frozenset[int], path: str) -> Any:
    (kind,) = {row["name"] for row in rows}
    if kind == LOST:
        return None
    if kind == RESULT:
        pickled = b"".join(row["payload"] for row in rows)
        # From our own tasks, through Spark; a node that was stopped returned nothing.
        return pickle.loads(pickled) if pickled else None
    assert kind == DIGEST  # the task sends nothing else
    told = json.loads(bytes(rows[0]["payload"]))
    if rank not in received:
        raise ClusterError(f"Expected {told['bytes']:,} bytes of a result from rank {rank}, received none.")
    with open(path, "rb") as file:
        # The digest came through Spark; the file did not.
        if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
            raise ClusterError(f"Expected {told['bytes']:,} bytes of a result from rank {rank}, received others.")
        file.seek(0)
        return pickle.load(file)
