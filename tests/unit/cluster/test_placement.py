"""Placement: decisions as tables, and that following the plan converges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import CollectionConfig, Settings
from cluster.errors import Invalid
from cluster.placement import (
    NEAR_RECORDS,
    Candidate,
    Load,
    ObservedReplica,
    ReplicaKey,
    ReplicaState,
    Start,
    Stop,
    WantedReplica,
    choose_lead,
    held_by_every_shard,
    leader,
    may_end_logs,
    plan,
    publishable,
    replicas_of,
    search_threads,
)

A0, A1, B0 = ReplicaKey("a", 0, 0), ReplicaKey("a", 1, 0), ReplicaKey("b", 0, 0)
A0_SECOND = ReplicaKey("a", 0, 1)
G2 = WantedReplica(version=20, generation=2, shards=2, num_cpus=1.0)
G2_WHILE_G1 = replace(G2, served=10, served_generation=1)


def seen(state: ReplicaState, *versions: int) -> ObservedReplica:
    """A replica that holds these versions, of which 10 to 19 are of generation 1, and so on."""
    generations = sorted({version // 10 for version in versions})
    return ObservedReplica(state, max(versions, default=0), tuple(generations))


@pytest.mark.parametrize(
    ("wanted", "observed", "actions"),
    [
        ({}, {}, []),
        ({A0: G2}, {}, [Start(A0, G2)]),
        ({}, {A0: seen("ready", 20)}, [Stop(A0)]),
        ({}, {A0: seen("starting")}, [Stop(A0)]),
        ({}, {A0: seen("unreachable")}, [Stop(A0)]),
        ({}, {A0: seen("failed")}, [Stop(A0)]),
        ({A0: G2}, {A0: seen("starting")}, []),
        ({A0: G2}, {A0: seen("unreachable")}, []),
        ({A0: G2}, {A0: seen("unreachable", 10)}, []),
        ({A0: G2}, {A0: seen("ready", 20)}, []),
        ({A0: G2}, {A0: seen("ready", 10, 20)}, []),
        ({A0: G2}, {A0: seen("ready", 10)}, [Load(A0, 20)]),
        ({A0: G2}, {A0: seen("ready")}, [Load(A0, 20)]),
        ({A0: G2}, {A0: seen("ready", 30)}, []),  # it knows more
        ({A0: replace(G2, served=20, served_generation=2)}, {A0: seen("ready", 30)}, [Load(A0, 20)]),
        ({A0: G2}, {A0: seen("failed")}, [Load(A0, 20)]),
        ({A0: G2}, {A0: seen("failed", 10)}, [Load(A0, 20)]),
        ({A0: G2}, {A0: seen("failed", 20)}, []),
        ({A0: G2_WHILE_G1}, {A0: seen("ready", 20)}, [Load(A0, 10)]),
        ({A0: G2_WHILE_G1}, {A0: seen("ready", 10)}, [Load(A0, 20)]),
        ({A0: G2_WHILE_G1}, {A0: seen("ready", 10, 20)}, []),
        ({A0: G2_WHILE_G1}, {A0: seen("failed")}, [Load(A0, 10), Load(A0, 20)]),
        ({A0: G2_WHILE_G1}, {A0: seen("starting")}, []),
        ({A0: replace(G2, served=20, served_generation=2)}, {A0: seen("failed")}, [Load(A0, 20)]),
        # versions of one generation that succeed each other
        ({A0: replace(G2, version=24)}, {A0: seen("ready", 23)}, [Load(A0, 24)]),
        ({A0: replace(G2, version=24)}, {A0: seen("ready", 25)}, []),  # it does not go back
        ({A0: replace(G2, version=24, served=23, served_generation=2)}, {A0: seen("ready", 22)}, [Load(A0, 24)]),
        ({A0: replace(G2, version=24, served=23, served_generation=2)}, {A0: seen("ready")}, [Load(A0, 24)]),
        ({A0: G2_WHILE_G1}, {A0: seen("ready", 9, 13, 22)}, []),
        ({A0: replace(G2, served=17, served_generation=1)}, {A0: seen("ready", 12)}, [Load(A0, 20)]),
    ],
)
def test_plan_for_one_replica(
    wanted: dict[ReplicaKey, WantedReplica], observed: dict[ReplicaKey, ObservedReplica], actions: list[Any]
) -> None:
    assert plan(wanted, observed) == actions


def test_plan_retires_first_then_goes_by_key() -> None:
    wanted = {A1: G2, A0: G2, A0_SECOND: G2}
    observed = {ReplicaKey("z", 1, 0): seen("ready", 90), B0: seen("ready", 10), A0_SECOND: seen("ready", 10)}
    assert plan(wanted, observed) == [
        Stop(B0),
        Stop(ReplicaKey("z", 1, 0)),
        Start(A0, G2),
        Load(A0_SECOND, 20),
        Start(A1, G2),
    ]


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ({}, False),
        ({A0: seen("ready", 20)}, False),  # shard 1 has none
        ({A0: seen("ready", 20), A1: seen("starting")}, False),
        ({A0: seen("ready", 20), A1: seen("unreachable", 20)}, False),
        ({A0: seen("ready", 20), A1: seen("ready", 10)}, False),
        ({A0: seen("ready", 20), A1: seen("failed", 10)}, False),
        ({A0: seen("ready", 20), A1: seen("failed")}, False),
        ({A0: seen("ready", 20), A1: seen("ready", 20)}, True),
        ({A0: seen("ready", 20), A1: seen("ready", 23)}, True),  # whatever its version
        ({A0: seen("ready", 10, 20), A1: seen("ready", 20, 30)}, True),
        ({A0_SECOND: seen("ready", 20), A1: seen("ready", 20)}, True),  # the other replica has yet to start
        ({A0: seen("starting"), A0_SECOND: seen("ready", 20), A1: seen("ready", 20)}, True),
        ({A0: seen("unreachable", 10), A0_SECOND: seen("ready", 20), A1: seen("ready", 20)}, True),
        ({A0: seen("ready", 10), A0_SECOND: seen("ready", 20), A1: seen("ready", 20)}, False),  # would answer the old
        ({A0: seen("ready", 20), A1: seen("ready", 20), B0: seen("ready", 10)}, True),  # not of this collection
    ],
)
def test_generation_is_publishable_when_all_that_answer_hold_it(
    observed: dict[ReplicaKey, ObservedReplica], expected: bool
) -> None:
    assert publishable({A0: G2, A0_SECOND: G2, A1: G2}, observed, 2) is expected


@pytest.mark.parametrize(
    ("observed", "held"),
    [
        ({}, False),
        ({A0: seen("ready", 20)}, False),
        ({A0: seen("ready", 10, 20), A1: seen("ready", 24)}, True),
        ({A0: seen("ready", 10), A0_SECOND: seen("ready", 20), A1: seen("ready", 20)}, True),
        ({A0: seen("ready", 20), A1: seen("unreachable", 20)}, False),
        ({A0: seen("ready", 20), A1: seen("ready", 10), ReplicaKey("b", 1, 0): seen("ready", 20)}, False),
    ],
)
def test_generation_is_held_by_every_shard_where_one_ready_replica_of_each_has_it(
    observed: dict[ReplicaKey, ObservedReplica], held: bool
) -> None:
    assert held_by_every_shard({A0, A0_SECOND, A1}, observed, 2) is held


def crossing(lag: int, *versions: int) -> ObservedReplica:
    """A replica that holds versions, and generation 2 as soon as the logs before it have ended."""
    return replace(seen("ready", *versions), crossing={2: lag})


@pytest.mark.parametrize(
    ("observed", "may"),
    [
        ({}, False),
        ({A0: crossing(0, 10)}, False),  # shard 1 has nobody
        ({A0: crossing(0, 10), A1: crossing(NEAR_RECORDS)}, True),
        ({A0: crossing(0, 10), A1: crossing(NEAR_RECORDS + 1)}, False),
        ({A0: crossing(0, 10), A1: seen("ready", 10)}, False),  # it fails to load it
        ({A0: crossing(0, 10), A1: seen("ready", 10, 20)}, True),  # they have ended already
        ({A0: seen("ready", 20), A1: seen("ready", 10, 20)}, False),  # and all have arrived
        ({A0: crossing(0, 10), A0_SECOND: crossing(99, 10), A1: crossing(0)}, False),
        ({A0: crossing(0, 10), A0_SECOND: seen("unreachable", 10), A1: crossing(0)}, True),
        ({A0: crossing(0, 10), A0_SECOND: seen("failed"), A1: crossing(0)}, True),
        ({A0: crossing(0, 10), A1: replace(crossing(0), state="starting")}, False),
        ({A0: replace(crossing(0, 10), crossing={3: 0}), A1: crossing(0)}, False),
    ],
)
def test_logs_may_end_once_the_new_generation_is_near_in_every_shard(
    observed: dict[ReplicaKey, ObservedReplica], may: bool
) -> None:
    assert may_end_logs(dict.fromkeys([A0, A0_SECOND, A1], G2), observed, 2) is may


keys = st.builds(ReplicaKey, st.sampled_from(["a", "b"]), st.integers(0, 2), st.integers(0, 1))
versions = st.integers(10, 49)


def wanted_of(version: int, served: int | None) -> WantedReplica:
    if served is None or served // 10 >= version // 10:
        served = None
    return WantedReplica(version, version // 10, 3, 1.0, 0.0, served, None if served is None else served // 10)


wanted_replicas = st.builds(wanted_of, versions, st.none() | versions)
observed_replicas = st.builds(
    lambda state, held: seen(state, *held),
    st.sampled_from(["starting", "ready", "failed", "unreachable"]),
    st.lists(versions, unique=True, max_size=2),
)


def perform(
    wanted: dict[ReplicaKey, WantedReplica], observed: dict[ReplicaKey, ObservedReplica], actions: list[Any]
) -> dict[ReplicaKey, ObservedReplica]:
    """A model of the cluster: actions work, and what was starting or unreachable is restarted by Ray meanwhile."""
    after = dict(observed)
    for key, replica in observed.items():
        if replica.state in ("starting", "unreachable") and key in wanted:
            after[key] = seen("ready", wanted[key].version)  # a restart loads the newest version
    for action in actions:
        if isinstance(action, Stop):
            del after[action.key]
        elif isinstance(action, Start):
            after[action.key] = ObservedReplica("starting")
        else:
            held = after[action.key]
            generations = {*held.generations, action.version // 10}
            after[action.key] = ObservedReplica("ready", max(held.version, action.version), tuple(sorted(generations)))
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
    for key, one in wanted.items():
        assert one.served_generation is None or one.served_generation in observed[key].generations
        assert observed[key].version >= one.version


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
def test_publishable_generation_is_held_by_a_replica_of_every_shard(
    observed: dict[ReplicaKey, ObservedReplica], generation: int
) -> None:
    wanted = dict.fromkeys(observed, G2) | {A0: G2}
    if publishable(wanted, observed, generation):
        for shard in {key.shard for key in wanted}:
            replicas = [observed[key] for key in wanted if key.shard == shard and key in observed]
            assert any(generation in replica.generations for replica in replicas)


# --- who leads ----------------------------------------------------------------------------------------------------

R0, R1, R2 = (ReplicaKey("a", 0, number) for number in range(3))
PATIENCE_S = 5.0
GONE = ReplicaKey("a", 0, 9)


def ready(lsn: int = 7, epoch: int = 0, **more: Any) -> Candidate:
    return Candidate("ready", lsn, epoch, **more)


def silent(silent_s: float, state: ReplicaState = "unreachable", **more: bool) -> Candidate:
    return Candidate(state, silent_s=silent_s, **more)


@pytest.mark.parametrize(
    ("replicas", "led_last", "chosen"),
    [
        ({}, None, None),
        ({R0: ready()}, None, R0),
        ({R0: Candidate("failed")}, R0, None),
        ({R0: Candidate("starting")}, None, None),
        # one leads
        ({R0: ready(epoch=3)}, None, None),
        ({R0: ready(), R1: ready(epoch=3)}, R0, None),
        ({R0: ready(epoch=4), R1: ready(epoch=3)}, R1, None),
        # which one
        ({R0: ready(), R1: ready()}, None, R0),
        ({R0: ready(7), R1: ready(8)}, None, R1),
        ({R0: ready(7), R1: ready(8)}, R0, R0),  # it was restarted
        ({R0: ready(7), R1: ready(8), R2: ready(8)}, GONE, R1),
        ({R0: ready(7), R1: Candidate("failed", 9)}, None, R0),
        # it led last, and is silent
        ({R0: silent(0.0), R1: ready()}, R0, None),
        ({R0: silent(4.9), R1: ready()}, R0, None),
        ({R0: silent(5.0), R1: ready()}, R0, R1),
        ({R0: silent(99.0)}, R0, None),
        ({R0: Candidate("failed"), R1: ready()}, R0, R1),  # it answers that it lost all
        ({R0: Candidate("starting"), R1: ready()}, R0, R1),  # its process was gone, and is started anew
        ({R1: ready(), R2: ready()}, R0, R1),  # its process is gone
        # another one is silent
        ({R0: silent(1.0), R1: ready()}, R1, R1),
        ({R0: silent(1.0), R1: ready()}, GONE, R1),
        ({R0: silent(1.0), R1: ready()}, None, None),  # it may lead, for all that is known
        ({R0: silent(1.0, "starting"), R1: ready()}, None, None),
        ({R0: silent(5.0), R1: ready()}, None, R1),
        # one is being told
        ({R0: ready(asked=True), R1: ready(9)}, None, None),
        ({R0: ready(asked=True), R1: ready()}, R1, None),
        ({R0: silent(1.0, asked=True), R1: ready()}, R1, None),
        ({R0: silent(5.0, asked=True), R1: ready()}, R0, R1),
        # that failed lately
        ({R0: ready(refused=True)}, R0, None),
        ({R0: ready(refused=True), R1: ready()}, R0, R1),
        # its log has ended, or others follow that of a later set
        ({R0: ready(log_set=None)}, R0, None),
        ({R0: ready(epoch=5), R1: ready(log_set=1)}, R0, R1),
        ({R0: ready(9), R1: ready(3, log_set=1), R2: ready(4, log_set=1)}, R0, R2),
        ({R0: ready(log_set=1), R1: ready(log_set=1, epoch=2)}, R0, None),
        ({R0: ready(log_set=1, refused=True), R1: ready()}, R1, None),
    ],
)
def test_choice_of_who_leads(
    replicas: dict[ReplicaKey, Candidate], led_last: ReplicaKey | None, chosen: ReplicaKey | None
) -> None:
    assert choose_lead(replicas, led_last, PATIENCE_S) == chosen


@pytest.mark.parametrize(
    ("replicas", "primary"),
    [
        ({}, None),
        ({R0: ready()}, None),
        ({R0: ready(epoch=2), R1: ready(epoch=11), R2: ready(epoch=9)}, R1),
        ({R0: ready(epoch=2), R1: Candidate("unreachable", epoch=11)}, R0),
        ({R0: ready(epoch=11), R1: ready(epoch=2, log_set=1)}, R1),
        ({R0: ready(epoch=11), R1: ready(log_set=1)}, None),
        ({R0: ready(epoch=11, log_set=None)}, None),
    ],
)
def test_leader_is_the_ready_replica_of_the_highest_epoch(
    replicas: dict[ReplicaKey, Candidate], primary: ReplicaKey | None
) -> None:
    assert leader(replicas) == primary


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from([R0, R1, R2]),
        st.builds(
            Candidate,
            st.sampled_from(["starting", "ready", "failed", "unreachable"]),
            st.integers(0, 3),
            st.integers(0, 2),
            st.none() | st.floats(0.0, 10.0),
            st.booleans(),
            st.booleans(),
            st.none() | st.integers(0, 1),
        ),
    ),
    st.sampled_from([None, R0, R1, R2]),
)
def test_chosen_replica_is_ready_and_no_other_leads_or_was_asked_a_moment_ago(
    replicas: dict[ReplicaKey, Candidate], led_last: ReplicaKey | None
) -> None:
    chosen = choose_lead(replicas, led_last, PATIENCE_S)
    if chosen is not None:
        assert replicas[chosen].state == "ready"
        assert not replicas[chosen].refused
        sets = [one.log_set for one in replicas.values() if one.state == "ready" and one.log_set is not None]
        assert replicas[chosen].log_set == max(sets)
        assert leader(replicas) is None
        assert not any(one.asked and (one.silent_s or 0.0) < PATIENCE_S for one in replicas.values())


def test_replicas_of_a_collection_are_all_pairs() -> None:
    config = CollectionConfig(dimension=2, shards=9, replicas=2)  # the manifest's shards count, not the config's
    assert replicas_of("a", config, 2) == [A0, A0_SECOND, A1, ReplicaKey("a", 1, 1)]


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
