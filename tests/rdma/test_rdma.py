import pytest

pytest.register_assert_rewrite("sparktf.transport.testing")

from sparktf.transport.testing import TransportConformance  # noqa: E402


class TestRdma(TransportConformance):
    protocol = "rdma"
