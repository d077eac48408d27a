"""What a job must mind on Spark Connect: a client that sees little of the cluster, and results that pass through it.

The nodes cannot reach the client, so that the trained model comes back as rows of the result, and whether nodes have
started at all is known only from Spark's reports on the operation.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from sparktf.cluster.start import never_started
from sparktf.errors import ClusterError, NodeError, ParamError, SlotsError, SparktfError, own_error

# Of gRPC, as Spark sets it on both sides (spark.connect.grpc.maxInboundMessageSize), less a margin for the query plan.
MESSAGE_BYTES = 127 << 20
# Chunks of a model, and the reports beside them, are wrapped on their way.
_WRAPPING, _REPORT_BYTES = 1.01, 1 << 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


class StartWatch:
    """Ends a job of which no task has run for some time; Spark itself tries for ten minutes to find slots for it.

    Parameters
    ----------
    spark : SparkSession
        Of Spark Connect.
    tag : str
        The operation's.
    nodes : int
        Task slots that the job needs.
    seconds : float
    """

    def __init__(self, spark: Any, tag: str, nodes: int, seconds: float) -> None:
        self._spark, self._tag, self._nodes, self._seconds = spark, tag, nodes, seconds
        self._thread = threading.get_ident()
        self._moved = time.monotonic()
        self._completed = 0
        self._ended = False

    def __call__(self, stages: Iterable[Any] | None, inflight_tasks: int, operation_id: str | None, done: bool) -> None:
        """Take one of Spark's reports; they come every few seconds while an operation runs."""
        # A session has one list of handlers for all its operations; each reports in the thread that waits for it.
        if threading.get_ident() != self._thread or self._ended:
            return
        completed = sum(stage.num_completed_tasks for stage in stages or ())
        if inflight_tasks or completed != self._completed:
            self._moved, self._completed = time.monotonic(), completed
        elif not done and time.monotonic() - self._moved > self._seconds:
            self._ended = True
            self._spark.interruptTag(self._tag)

    def error(self) -> SlotsError | None:
        """Return why the job was ended; None where it was not."""
        return never_started(self._nodes, self._seconds) if self._ended else None


@contextlib.contextmanager
def watched_start(spark: Any, tag: str, nodes: int, seconds: float) -> Iterator[StartWatch]:
    """Watch over this thread's next operation."""
    watch = StartWatch(spark, tag, nodes, seconds)
    spark.registerProgressHandler(watch)
    try:
        yield watch
    finally:
        spark.removeProgressHandler(watch)


def remote_error(text: str) -> SparktfError | None:
    """Return the error of ours that a node raised, from what Spark tells of a failed job; None where there is none."""
    found = re.findall(r"^(sparktf\.errors\.\w+): (.*?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        return None
    kind, message = found[-1]
    known = own_error(kind)
    # Of a NodeError, the traceback behind its first lines counts: Spark's whole text has it.
    return None if known is None or known is NodeError else known(message.strip())


def result_limit(spark: Any) -> int | None:
    """Return the bytes that a job's result may have (``spark.driver.maxResultSize``); None for any number."""
    text = str(spark.conf.get("spark.driver.maxResultSize", "1g")).strip().lower()
    number, unit = re.fullmatch(r"(\d+)\s*([kmgtp]?)b?", text).groups()  # type: ignore[union-attr]  # Spark has read it
    return int(number) * _UNITS[unit] or None


def check_returnable(
    nbytes: int,
    limit: int | None,
    what: str = "a trained model with its optimizer's state",
    fix: str = "take an optimizer with less state",
) -> None:
    """Check that something can come back as rows of the result.

    Parameters
    ----------
    nbytes : int
        Of the model, its optimizer's state included.
    limit : int or None
        See `result_limit`.
    what, fix : str
        What it is and how to make it smaller, for the message.

    Raises
    ------
    ClusterError
    """
    if limit is not None and nbytes * _WRAPPING + _REPORT_BYTES > limit:
        raise ClusterError(
            f"Expected {what} of less than {limit:,} bytes, which is spark.driver.maxResultSize; received one of "
            f"{nbytes:,} bytes. Where the driver cannot be reached (Spark Connect) it comes back as Spark's result. "
            f"Start the Connect server with a larger spark.driver.maxResultSize (0: any size), {fix}, or use a classic "
            "session."
        )


def check_message(nbytes: int) -> None:
    """Check that what a job carries fits into one message to the server.

    Parameters
    ----------
    nbytes : int
        Of the pickled modelFn, callbacks and custom objects, and of a small model beside them.

    Raises
    ------
    ParamError
    """
    if nbytes > MESSAGE_BYTES:
        raise ParamError(
            f"modelFn, callbacks and custom objects, or main and args: expected at most {MESSAGE_BYTES:,} bytes "
            f"together when pickled, for Spark Connect takes no message over 128 MiB; received {nbytes:,}. Load large "
            "data on the nodes, from a file. A model itself (model=...) is uploaded in pieces."
        )
