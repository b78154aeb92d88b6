"""What the supervisor tells of a collection's upkeep: reasons for a rebuild, and shards whose upkeep does not begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.replica_status import ReplicaStatus, Statuses
from cluster import upkeep as policy
from cluster.advice import (
    AdviceFacts,
    FullShare,
    IndexFacts,
    ObservedRecall,
    ShardFacts,
    largest_segment,
    rebuild_advice,
)
from cluster.config import Upkeep
from cluster.manifest import Manifest, ShardEntry
from cluster.manifest_format import added_on
from cluster.placement import Candidate, leader


def upkeep_facts(manifest: Manifest, statuses: Statuses, bounds: Upkeep) -> dict[str, Any]:
    """`advice`: reasons for a rebuild of this generation. `idle_upkeep`: shard -> why nothing is sealed or merged,
    though that is due. `statuses` are the collection's."""
    shards: list[ShardFacts] = []
    idle: dict[int, str] = {}
    for entry in manifest.shards:
        replicas = {key: status for key, status in statuses.items() if key.shard == entry.shard}
        first = _first(replicas, manifest.generation)
        if first is None:
            continue
        most = largest_segment(manifest.built_for, added_on(manifest.device))
        work = _due(entry, first, most, bounds)
        shard = _shard_facts(entry, first, replicas, manifest.generation, most, work is not None)
        shards.append(replace(shard, full_share=_full_share(manifest, replicas)))
        if work is not None and (why := _why_idle(replicas)):
            idle[entry.shard] = f"{why}: {work.reason}"
    return {"advice": rebuild_advice(AdviceFacts(manifest.built_for, tuple(shards)), bounds), "idle_upkeep": idle}


def _first(replicas: Statuses, generation: int) -> ReplicaStatus | None:
    """The ready replica that is ahead of the others; a status tells of its newest generation."""
    telling = [s for s in replicas.values() if s.state == "ready" and s.generations and s.generations[-1] == generation]
    return max(telling, key=lambda status: status.lsn, default=None)


def _due(
    entry: ShardEntry, status: ReplicaStatus, points_max: int, bounds: Upkeep
) -> policy.Seal | policy.Merge | None:
    """What the policy asks for, as far as a status tells: of the tail only its points."""
    deleted = {each["segment_id"]: each["tombstones"] for each in status.segments}
    segments = policy.segment_facts(entry, deleted)
    facts = policy.ShardFacts(segments, status.tail_points, points_max=points_max)
    return policy.wanted_upkeep(facts, bounds)


def _why_idle(replicas: Statuses) -> str:
    """Why nothing is done of what is due; "" where the primary is at it, or says itself why not."""
    primary = leader({key: Candidate(each.state, each.lsn, each.epoch) for key, each in replicas.items()})
    if primary is None:
        return "not begun, no replica leads the shard"
    return "" if replicas[primary].upkeep else "not begun yet"


def _shard_facts(
    entry: ShardEntry, first: ReplicaStatus, replicas: Statuses, generation: int, points_max: int, due: bool
) -> ShardFacts:
    segments = tuple(
        IndexFacts(
            each["count"],
            each["count"] - each["tombstones"],
            _planned(each),
            each["index_kind"],
            each.get("device", "cpu"),
        )
        for each in first.segments
    )
    observed = _observed(replicas, generation)
    return ShardFacts(entry.shard, segments, first.tail_points, due, observed, points_max)


def _full_share(manifest: Manifest, replicas: Statuses) -> FullShare | None:
    """Where a replica whose GPU works has an index that is not there; None where none has, or tells its memory."""
    memory = [
        int(status.gpu["total_bytes"])
        for key, status in replicas.items()
        if key.num_gpus == manifest.num_gpus
        and status.gpu is not None
        and not status.gpu["lost"]
        and status.gpu["total_bytes"]
        and status.generations[-1:] == (manifest.generation,)
        and any(segment.get("degraded") for segment in status.segments)
    ]
    return FullShare(manifest.num_gpus, min(memory), manifest.config) if memory else None


def _planned(segment: Mapping[str, Any]) -> str:
    """The kind that the policy chose, from which the builder may have departed."""
    kinds = [str(each["kind"]) for each in segment["considered"] if not each["rejected"]]
    return kinds[0] if kinds else str(segment["index_kind"])


def _observed(replicas: Statuses, generation: int) -> ObservedRecall | None:
    """What the replica saw that evaluated most queries."""
    told = [each for status in replicas.values() for each in status.observed if each["generation"] == generation]
    if not told:
        return None
    most = max(told, key=lambda each: int(each["queries"]))
    return ObservedRecall(most["recall"], most["low"], most["high"], most["queries"])
