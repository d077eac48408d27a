"""Counts of the buffers that a communicator makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparktf.transport.testing import results_of_threads


def made_by_three(protocol: str, operation: Callable[[Any], object], **given: Any) -> list[list[int]]:
    """Return, for each of two ranks, how many buffers it has made after one, two and three times an operation."""

    def main(comm: Any) -> list[int]:
        before, counts = comm.stats.registrations, []
        for _ in range(3):
            operation(comm)
            counts.append(comm.stats.registrations - before)
        return counts

    return results_of_threads(protocol, 2, main, **given)
