"""Who has to be ready for a collection to be: those that are to answer for what is served."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.replica_status import ReplicaStatus
from actors.serving_table import served_collection, why_not_switched, why_unready
from actors.wanted_replicas import own_replicas, serving_replicas
from cluster.config import CollectionConfig
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import ReplicaKey
from cluster.routing import Routing

FIRST, SECOND = ReplicaKey("words", 0, 0), ReplicaKey("words", 0, 1)
OTHER_SHARD, ON_GPU = ReplicaKey("words", 1, 0), ReplicaKey("words", 0, 0, 0.5)
STARTING = ReplicaStatus("starting", error="it asks for 1 GPU")


def version(number: int, shards: int = 1, replicas: int = 2, num_gpus: float = 0.0) -> Manifest:
    entries = tuple(ShardEntry(shard) for shard in range(shards))
    config = CollectionConfig(4, shards=shards, replicas=replicas)
    return Manifest("words", number, config, Routing(shards), number, entries, "", "", num_gpus=num_gpus)


def holds(*generations: int, error: str = "") -> ReplicaStatus:
    return ReplicaStatus("ready", generations, generations, error=error)


@pytest.mark.parametrize(
    ("statuses", "why"),
    [
        ({FIRST: holds(1), SECOND: holds(1)}, ""),
        ({FIRST: holds(1), SECOND: holds(1, 2)}, ""),
        (
            {FIRST: holds(1), SECOND: ReplicaStatus("unreachable", error="dead")},
            "replica words/0/1 is unreachable (dead)",
        ),
        ({FIRST: holds(1), SECOND: ReplicaStatus("starting")}, "replica words/0/1 is starting"),
        ({FIRST: holds(1), SECOND: holds(2)}, "replica words/0/1 does not hold generation 1"),
        ({FIRST: holds(2), SECOND: holds(2)}, "no ready replica of shard 0 holds generation 1"),
        (
            {FIRST: holds(2), SECOND: ReplicaStatus("failed", error="Corrupt")},
            "replica words/0/1 is failed (Corrupt); no ready replica of shard 0 holds generation 1",
        ),
    ],
)
def test_collection_is_ready_while_each_replica_of_what_is_served_holds_it(
    statuses: dict[ReplicaKey, ReplicaStatus], why: str
) -> None:
    assert why_unready(served_collection(version(1), statuses, None), statuses) == why


@pytest.mark.parametrize(
    ("newest", "served", "answering"),
    [
        (version(2, num_gpus=0.5), None, own_replicas(version(2, num_gpus=0.5))),  # nothing is served yet
        (version(2), version(1), [FIRST, SECOND]),
        (version(2, num_gpus=0.5), version(1), [FIRST, SECOND]),
        (version(2, shards=2, replicas=1), version(1, replicas=1), [FIRST]),
        (version(2, replicas=1), version(1, shards=2, replicas=1), [FIRST, OTHER_SHARD]),
        (version(2, replicas=1), version(1), [FIRST]),
    ],
)
def test_replicas_that_are_to_answer_are_those_of_what_is_served(
    newest: Manifest, served: Manifest | None, answering: list[ReplicaKey]
) -> None:
    assert serving_replicas(newest, served) == answering


def test_nothing_served_yet_is_unready_whatever_is_loading() -> None:
    assert why_unready(None, {ON_GPU: STARTING}) == "replica words/0/0/gpu:0.5 is starting (it asks for 1 GPU)"
    assert why_unready(None, {ON_GPU: holds()}) == "its replicas are loading"


def test_what_the_newest_generation_waits_for_is_told_while_an_earlier_one_is_served() -> None:
    newest, served = version(2, num_gpus=0.5), version(1)
    assert why_not_switched(newest, None, {ON_GPU: STARTING}) == ""
    assert why_not_switched(newest, newest, {ON_GPU: STARTING}) == ""
    waits = why_not_switched(newest, served, {ON_GPU: STARTING})
    assert waits == "replica words/0/0/gpu:0.5 is starting (it asks for 1 GPU)"
    assert why_not_switched(newest, served, {ON_GPU: holds()}) == "", "it loads"
    here = replace(newest, num_gpus=0.0)
    assert why_not_switched(here, served, {FIRST: holds(1, error="Corrupt: x"), SECOND: holds(1)}) == (
        "replica words/0/0 does not hold generation 2 (Corrupt: x)"
    )
    assert why_not_switched(here, served, {FIRST: holds(1, 2, error="behind"), SECOND: holds(2)}) == ""
