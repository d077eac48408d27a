"""A node in a fresh child process, for what TensorFlow can only be told when it starts: its threads, its cluster.

The Spark task stays the parent: it has spooled the partition, whose descriptors the child inherits, and it holds the
rendezvous, which it lends to the child over a socket pair. The child dies with its parent.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sparktf.cluster import child_wire
from sparktf.cluster.gpus import task_gpus, visible_gpus
from sparktf.cluster.hearing import hear
from sparktf.cluster.job import TrainJob
from sparktf.cluster.leash import job_environment
from sparktf.cluster.readiness import START_SECONDS, gather_when_ready, not_ready_yet
from sparktf.cluster.spooled import SpooledNode
from sparktf.cluster.threads import op_threads
from sparktf.distribute.fit import RankRows
from sparktf.distribute.pair import receive_bytes, send_bytes
from sparktf.distribute.threads import Threads
from sparktf.errors import NodeError, PeerLostError, TransportTimeoutError, told_error
from sparktf.transport.framing import send_frame

# An error is to reach the driver within ten seconds, whatever threads of a user's keep the child alive.
_EXIT_SECONDS = 5.0
_ALIVE_SECONDS = 1.0


def train_in_child(
    job: TrainJob,
    node: SpooledNode,
    save: bool,
    rows: RankRows | None = None,
) -> dict[str, Any]:
    """Do what `sparktf.cluster.training` does, in a child process.

    Parameters
    ----------
    job : TrainJob
    node : SpooledNode
        Its communicator is the children's rendezvous.
    save : bool
    rows : RankRows, optional
        Of all workers, for those that train at their own pace.

    Returns
    -------
    dict
        What the child has to tell. Of one at its own pace that was lost, under ``"lost"``, how: the others go on.

    Raises
    ------
    NodeError
        The child failed, or ended without a word.
    SparktfError
        The child raised it.
    """
    from pyspark import cloudpickle

    ours, theirs = socket.socketpair()
    with ours:
        command = [sys.executable, "-m", "sparktf.cluster.child", str(theirs.fileno())]
        fds = node.spool.fds()
        with theirs:
            environment = {**job_environment(), **visible_gpus(task_gpus())}
            child = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), *fds), env=environment, stdin=subprocess.DEVNULL
            )
        told = {
            # Its archive follows: a broadcast variable cannot be pickled on a worker.
            "job": replace(job, archive=None),
            "archive": job.archive is not None,
            "specs": node.specs,
            "spool": node.spool.describe(),
            "fds": fds,
            "rank": node.rank,
            "host": node.host,
            "threads": node.threads,
            "ops": op_threads(node.threads, job.world_size, job.small_model),
            "report": node.report is not None,
            "save": save,
            "rows": rows,
        }
        met = threading.Event()
        sender = Threads(1, "sparktf-child-job")
        try:
            pickled = cloudpickle.dumps(told)  # type: ignore[no-untyped-call]
            pieces = () if job.archive is None else itertools.chain(job.archive.pieces(), [b""])
            # Beside the rounds in which ranks show that they live: a child that starts late reads late.
            sent = sender.submit(lambda: _hand_over(ours, pickled, pieces, job.timeout + START_SECONDS))
            outcome = _serve(ours, child, node, met, job.timeout)
        finally:
            # Wakes a child that still waits for an answer, and the sender of what it no longer reads.
            ours.shutdown(socket.SHUT_RDWR)
            status = _wait(child)
            sender.close()
    if outcome is None and not sent.cancelled() and (error := sent.exception()) is not None:
        raise error
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        if rows is not None and met.is_set():
            return {"lost": how}
        raise NodeError(f"The node's child process ended without a word ({how}).", node.rank)
    return outcome


def _hand_over(sock: socket.socket, job: bytes, pieces: Iterable[bytes], seconds: float) -> None:
    """Send a child its job and its model; whatever fails ends the child as well."""
    try:
        send_frame(sock, child_wire.JOB, job, seconds)
        for piece in pieces:
            send_frame(sock, child_wire.PIECE, piece, seconds)
    except PeerLostError:
        # The child has ended before it had read all of this, which its exit status tells.
        return
    except BaseException:
        sock.shutdown(socket.SHUT_RDWR)
        raise


def _serve(
    sock: socket.socket,
    child: subprocess.Popen[bytes],
    node: SpooledNode,
    met: threading.Event,
    timeout: float,
) -> dict[str, Any] | Exception | None:
    """Answer the child until it is done; return its result, its error, or None where it vanished.

    Parameters
    ----------
    sock : socket
    child : Popen
    node : SpooledNode
    met : threading.Event
        Set once the child has met the others.
    timeout : float
        Seconds, the job's. Until the child has met the others it may say nothing for `START_SECONDS` more: TensorFlow
        waits without end for a peer of its cluster that does not come.
    """
    communicator = node.communicator
    until_met = timeout + START_SECONDS
    deadline = time.monotonic() + until_met
    ready = False
    while True:
        try:
            # Once it has met, as long as it lives: the child may train for hours.
            patience = None if met.is_set() else min(_ALIVE_SECONDS, timeout / 4)
            kind, payload = hear(sock, child, patience, child_wire.SEND_SECONDS, child_wire.FRAME_LIMIT)
        except PeerLostError:
            return None
        except TransportTimeoutError:
            if time.monotonic() > deadline:
                return TransportTimeoutError(
                    f"Expected this node's child process to meet the others within {until_met:g} s; it has not said a "
                    "word for that long."
                )
            if not ready:
                not_ready_yet(communicator)
            # TensorFlow's import takes its time, which the driver would take for a hang.
            node.alive()
            continue
        deadline = time.monotonic() + until_met
        if kind == child_wire.EXCHANGE:
            ready = True
            parts = [part.hex() for part in gather_when_ready(communicator, payload, node.alive)]
            deadline = time.monotonic() + until_met
            if not _answer(sock, child_wire.EXCHANGE, json.dumps(parts).encode()):
                return None
        elif kind == child_wire.SWAP:
            if not ready:
                # Its servers are, before they swap with anyone.
                gather_when_ready(communicator, alive=node.alive)
                ready = True
                deadline = time.monotonic() + until_met
            peer = int.from_bytes(payload[:4], "big")
            send_bytes(communicator, peer, bytes(payload[4:]))
            if not _answer(sock, child_wire.SWAP, receive_bytes(communicator, peer)):
                return None
        elif kind == child_wire.MET:
            met.set()
        elif kind == child_wire.PROGRESS and node.report is not None:
            node.report(json.loads(payload))
        elif kind == child_wire.RESULT:
            result: dict[str, Any] = json.loads(payload)
            return result
        elif kind == child_wire.ERROR:
            return told_error(json.loads(payload), node.rank)


def _answer(sock: socket.socket, kind: int, payload: bytes) -> bool:
    """Answer the child; return whether it is still there."""
    try:
        send_frame(sock, kind, payload, child_wire.SEND_SECONDS)
    except PeerLostError:
        return False
    return True


def _wait(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
