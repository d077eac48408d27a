"""Gradients of a VGG-19-shaped model over rdma, tcp and TensorFlow's gRPC ring, on a machine with an RDMA device.

Where this machine has none, it runs on the virtual one of ``tests/rdma``: Soft-RoCE and emulated processors, which say
nothing about hardware, but put all contenders at the same disadvantage. The model's layers are those of VGG-19
(Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015) with all
widths divided by the same number; a step's gradients travel in buckets of at most 25 MiB, as in training.

Interleaved rounds and ratios within a round, as in ``benchmarks/transport.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from transport import Group

VIRTUAL_MACHINE = Path(__file__).parent.parent / "tests" / "rdma" / "vm.py"
DEVICES = Path("/sys/class/infiniband")
CONTENDERS = ("rdma", "rdma, any array", "tcp", "grpc")
# Output channels of the convolutions, each of 3 x 3, and of the dense layers; the last one is not divided.
CONVOLUTIONS = (64, 64, 128, 128, *[256] * 4, *[512] * 8)
DENSE = (4096, 4096, 1000)
BUCKET_BYTES = 25 << 20


def layer_bytes(divisor: int) -> Iterator[int]:
    """Yield the bytes of each layer's float32 gradient, the first layer's first."""
    inputs = 3
    for channels in CONVOLUTIONS:
        outputs = channels // divisor
        yield 4 * (9 * inputs * outputs + outputs)
        inputs = outputs
    # Five poolings leave 7 x 7 of an image of 224 x 224.
    inputs *= 49
    for units in DENSE:
        outputs = units if units == DENSE[-1] else units // divisor
        yield 4 * (inputs * outputs + outputs)
        inputs = outputs


def buckets(divisor: int) -> list[int]:
    """Return the bytes of each bucket, the one that is ready first in front: gradients come from the last layer on."""
    sizes: list[int] = []
    for nbytes in reversed(list(layer_bytes(divisor))):
        left = nbytes
        while left:
            if not sizes or sizes[-1] == BUCKET_BYTES:
                sizes.append(0)
            part = min(left, BUCKET_BYTES - sizes[-1])
            sizes[-1] += part
            left -= part
    return sizes


def step(group: Group, sizes: list[int], iterations: int) -> float:
    """Return the seconds that one step's buckets take, one after the other."""
    return sum(group.run(nbytes, iterations)[0] for nbytes in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--divisors", type=int, nargs="*", default=[64, 32, 16, 8, 4], help="what widths are divided by"
    )
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    if not (DEVICES.is_dir() and any(DEVICES.iterdir())):
        machine = [sys.executable, str(VIRTUAL_MACHINE), "--timeout", "1500", sys.executable]
        os.execv(sys.executable, [*machine, *sys.argv])
    figures = []
    with ExitStack() as stack:
        groups = {}
        for kind in arguments.contenders:
            groups[kind] = Group(kind, arguments.ranks, [[]] * arguments.ranks, ["127.0.0.1"] * arguments.ranks)
            stack.callback(groups[kind].close)
        for divisor in arguments.divisors:
            sizes = buckets(divisor)
            iterations = max(1, (4 << 20) // sum(sizes))
            rounds = [
                {kind: step(group, sizes, iterations) for kind, group in groups.items()}
                for _ in range(arguments.rounds)
            ]
            label = f"VGG-19/{divisor} {sum(sizes) / 2**20:7.2f} MiB in {len(sizes)}"
            for kind in groups:
                seconds = statistics.median(one[kind] for one in rounds)
                ratio = statistics.median(one["grpc"] / one[kind] for one in rounds) if "grpc" in groups else 0.0
                print(f"{label} {kind:<16} {seconds * 1e3:9.2f} ms  {ratio:6.2f} times the rate of grpc", flush=True)
                figures.append({"divisor": divisor, "bytes": sum(sizes), "kind": kind, "ms": seconds * 1e3, "x": ratio})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
