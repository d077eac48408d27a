"""The rdma protocol on a device: what it computes, and that it costs what it promises."""

import json
import os
import resource
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from steps import take_step

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.errors import ParamError, ProtocolError, TransportError  # noqa: E402
from sparktf.transport import Settings, rdma_device, survey  # noqa: E402
from sparktf.transport.rdma import preflight  # noqa: E402
from sparktf.transport.rdma_adapter import Adapter, close_channel, open_channel  # noqa: E402
from sparktf.transport.rdma_link import RdmaLink  # noqa: E402
from sparktf.transport.testing import TransportConformance, results_of_threads, run_threads  # noqa: E402

KIB, MIB = 1024, 1024 * 1024
NOBODY = 65534
# A machine with a card of its own has no such devices; one that should be ours and lacks them is broken.
IN_OUR_MACHINE = pytest.mark.skipif(
    not Path("/run/vm/started").exists(), reason="only the virtual machine has such a device"
)


class TestRdma(TransportConformance):
    protocol = "rdma"


def resources():
    """Return what the kernel counts of the devices' queue pairs, queues and registrations."""
    told = subprocess.run(["rdma", "-j", "resource", "show"], capture_output=True, check=True, timeout=60)
    return json.loads(told.stdout)


@pytest.mark.parametrize("nbytes", [4, KIB, 64 * KIB, 512 * KIB, 512 * KIB + 4, 8 * MIB, 64 * MIB])
@pytest.mark.parametrize("allocated", [False, True])
def test_transfers_of_any_size_arrive_as_they_were_sent(nbytes, allocated):
    sent = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)

    def main(comm):
        array = comm.allocate(nbytes, np.uint8) if allocated else np.zeros(nbytes, np.uint8)
        if comm.rank == 0:
            array[:] = sent
            comm.send(1, array)
            return comm.stats.bytes_sent
        comm.recv(0, array)
        assert np.array_equal(array, sent)
        return comm.stats.bytes_received

    assert results_of_threads("rdma", 2, main) == [nbytes, nbytes]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("nbytes", [4, 100_000, 4 * MIB, 64 * MIB])
def test_reductions_of_any_size_equal_those_of_numpy(size, nbytes):
    pattern = np.resize(np.arange(1000, dtype=np.float32), nbytes // 4)

    def main(comm):
        array = comm.allocate(pattern.size, np.float32)
        np.multiply(pattern, comm.rank + 1, out=array)
        comm.all_reduce(array)
        return bool(np.array_equal(array, pattern * (size * (size + 1) // 2)))

    assert results_of_threads("rdma", size, main) == [True] * size


def test_nothing_is_registered_after_the_first_step():
    def main(comm):
        bucket = comm.allocate(300_000, np.float32)
        counts = []
        for step in range(101):
            counts.append(take_step(comm, bucket, step))
            if step in (0, 100):
                # What the kernel says, while nobody is between two steps.
                comm.barrier()
                counts.append([device["mr"] for device in resources()])
                comm.barrier()
        assert counts[0] == counts[-2]
        assert counts[1] == counts[-1]
        return len(set(counts[2:-1]))

    assert results_of_threads("rdma", 2, main) == [1, 1]


@pytest.mark.parametrize("size", [2, 3])
def test_allocated_arrays_travel_without_a_copy(size, monkeypatch):
    copied = []
    plain = RdmaLink._copy

    def counted(link, fragment, start):
        length = plain(link, fragment, start)
        copied.append(length)
        return length

    def main(comm):
        bucket = comm.allocate(1_000_000, np.float32)
        other = np.ones(1_000_000, np.float32)
        counts = []
        for array in (bucket, other):
            comm.barrier()
            copied.clear()
            comm.barrier()
            comm.all_reduce(array)
            comm.barrier()
            counts.append(sum(copied))
        return counts

    monkeypatch.setattr(RdmaLink, "_copy", counted)
    for allocated, other in results_of_threads("rdma", size, main):
        # Headers and offers; and the whole array, as often as the ring sends it.
        assert allocated < 10_000
        assert other > 4_000_000


def test_rdma_and_tcp_give_the_same_bits_side_by_side():
    outcomes = {}

    def main(comm):
        values = np.random.default_rng(comm.rank).standard_normal(700_001).astype(np.float32)
        return [comm.all_reduce(values.copy(), "mean").tobytes() for _ in range(3)]

    def run(protocol):
        outcomes[protocol] = run_threads(protocol, 3, main)

    threads = [threading.Thread(target=run, args=(protocol,)) for protocol in ("rdma", "tcp")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes["rdma"] == outcomes["tcp"]
    assert len({bits for rank in outcomes["rdma"] for bits in rank}) == 1


def test_the_device_is_left_as_it_was_found():
    def fine(comm):
        comm.all_reduce(comm.allocate(300_000, np.float32))

    def broken(comm):
        fine(comm)
        if comm.rank == 0:
            raise ValueError("on purpose")
        fine(comm)

    before = resources()
    for main in (fine, broken):
        run_threads("rdma", 3, main)
        assert resources() == before


def test_channels_are_told_apart_while_others_come_and_go():
    found, lock, failed = set(), threading.Lock(), []

    def come_and_go():
        adapter = Adapter(Settings())
        try:
            for _ in range(30):
                channel, descriptor = open_channel(adapter)
                with lock:
                    assert descriptor not in found
                    found.add(descriptor)
                assert "infinibandevent" in os.readlink(f"/proc/self/fd/{descriptor}")
                assert not os.get_blocking(descriptor)
                with lock:
                    found.remove(descriptor)
                    close_channel(channel)
        except BaseException as exc:
            failed.append(exc)
        finally:
            adapter.close()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_what_a_rank_tells_another_does_not_grow_with_the_world(monkeypatch):
    # One card fits, two do not.
    monkeypatch.setattr(survey, "_LIMIT", 320)
    assert results_of_threads("rdma", 4, lambda comm: float(comm.all_reduce(np.ones(100_000))[-1])) == [4.0] * 4


def test_auto_takes_rdma_between_machines_where_every_rank_has_it():
    apart = [Settings(host_id="a"), Settings(host_id="b")]
    protocol, reason = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason), settings=apart)[0]
    assert protocol == "rdma"
    assert "every rank" in reason
    protocol, reason = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason))[0]
    assert protocol == "shm"
    assert "memory of one machine, which is nearer than RDMA" in reason
    alone = [Settings(host_id="a"), Settings(rdma_device="none0", host_id="b")]
    protocol, reason = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason), settings=alone)[0]
    assert protocol == "tcp"
    assert "rank 1: " in reason


@IN_OUR_MACHINE
def test_ports_of_different_networks_are_an_error_on_every_rank_and_auto_goes_another_way():
    apart = [Settings(rdma_device="rxe0", host_id="a"), Settings(rdma_device="rxe2", host_id="b")]
    for outcome in run_threads("rdma", 2, lambda comm: None, settings=apart):
        assert isinstance(outcome, ProtocolError)
        assert "rank 0 cannot use RDMA" in str(outcome)
    outcomes = run_threads(
        "auto", 2, lambda comm: (comm.protocol, comm.reason, comm.all_reduce(np.ones(1))[0]), settings=apart
    )
    assert all(outcome[0] == "tcp" and outcome[2] == 2 for outcome in outcomes)
    assert all("no RDMA (rank 0 cannot use RDMA" in outcome[1] for outcome in outcomes)


def test_too_little_memory_to_lock_sends_auto_another_way(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 * KIB, 64 * KIB))
    monkeypatch.setattr(rdma_device, "_may_lock_any", lambda: False)
    apart = [Settings(host_id="a"), Settings(host_id="b")]
    protocol, reason = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason), settings=apart)[1]
    assert protocol == "tcp"
    assert "MiB of locked memory" in reason


def test_too_little_memory_to_lock_for_gradients_sends_auto_another_way_before_they_are_there(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32 * MIB, 32 * MIB))
    monkeypatch.setattr(rdma_device, "_may_lock_any", lambda: False)
    for later, protocol, said in [(8 * MIB, "rdma", ""), (64 * MIB, "tcp", "and 64 MiB for gradients")]:
        apart = [Settings(host_id=name, later_bytes=later) for name in "ab"]
        outcomes = run_threads("auto", 2, lambda comm: (comm.protocol, comm.reason), settings=apart)
        assert [outcome[0] for outcome in outcomes] == [protocol] * 2
        assert said in outcomes[1][1]


def test_a_device_that_takes_smaller_work_requests_than_ours_is_an_error_on_every_rank(monkeypatch):
    monkeypatch.setattr(rdma_device, "_LONGEST_REQUEST", 4096)
    for outcome in run_threads("rdma", 2, lambda comm: None):
        assert isinstance(outcome, ProtocolError)
        assert "max_msg_sz 4096" in str(outcome)


@IN_OUR_MACHINE
def test_a_device_that_may_not_be_opened_is_named():
    # As in a container that sees the host's devices and was not given them.
    (node,) = [p.parent.name for p in Path("/sys/class/infiniband_verbs").glob("*/ibdev") if p.read_text() == "rxe2\n"]
    path = Path("/dev/infiniband", node)
    path.chmod(0o600)
    os.seteuid(NOBODY)
    try:
        assert "rxe2 cannot be opened: " in preflight(Settings(rdma_device="rxe2"))
    finally:
        os.seteuid(0)


def test_a_device_that_is_not_there_is_an_error_on_every_rank():
    first, second = run_threads("rdma", 2, lambda comm: None, settings=[Settings(), Settings(rdma_device="none0")])
    assert isinstance(first, ProtocolError)
    assert "rank 1 cannot use RDMA" in str(first)
    assert isinstance(second, ProtocolError)
    assert "Expected: none0. Received: " in str(second)


@IN_OUR_MACHINE
def test_a_port_that_is_down_is_named():
    outcomes = run_threads("rdma", 2, lambda comm: None, settings=[Settings(rdma_device="rxe1")] * 2)
    assert all(isinstance(outcome, ProtocolError) for outcome in outcomes)
    assert any("rxe1: port 1 is not active" in str(outcome) for outcome in outcomes)


def test_a_gid_that_is_not_there_is_an_error():
    outcomes = run_threads("rdma", 2, lambda comm: None, settings=[Settings(rdma_gid_index=99)] * 2)
    assert all(isinstance(outcome, TransportError) for outcome in outcomes)


def test_arguments_are_still_checked_first():
    def main(comm):
        with pytest.raises(ParamError):
            comm.all_reduce(np.array(["text"]))
        return float(comm.all_reduce(np.ones(1))[0])

    assert results_of_threads("rdma", 2, main) == [2.0, 2.0]
