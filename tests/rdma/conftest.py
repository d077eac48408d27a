"""These tests need an RDMA device: ``make test-rdma`` finds or makes one."""

from __future__ import annotations

import os

import pytest

from sparktf.transport.rdma import preflight
from sparktf.transport.settings import Settings


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    """Skip where there is no device, or fail where SPARKTF_REQUIRE_RDMA=1 says that there must be one."""
    trouble = preflight(Settings.from_environment())
    if trouble and os.environ.get("SPARKTF_REQUIRE_RDMA") == "1":
        pytest.fail(f"SPARKTF_REQUIRE_RDMA=1, and {trouble}")
    if trouble:
        pytest.skip("no RDMA device here (python -m sparktf doctor); make test-rdma has one")
