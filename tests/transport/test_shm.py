import os
import stat
from pathlib import Path

import numpy as np
import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf import transport  # noqa: E402
from sparktf.errors import ProtocolError, TransportError  # noqa: E402
from sparktf.transport.segment import Segment  # noqa: E402
from sparktf.transport.testing import TransportConformance, run_threads  # noqa: E402


class TestShm(TransportConformance):
    protocol = "shm"


def on_hosts(*names):
    """Return settings that make ranks believe in these hosts."""
    return [transport.Settings(host_id=name) for name in names]


def shared_files():
    return [name for name in os.listdir("/dev/shm") if name.startswith("sparktf-")]


def test_ranks_on_several_hosts_are_refused_with_the_way_out():
    outcomes = run_threads("shm", 3, lambda comm: None, settings=on_hosts("a", "a", "b"))
    assert all(isinstance(outcome, ProtocolError) for outcome in outcomes)
    assert all("protocol='auto'" in str(outcome) and "0, 1" in str(outcome) for outcome in outcomes)


def test_nobody_else_can_open_the_memory_and_no_name_is_left():
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

    def main(comm):
        comm.allocate(1000, np.float32)
        comm.all_gather(np.ones(300_000))
        comm.barrier()
        return shared_files()

    assert run_threads("shm", 3, main) == [[]] * 3


def test_memory_that_finds_no_room_is_an_error_that_says_what_to_do():
    with pytest.raises(TransportError, match="--shm-size"):
        Segment.create(1 << 60)

    def main(comm):
        comm.allocate(1 << 50, np.uint8)

    outcomes = run_threads("shm", 2, main)
    assert all(isinstance(outcome, TransportError) for outcome in outcomes)
    assert not shared_files()


def test_containers_of_one_machine_that_cannot_open_each_others_files_use_sockets(monkeypatch):
    attach = Segment.attach.__func__

    def refuse(cls, path, nbytes):
        if path.endswith(hidden[0][-8:]):
            raise FileNotFoundError(2, "No such file or directory", path)
        return attach(cls, path, nbytes)

    create, hidden = Segment.create.__func__, []

    def remember(cls, nbytes):
        segment = create(cls, nbytes)
        hidden.append(segment.path)
        return segment

    monkeypatch.setattr(Segment, "create", classmethod(remember))
    monkeypatch.setattr(Segment, "attach", classmethod(refuse))
    outcomes = run_threads("auto", 3, lambda comm: (comm.protocol, comm.reason, float(comm.all_reduce(np.ones(1))[0])))
    assert {outcome[0] for outcome in outcomes} == {"tcp"}
    assert all("cannot be opened" in outcome[1] for outcome in outcomes)
    assert not shared_files()
