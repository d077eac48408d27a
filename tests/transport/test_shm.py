import errno
import gc
import logging
import os
import re
import signal
import stat
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from counting import made_by_three

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf import transport  # noqa: E402
from sparktf.errors import ProtocolError, TransportError  # noqa: E402
from sparktf.transport.segment import Segment  # noqa: E402
from sparktf.transport.shared import STAGING_BYTES  # noqa: E402
from sparktf.transport.testing import TransportConformance, processes, results_of_threads, run_threads  # noqa: E402


class TestShm(TransportConformance):
    protocol = "shm"


def on_hosts(*names):
    """Return settings that make ranks believe in these hosts."""
    return [transport.Settings(host_id=name) for name in names]


@pytest.fixture
def made(monkeypatch):
    """The paths of all memory that is made in this process."""
    create, paths = Segment.create.__func__, []

    def remember(cls, nbytes):
        segment = create(cls, nbytes)
        paths.append(segment.path)
        return segment

    monkeypatch.setattr(Segment, "create", classmethod(remember))
    return paths


def those_left(paths):
    return [path for path in paths if os.path.exists(path)]


def test_ranks_on_several_hosts_are_refused_with_the_way_out():
    outcomes = run_threads("shm", 3, lambda comm: None, settings=on_hosts("a", "a", "b"))
    assert all(isinstance(outcome, ProtocolError) for outcome in outcomes)
    assert all("protocol='auto'" in str(outcome) and "0, 1" in str(outcome) for outcome in outcomes)


def test_nobody_else_can_open_the_memory():
    segment = Segment.create(5000)
    try:
        status = os.stat(segment.path)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_blocks * 512 >= 5000, "not reserved: a full file system would kill the process"
        peer = Segment.attach(segment.path, 5000)
        segment.array[4999] = 7
        assert peer.array[4999] == 7
        with pytest.raises(OSError, match="expected 6000"):
            Segment.attach(segment.path, 6000)
    finally:
        segment.unlink()
    assert not Path(segment.path).exists()


def test_no_name_is_left_while_ranks_still_work(made):
    def main(comm):
        comm.allocate(1000, np.float32)
        comm.all_gather(np.ones(300_000))
        comm.barrier()
        return those_left(made)

    assert results_of_threads("shm", 3, main) == [[]] * 3
    # Of each rank: for reductions, for what was allocated, and for what it gathered to its neighbour.
    assert len(made) == 9


def test_memory_of_single_links_is_counted():
    # To send through and to receive through.
    assert made_by_three("shm", lambda comm: comm.all_gather(np.ones(300_000))) == [[2] * 3] * 2


def test_a_closed_communicator_holds_no_memory_though_it_is_kept():
    kept = []

    def main(comm):
        kept.append(comm)
        comm.all_reduce(comm.allocate(300_000, np.float32))
        comm.all_gather(np.ones(300_000))

    def mapped():
        gc.collect()
        return Path("/proc/self/maps").read_text().count("/sparktf-")

    before = mapped()
    run_threads("shm", 2, main)
    assert len(kept) == 2
    assert mapped() == before


def test_no_name_is_left_of_a_killed_rank(tmp_path):
    with processes("shm", 2, report_files, tmp_path, timeout=20.0) as ranks:
        paths = [path for rank in ranks for path in mapped_files(rank)]
        ranks[0].signal(signal.SIGKILL)
        assert ranks[1].report()["error"] == "PeerLostError"
    assert len(paths) >= 4
    assert not those_left(paths)


def report_files(comm):
    large = comm.allocate(1 << 20, np.float32)
    while True:
        comm.all_reduce(large)


def mapped_files(rank):
    assert rank.report()["event"] == "connected"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = Path(f"/proc/{rank.pid}/maps").read_text().splitlines()
        paths = {line.split(maxsplit=5)[5].removesuffix(" (deleted)") for line in lines if "/sparktf-" in line}
        if len(paths) == 4:
            return paths
        time.sleep(0.05)
    return set()


def test_memory_that_finds_no_room_is_an_error_that_says_what_to_do(made):
    with pytest.raises(TransportError, match="--shm-size"):
        Segment.create(1 << 60)

    def main(comm):
        comm.allocate(1 << 50, np.uint8)

    outcomes = run_threads("shm", 2, main)
    assert all(isinstance(outcome, TransportError) for outcome in outcomes)
    assert made
    assert not those_left(made)


@pytest.fixture
def little_memory(monkeypatch):
    """Return a function that leaves room in /dev/shm for no file longer than so many bytes."""
    reserve = os.posix_fallocate

    def leave(room):
        def refuse(descriptor, offset, nbytes):
            if nbytes > room and os.readlink(f"/proc/self/fd/{descriptor}").startswith("/dev/shm/"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            reserve(descriptor, offset, nbytes)

        monkeypatch.setattr(os, "posix_fallocate", refuse)

    return leave


@pytest.mark.parametrize("protocol", ["shm", "auto"])
def test_memory_that_is_a_disks_is_warned_of_with_the_way_out(protocol, little_memory, caplog):
    little_memory(1_000_000)

    def main(comm):
        comm.allocate(1_000_000, np.float32)
        return comm.protocol, comm.reason

    for used, reason in results_of_threads(protocol, 2, main):
        assert used == "shm"
        assert reason.count(f"; what ranks share lies in files of {tempfile.gettempdir()}, for /dev/shm") == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    words = r"3.8 MiB of shared memory.*/dev/shm: No space.*, of which \d+ MiB is free.*--shm-size.*'tcp'"
    assert any(re.match(words, said) for said in warnings)


def test_the_reason_tells_of_an_allocation_that_found_no_room(little_memory):
    little_memory(STAGING_BYTES)

    def main(comm):
        before = comm.reason
        comm.allocate(STAGING_BYTES + 1, np.uint8)
        return before, comm.reason

    for before, after in results_of_threads("shm", 2, main):
        assert before == "protocol='shm' was asked for"
        assert after.startswith(f"{before}; what ranks share lies in files of ")


def test_containers_of_one_machine_that_cannot_open_each_others_files_use_sockets(made, monkeypatch):
    attach = Segment.attach.__func__

    def refuse(cls, path, nbytes):
        if path == made[0]:
            raise FileNotFoundError(2, "No such file or directory", path)
        return attach(cls, path, nbytes)

    monkeypatch.setattr(Segment, "attach", classmethod(refuse))
    outcomes = run_threads("auto", 3, lambda comm: (comm.protocol, comm.reason, float(comm.all_reduce(np.ones(1))[0])))
    assert {outcome[0] for outcome in outcomes} == {"tcp"}
    assert {outcome[2] for outcome in outcomes} == {3.0}
    assert all("cannot be opened" in outcome[1] for outcome in outcomes)
    assert not those_left(made)
