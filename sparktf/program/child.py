"""A node's own process: TensorFlow set up, the others found, then the user's function."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import traceback
from typing import Any, BinaryIO

from sparktf.cluster.job import GRPC
from sparktf.cluster.leash import die_with_parent
from sparktf.errors import NodeError, lost_peer
from sparktf.program import wire
from sparktf.program.context import Context
from sparktf.program.job import ProgramJob
from sparktf.program.link import TaskLink
from sparktf.program.sources import lend_sources
from sparktf.transport import connect
from sparktf.transport.ports import HeldPort, host_and_port


def main(frames: int, descriptors: int, result: int) -> int:
    """Run the child; returns its exit status.

    Parameters
    ----------
    frames, descriptors : int
        Its ends of the socket pairs.
    result : int
        The file for what the user's function returns.
    """
    die_with_parent()
    link = TaskLink(socket.socket(fileno=frames), socket.socket(fileno=descriptors))
    from pyspark import cloudpickle

    told = cloudpickle.loads(link.receive_job())
    try:
        with os.fdopen(result, "wb") as file:
            _run(link, told, file)
    except BaseException as error:  # whatever the user's function raises goes to the task
        _tell_failure(link, error)
        return 1
    _flush()
    link.tell(wire.RESULT)
    return 0


def _run(link: TaskLink, told: dict[str, Any], result: BinaryIO) -> None:
    from pyspark import cloudpickle

    from sparktf.cluster.threads import start_tensorflow
    from sparktf.distribute.grpc import start_cluster, taken_port

    job: ProgramJob = told["job"]
    rank, roles = told["rank"], job.roles
    sys.path.extend(entry for entry in job.search_path if entry not in sys.path)
    lend_sources(job.sources)
    _log_to_stderr(tell_protocol=rank == 0 and roles.num_workers > 1)
    start_tensorflow(told["threads"])
    with HeldPort(told["host"]) as port:
        addresses: list[str] = []
        communicator = None
        if job.cluster:
            # Held until the end: TensorFlow listens beside it whenever the program makes its server.
            mine = host_and_port(told["host"], port.port).encode()
            everyone = range(roles.world_size)
            addresses = [part.decode() for part in link.exchange(mine, everyone, "addresses")]
            os.environ["TF_CONFIG"] = roles.tf_config(rank, addresses)
        if job.cluster and rank in roles.compute_ranks:
            communicator = connect(
                job.data_transport,
                rank=rank,
                size=roles.num_workers,
                exchange=lambda payload: link.exchange(payload, roles.compute_ranks, "communicator"),
                secret=job.secret,
                timeout=job.timeout,
                host=told["host"],
            )
        # Before the first op runs: TensorFlow takes a cluster only then. It ends with this reference to it.
        ring = start_cluster(communicator, told["host"]) if job.protocol == GRPC and communicator is not None else None
        with Context(job, rank, addresses, communicator, ring, link, told["log_dir"]) as context:
            _serve_until_done(link)
            function, args = cloudpickle.loads(job.program)
            try:
                value = _call(function, args, context)
            except BaseException as error:
                named = taken_port(error, port, addresses[rank]) if addresses else None
                # Before the others are told, whose tasks would end this one's as well.
                _tell_failure(link, named.with_traceback(error.__traceback__) if named is not None else error)
                raise
        _dump(value, result)


def _call(function: Any, args: Any, context: Context) -> Any:
    try:
        return function(args, context)
    except SystemExit as end:
        # Programs made for the command line end so (absl.app.run).
        if end.code in (None, 0):
            return None
        raise


def _dump(value: Any, result: BinaryIO) -> None:
    from pyspark import cloudpickle

    try:
        cloudpickle.dump(value, result)  # type: ignore[no-untyped-call]
    except Exception as error:  # any object's own way of being pickled may fail in any way
        raise NodeError(
            f"main returned a {type(value).__module__}.{type(value).__qualname__} that cannot be pickled: {error}. "
            "Return numbers, arrays or plain containers; save models with ctx.export."
        ) from error


def _serve_until_done(link: TaskLink) -> None:
    """Let ``tf.distribute.Server.join`` return when the workers are done; TensorFlow's own never does."""
    import tensorflow as tf

    def join(self: Any) -> None:
        link.tell(wire.SERVING)
        link.workers_done.wait()

    tf.distribute.Server.join = join


def _log_to_stderr(tell_protocol: bool) -> None:
    """Show the program's log from INFO on, unless it sets up logging itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    # In the place where Python keeps what it uses as long as nobody has said anything else.
    logging.lastResort = handler
    logging.root.setLevel(logging.INFO)
    # What these tell at INFO is for their own developers; in a plain Python process nobody sees it either.
    for name in ("tensorflow", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not tell_protocol:
        # All ranks choose it together, so that one of them says it for all.
        logging.getLogger("sparktf.transport").setLevel(logging.WARNING)


def _tell_failure(link: TaskLink, error: BaseException) -> None:
    _flush()
    link.fail(_described(error))


def _described(error: BaseException) -> dict[str, Any]:
    # From the user's function on, if it came so far; frames of this file tell nothing.
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return {
        "kind": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": str(error),
        "traceback": "".join(traceback.format_exception(type(error), error, frames)),
        **lost_peer(error),
    }


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A program may have closed it, or have put something else in its place.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
