"""The child's side of a node that trains in a process of its own; `sparktf.cluster.child_process` starts it."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from sparktf.cluster import child_wire
from sparktf.cluster.job import Program, TrainJob
from sparktf.cluster.leash import die_with_parent
from sparktf.cluster.pairs import Pair, connect_pairs
from sparktf.cluster.readiness import START_SECONDS
from sparktf.cluster.threads import start_tensorflow
from sparktf.cluster.training import archive_file, make_model, train, train_at_own_pace
from sparktf.data.spool import Spool
from sparktf.distribute.client import ParameterClient
from sparktf.distribute.custom_objects import registered
from sparktf.distribute.grpc import GrpcReducer, start_cluster
from sparktf.errors import lost_peer
from sparktf.transport import connect
from sparktf.transport.framing import recv_frame, send_frame


def main(descriptor: int) -> int:
    """Run the child; returns its exit status."""
    die_with_parent()
    from pyspark import cloudpickle

    with socket.socket(fileno=descriptor) as sock:
        _, payload = recv_frame(sock, child_wire.SEND_SECONDS, child_wire.FRAME_LIMIT)
        try:
            # From the parent, over a socket pair that nobody else can open.
            told = cloudpickle.loads(payload)
            # All that the parent sends, before TensorFlow's import lets it wait.
            with contextlib.ExitStack() as held:
                path = held.enter_context(archive_file(_pieces(sock) if told["archive"] else None))
                result = _train(sock, told, path, held)
        except BaseException as error:  # whatever a user's model or callback raises goes to the parent
            described = {
                "kind": f"{type(error).__module__}.{type(error).__qualname__}",
                "message": str(error),
                "traceback": traceback.format_exc(),
                **lost_peer(error),
            }
            send_frame(sock, child_wire.ERROR, json.dumps(described).encode(), child_wire.SEND_SECONDS)
            return 1
        send_frame(sock, child_wire.RESULT, json.dumps(result).encode(), child_wire.SEND_SECONDS)
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
        return [bytes.fromhex(part) for part in json.loads(self._ask(child_wire.EXCHANGE, payload))]

    def exchange_in_pair(self, payload: bytes, pair: Pair) -> list[bytes]:
        """Give this worker and a server what both put in."""
        return [payload, self._ask(child_wire.SWAP, pair[1].to_bytes(4, "big") + payload)]

    def met(self) -> None:
        """Tell that this child has met the others."""
        self._tell(child_wire.MET, b"")

    def report(self, progress: dict[str, Any]) -> None:
        """Tell progress; any thread may."""
        self._tell(child_wire.PROGRESS, json.dumps(progress).encode())

    def alive(self) -> None:
        """Tell that this child lives."""
        self.report({})

    def _ask(self, kind: int, payload: bytes) -> bytes:
        self._tell(kind, payload)
        return bytes(recv_frame(self._sock, self._timeout, child_wire.FRAME_LIMIT)[1])

    def _tell(self, kind: int, payload: bytes) -> None:
        with self._sending:
            send_frame(self._sock, kind, payload, child_wire.SEND_SECONDS)


def _train(sock: socket.socket, told: dict[str, Any], path: str | None, held: contextlib.ExitStack) -> dict[str, Any]:
    """Train as told.

    Parameters
    ----------
    sock : socket
    told : dict
    path : str or None
        The model's archive.
    held : ExitStack
        Keeps the archive; closed once the model is made.
    """
    from pyspark import cloudpickle

    job: TrainJob = told["job"]
    start_tensorflow(told["threads"], told["ops"])
    program: Program = cloudpickle.loads(job.program)
    # Another's child may take as long to start and, after a word, as long again.
    parent = _Parent(sock, 2 * (job.timeout + START_SECONDS))
    if told["report"]:
        # TensorFlow's import takes its time, and the driver counts it as silence.
        parent.alive()
    with Spool.from_fds(told["spool"], told["fds"]) as spool, registered(program.custom_objects):

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
    job: TrainJob = told["job"]
    with connect(
        job.transport,
        rank=told["rank"],
        size=job.world_size,
        exchange=parent.exchange,
        secret=job.secret,
        timeout=job.timeout,
        host=told["host"],
        settings=job.transport_settings,
    ) as communicator:
        # Before the first op runs: TensorFlow takes a cluster only then. It ends with this reference to it.
        cluster = start_cluster(communicator, told["host"]) if job.over_grpc else None
        reducer = None if cluster is None else GrpcReducer(communicator, job.timeout)
        report = parent.report if told["report"] else None
        return train(job, program, made(), told["specs"], spool, communicator, report, told["save"], reducer)


def _train_at_own_pace(
    parent: _Parent, told: dict[str, Any], program: Program, spool: Spool, made: Callable[[], Any]
) -> dict[str, Any]:
    job, rank, rows = told["job"], told["rank"], told["rows"]
    servers = connect_pairs(job, rank, job.workers, job.servers, parent.exchange_in_pair, told["host"], job.transport)
    with ParameterClient(servers, rank, job.max_staleness, job.compression, parent.alive) as client:
        report = parent.report if told["report"] else None
        return train_at_own_pace(job, program, made(), told["specs"], spool, rows, client, rank, report)


def _pieces(sock: socket.socket) -> Iterator[bytes]:
    """Yield the archive as the parent sends it, up to an empty frame."""
    while piece := recv_frame(sock, START_SECONDS, child_wire.FRAME_LIMIT)[1]:
        yield bytes(piece)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
