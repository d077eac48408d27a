"""Memory within machines and RDMA between them, on one machine whose ranks are told that they are on several."""

from pathlib import Path

import numpy as np
import pytest
from steps import take_step

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.transport import Settings  # noqa: E402
from sparktf.transport.testing import results_of_threads, run_threads  # noqa: E402
from sparktf.transport.testing.lost import check_killed_process  # noqa: E402


def on_hosts(names):
    return [Settings(host_id=name) for name in names]


def test_a_killed_process_is_reported_by_all_others_within_two_seconds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "transport")
    # The second rank is on a machine of its own.
    check_killed_process("two_machines:connect", tmp_path)


@pytest.mark.parametrize("names", ["aab", "abab", "abbcc"])
@pytest.mark.parametrize("length", [1, 1_000_001])
def test_a_world_over_several_machines_reduces_as_one(names, length):
    def main(comm):
        assert comm.protocol == "shm+rdma"
        assert "share memory; every rank has an RDMA device" in comm.reason
        values = np.random.default_rng(comm.rank).integers(0, 8, length).astype(np.float32)
        shared = comm.allocate(length, np.float32)
        shared[:] = values
        shard = comm.reduce_scatter(values, "max")
        halved = comm.all_reduce(values.copy(), "sum", "bf16")
        return comm.all_reduce(values, "mean"), comm.all_reduce(shared, "mean"), shard, halved

    size = len(names)
    parts = [np.random.default_rng(rank).integers(0, 8, length).astype(np.float32) for rank in range(size)]
    mean, largest = np.mean(parts, axis=0), np.max(parts, axis=0)
    outcomes = run_threads("auto", size, main, settings=on_hosts(names))
    for rank, (plain, shared, shard, halved) in enumerate(outcomes):
        assert np.allclose(plain, mean, rtol=1e-6)
        assert plain.tobytes() == shared.tobytes() == outcomes[0][0].tobytes()
        assert np.array_equal(shard, np.array_split(largest, size)[rank])
        # Whole numbers below 256 are exact in bfloat16.
        assert np.array_equal(halved, np.sum(parts, axis=0))


def test_the_other_operations_cross_machines_too():
    def main(comm):
        told = comm.broadcast(np.full(100_000, comm.rank), root=3)
        gathered = comm.all_gather(np.full(comm.rank + 1, comm.rank))
        # More than all slots of a link hold.
        large = comm.all_gather(np.full(2_000_000, comm.rank))
        assert [part[-1] for part in large] == [0, 1, 2, 3]
        texts = comm.all_gather_bytes(b"x" * comm.rank)
        for peer in range(comm.size):
            if comm.rank == peer:
                continue
            # Between any two the lower one begins.
            array = np.full(300_000, comm.rank)
            comm.send(peer, array) if comm.rank < peer else comm.recv(peer, array)
            assert array[-1] == min(comm.rank, peer)
        comm.barrier()
        return told[-1], [len(part) for part in gathered], texts

    expected = (3, [1, 2, 3, 4], [b"", b"x", b"xx", b"xxx"])
    assert results_of_threads("auto", 4, main, settings=on_hosts("aabb")) == [expected] * 4


def test_nothing_is_registered_after_the_first_step():
    def main(comm):
        bucket = comm.allocate(300_000, np.float32)
        counts = [take_step(comm, bucket, step) for step in range(50)]
        return counts[0] > 0, len(set(counts))

    assert results_of_threads("auto", 3, main, settings=on_hosts("aab")) == [(True, 1)] * 3
