"""Ranks and roles: the chief first, then workers, servers and the evaluator; TensorFlow is told the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktf.errors import ParamError
from sparktf.program.roles import Roles


def test_ranks_are_chief_workers_servers_evaluator_in_this_order() -> None:
    roles = Roles(num_workers=3, num_ps=2, evaluator=True)
    assert [(roles.job_name(rank), roles.task_index(rank)) for rank in range(roles.world_size)] == [
        ("chief", 0),
        ("worker", 0),
        ("worker", 1),
        ("ps", 0),
        ("ps", 1),
        ("evaluator", 0),
    ]


@given(st.integers(1, 6), st.integers(0, 4), st.booleans())
def test_every_rank_but_the_evaluator_stands_once_in_the_cluster(workers: int, servers: int, evaluator: bool) -> None:
    roles = Roles(workers, servers, evaluator)
    addresses = [f"host:{rank}" for rank in range(roles.world_size)]
    spec = roles.cluster_spec(addresses)
    assert sorted(a for job in spec.values() for a in job) == sorted(addresses[: workers + servers])
    for rank in range(workers + servers):
        assert spec[roles.job_name(rank)][roles.task_index(rank)] == addresses[rank]


def test_tensorflow_reads_its_place_from_tf_config(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    roles = Roles(num_workers=2, num_ps=1)
    monkeypatch.setenv("TF_CONFIG", roles.tf_config(1, ["a:1", "b:2", "c:3"]))
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert (resolver.task_type, resolver.task_id) == ("worker", 0)
    assert resolver.cluster_spec().as_dict() == {"chief": ["a:1"], "worker": ["b:2"], "ps": ["c:3"]}


def test_the_evaluator_is_told_of_a_cluster_that_it_is_no_part_of() -> None:
    told = json.loads(Roles(2, 0, evaluator=True).tf_config(2, ["a:1", "b:2", "c:3"]))
    assert told == {"cluster": {"chief": ["a:1"], "worker": ["b:2"]}, "task": {"type": "evaluator", "index": 0}}


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"num_workers": 1.5}, {"num_ps": -1}, {"num_workers": True}])
def test_numbers_of_nodes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ParamError, match=f"{next(iter(wrong))}: expected an integer"):
        Roles(**wrong)
