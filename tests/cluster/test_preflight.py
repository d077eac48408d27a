"""What is checked before a job starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sparktf.cluster.preflight import check_cluster, check_versions, installed_versions
from sparktf.errors import ClusterError, VersionError


def test_equal_versions_up_to_the_patch_level_are_fine() -> None:
    check_versions({"keras": "3.15.1", "python": "3.11"}, [{"keras": "3.15.0", "python": "3.11"}])


def test_a_rank_with_another_version_is_named_with_both_versions() -> None:
    versions = [{"keras": "3.15.1"}, {"keras": "3.12.0"}]
    with pytest.raises(VersionError, match=r"keras 3\.15\.1.*received 3\.12\.0 on rank 1"):
        check_versions({"keras": "3.15.1"}, versions)


def test_a_package_that_an_executor_lacks_is_named() -> None:
    with pytest.raises(VersionError, match=r"tensorflow 2\.21\.0.*received none on rank 0"):
        check_versions({"tensorflow": "2.21.0"}, [{}])


def test_this_machines_versions_are_known() -> None:
    versions = installed_versions()
    assert set(versions) == {"python", "sparktf", "tensorflow", "keras"}
    assert "none" not in versions.values()


def test_dynamic_allocation_is_refused_with_the_setting_to_change() -> None:
    settings = {"spark.dynamicAllocation.enabled": "true"}
    session = SimpleNamespace(conf=SimpleNamespace(get=lambda name, default=None: settings.get(name, default)))
    with pytest.raises(ClusterError, match=r"spark\.dynamicAllocation\.enabled=false"):
        check_cluster(session, 1)
