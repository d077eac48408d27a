"""What nodes may ask of a cluster, and where that is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparktf.errors import ParamError
from sparktf.program.resources import resource_profile


def _session(master: str) -> Any:
    # Spark's own local mode is tested in test_run.py; a process holds only one session, of one master.
    return SimpleNamespace(sparkContext=SimpleNamespace(master=master))


@pytest.mark.parametrize("master", ["local", "local[1]", "local[*]", "local[4,2]"])
def test_local_mode_knows_no_profiles(master: str) -> None:
    with pytest.raises(ParamError, match="resource profiles"):
        resource_profile(_session(master), {"cpus": 1})


@pytest.mark.parametrize("name", ["cpus", "gpu"])
@pytest.mark.parametrize("amount", [0.5, 1.5, 0, -1, True, "2", float("inf"), float("nan")])
def test_a_node_takes_whole_cores_and_gpus(name: str, amount: Any) -> None:
    with pytest.raises(ParamError, match=rf"resources\['{name}'\]: expected a"):
        resource_profile(_session("spark://host:7077"), {name: amount})


def test_a_profile_of_sparks_goes_through_as_it_is() -> None:
    profile = object()
    assert resource_profile(_session("local-cluster[2,1,1024]"), profile) is profile


def test_nothing_is_asked_for_by_default() -> None:
    assert resource_profile(_session("local"), None) is None
