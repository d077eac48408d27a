"""Pushes to a parameter server over a link of limited rate: two under way at a time against one; needs root, iproute2.

A worker in one network namespace and a server in another. A push brings gradients of all weights, its answer all
weights, and the worker computes nothing: with ``max_staleness=1`` one push is under way at a time, and the link carries
something in one direction only; with ``None`` there are two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from link import slow_link
from parameter_servers import MIB, sgd, started

from sparktf.distribute.server import serve
from sparktf.transport import connect
from sparktf.transport.testing import FileExchange

BOUNDS: list[int | None] = [1, None]


def be(side: int, args: argparse.Namespace) -> None:
    """Be the worker (0) or the server (1) of every measurement, one after the other; the worker prints the rates."""
    rates: dict[str, list[float]] = {str(bound): [] for bound in BOUNDS}
    for number in range(args.rounds):
        for bound in BOUNDS:
            place = Path(args.directory, f"{number}-{bound}")
            place.mkdir(exist_ok=True)
            exchange = FileExchange(place, side, 2)
            communicator = connect(
                "tcp", rank=side, size=2, exchange=exchange, secret=b"benchmark", timeout=300.0, host=args.host
            )
            if side:
                serve([communicator], sgd(), 300.0)
                continue
            client, gradients = started([communicator], 0, args.mebibytes * MIB, bound)
            with client:
                client.push(gradients, 1e-3)
                client.finish()
                began = time.perf_counter()
                for _ in range(args.pushes):
                    client.push(gradients, 1e-3)
                client.finish()
                rates[str(bound)].append(args.pushes / (time.perf_counter() - began))
    if not side:
        print(json.dumps(rates), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabits", type=float, default=1.0, help="of the link, a second and direction")
    parser.add_argument("--mebibytes", type=int, default=16, help="of weights")
    parser.add_argument("--pushes", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, choices=[0, 1], help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--host", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        be(args.side, args)
        return
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        prefixes, hosts = stack.enter_context(slow_link(int(args.gigabits * 1e9)))
        sides = []
        for side, (prefix, host) in enumerate(zip(prefixes, hosts, strict=True)):
            own = ["--side", str(side), "--directory", directory, "--host", host]
            command = [*prefix, sys.executable, __file__, *sys.argv[1:], *own]
            sides.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
            stack.callback(sides[-1].kill)
        output = [side.communicate(timeout=500)[0] for side in sides]
    told = json.loads(output[0].splitlines()[-1])
    one, two = (told[str(bound)] for bound in BOUNDS)
    ratio = statistics.median(b / a for a, b in zip(one, two, strict=True))
    # A push and its answer, in turn.
    alone = args.gigabits * 1e9 / 8 / (2 * args.mebibytes * MIB)
    print(
        f"pushes of {args.mebibytes} MiB over {args.gigabits:g} Gbit/s: two under way by one: {ratio:.2f} "
        f"({statistics.median(two):.2f} and {statistics.median(one):.2f} pushes/s; the link's bound for one is "
        f"{alone:.2f})"
    )


if __name__ == "__main__":
    main()
