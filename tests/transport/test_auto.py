import numpy as np
import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.transport import Settings  # noqa: E402
from sparktf.transport.testing import TransportConformance, run_threads  # noqa: E402


def on_hosts(names):
    return [Settings(host_id=name) for name in names]


class TestTwoMachines(TransportConformance):
    """Every world of more than two ranks has machines of one, two or more of them."""

    protocol = "two_machines:connect"


@pytest.mark.parametrize(
    ("names", "protocol", "reason"),
    [
        ("aaa", "shm", "all 3 ranks share"),
        ("aab", "shm+tcp", "3 ranks in 2 groups"),
        ("abc", "tcp", "no two of 3 ranks"),
        (["", ""], "tcp", "no two of 2 ranks"),
    ],
)
def test_auto_takes_memory_within_machines_and_sockets_between_them(names, protocol, reason):
    outcomes = run_threads("auto", len(names), lambda comm: (comm.protocol, comm.reason), settings=on_hosts(names))
    assert {outcome[0] for outcome in outcomes} == {protocol}
    assert all(reason in outcome[1] and "no RDMA (rank 0" in outcome[1] for outcome in outcomes)


@pytest.mark.parametrize("names", ["aabb", "abab", "aaabb", "aaab", "abbcc"])
@pytest.mark.parametrize("length", [1, 30_000, 1_000_001, 5_000_000])
def test_a_world_over_several_machines_reduces_as_one(names, length):
    def main(comm):
        values = np.random.default_rng(comm.rank).integers(0, 8, length).astype(np.float32)
        shared = comm.allocate(length, np.float32)
        shared[:] = values
        shard = comm.reduce_scatter(values, "max")
        return comm.all_reduce(values, "mean"), comm.all_reduce(shared, "mean"), shard

    size = len(names)
    parts = [np.random.default_rng(rank).integers(0, 8, length).astype(np.float32) for rank in range(size)]
    mean, largest = np.mean(parts, axis=0), np.max(parts, axis=0)
    outcomes = run_threads("auto", size, main, settings=on_hosts(names))
    for rank, (plain, shared, shard) in enumerate(outcomes):
        assert np.allclose(plain, mean, rtol=1e-6)
        assert plain.tobytes() == shared.tobytes() == outcomes[0][0].tobytes()
        assert np.array_equal(shard, np.array_split(largest, size)[rank])
