"""A collection as `GET /v1/collections/{c}` and the metrics tell it: plain data from manifest and statuses."""

from __future__ import annotations

from typing import Any

from actors.shard import ReplicaStatus
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import Candidate, ReplicaKey, leader


def describe_collection(facts: dict[str, Any], unready: str | None) -> dict[str, Any]:
    """`facts` as `Directory.describe` gives them. Points are live ones."""
    manifest: Manifest = facts["manifest"]
    statuses: dict[ReplicaKey, ReplicaStatus] = facts["statuses"]
    shards = [
        _shard(entry, manifest.generation, {key: each for key, each in statuses.items() if key.shard == entry.shard})
        for entry in manifest.shards
    ]
    return {
        "name": manifest.collection,
        "config": manifest.config.to_dict(),
        "points": sum(shard["points"] for shard in shards),
        "version": manifest.version,
        "generation": manifest.generation,
        "serving_generation": facts["serving_generation"],
        "ready": not unready,
        "reason": unready or "",
        "shards": shards,
    }


def describe_unreadable(name: str, reason: str) -> dict[str, Any]:
    """A collection of which no manifest could be read: that it is there, and why nothing more is known."""
    return {
        "name": name,
        "config": {},
        "points": 0,
        "version": 0,
        "generation": 0,
        "serving_generation": None,
        "ready": False,
        "reason": reason,
        "shards": [],
    }


def _shard(entry: ShardEntry, generation: int, statuses: dict[ReplicaKey, ReplicaStatus]) -> dict[str, Any]:
    """What the replica says that is ahead of the others in the log; the manifest's while none holds its generation."""
    ready = {key: status for key, status in sorted(statuses.items()) if status.state == "ready"}
    segments = next((list(status.segments) for status in ready.values()), [])
    holding = [status for status in ready.values() if status.generations and status.generations[-1] == generation]
    first = max(holding, key=lambda status: status.lsn, default=None)
    primary = leader({key: Candidate(status.state, status.lsn, status.epoch) for key, status in statuses.items()})
    return {
        "shard": entry.shard,
        "points": first.points if first else entry.points,
        "lsn": max((status.lsn for status in ready.values()), default=entry.applied_lsn),
        "primary": primary.replica if primary else None,
        "tail_points": first.tail_points if first else 0,
        "tombstones": first.tombstones if first else sum(ref.count for ref in entry.tombstones),
        "upkeep": statuses[primary].upkeep if primary else "",
        "replicas": [_replica(key, status) for key, status in sorted(statuses.items())],
        "segments": list(first.segments) if first else segments,
        "observed": [
            {"replica": key.replica} | facts for key, status in sorted(statuses.items()) for facts in status.observed
        ],
    }


def _replica(key: ReplicaKey, status: ReplicaStatus) -> dict[str, Any]:
    return {
        "replica": key.replica,
        "state": status.state,
        "node": status.node,
        "pid": status.pid,
        "threads": status.threads,
        "generations": list(status.generations),
        "lsn": status.lsn,
        "epoch": status.epoch,
        "upkeep": status.upkeep,
        "error": status.error,
    }
