"""A node's GPUs are those that Spark gave to its task, and no other node's."""

from __future__ import annotations

import sys

import pytest

from sparktf.cluster.gpus import find_shared
from sparktf.errors import ClusterError
from sparktf.program import task
from sparktf.program.task import _environment


def test_gpus_of_their_own_are_fine_and_numbers_may_repeat_on_another_host() -> None:
    find_shared([("a", ["0", "1"]), ("a", ["2"]), ("b", ["0"]), ("b", [])])


def test_a_gpu_given_twice_on_a_host_is_named_with_both_ranks() -> None:
    with pytest.raises(ClusterError, match=r"GPU 1 of host a for ranks 0 and 2.*discoveryScript"):
        find_shared([("a", ["0", "1"]), ("b", ["1"]), ("a", ["1"])])


def test_the_child_sees_its_tasks_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    # Where Spark gives out no GPUs, the machine's own setting holds.
    assert _environment()["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setattr(task, "task_gpus", lambda: ["2", "0"])
    assert _environment()["CUDA_VISIBLE_DEVICES"] == "2,0"


def test_the_child_knows_no_cluster_of_its_parents_and_finds_what_spark_has_shipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TF_CONFIG", "{}")
    monkeypatch.setattr(sys, "path", ["/shipped/modules.zip", *sys.path])
    environment = _environment()
    assert "TF_CONFIG" not in environment
    assert environment["PYTHONPATH"].startswith("/shipped/modules.zip:")
