"""A network that fails between two machines, here network namespaces with a cable between them."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

NAMES = [f"sparktf-{os.getpid()}-{side}" for side in "ab"]
HOSTS = ["10.231.9.1", "10.231.9.2"]
TIMEOUT = 2.0


def run(*command):
    # Where tc is, which not every PATH names.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def cannot_be(trouble):
    """Skip, or fail where SPARKTF_REQUIRE_NAMESPACES=1 says that this machine has what it takes."""
    if os.environ.get("SPARKTF_REQUIRE_NAMESPACES") == "1":
        pytest.fail(f"SPARKTF_REQUIRE_NAMESPACES=1, and {trouble}")
    pytest.skip(trouble)


@pytest.fixture
def cable():
    """Two namespaces, each with an interface ``v0`` on one cable."""
    if (
        os.geteuid() != 0
        or shutil.which("ip") is None
        or shutil.which("tc", path="/usr/sbin:/sbin:/usr/bin:/bin") is None
    ):
        cannot_be("network namespaces need root and iproute2")
    with ExitStack() as stack:
        try:
            for name in NAMES:
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "del", name)
            run("ip", "link", "add", "v0", "netns", NAMES[0], "type", "veth", "peer", "name", "v0", "netns", NAMES[1])
        except OSError as exc:
            cannot_be(f"no network namespaces here: {exc}")
        for name, host in zip(NAMES, HOSTS, strict=True):
            run("ip", "-n", name, "addr", "add", f"{host}/24", "dev", "v0")
            run("ip", "-n", name, "link", "set", "v0", "up")
        yield


def drop_packets():
    for name in NAMES:
        # A queue that holds nothing drops everything, and tells nobody.
        run("tc", "-n", name, "qdisc", "add", "dev", "v0", "root", "pfifo", "limit", "0")


def unplug():
    run("ip", "-n", NAMES[0], "link", "set", "v0", "down")


@pytest.mark.usefixtures("cable")
@pytest.mark.parametrize("cut", [drop_packets, unplug])
def test_a_cut_cable_is_reported_on_both_sides_within_the_timeout(cut, tmp_path):
    script = Path(__file__).with_name("cable_rank.py")
    ranks = []
    try:
        for rank, (name, host) in enumerate(zip(NAMES, HOSTS, strict=True)):
            command = [sys.executable, str(script), str(rank), host, str(tmp_path), str(TIMEOUT)]
            ranks.append(subprocess.Popen(["ip", "netns", "exec", name, *command], stdout=subprocess.PIPE, text=True))
        assert [rank.stdout.readline() for rank in ranks] == ["connected\n"] * 2
        time.sleep(0.5)
        begin = time.monotonic()
        cut()
        failures = [json.loads(rank.stdout.readline()) for rank in ranks]
        assert [rank.wait(20) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stdout.close()
    for number, failure in enumerate(failures):
        assert failure["error"] == "TransportTimeoutError"
        assert f"rank {1 - number}" in failure["message"]
        assert "all_reduce (operation" in failure["message"]
        assert failure["at"] - begin < TIMEOUT + 1
