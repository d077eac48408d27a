"""A result that reached its node's end of the connection only: the driver says why, not that there is none."""

import json
from types import SimpleNamespace

import pytest

from sparktf.cluster import launch
from sparktf.cluster.control_server import NodeFailure
from sparktf.cluster.node import REPORT
from sparktf.cluster.submit import Outcome
from sparktf.errors import ClusterError, NodeError
from sparktf.program import handle
from sparktf.program.roles import Roles
from sparktf.program.task import DIGEST

FULL = NodeFailure(0, "", "its file could not be written on the driver: [Errno 28] No space left on device", "")


def outcome(name, told, failure):
    return Outcome([{"rank": 0, "name": name, "part": 0, "payload": json.dumps(told).encode()}], frozenset(), failure)


def test_a_model_that_the_drivers_disk_did_not_hold_is_told_of_as_such(tmp_path):
    with pytest.raises(NodeError, match="No space left"):
        launch._result(outcome(REPORT, {}, FULL), SimpleNamespace(world_size=1), str(tmp_path / "model"))
    with pytest.raises(ClusterError, match="received none"):
        launch._result(outcome(REPORT, {}, None), SimpleNamespace(world_size=1), str(tmp_path / "model"))


def test_so_is_a_programs_result(tmp_path):
    told, paths = {"bytes": 5_000_000, "sha256": "00"}, {0: str(tmp_path / "result")}
    with pytest.raises(NodeError, match="No space left"):
        handle._results(outcome(DIGEST, told, FULL), Roles(num_workers=1), paths)
    with pytest.raises(ClusterError, match="5,000,000 bytes of a result from rank 0, received none"):
        handle._results(outcome(DIGEST, told, None), Roles(num_workers=1), paths)
