"""Tests on executors in processes of their own: two, of one slot each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def spark(start_spark: Callable[..., Any]) -> Any:
    """Return a session whose two executors are processes, one slot each."""
    return start_spark("local-cluster[2,1,1536]")
