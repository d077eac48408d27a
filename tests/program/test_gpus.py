"""A node's GPUs are those that Spark gave to its task, and no other node's."""

from __future__ import annotations

import sys

import pytest

from sparktf.cluster import gpus
from sparktf.cluster.gpus import check_gpus, shared_gpu
from sparktf.errors import ClusterError
from sparktf.program import task
from sparktf.program.task import _environment
from sparktf.transport.testing import results_of_threads, run_threads


def test_gpus_of_their_own_are_fine_and_numbers_may_repeat_on_another_host() -> None:
    assert shared_gpu([("a", ["0", "1"]), ("a", ["2"]), ("b", ["0"]), ("b", [])]) is None


def test_a_gpu_given_twice_on_a_host_is_found_with_both_ranks() -> None:
    assert shared_gpu([("a", ["0", "1"]), ("b", ["1"]), ("a", ["1"])]) == ("1", "a", 0, 2)


def test_all_nodes_of_a_job_refuse_a_gpu_that_two_of_them_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "task_gpus", lambda: ["1"])
    outcomes = run_threads("tcp", 2, lambda comm: check_gpus(comm, "a"))
    for outcome in outcomes:
        with pytest.raises(ClusterError, match=r"GPU 1 of host a for ranks 0 and 1.*discoveryScript"):
            raise outcome
    assert results_of_threads("tcp", 2, lambda comm: check_gpus(comm, f"host {comm.rank}")) == [True, True]
    monkeypatch.setattr(gpus, "task_gpus", lambda: [])
    assert results_of_threads("tcp", 2, lambda comm: check_gpus(comm, "a")) == [False, False]


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
