"""What goes wrong with RDMA: each error is made on a real device and reported in words."""

import signal
import time

import numpy as np
import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import PeerLostError, TransportError  # noqa: E402
from sparktf.transport.testing import processes, results_of_threads, run_threads  # noqa: E402


def outcomes_of(spoil):
    """Return what two ranks meet in a large reduction after rank 0 has spoilt its link."""

    def main(comm):
        comm.barrier()
        if comm.rank == 0:
            spoil(comm._fabric.links[1])
        comm.all_reduce(np.ones(1_000_000, np.float32))

    return run_threads("rdma", 2, main)


def test_a_wrong_key_is_an_error_that_names_peer_operation_and_status():
    def spoil(link):
        address, key = link._peer_slots
        link._peer_slots = (address, key ^ 0xFF00)

    begin = time.monotonic()
    first, second = outcomes_of(spoil)
    # The device tells both ends at once, and whoever hears it first tells the other.
    for outcome in (first, second):
        assert isinstance(outcome, PeerLostError)
        assert outcome.peer in (0, 1)
        assert "all_reduce (operation 2)" in str(outcome)
        assert "IBV_WC_REM_ACCESS_ERR" in str(outcome)
    # Long before the timeout: the device says so at once.
    assert time.monotonic() - begin < 20


def test_a_write_beyond_the_region_is_refused_by_the_peers_device():
    def spoil(link):
        address, key = link._peer_slots
        link._peer_slots = (address + (1 << 30), key)

    first, _ = outcomes_of(spoil)
    assert isinstance(first, PeerLostError)
    assert "IBV_WC_REM_ACCESS_ERR" in str(first)


def test_a_work_request_over_the_limit_is_refused_before_it_is_posted():
    def main(comm):
        link = comm._fabric.links[1 - comm.rank]
        limit = comm._fabric._adapter.port.longest_request
        assert 0 < limit <= 1 << 20
        with pytest.raises(TransportError, match=rf"at most {limit} bytes.*Received: {limit + 1}"):
            link._pair.write(link._own_slots.here, limit + 1, link._peer_slots, None, signal=True)
        # Nothing was posted, so the link still works.
        return float(comm.all_reduce(np.ones(100_000))[-1])

    assert results_of_threads("rdma", 2, main) == [2.0, 2.0]


def _wait_for_one(communicator):
    communicator.barrier()
    if communicator.rank == 1:
        time.sleep(600)
    communicator.recv(1, np.ones(100_000))


def test_a_killed_peer_is_reported_while_this_side_only_waits(tmp_path):
    with processes("rdma", 2, _wait_for_one, tmp_path, timeout=30.0) as ranks:
        for rank in ranks:
            assert rank.report()["event"] == "connected"
        time.sleep(1.0)
        begin = time.monotonic()
        ranks[1].signal(signal.SIGKILL)
        failure = ranks[0].report()
    assert failure["error"] == "PeerLostError"
    assert failure["peer"] == 1
    assert "recv from rank 1" in failure["message"]
    assert failure["at"] - begin < 2


def test_a_stopped_peer_is_reported_within_the_timeout_while_this_side_only_waits(tmp_path):
    with processes("rdma", 2, _wait_for_one, tmp_path, timeout=3.0) as ranks:
        for rank in ranks:
            assert rank.report()["event"] == "connected"
        time.sleep(1.0)
        ranks[1].signal(signal.SIGSTOP)
        failure = ranks[0].report()
    assert failure["error"] == "TransportTimeoutError"
    assert "its process is stopped" in failure["message"]
