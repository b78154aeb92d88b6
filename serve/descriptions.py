"""A collection as `GET /v1/collections/{c}` and the metrics tell it: plain data from manifest and statuses."""

from __future__ import annotations

from typing import Any

from actors.shard import ReplicaStatus
from cluster.advice import Advice
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import Candidate, ReplicaKey, leader


def describe_collection(facts: dict[str, Any], unready: str | None) -> dict[str, Any]:
    """`facts` as `Directory.describe` gives them. Points are live ones."""
    manifest: Manifest = facts["manifest"]
    statuses: dict[ReplicaKey, ReplicaStatus] = facts["statuses"]
    idle = facts["idle_upkeep"]
    shards = []
    for entry in manifest.shards:
        replicas = {key: each for key, each in statuses.items() if key.shard == entry.shard}
        shards.append(_shard(entry, manifest, replicas, idle.get(entry.shard, "")))
    advice: tuple[Advice, ...] = facts["advice"]
    return {
        "name": manifest.collection,
        "config": manifest.config.to_dict(),
        "points": sum(shard["points"] for shard in shards),
        "version": manifest.version,
        "generation": manifest.generation,
        "device": manifest.device,
        "num_gpus": manifest.num_gpus,
        "serving_generation": facts["serving_generation"],
        "ready": not unready,
        "reason": unready or "",
        "switching": _switching(manifest, facts["serving_generation"], statuses),
        "rebuild_advised": "; ".join(each.reason for each in advice) or None,
        "rebuild_reasons": [each.kind for each in advice],
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
        "device": None,
        "num_gpus": None,
        "serving_generation": None,
        "ready": False,
        "reason": reason,
        "switching": "",
        "rebuild_advised": None,
        "rebuild_reasons": [],
        "shards": [],
    }


def _switching(manifest: Manifest, serving: int | None, statuses: dict[ReplicaKey, ReplicaStatus]) -> str:
    """What the newest generation waits for until it is served in the place of another; nothing where it is served."""
    if serving is None or serving == manifest.generation:
        return ""
    shards: dict[int, str] = {}
    for key, status in sorted(statuses.items()):
        own = key.shard < len(manifest.shards) and key.num_gpus == manifest.num_gpus
        if own and manifest.generation not in status.generations:
            shards[key.shard] = f"shard {key.shard} {_on_its_way(status, manifest.generation)}"
    return f"switching to generation {manifest.generation}" + (f": {', '.join(shards.values())}" if shards else "")


def _on_its_way(status: ReplicaStatus, generation: int) -> str:
    lacks = status.crossing.get(generation)
    if status.state == "ready" and lacks is not None:
        return f"{lacks:,} records behind"
    how = {"starting": "starts", "ready": "loads it", "failed": "does not load it", "unreachable": "does not answer"}
    return how[status.state] + (f": {status.error}" if status.error else "")


def _shard(
    entry: ShardEntry, manifest: Manifest, statuses: dict[ReplicaKey, ReplicaStatus], idle_upkeep: str
) -> dict[str, Any]:
    """What the replica says that is ahead of the others in the log; the manifest's while none holds its generation.

    One with the generation's own share of a GPU comes first: another may hold it only to seal and merge.
    """
    ready = {key: status for key, status in sorted(statuses.items()) if status.state == "ready"}
    segments = next((list(status.segments) for status in ready.values()), [])
    holding = [
        (key.num_gpus == manifest.num_gpus, status)
        for key, status in ready.items()
        if status.generations and status.generations[-1] == manifest.generation
    ]
    first = max(holding, key=lambda held: (held[0], held[1].lsn), default=(False, None))[1]
    primary = leader({key: Candidate(status.state, status.lsn, status.epoch) for key, status in statuses.items()})
    return {
        "shard": entry.shard,
        "points": first.points if first else entry.points,
        "lsn": max((status.lsn for status in ready.values()), default=entry.applied_lsn),
        "primary": primary.replica if primary else None,
        "tail_points": first.tail_points if first else 0,
        "tombstones": first.tombstones if first else sum(ref.count for ref in entry.tombstones),
        "upkeep": (statuses[primary].upkeep if primary else "") or idle_upkeep,
        "replicas": [_replica(key, status) for key, status in sorted(statuses.items())],
        "segments": list(first.segments) if first else segments,
        "observed": [
            {"replica": key.replica, "device": key.device, "num_gpus": key.num_gpus} | facts
            for key, status in sorted(statuses.items())
            for facts in status.observed
        ],
    }


def _replica(key: ReplicaKey, status: ReplicaStatus) -> dict[str, Any]:
    return {
        "replica": key.replica,
        "device": key.device,
        "num_gpus": key.num_gpus,
        "state": status.state,
        "node": status.node,
        "pid": status.pid,
        "threads": status.threads,
        "generations": list(status.generations),
        "lsn": status.lsn,
        "epoch": status.epoch,
        "upkeep": status.upkeep,
        "error": status.error,
        "gpu": None if status.gpu is None else status.gpu | _on_gpu(status),
        "degraded": status.degraded,
    }


def _on_gpu(status: ReplicaStatus) -> dict[str, Any]:
    """Sums over the newest generation's indexes that are on the GPU; measured bytes are None where one's are not known.

    `out_of_memory` counts searches that their twins answered for lack of memory, since each of them was loaded.
    """
    twins = [segment for segment in status.segments if "gpu_predicted_bytes" in segment]
    there = [twin for twin in twins if twin["gpu_predicted_bytes"] is not None]
    measured = [twin["gpu_measured_bytes"] for twin in there]
    return {
        "index_predicted_bytes": sum(twin["gpu_predicted_bytes"] for twin in there),
        "index_measured_bytes": None if None in measured else sum(measured),
        "out_of_memory": sum(twin["out_of_memory"] for twin in twins),
    }
