"""All-reduce over tcp and shm against gloo (torch), TensorFlow's gRPC ring and what the machine can do.

Interleaved rounds: in every round each contender runs once for every size, so that a slow moment hits all alike; ratios
are taken within a round, and their median is reported. ``--link`` compares over a link of 1 Gbit/s between two network
namespaces instead, which needs root and iproute2.

gloo comes from an environment of its own (``benchmarks/peers``), which is made when it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from link import slow_link
from peers.environment import make_environment

HERE = Path(__file__).parent
WORKER = HERE / "peers" / "worker.py"
PEERS = HERE / "peers"
KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 256 * KIB, 4 * MIB, 64 * MIB, 256 * MIB)
CONTENDERS = ("tcp", "shm", "shm, any array", "gloo", "grpc", "memory", "raw tcp")
# Contender by contender to compare with, of the goals.
RATIOS = (("tcp", "gloo"), ("tcp", "grpc"), ("shm", "tcp"), ("shm, any array", "tcp"), ("shm", "memory"))
LINK_BITS = 1_000_000_000


class Group:
    """The processes of one contender.

    Parameters
    ----------
    kind : str
        The contender.
    size : int
        Ranks.
    prefixes : sequence of list of str
        By rank: a command that runs the worker, such as ``ip netns exec``.
    hosts : sequence of str
        By rank: its address.
    """

    def __init__(self, kind: str, size: int, prefixes: Sequence[list[str]], hosts: Sequence[str]) -> None:
        self._directory = tempfile.TemporaryDirectory()
        python = str(PEERS / ".venv" / "bin" / "python") if kind == "gloo" else sys.executable
        self._processes = []
        for rank in range(size):
            # What is on the path beside the project may hold the distribution's pyverbs.
            path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
            environment = {"BENCH_HOST": hosts[rank], "PATH": "/usr/bin:/bin", "PYTHONPATH": path}
            environment |= {"TMPDIR": tempfile.gettempdir(), "GLOO_SOCKET_IFNAME": "lo" if not prefixes[rank] else "v0"}
            command = [*prefixes[rank], python, str(WORKER), kind, str(rank), str(size), self._directory.name]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
            self._processes.append(process)
        for process in self._processes:
            self._read(process)

    def _read(self, process: subprocess.Popen[str]) -> str:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(f"{process.args} ended with {process.wait()}.")
        return line

    def run(self, nbytes: int, iterations: int) -> tuple[float, float]:
        """Return the seconds of one operation, and the CPU seconds of a rank, both as means over the ranks."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"nbytes": nbytes, "iterations": iterations}) + "\n")
            process.stdin.flush()
        answers = [json.loads(self._read(process)) for process in self._processes]
        return statistics.mean(a["seconds"] for a in answers), statistics.mean(a["cpu"] for a in answers)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._directory.cleanup()


def iterations_for(seconds: float, budget: float) -> int:
    return max(1, min(300, int(budget / seconds)))


def measure(groups: dict[str, Group], nbytes: int, rounds: int, budget: float) -> dict[str, list[tuple[float, float]]]:
    """Return each contender's (seconds, CPU seconds) by round."""
    counts = {}
    for kind, group in groups.items():
        # What a warm operation takes tells how many fit into a contender's share of a round.
        group.run(nbytes, 1)
        counts[kind] = iterations_for(group.run(nbytes, 1)[0], budget)
    results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in groups}
    for _ in range(rounds):
        for kind, group in groups.items():
            results[kind].append(group.run(nbytes, counts[kind]))
    return results


def report(size: int, nbytes: int, results: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Print one size's lines; return what they say."""
    label = f"{nbytes // KIB} KiB" if nbytes < MIB else f"{nbytes // MIB} MiB"
    summary: dict[str, Any] = {"ranks": size, "nbytes": nbytes, "seconds": {}, "cpu_per_gb": {}, "ratios": {}}
    for kind, rounds in results.items():
        seconds, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
        summary["seconds"][kind], summary["cpu_per_gb"][kind] = seconds, cpu / nbytes * 1e9
        best = min(value for value, _ in rounds)
        print(
            f"{size} ranks {label:>8} {kind:<15} {seconds * 1e3:10.3f} ms (best {best * 1e3:.3f})"
            f" {cpu / nbytes * 1e9:8.2f} CPU s/GB",
            flush=True,
        )
    for kind, other in RATIOS:
        if kind in results and other in results:
            pairs = zip(results[kind], results[other], strict=True)
            ratio = statistics.median(theirs[0] / mine[0] for mine, theirs in pairs)
            summary["ratios"][f"{kind} / {other}"] = ratio
            print(f"{size} ranks {label:>8} {kind} / {other}: {ratio:.2f} times the rate", flush=True)
    return summary


def compare_on_link(kinds: list[str], rounds: int) -> list[dict[str, Any]]:
    """Print the share of the bound of a 1 Gbit/s link that each contender reaches with 64 MiB and two ranks."""
    nbytes = 64 * MIB
    bound = 2 * (2 - 1) / 2 * nbytes * 8 / LINK_BITS
    with ExitStack() as stack:
        prefixes, hosts = stack.enter_context(slow_link(LINK_BITS))
        groups = {}
        for kind in kinds:
            groups[kind] = Group(kind, 2, prefixes, hosts)
            stack.callback(groups[kind].close)
        results = measure(groups, nbytes, rounds, budget=1.0)
    shares = {kind: bound / statistics.median(s for s, _ in values) for kind, values in results.items()}
    for kind, share in shares.items():
        print(f"1 Gbit/s, 2 ranks, 64 MiB: {kind:<6} {share:.1%} of the bound", flush=True)
    return [{"link": shares}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="bytes")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of a contender in a round")
    parser.add_argument("--link", action="store_true", help="over a 1 Gbit/s link between network namespaces")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    kinds = list(arguments.contenders)
    if "gloo" in kinds and make_environment(PEERS, "torch", "torch, 200 MB") is None:
        print("without gloo: torch could not be installed", flush=True)
        kinds.remove("gloo")
    summaries: list[dict[str, Any]] = []
    if arguments.link:
        summaries += compare_on_link([kind for kind in kinds if kind in ("tcp", "gloo", "grpc")], arguments.rounds)
    else:
        for size in arguments.ranks:
            with ExitStack() as stack:
                groups = {}
                for kind in kinds:
                    groups[kind] = Group(kind, size, [[]] * size, ["127.0.0.1"] * size)
                    stack.callback(groups[kind].close)
                for nbytes in arguments.sizes:
                    summaries.append(report(size, nbytes, measure(groups, nbytes, arguments.rounds, arguments.budget)))
    if arguments.json:
        arguments.json.write_text(json.dumps(summaries, indent=1))


if __name__ == "__main__":
    main()
