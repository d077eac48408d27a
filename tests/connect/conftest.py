"""Tests on a Spark Connect session to a local server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("grpc", reason="Spark Connect needs the connect extra")


@pytest.fixture(scope="session")
def spark(start_spark: Callable[..., Any]) -> Any:
    """Return a Connect session to a server of this process with four task slots."""
    return start_spark(
        "local[4]",
        connect=True,
        **{
            # Long enough to try the client's own patience, short enough to try Spark's.
            "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": 8,
            "spark.driver.maxResultSize": "32m",
        },
    )
