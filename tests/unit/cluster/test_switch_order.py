from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cluster.placement import Load, ObservedReplica, ReplicaKey, Start, WantedReplica, may_end_logs, plan, publishable
from cluster.switch_order import Drop, Lead, in_switch_order

Observed = dict[ReplicaKey, ObservedReplica]
A, B, C = (ReplicaKey("a", 0, number) for number in range(3))
PENDING = WantedReplica(20, 2, 1, 0.0, served=10, served_generation=1)
ROOM = replace(PENDING, switch="one_at_a_time")
SERVED = replace(ROOM, served=20, served_generation=2)  # the new one


def holds(*generations: int, state: Any = "ready", epoch: int = 0, crossing: Mapping[int, int] | None = None) -> Any:
    """A replica with the first version of some generations."""
    newest = max((*generations, *(crossing or ())), default=0)
    return ObservedReplica(state if newest else "failed", 10 * newest, generations, crossing or {}, epoch)


def actions(wanted: WantedReplica, observed: Observed) -> list[Any]:
    all_wanted = dict.fromkeys(observed, wanted)
    return in_switch_order(plan(all_wanted, observed), all_wanted, observed)


# --- with room


def test_replicas_with_room_load_a_generation_one_after_the_other_and_who_leads_last() -> None:
    observed = {A: holds(1, epoch=3), B: holds(1), C: holds(1)}
    assert actions(PENDING, observed) == [Load(B, 20)]
    assert actions(PENDING, observed | {B: holds(1, 2)}) == [Load(C, 20)]
    assert actions(PENDING, observed | {B: holds(1, 2), C: holds(1, 2)}) == [Load(A, 20)]
    assert actions(PENDING, dict.fromkeys(observed, holds(1, 2))) == []


def test_replica_that_crosses_to_a_generation_has_had_its_turn() -> None:
    assert actions(PENDING, {A: holds(1, crossing={2: 900}), B: holds(1)}) == [Load(B, 20)]


def test_one_that_cannot_be_told_anything_holds_up_no_other() -> None:
    observed = {A: holds(1, state="unreachable"), B: holds(1), C: holds(1)}
    assert actions(PENDING, observed) == [Load(B, 20)]


def test_replica_that_holds_nothing_or_lacks_what_is_served_does_not_wait() -> None:
    assert actions(PENDING, {A: holds(1), B: holds(), C: holds(1)}) == [Load(A, 20), Load(B, 10), Load(B, 20)]
    assert actions(PENDING, {A: holds(1), B: holds(2)}) == [Load(A, 20), Load(B, 10)]


def test_later_version_of_a_generation_is_loaded_by_all_at_once() -> None:
    sealed = replace(PENDING, version=21, served=21, served_generation=2)
    assert actions(sealed, {A: holds(2), B: holds(2)}) == [Load(A, 21), Load(B, 21)]


@pytest.mark.parametrize("wanted", [PENDING, ROOM])
def test_only_replica_of_a_shard_loads_beside_what_it_serves(wanted: WantedReplica) -> None:
    assert actions(wanted, {A: holds(1, epoch=3)}) == [Load(A, 20)]


def test_shards_do_not_wait_for_each_other_and_other_actions_stay() -> None:
    other = ReplicaKey("a", 1, 0)
    keys = [A, B, other, replace(other, replica=1)]
    wanted = dict.fromkeys(keys, PENDING)
    observed = {A: holds(1), B: holds(1), other: holds(1)}
    ordered = in_switch_order(plan(wanted, observed), wanted, observed)
    assert ordered == [Start(keys[3], PENDING), Load(A, 20), Load(other, 20)]


# --- without


def test_one_replica_makes_room_and_it_is_not_the_one_that_leads() -> None:
    observed = {A: holds(1, epoch=3), B: holds(1), C: holds(1)}
    assert actions(ROOM, observed) == [Drop(B, 2)]
    assert actions(ROOM, observed | {B: holds()}) == [Load(B, 20)]
    assert actions(ROOM, observed | {B: holds(2)}) == []  # until that is served
    assert actions(ROOM, observed | {B: holds(crossing={2: 9})}) == []


@pytest.mark.parametrize(
    "observed",
    [
        {A: holds(1, epoch=3), B: holds(1, state="unreachable")},
        {A: holds(1, epoch=3), B: ObservedReplica("starting")},
        {A: holds(1, state="unreachable"), B: holds(1)},
        {A: holds(1, epoch=3), B: holds(1, state="failed")},
    ],
    ids=str,
)
def test_nobody_drops_what_no_other_answers_for(observed: Observed) -> None:
    assert [each for each in actions(ROOM, observed) if isinstance(each, Drop)] == []


def test_what_is_served_is_loaded_again_only_where_nobody_else_answers() -> None:
    assert actions(ROOM, {A: holds(1, epoch=3), B: holds()}) == [Load(B, 20)]
    assert actions(ROOM, {A: holds(1, state="unreachable"), B: holds()}) == [Load(B, 10)]
    assert actions(ROOM, {A: holds(2), B: holds(2)}) == []


def test_who_leads_hands_over_once_the_new_generation_is_served() -> None:
    observed = {A: holds(1, epoch=3), B: holds(2)}
    assert actions(SERVED, observed) == [Lead(B)]
    assert actions(SERVED, observed | {B: holds(2, epoch=4)}) == []  # A has not heard of it yet
    assert actions(SERVED, {A: holds(), B: holds(2, epoch=4)}) == [Load(A, 20)]
    assert actions(SERVED, {A: holds(1, epoch=3), B: holds(2, state="unreachable")}) == []


def test_later_versions_are_loaded_as_ever() -> None:
    sealed = replace(SERVED, version=21, served=21)
    assert actions(sealed, {A: holds(2), B: holds(2)}) == [Load(A, 21), Load(B, 21)]


def test_table_switches_once_one_replica_of_each_shard_holds_the_generation() -> None:
    other, mate = ReplicaKey("a", 1, 0), ReplicaKey("a", 1, 1)
    observed = {A: holds(1, epoch=3), B: holds(2), other: holds(2), mate: holds(1)}
    room, beside = dict.fromkeys(observed, ROOM), dict.fromkeys(observed, PENDING)
    assert publishable(room, observed, 2)
    assert not publishable(beside, observed, 2)
    assert not publishable(room, observed | {other: holds()}, 2)


def test_logs_end_once_one_replica_of_each_shard_is_near_the_generation() -> None:
    other, mate = ReplicaKey("a", 1, 0), ReplicaKey("a", 1, 1)
    near, far = holds(crossing={2: 5}), holds(crossing={2: 5_000})
    observed = {A: holds(1, epoch=3), B: near, other: near, mate: holds(1)}
    room, beside = dict.fromkeys(observed, ROOM), dict.fromkeys(observed, PENDING)
    assert may_end_logs(room, observed, 2)
    assert not may_end_logs(beside, observed, 2)
    assert not may_end_logs(room, observed | {other: far}, 2)
    assert not may_end_logs(room, {A: holds(2), B: holds(1), other: holds(2), mate: holds(1)}, 2)


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("crosses", [False, True])
def test_all_go_over_and_some_replica_answers_at_every_step(replicas: int, crosses: bool) -> None:
    keys = [A, B, C][:replicas]
    observed: Observed = {key: holds(1, epoch=3 if key == A else 0) for key in keys}
    wanted = dict.fromkeys(keys, ROOM)
    for _ in range(20):
        for each in in_switch_order(plan(wanted, observed), wanted, observed):
            held = observed[each.key]
            if isinstance(each, Drop):
                observed[each.key] = holds(epoch=held.epoch)
            elif isinstance(each, Lead):
                observed[each.key] = replace(held, epoch=4)
            elif isinstance(each, Load):
                assert held.generations == ()  # nothing is beside it
                observed[each.key] = holds(crossing={2: 0}) if crosses and wanted[each.key] is ROOM else holds(2)
        served = 1 if wanted[A] is ROOM else 2
        if crosses and may_end_logs(wanted, observed, 2):
            observed = {key: holds(2) if each.crossing else each for key, each in observed.items()}
        answering = [key for key, each in observed.items() if served in each.generations]
        assert answering, observed
        leading = [key for key, each in observed.items() if each.epoch]
        assert crosses or any(observed[key].generations for key in leading), "nobody can apply a write"
        if wanted[A] is ROOM and publishable(wanted, observed, 2):
            wanted = dict.fromkeys(keys, SERVED)
        elif wanted[A] is SERVED:  # what the supervisor retires
            leader = max(keys, key=lambda key: observed[key].epoch)
            for key in keys:
                if observed[key].generations == (1,) and (crosses or key != leader):
                    observed[key] = holds(epoch=observed[key].epoch)
    assert [each.generations for each in observed.values()] == [(2,)] * replicas
    assert in_switch_order(plan(wanted, observed), wanted, observed) == []
