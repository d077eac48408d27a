"""A node in a fresh child process, for what TensorFlow can only be told when it starts: its threads, its cluster.

The Spark task stays the parent: it has spooled the partition, whose descriptors the child inherits, and it holds the
rendezvous, which it lends to the child over a socket pair. The child dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sparktf.cluster.job import Program, TrainJob
from sparktf.cluster.threads import op_threads
from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import Spool
from sparktf.errors import NodeError, PeerLostError, TransportTimeoutError, own_error
from sparktf.transport import Communicator, connect
from sparktf.transport.framing import recv_frame, send_frame

_JOB, _PIECE, _EXCHANGE, _MET, _PROGRESS, _RESULT, _ERROR = range(1, 8)
# The job itself is the largest: whatever its program carries.
_FRAME_LIMIT = 1 << 40
_SEND_SECONDS = 60.0
_EXIT_SECONDS = 10.0
# What a child may take to import TensorFlow and load its model, beyond the job's timeout.
_START_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1


def train_in_child(
    job: TrainJob,
    specs: list[ColumnSpec],
    spool: Spool,
    communicator: Communicator,
    host: str,
    threads: int,
    report: Callable[[dict[str, Any]], None] | None,
    save: bool,
) -> dict[str, Any]:
    """Do what `sparktf.cluster.training.train` does, in a child process.

    Parameters
    ----------
    job : TrainJob
    specs : list of ColumnSpec
    spool : Spool
    communicator : Communicator
        The parents' group: the children's rendezvous.
    host : str
        The address that the child listens on.
    threads : int
    report : callable or None
    save : bool

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
        fds = spool.fds()
        # Modules that Spark shipped with the job are on this process's path only.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with theirs:
            child = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), *fds), env=environment, stdin=subprocess.DEVNULL
            )
        told = {
            # Its archive follows: a broadcast variable cannot be pickled on a worker.
            "job": replace(job, archive=None),
            "archive": job.archive is not None,
            "specs": specs,
            "spool": spool.describe(),
            "fds": fds,
            "rank": communicator.rank,
            "host": host,
            "threads": threads,
            "ops": op_threads(threads, job.world_size, job.small_model),
            "report": report is not None,
            "save": save,
        }
        try:
            # A child that ends before it has read all of this is told of by its exit status. Only that: a peer that is
            # lost while the children meet is the peer's failure, not the child's.
            with contextlib.suppress(PeerLostError):
                send_frame(ours, _JOB, cloudpickle.dumps(told), _SEND_SECONDS)  # type: ignore[no-untyped-call]
                for piece in itertools.chain(job.archive.pieces(), [b""]) if job.archive is not None else ():
                    # The child imports TensorFlow before it reads them.
                    send_frame(ours, _PIECE, piece, _START_SECONDS)
            outcome = _serve(ours, communicator, report, job.timeout + _START_SECONDS)
        finally:
            # Wakes a child that still waits for an answer.
            ours.shutdown(socket.SHUT_RDWR)
            status = _wait(child)
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        raise NodeError(f"The node's child process ended without a word ({how}).", communicator.rank)
    return outcome


def _serve(
    sock: socket.socket,
    communicator: Communicator,
    report: Callable[[dict[str, Any]], None] | None,
    until_met: float,
) -> dict[str, Any] | Exception | None:
    """Answer the child until it is done; return its result, its error, or None where it vanished.

    Parameters
    ----------
    sock : socket
    communicator : Communicator
    report : callable or None
    until_met : float
        Seconds between the child's words until it has met the others: TensorFlow waits without end for a peer of its
        cluster that does not come.
    """
    timeout: float | None = until_met
    while True:
        try:
            # Then without end: the child may train for hours, and its death closes the socket.
            kind, payload = recv_frame(sock, timeout, _FRAME_LIMIT)
        except PeerLostError:
            return None
        except TransportTimeoutError:
            return TransportTimeoutError(f"Expected the ranks' child processes to meet within {until_met} s.")
        if kind == _EXCHANGE:
            parts = [part.hex() for part in communicator.all_gather_bytes(payload)]
            try:
                send_frame(sock, _EXCHANGE, json.dumps(parts).encode(), _SEND_SECONDS)
            except PeerLostError:
                return None
        elif kind == _MET:
            timeout = None
        elif kind == _PROGRESS and report is not None:
            report(json.loads(payload))
        elif kind == _RESULT:
            result: dict[str, Any] = json.loads(payload)
            return result
        elif kind == _ERROR:
            return _rebuild(json.loads(payload), communicator.rank)


def _rebuild(error: dict[str, Any], rank: int) -> Exception:
    known = own_error(error["kind"])
    if known is PeerLostError:
        return PeerLostError(error["message"], error["peer"], error["reason"])
    if known is not None and known is not NodeError:
        return known(error["message"])
    message = f"{error['kind'].removeprefix('builtins.')}: {error['message']}\n\n{error['traceback']}"
    return NodeError(message, rank, error["traceback"])


def _wait(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def main(descriptor: int) -> int:
    """Run the child; returns its exit status."""
    # Ends the child when its parent ends, however that happens (prctl(2)).
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from pyspark import cloudpickle

    with socket.socket(fileno=descriptor) as sock:
        _, payload = recv_frame(sock, _SEND_SECONDS, _FRAME_LIMIT)
        try:
            # From the parent, over a socket pair that nobody else can open.
            result = _train(sock, cloudpickle.loads(payload))
        except Exception as error:  # whatever a user's model or callback raises goes to the parent
            described = {
                "kind": f"{type(error).__module__}.{type(error).__qualname__}",
                "message": str(error),
                "traceback": traceback.format_exc(),
                "peer": getattr(error, "peer", None),
                "reason": getattr(error, "reason", ""),
            }
            send_frame(sock, _ERROR, json.dumps(described).encode(), _SEND_SECONDS)
            return 1
        send_frame(sock, _RESULT, json.dumps(result).encode(), _SEND_SECONDS)
    return 0


def _train(sock: socket.socket, told: dict[str, Any]) -> dict[str, Any]:
    from pyspark import cloudpickle

    from sparktf.cluster.threads import start_tensorflow
    from sparktf.cluster.training import archive_file, make_model, train
    from sparktf.distribute.custom_objects import registered
    from sparktf.distribute.grpc import GrpcReducer, start_cluster

    job: TrainJob = told["job"]
    start_tensorflow(told["threads"], told["ops"])
    program: Program = cloudpickle.loads(job.program)

    def exchange(payload: bytes) -> list[bytes]:
        send_frame(sock, _EXCHANGE, payload, _SEND_SECONDS)
        _, answer = recv_frame(sock, job.timeout, _FRAME_LIMIT)
        return [bytes.fromhex(part) for part in json.loads(answer)]

    def report(progress: dict[str, Any]) -> None:
        send_frame(sock, _PROGRESS, json.dumps(progress).encode(), _SEND_SECONDS)

    if told["report"]:
        # TensorFlow's import takes its time, and the driver counts it as silence.
        report({})
    with (
        Spool.from_fds(told["spool"], told["fds"]) as spool,
        registered(program.custom_objects),
        contextlib.ExitStack() as held,
    ):
        path = held.enter_context(archive_file(_pieces(sock) if told["archive"] else None))
        with connect(
            job.transport,
            rank=told["rank"],
            size=job.world_size,
            exchange=exchange,
            secret=job.secret,
            timeout=job.timeout,
            host=told["host"],
        ) as communicator:
            # Before the first op runs: TensorFlow takes a cluster only then.
            cluster = start_cluster(communicator, told["host"]) if job.over_grpc else None
            reducer = None if cluster is None else GrpcReducer(communicator, job.timeout)
            send_frame(sock, _MET, b"", _SEND_SECONDS)
            model = make_model(path, program, job.settings.seed)
            held.close()
            return train(
                job,
                program,
                model,
                told["specs"],
                spool,
                communicator,
                report if told["report"] else None,
                told["save"],
                reducer,
            )


def _pieces(sock: socket.socket) -> Iterator[bytes]:
    """Yield the archive as the parent sends it, up to an empty frame."""
    while piece := recv_frame(sock, _START_SECONDS, _FRAME_LIMIT)[1]:
        yield bytes(piece)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
