"""A link of limited rate between two network namespaces; needs root and iproute2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

# Of this process: those of one that was killed stay.
NAMES, HOSTS = (f"sparktf-{os.getpid()}-a", f"sparktf-{os.getpid()}-b"), ("10.99.0.1", "10.99.0.2")


@contextmanager
def slow_link(bits_per_second: int) -> Iterator[tuple[Sequence[list[str]], Sequence[str]]]:
    """Make the link, and take it away at exit.

    Parameters
    ----------
    bits_per_second : int
        In each direction.

    Yields
    ------
    prefixes : sequence of list of str
        By end: what to put before a command that is to run there.
    hosts : sequence of str
        By end: its address.
    """

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    with ExitStack() as stack:
        for name in NAMES:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("link", "add", "v0", "netns", NAMES[0], "type", "veth", "peer", "name", "v0", "netns", NAMES[1])
        for name, host in zip(NAMES, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "v0")
            ip("-n", name, "link", "set", "v0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            # The bucket must hold what passes between two ticks of the kernel's timer, and a whole segment of 64 KiB.
            burst = max(256_000, bits_per_second // 8 // 250)
            limit = ["tbf", "rate", f"{bits_per_second}bit", "burst", str(burst), "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "v0", "root", *limit], check=True)
        yield [["ip", "netns", "exec", name] for name in NAMES], HOSTS
