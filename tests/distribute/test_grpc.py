from __future__ import annotations

import pytest

from sparktf.distribute.grpc import start_cluster
from sparktf.errors import ProtocolError
from sparktf.transport.solo import SoloCommunicator


def test_where_encryption_is_asked_for_gradients_do_not_travel_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKTF_TLS", "1")
    with pytest.raises(ProtocolError, match="clear text"):
        start_cluster(SoloCommunicator("tcp"), "127.0.0.1")
