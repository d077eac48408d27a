"""What the operations compute, for any protocol."""

# Test names are sentences already.
# ruff: noqa: D102

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparktf.errors import ParamError, TransportError
from sparktf.transport.contract import Array, Communicator
from sparktf.transport.reduction import OPS
from sparktf.transport.testing.worlds import results_of_threads, run_threads

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8", "bool")
_FUNCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}
_SETTINGS = settings(
    max_examples=40,
    deadline=None,
    # The same inherited test runs for several classes, one a protocol.
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


def arrays(size: int, length: int, dtype: str, seed: int) -> list[Array]:
    """Return one array a rank whose sums are exact in any dtype and order."""
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2 if dtype == "bool" else 8, length).astype(kind) for _ in range(size)]


def expected(parts: list[Array], op: str) -> Array:
    """Return what numpy makes of the arrays of all ranks."""
    if parts[0].dtype == np.bool_:
        result = np.logical_and.reduce(parts) if op == "min" else np.logical_or.reduce(parts)
    else:
        result = _FUNCTIONS[op](np.stack(parts).astype(np.float64), axis=0)
    return np.asarray(result).astype(parts[0].dtype)


class Collectives:
    """What the operations compute."""

    protocol = ""

    @_SETTINGS
    @given(
        size=st.integers(1, 4),
        length=st.one_of(st.integers(0, 12), st.integers(0, 10_000), st.sampled_from([40_000, 300_001])),
        dtype=st.sampled_from(_DTYPES),
        op=st.sampled_from(OPS),
        seed=st.integers(0, 99),
    )
    def test_reductions_equal_those_of_numpy(self, size: int, length: int, dtype: str, op: str, seed: int) -> None:
        parts = arrays(size, length, dtype, seed)
        if op == "mean" and not dtype.startswith(("float", "bfloat")):
            op = "sum"
        whole = expected(parts, op)

        def main(comm: Communicator) -> tuple[Array, Array, bool]:
            given_array = parts[comm.rank].copy()
            shard = comm.reduce_scatter(given_array, op)
            kept = bool(np.array_equal(given_array, parts[comm.rank]))
            assert comm.all_reduce(given_array, op) is given_array
            return given_array, shard, kept

        for rank, (reduced, shard, kept) in enumerate(results_of_threads(self.protocol, size, main)):
            assert reduced.dtype == whole.dtype
            # A third has no exact binary form; everything else is exact.
            exact = op != "mean"
            assert np.allclose(reduced.astype(float), whole.astype(float), rtol=0 if exact else 1e-2, atol=0)
            assert np.array_equal(shard, np.array_split(reduced, size)[rank])
            assert kept, "reduce_scatter changed its argument"

    @pytest.mark.parametrize("length", [1000, 700_001])
    def test_results_have_the_same_bits_on_all_ranks_and_in_every_run(self, length: int) -> None:
        def main(comm: Communicator) -> bytes:
            values = np.random.default_rng(comm.rank).standard_normal(length).astype(np.float32)
            return comm.all_reduce(values, "mean").tobytes()

        results = results_of_threads(self.protocol, 3, main) + results_of_threads(self.protocol, 3, main)
        assert len(set(results)) == 1

    @_SETTINGS
    @given(lengths=st.lists(st.sampled_from([0, 1, 5, 3000, 200_000]), min_size=1, max_size=4))
    def test_all_gather_takes_a_different_length_from_every_rank(self, lengths: list[int]) -> None:
        def main(comm: Communicator) -> list[Array]:
            return comm.all_gather(np.full((lengths[comm.rank], 2), comm.rank, np.int32))

        for parts in results_of_threads(self.protocol, len(lengths), main):
            assert [part.shape for part in parts] == [(length, 2) for length in lengths]
            assert all((part == rank).all() for rank, part in enumerate(parts))

    def test_all_gather_receives_into_the_callers_memory(self) -> None:
        def main(comm: Communicator) -> bool:
            memory, asked = np.zeros((100_000, 3), np.float32), []

            def out(rows: int) -> Array:
                asked.append(rows)
                return memory[:rows]

            lengths = [7, 0, 60_000]
            parts = comm.all_gather(np.full((lengths[comm.rank], 3), comm.rank, np.float32), out)
            assert asked == [60_007]
            assert [len(part) for part in parts] == lengths
            assert all(np.shares_memory(part, memory) for part in parts if len(part))
            return bool((memory[:7] == 0).all() and (memory[7:60_007] == 2).all())

        assert results_of_threads(self.protocol, 3, main) == [True] * 3

    @pytest.mark.parametrize("op", ["sum", "mean"])
    def test_bfloat16_on_the_wire_keeps_float32_sums_and_equal_bits(self, op: str) -> None:
        def main(comm: Communicator) -> Array:
            values = np.random.default_rng(comm.rank).random(300_001, np.float32)
            return comm.all_reduce(values, op, compression="bf16")

        rows = [np.random.default_rng(rank).random(300_001, np.float32) for rank in range(3)]
        whole = np.sum(rows, 0) / (3 if op == "mean" else 1)
        outcomes = results_of_threads(self.protocol, 3, main)
        assert len({values.tobytes() for values in outcomes}) == 1
        # Three roundings to 8 bits on the way round, each of half a unit in the last place at most.
        np.testing.assert_allclose(outcomes[0], whole, rtol=3 * 2**-8)

    @pytest.mark.parametrize("compression", ["none", "bf16"])
    def test_nothing_large_is_allocated_after_the_first_step(self, compression: str) -> None:
        def main(comm: Communicator) -> int:
            values = np.ones(1_000_000, np.float32)
            comm.all_reduce(values, compression=compression)
            comm.barrier()
            if comm.rank == 0:
                tracemalloc.start()
            comm.barrier()
            comm.all_reduce(values, compression=compression)
            comm.barrier()
            return tracemalloc.get_traced_memory()[1]

        try:
            # Of both ranks together: headers, views and lists of chunks.
            assert max(results_of_threads(self.protocol, 2, main)) < 100_000
        finally:
            tracemalloc.stop()

    def test_compression_of_what_cannot_be_compressed_is_refused(self) -> None:
        def main(comm: Communicator) -> bool:
            for array, op, kind in (
                (np.ones(3), "sum", "bf16"),
                (np.ones(3, np.float32), "max", "bf16"),
                (np.ones(3, np.float32), "sum", "zip"),
            ):
                with pytest.raises(ParamError, match="compression"):
                    comm.all_reduce(array, op, kind)
            return bool(comm.all_reduce(np.ones(1, np.float32), compression="bf16")[0] == comm.size)

        assert results_of_threads(self.protocol, 2, main) == [True, True]

    def test_all_gather_bytes_keeps_order_and_lengths(self) -> None:
        outcomes = results_of_threads(self.protocol, 3, lambda comm: comm.all_gather_bytes(b"ab" * comm.rank))
        assert outcomes == [[b"", b"ab", b"abab"]] * 3

    @pytest.mark.parametrize("length", [0, 7, 400_000])
    def test_broadcast_gives_every_rank_the_roots_array(self, length: int) -> None:
        def main(comm: Communicator) -> list[bool]:
            return [
                bool((comm.broadcast(np.full(length, comm.rank, np.float64), root) == root).all())
                for root in range(comm.size)
            ]

        assert results_of_threads(self.protocol, 3, main) == [[True] * 3] * 3

    def test_point_to_point_reaches_any_rank_between_collectives(self) -> None:
        def main(comm: Communicator) -> list[float]:
            got = []
            for sender in range(comm.size):
                for receiver in range(comm.size):
                    if sender != receiver and comm.rank == sender:
                        comm.send(receiver, np.full(200_000, 10 * sender + receiver, np.float32))
                    elif sender != receiver and comm.rank == receiver:
                        got.append(float(comm.recv(sender, np.zeros(200_000, np.float32))[-1]))
                comm.barrier()
            return got

        assert results_of_threads(self.protocol, 3, main) == [[10, 20], [1, 21], [2, 12]]

    def test_arrays_of_any_shape_and_stride_are_reduced_in_place(self) -> None:
        def main(comm: Communicator) -> tuple[Array, Array, Array]:
            columns = np.ones((6, 4), np.float32)
            comm.all_reduce(columns[:, ::2])
            return columns, comm.all_reduce(np.ones((2, 3, 4))), comm.all_reduce(np.array(2.0))

        for columns, cube, scalar in results_of_threads(self.protocol, 2, main):
            assert columns.tolist() == [[2, 1, 2, 1]] * 6
            assert cube.shape == (2, 3, 4)
            assert scalar.shape == ()
            assert scalar == 4

    def test_buffers_are_allocated_once(self) -> None:
        def main(comm: Communicator) -> bool:
            def step() -> int:
                comm.all_reduce(np.ones(300_000, np.float32))
                comm.all_reduce(np.ones(3, np.float32))
                comm.reduce_scatter(np.ones(300_000, np.float32))
                return comm.stats.registrations

            first = step()
            return all(step() == first for _ in range(5))

        assert results_of_threads(self.protocol, 2, main) == [True, True]

    @pytest.mark.parametrize("length", [5, 1000, 700_001])
    def test_allocated_arrays_and_slices_of_them_give_what_others_give(self, length: int) -> None:
        def main(comm: Communicator) -> tuple[list[bool], list[int]]:
            values = np.random.default_rng(comm.rank).standard_normal(length + 3).astype(np.float32)
            own = comm.allocate(length + 3, np.float32)
            assert not own.any()
            counts, equal = [comm.stats.registrations], []
            for _ in range(3):
                own[:] = values
                inner, plain = own[2:-1], values[2:-1].copy()
                shards = comm.reduce_scatter(inner, "max"), comm.reduce_scatter(plain, "max")
                equal.append(np.array_equal(*shards))
                comm.all_reduce(plain)
                # As one rank's array is its own business, only some give theirs from the allocated one.
                comm.all_reduce(inner if comm.rank else (copy := inner.copy()))
                equal.append(np.array_equal(inner if comm.rank else copy, plain))
                inner[:] = values[2:-1]
                equal.append(np.array_equal(comm.all_reduce(inner), plain))
                equal.append(bool((own[:2] == values[:2]).all() and own[-1] == values[-1]))
                equal.append(np.array_equal(comm.broadcast(own, 1), comm.all_gather(own)[1]))
                counts.append(comm.stats.registrations)
            return equal, counts

        for equal, counts in results_of_threads(self.protocol, 3, main):
            assert all(equal)
            assert counts[1] == counts[-1]

    def test_an_allocation_that_differs_is_an_error_and_the_memory_outlives_the_communicator(self) -> None:
        kept: list[Array] = []

        def main(comm: Communicator) -> None:
            cube = comm.allocate((2, 3, 4), np.float64)
            assert cube.shape == (2, 3, 4)
            cube += 1
            kept.append(comm.all_reduce(cube))
            comm.allocate(3 + comm.rank, np.int32)

        outcomes = run_threads(self.protocol, 2, main)
        assert all(isinstance(outcome, TransportError) for outcome in outcomes)
        assert all((cube == 2).all() for cube in kept)

    def test_a_world_of_one_needs_no_peer(self) -> None:
        def main(comm: Communicator) -> bool:
            assert (comm.rank, comm.size, comm.protocol) == (0, 1, self.protocol)
            assert comm.reason
            assert comm.allocate((2, 2), np.float32).tolist() == [[0, 0], [0, 0]]
            comm.barrier()
            assert comm.all_gather_bytes(b"x") == [b"x"]
            return bool((comm.broadcast(comm.all_reduce(np.ones(5), "mean")) == 1).all())

        assert results_of_threads(self.protocol, 1, main) == [True]

    def test_a_wrong_argument_is_refused_before_anything_is_sent(self) -> None:
        def main(comm: Communicator) -> bool:
            frozen = np.ones(3)
            frozen.flags.writeable = False
            for array, op in ((np.ones(3), "product"), (np.ones(3, int), "mean"), (frozen, "sum")):
                with pytest.raises(ParamError):
                    comm.all_reduce(array, op)
            with pytest.raises(ParamError):
                comm.all_reduce(np.array(["text"]))
            with pytest.raises(ParamError, match="axis"):
                comm.all_gather(np.array(1.0), np.empty)
            return bool(comm.all_reduce(np.ones(1))[0] == comm.size)

        assert results_of_threads(self.protocol, 2, main) == [True, True]
