"""A node in a fresh child process, for what TensorFlow can only be told when it starts: its threads, its cluster.

The Spark task stays the parent: it has spooled the partition, whose descriptors the child inherits, and it holds the
rendezvous, which it lends to the child over a socket pair. The child dies with its parent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sparktf.cluster.gpus import task_gpus, visible_gpus
from sparktf.cluster.hearing import hear
from sparktf.cluster.job import Program, TrainJob
from sparktf.cluster.leash import die_with_parent, job_environment
from sparktf.cluster.pairs import Pair, connect_pairs
from sparktf.cluster.threads import op_threads
from sparktf.data.columns import ColumnSpec
from sparktf.data.spool import Spool
from sparktf.distribute.fit import RankRows
from sparktf.distribute.pair import receive_bytes, send_bytes
from sparktf.errors import NodeError, PeerLostError, TransportTimeoutError, told_error
from sparktf.transport import Communicator, connect
from sparktf.transport.framing import recv_frame, send_frame

_JOB, _PIECE, _EXCHANGE, _SWAP, _MET, _PROGRESS, _RESULT, _ERROR = range(1, 9)
# The job itself is the largest: whatever its program carries.
_FRAME_LIMIT = 1 << 40
_SEND_SECONDS = 60.0
_EXIT_SECONDS = 10.0
# What a child may take to import TensorFlow and load its model, beyond the job's timeout.
_START_SECONDS = 120.0
_ALIVE_SECONDS = 1.0


def train_in_child(
    job: TrainJob,
    specs: list[ColumnSpec],
    spool: Spool,
    communicator: Communicator,
    host: str,
    threads: int,
    report: Callable[[dict[str, Any]], None] | None,
    save: bool,
    rows: RankRows | None = None,
) -> dict[str, Any]:
    """Do what `sparktf.cluster.training` does, in a child process.

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
        fds = spool.fds()
        with theirs:
            environment = {**job_environment(), **visible_gpus(task_gpus())}
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
            "rows": rows,
        }
        met = threading.Event()
        try:
            # A child that ends before it has read all of this is told of by its exit status. Only that: a peer that is
            # lost while the children meet is the peer's failure, not the child's.
            with contextlib.suppress(PeerLostError):
                send_frame(ours, _JOB, cloudpickle.dumps(told), _SEND_SECONDS)  # type: ignore[no-untyped-call]
                for piece in itertools.chain(job.archive.pieces(), [b""]) if job.archive is not None else ():
                    # The child imports TensorFlow before it reads them.
                    send_frame(ours, _PIECE, piece, _START_SECONDS)
            outcome = _serve(ours, child, communicator, report, met, job.timeout + _START_SECONDS)
        finally:
            # Wakes a child that still waits for an answer.
            ours.shutdown(socket.SHUT_RDWR)
            status = _wait(child)
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        if rows is not None and met.is_set():
            return {"lost": how}
        raise NodeError(f"The node's child process ended without a word ({how}).", communicator.rank)
    return outcome


def _serve(
    sock: socket.socket,
    child: subprocess.Popen[bytes],
    communicator: Communicator,
    report: Callable[[dict[str, Any]], None] | None,
    met: threading.Event,
    until_met: float,
) -> dict[str, Any] | Exception | None:
    """Answer the child until it is done; return its result, its error, or None where it vanished.

    Parameters
    ----------
    sock : socket
    child : Popen
    communicator : Communicator
    report : callable or None
    met : threading.Event
        Set once the child has met the others.
    until_met : float
        Seconds between the child's words until it has met the others: TensorFlow waits without end for a peer of its
        cluster that does not come.
    """
    deadline = time.monotonic() + until_met
    while True:
        try:
            # Once it has met, as long as it lives: the child may train for hours.
            timeout = None if met.is_set() else _ALIVE_SECONDS
            kind, payload = hear(sock, child, timeout, _SEND_SECONDS, _FRAME_LIMIT)
        except PeerLostError:
            return None
        except TransportTimeoutError:
            if time.monotonic() > deadline:
                return TransportTimeoutError(f"Expected the ranks' child processes to meet within {until_met} s.")
            if report is not None:
                # TensorFlow's import takes its time, which the driver would take for a hang.
                report({})
            continue
        deadline = time.monotonic() + until_met
        if kind == _EXCHANGE:
            parts = [part.hex() for part in communicator.all_gather_bytes(payload)]
            try:
                send_frame(sock, _EXCHANGE, json.dumps(parts).encode(), _SEND_SECONDS)
            except PeerLostError:
                return None
        elif kind == _SWAP:
            peer = int.from_bytes(payload[:4], "big")
            send_bytes(communicator, peer, bytes(payload[4:]))
            try:
                send_frame(sock, _SWAP, receive_bytes(communicator, peer), _SEND_SECONDS)
            except PeerLostError:
                return None
        elif kind == _MET:
            met.set()
        elif kind == _PROGRESS and report is not None:
            report(json.loads(payload))
        elif kind == _RESULT:
            result: dict[str, Any] = json.loads(payload)
            return result
        elif kind == _ERROR:
            return told_error(json.loads(payload), communicator.rank)


def _wait(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def main(descriptor: int) -> int:
    """Run the child; returns its exit status."""
    die_with_parent()
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


class _Parent:
    """A child's words with its parent.

    Parameters
    ----------
    sock : socket
    timeout : float
        Seconds for an answer.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock, self._timeout = sock, timeout
        self._sending = threading.Lock()

    def exchange(self, payload: bytes) -> list[bytes]:
        """Give all ranks' children what each put in."""
        return [bytes.fromhex(part) for part in json.loads(self._ask(_EXCHANGE, payload))]

    def exchange_in_pair(self, payload: bytes, pair: Pair) -> list[bytes]:
        """Give this worker and a server what both put in."""
        return [payload, self._ask(_SWAP, pair[1].to_bytes(4, "big") + payload)]

    def met(self) -> None:
        """Tell that this child has met the others."""
        self._tell(_MET, b"")

    def report(self, progress: dict[str, Any]) -> None:
        """Tell progress; any thread may."""
        self._tell(_PROGRESS, json.dumps(progress).encode())

    def alive(self) -> None:
        """Tell that this child lives."""
        self.report({})

    def _ask(self, kind: int, payload: bytes) -> bytes:
        self._tell(kind, payload)
        return bytes(recv_frame(self._sock, self._timeout, _FRAME_LIMIT)[1])

    def _tell(self, kind: int, payload: bytes) -> None:
        with self._sending:
            send_frame(self._sock, kind, payload, _SEND_SECONDS)


def _train(sock: socket.socket, told: dict[str, Any]) -> dict[str, Any]:
    from pyspark import cloudpickle

    from sparktf.cluster.threads import start_tensorflow
    from sparktf.cluster.training import archive_file, make_model
    from sparktf.distribute.custom_objects import registered

    job: TrainJob = told["job"]
    start_tensorflow(told["threads"], told["ops"])
    program: Program = cloudpickle.loads(job.program)
    parent = _Parent(sock, job.timeout)
    if told["report"]:
        # TensorFlow's import takes its time, and the driver counts it as silence.
        parent.alive()
    with (
        Spool.from_fds(told["spool"], told["fds"]) as spool,
        registered(program.custom_objects),
        contextlib.ExitStack() as held,
    ):
        path = held.enter_context(archive_file(_pieces(sock) if told["archive"] else None))

        def made() -> Any:
            parent.met()
            model = make_model(path, program, job.settings.seed)
            held.close()
            return model

        in_mode = _train_in_lockstep if told["rows"] is None else _train_at_own_pace
        return in_mode(parent, told, program, spool, made)


def _train_in_lockstep(
    parent: _Parent, told: dict[str, Any], program: Program, spool: Spool, made: Callable[[], Any]
) -> dict[str, Any]:
    from sparktf.cluster.training import train
    from sparktf.distribute.grpc import GrpcReducer, start_cluster

    job: TrainJob = told["job"]
    with connect(
        job.transport,
        rank=told["rank"],
        size=job.world_size,
        exchange=parent.exchange,
        secret=job.secret,
        timeout=job.timeout,
        host=told["host"],
    ) as communicator:
        # Before the first op runs: TensorFlow takes a cluster only then. It ends with this reference to it.
        cluster = start_cluster(communicator, told["host"]) if job.over_grpc else None
        reducer = None if cluster is None else GrpcReducer(communicator, job.timeout)
        report = parent.report if told["report"] else None
        return train(job, program, made(), told["specs"], spool, communicator, report, told["save"], reducer)


def _train_at_own_pace(
    parent: _Parent, told: dict[str, Any], program: Program, spool: Spool, made: Callable[[], Any]
) -> dict[str, Any]:
    from sparktf.cluster.training import train_at_own_pace
    from sparktf.distribute.client import ParameterClient

    job, rank, rows = told["job"], told["rank"], told["rows"]
    servers = connect_pairs(job, rank, job.workers, job.servers, parent.exchange_in_pair, told["host"])
    with ParameterClient(servers, rank, job.max_staleness, job.compression, parent.alive) as client:
        report = parent.report if told["report"] else None
        return train_at_own_pace(job, program, made(), told["specs"], spool, rows, client, rank, report)


def _pieces(sock: socket.socket) -> Iterator[bytes]:
    """Yield the archive as the parent sends it, up to an empty frame."""
    while piece := recv_frame(sock, _START_SECONDS, _FRAME_LIMIT)[1]:
        yield bytes(piece)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
