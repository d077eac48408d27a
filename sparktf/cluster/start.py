"""Jobs whose nodes never start, because others hold the slots or executors are gone: Spark itself waits without end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from sparktf.errors import SlotsError

# Between two looks; each is a handful of calls into the JVM.
_LOOK_SECONDS = 2.0


def never_started(nodes: int, seconds: float) -> SlotsError:
    """Return the error of a job of which no node has started."""
    return SlotsError(
        f"Expected {nodes} free task slots, one for each node; no node has started within timeout={seconds:g} s. Use "
        "fewer workers, give the cluster more executors or cores, or, where other jobs hold them, wait longer "
        "(timeout)."
    )


class ClassicStartWatch:
    """Ends a job of which no task has run for some time; on classic Spark, where the driver sees its stages.

    A job of ours that has started may take long: others queue behind it as long as it runs (as in a parallel
    cross-validation). A context manager.

    Parameters
    ----------
    spark : SparkSession
    tag : str
        The job's.
    nodes : int
        Task slots that it needs.
    seconds : float
    started : callable
        Tells whether a node has said a word.
    end : callable
        Ends the job.
    """

    # Tags of this process's jobs of which tasks run.
    _running: set[str] = set()

    def __init__(
        self, spark: Any, tag: str, nodes: int, seconds: float, started: Callable[[], bool], end: Callable[[], None]
    ) -> None:
        self._spark, self._tag, self._nodes, self._seconds = spark, tag, nodes, seconds
        self._started, self._end = started, end
        self._left = threading.Event()
        self._given_up = False
        self._thread = threading.Thread(target=self._watch, name="sparktf-start-watch", daemon=True)

    def error(self) -> SlotsError | None:
        """Return why the job was ended; None where it was not."""
        return never_started(self._nodes, self._seconds) if self._given_up else None

    def _watch(self) -> None:
        done_before, moved = 0, time.monotonic()
        while not self._left.wait(min(_LOOK_SECONDS, self._seconds / 4)):
            if self._started():
                # From now on its nodes watch over each other.
                self._running.add(self._tag)
                return
            planned, active, done = self._tasks()
            (self._running.add if active else self._running.discard)(self._tag)
            if not planned or done != done_before or self._running:
                done_before, moved = done, time.monotonic()
            elif time.monotonic() - moved > self._seconds:
                self._given_up = True
                self._end()

    def _tasks(self) -> tuple[bool, int, int]:
        """Tell whether Spark has the job by now, and how many of its tasks run and are done, the data's among them."""
        tracker = self._spark.sparkContext._jsc.sc().statusTracker()
        jobs = list(tracker.getJobIdsForTag(self._tag))
        active = done = 0
        for job in jobs:
            found = tracker.getJobInfo(job)
            for stage in found.get().stageIds() if found.isDefined() else ():
                if (info := tracker.getStageInfo(stage)).isDefined():
                    active += info.get().numActiveTasks()
                    done += info.get().numCompletedTasks()
        return bool(jobs), active, done

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(_LOOK_SECONDS)
        self._running.discard(self._tag)
