"""The tests that every protocol passes, for backends in and outside this package.

Use it with pytest in these lines::

    import pytest
    pytest.register_assert_rewrite("sparktf.transport.testing")
    from sparktf.transport.testing import TransportConformance

    class TestMine(TransportConformance):
        protocol = "my_package.mine:connect"

Ranks are real: threads for what is computed, processes for what is killed. It needs pytest and hypothesis.
"""

from sparktf.transport.testing.collectives import Collectives
from sparktf.transport.testing.failures import Failures
from sparktf.transport.testing.lost import LostProcesses
from sparktf.transport.testing.worlds import (
    SECRET,
    FileExchange,
    MemoryExchange,
    Rank,
    processes,
    results_of_threads,
    run_threads,
)

__all__ = [
    "SECRET",
    "Collectives",
    "Failures",
    "FileExchange",
    "LostProcesses",
    "MemoryExchange",
    "Rank",
    "TransportConformance",
    "processes",
    "results_of_threads",
    "run_threads",
]


class TransportConformance(Collectives, Failures, LostProcesses):
    """All of it; set `protocol` in a subclass."""
