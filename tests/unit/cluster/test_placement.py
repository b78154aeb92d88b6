"""Placement: decisions as tables, and that following the plan converges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import CollectionConfig, IndexConfig, Settings
from cluster.errors import Invalid
from cluster.placement import (
    Load,
    ObservedReplica,
    ReplicaKey,
    ReplicaState,
    Start,
    Stop,
    WantedReplica,
    held_by_every_shard,
    plan,
    publishable_version,
    replica_resources,
    replicas_of,
    search_threads,
)

A0, A1, B0 = ReplicaKey("a", 0, 0), ReplicaKey("a", 1, 0), ReplicaKey("b", 0, 0)
A0_SECOND = ReplicaKey("a", 0, 1)
V2 = WantedReplica(version=2, generation=1, shards=2, num_cpus=1.0)
V2_WHILE_V1 = replace(V2, served=1)


def seen(state: ReplicaState, *versions: int) -> ObservedReplica:
    return ObservedReplica(state, versions)


@pytest.mark.parametrize(
    ("wanted", "observed", "actions"),
    [
        ({}, {}, []),
        ({A0: V2}, {}, [Start(A0, V2)]),
        ({}, {A0: seen("ready", 2)}, [Stop(A0)]),
        ({}, {A0: seen("starting")}, [Stop(A0)]),
        ({}, {A0: seen("unreachable")}, [Stop(A0)]),
        ({}, {A0: seen("failed")}, [Stop(A0)]),
        ({A0: V2}, {A0: seen("starting")}, []),
        ({A0: V2}, {A0: seen("unreachable")}, []),
        ({A0: V2}, {A0: seen("unreachable", 1)}, []),
        ({A0: V2}, {A0: seen("ready", 2)}, []),
        ({A0: V2}, {A0: seen("ready", 1, 2)}, []),
        ({A0: V2}, {A0: seen("ready", 1)}, [Load(A0, 2)]),
        ({A0: V2}, {A0: seen("ready")}, [Load(A0, 2)]),
        ({A0: V2}, {A0: seen("ready", 3)}, [Load(A0, 2)]),
        ({A0: V2}, {A0: seen("failed")}, [Load(A0, 2)]),
        ({A0: V2}, {A0: seen("failed", 1)}, [Load(A0, 2)]),
        ({A0: V2}, {A0: seen("failed", 2)}, []),
        ({A0: V2_WHILE_V1}, {A0: seen("ready", 2)}, [Load(A0, 1)]),
        ({A0: V2_WHILE_V1}, {A0: seen("ready", 1)}, [Load(A0, 2)]),
        ({A0: V2_WHILE_V1}, {A0: seen("ready", 1, 2)}, []),
        ({A0: V2_WHILE_V1}, {A0: seen("failed")}, [Load(A0, 1), Load(A0, 2)]),
        ({A0: V2_WHILE_V1}, {A0: seen("starting")}, []),
        ({A0: replace(V2, served=2)}, {A0: seen("failed")}, [Load(A0, 2)]),
    ],
)
def test_plan_for_one_replica(
    wanted: dict[ReplicaKey, WantedReplica], observed: dict[ReplicaKey, ObservedReplica], actions: list[Any]
) -> None:
    assert plan(wanted, observed) == actions


def test_plan_retires_first_then_goes_by_key() -> None:
    wanted = {A1: V2, A0: V2, A0_SECOND: V2}
    observed = {ReplicaKey("z", 1, 0): seen("ready", 9), B0: seen("ready", 1), A0_SECOND: seen("ready", 1)}
    assert plan(wanted, observed) == [
        Stop(B0),
        Stop(ReplicaKey("z", 1, 0)),
        Start(A0, V2),
        Load(A0_SECOND, 2),
        Start(A1, V2),
    ]


@pytest.mark.parametrize(
    ("observed", "publishable"),
    [
        ({}, False),
        ({A0: seen("ready", 2)}, False),  # shard 1 has none
        ({A0: seen("ready", 2), A1: seen("starting")}, False),
        ({A0: seen("ready", 2), A1: seen("unreachable", 2)}, False),
        ({A0: seen("ready", 2), A1: seen("ready", 1)}, False),
        ({A0: seen("ready", 2), A1: seen("failed", 1)}, False),
        ({A0: seen("ready", 2), A1: seen("failed")}, False),
        ({A0: seen("ready", 2), A1: seen("ready", 2)}, True),
        ({A0: seen("ready", 1, 2), A1: seen("ready", 2, 3)}, True),
        ({A0_SECOND: seen("ready", 2), A1: seen("ready", 2)}, True),  # the other replica has yet to start
        ({A0: seen("starting"), A0_SECOND: seen("ready", 2), A1: seen("ready", 2)}, True),
        ({A0: seen("unreachable", 1), A0_SECOND: seen("ready", 2), A1: seen("ready", 2)}, True),
        ({A0: seen("ready", 1), A0_SECOND: seen("ready", 2), A1: seen("ready", 2)}, False),  # would answer the old
        ({A0: seen("ready", 2), A1: seen("ready", 2), B0: seen("ready", 1)}, True),  # not of this collection
    ],
)
def test_version_is_publishable_when_all_that_answer_hold_it(
    observed: dict[ReplicaKey, ObservedReplica], publishable: bool
) -> None:
    assert publishable_version({A0: V2, A0_SECOND: V2, A1: V2}, observed, 2) is publishable


@pytest.mark.parametrize(
    ("observed", "held"),
    [
        ({}, False),
        ({A0: seen("ready", 2)}, False),
        ({A0: seen("ready", 1, 2), A1: seen("ready", 2)}, True),
        ({A0: seen("ready", 1), A0_SECOND: seen("ready", 2), A1: seen("ready", 2)}, True),
        ({A0: seen("ready", 2), A1: seen("unreachable", 2)}, False),
        ({A0: seen("ready", 2), A1: seen("ready", 1), ReplicaKey("b", 1, 0): seen("ready", 2)}, False),
    ],
)
def test_version_is_held_by_every_shard_where_one_ready_replica_of_each_has_it(
    observed: dict[ReplicaKey, ObservedReplica], held: bool
) -> None:
    assert held_by_every_shard("a", 2, observed, 2) is held


keys = st.builds(ReplicaKey, st.sampled_from(["a", "b"]), st.integers(0, 2), st.integers(0, 1))
wanted_replicas = st.builds(
    WantedReplica,
    st.integers(1, 4),
    st.integers(1, 3),
    st.just(3),
    st.just(1.0),
    served=st.none() | st.integers(1, 4),
)
observed_replicas = st.builds(
    ObservedReplica,
    st.sampled_from(["starting", "ready", "failed", "unreachable"]),
    st.lists(st.integers(1, 4), unique=True, max_size=2).map(lambda versions: tuple(sorted(versions))),
)


def perform(
    wanted: dict[ReplicaKey, WantedReplica], observed: dict[ReplicaKey, ObservedReplica], actions: list[Any]
) -> dict[ReplicaKey, ObservedReplica]:
    """A model of the cluster: actions work, and what was starting or unreachable is restarted by Ray meanwhile."""
    after = dict(observed)
    for key, replica in observed.items():
        if replica.state in ("starting", "unreachable") and key in wanted:
            after[key] = ObservedReplica("ready", (wanted[key].version,))  # a restart loads the newest version
    for action in actions:
        if isinstance(action, Stop):
            del after[action.key]
        elif isinstance(action, Start):
            after[action.key] = ObservedReplica("starting")
        else:
            after[action.key] = ObservedReplica("ready", (*after[action.key].versions, action.version))
    return after


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(keys, wanted_replicas, max_size=8),
    st.dictionaries(keys, observed_replicas, max_size=8),
)
def test_following_the_plan_converges_and_then_rests(
    wanted: dict[ReplicaKey, WantedReplica], observed: dict[ReplicaKey, ObservedReplica]
) -> None:
    for _ in range(3):  # to start and load, for what was started to become ready, and to load what is served too
        observed = perform(wanted, observed, plan(wanted, observed))
    assert plan(wanted, observed) == []
    assert observed.keys() == wanted.keys()
    assert all(set(wanted[key].versions) <= set(observed[key].versions) for key in wanted)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.dictionaries(keys, wanted_replicas, max_size=8),
    st.dictionaries(keys, observed_replicas, max_size=8),
)
def test_plan_does_one_kind_of_thing_to_a_replica_and_no_thing_twice(
    wanted: dict[ReplicaKey, WantedReplica], observed: dict[ReplicaKey, ObservedReplica]
) -> None:
    actions = plan(wanted, observed)
    assert len(actions) == len(set(actions))
    kinds = {(action.key, type(action)) for action in actions}
    assert len(kinds) == len({key for key, _ in kinds})
    assert {key for key, _ in kinds} <= wanted.keys() | observed.keys()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(keys, observed_replicas, max_size=8), st.integers(1, 4))
def test_publishable_version_is_held_by_a_replica_of_every_shard(
    observed: dict[ReplicaKey, ObservedReplica], version: int
) -> None:
    wanted = dict.fromkeys(observed, V2) | {A0: V2}
    if publishable_version(wanted, observed, version):
        for shard in {key.shard for key in wanted}:
            replicas = [observed[key] for key in wanted if key.shard == shard and key in observed]
            assert any(version in replica.versions for replica in replicas)


def test_replicas_of_a_collection_are_all_pairs() -> None:
    config = CollectionConfig(dimension=2, shards=9, replicas=2)  # the manifest's shards count, not the config's
    assert replicas_of("a", config, 2) == [A0, A0_SECOND, A1, ReplicaKey("a", 1, 1)]


@pytest.mark.parametrize(("device", "resources"), [("cpu", (0.5, 0.0)), ("gpu", (0.5, 1.0))])
def test_replica_resources_ask_for_a_gpu_only_where_wanted(device: Any, resources: tuple[float, float]) -> None:
    config = CollectionConfig(dimension=2, index=IndexConfig(device=device))
    assert replica_resources(config, Settings(data="memory://x", shard_cpus=0.5)) == resources


@pytest.mark.parametrize(
    ("shard_threads", "shard_cpus", "shards", "node_cores", "threads"),
    [
        (3, 8.0, 1, 16, 3),  # as set
        (None, 8.0, 1, 16, 8),  # its CPUs
        (None, 1.0, 4, 16, 1),
        (None, 2.9, 1, 16, 2),
        (None, 0.0, 4, 16, 4),  # its share of the node
        (None, 0.5, 3, 16, 5),
        (None, 0.0, 32, 16, 1),  # never none
        (None, 0.0, 1, 1, 1),
    ],
)
def test_search_threads(
    shard_threads: int | None, shard_cpus: float, shards: int, node_cores: int, threads: int
) -> None:
    settings = Settings(data="memory://x", shard_cpus=shard_cpus, shard_threads=shard_threads)
    assert search_threads(shards, settings, node_cores) == threads


@pytest.mark.parametrize("shard_threads", [0, -1])
def test_search_threads_below_one_are_refused(shard_threads: int) -> None:
    with pytest.raises(Invalid, match="shard_threads: must be at least 1"):
        search_threads(1, Settings(data="memory://x", shard_threads=shard_threads), 8)


@pytest.mark.parametrize("key", [A0, A0_SECOND, ReplicaKey("word-net_2", 1_023, 15)])
def test_replica_key_survives_its_text(key: ReplicaKey) -> None:
    assert ReplicaKey.parse(str(key)) == key


def test_replica_key_text_is_pinned() -> None:
    assert str(ReplicaKey("words", 3, 1)) == "words/3/1"
