"""A collection as `GET /v1/collections/{c}` and the metrics tell it: plain data from manifest and statuses."""

from __future__ import annotations

from typing import Any

from actors.shard import ReplicaStatus
from cluster.manifest import Manifest
from cluster.placement import ReplicaKey


def describe_collection(facts: dict[str, Any], unready: str | None) -> dict[str, Any]:
    """`facts` as `Directory.describe` gives them."""
    manifest: Manifest = facts["manifest"]
    statuses: dict[ReplicaKey, ReplicaStatus] = facts["statuses"]
    return {
        "name": manifest.collection,
        "config": manifest.config.to_dict(),
        "points": manifest.points,
        "version": manifest.version,
        "generation": manifest.generation,
        "serving_generation": facts["serving_generation"],
        "ready": not unready,
        "reason": unready or "",
        "shards": [
            _shard(entry.shard, entry.points, {k: s for k, s in statuses.items() if k.shard == entry.shard})
            for entry in manifest.shards
        ],
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


def _shard(shard: int, points: int, statuses: dict[ReplicaKey, ReplicaStatus]) -> dict[str, Any]:
    segments = next((list(status.segments) for status in statuses.values() if status.state == "ready"), [])
    return {
        "shard": shard,
        "points": points,
        "replicas": [_replica(key, status) for key, status in sorted(statuses.items())],
        "segments": segments,
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
        "error": status.error,
    }
