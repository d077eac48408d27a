"""Start a TensorFlow cluster's processes on this machine, for a program that finds its place in TF_CONFIG."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def run(main: Callable[[], Any], **jobs: int) -> Any:
    """Run `main` once in this process, as the chief, and in one more for every other task; return the chief's value.

    Parameters
    ----------
    main : callable
    **jobs : int
        The number of tasks by job name.
    """
    cluster = {job: [f"localhost:{_free_port()}" for _ in range(count)] for job, count in jobs.items()}
    others = [
        multiprocessing.get_context("spawn").Process(target=_serve, args=(main, cluster, job, index), daemon=True)
        for job, addresses in cluster.items()
        for index in range(len(addresses))
        if job != "chief"
    ]
    for process in others:
        process.start()
    try:
        return _serve(main, cluster, "chief", 0)
    finally:
        for process in others:
            process.terminate()
            process.join()


def _serve(main: Callable[[], Any], cluster: dict[str, list[str]], job: str, index: int) -> Any:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": job, "index": index}})
    return main()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
