"""Entries of the serving table as functions of a manifest and of what its replicas said: who serves it, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from actors.replica_status import ReplicaStatus, Statuses
from actors.shard_client import ServedCollection, ServingTable, ShardEndpoint
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import Candidate, ReplicaKey, leader


def served_collection(manifest: Manifest, statuses: Statuses, before: ServedCollection | None) -> ServedCollection:
    """A version as its ready replicas serve it. `statuses` are its collection's, `before` is its entry until now.

    Replicas with another share of a GPU than the version's may hold it too, for they seal and merge until it is served:
    they are not asked.
    """
    holding: dict[int, dict[ReplicaKey, ReplicaStatus]] = {entry.shard: {} for entry in manifest.shards}
    for key in sorted(statuses):
        status = statuses[key]
        able = status.state == "ready" and manifest.generation in status.generations
        if able and key.shard in holding and key.num_gpus == manifest.num_gpus:
            holding[key.shard][key] = status
    return ServedCollection(
        manifest.config,
        manifest.routing,
        manifest.version,
        manifest.generation,
        {entry.shard: _points(entry, manifest.generation, holding[entry.shard]) for entry in manifest.shards},
        _attributes(manifest, statuses, before),
        {shard: tuple(replicas) for shard, replicas in holding.items()},
        _primaries(manifest, statuses),
        _log_start(manifest, statuses, before),
    )


def _points(entry: ShardEntry, generation: int, replicas: Statuses) -> int:
    """Live points of a shard, as its most advanced replica has them; a status tells those of its newest generation."""
    telling = [status for status in replicas.values() if status.generations[-1] == generation]
    return max(telling, key=lambda status: status.lsn).points if telling else entry.points


def _attributes(manifest: Manifest, statuses: Statuses, before: ServedCollection | None) -> dict[str, str]:
    """Name -> type of what the manifest declares, and what replicas have, which counts more.

    Once known for this generation they stay known: a replica that is away must not make a valid search Invalid.
    """
    known = dict(manifest.attributes)
    if before is not None and before.generation == manifest.generation:
        known |= before.attributes
    for key in sorted(statuses):
        known |= statuses[key].attributes.get(manifest.generation, {})
    return dict(sorted(known.items()))


def _primaries(manifest: Manifest, statuses: Statuses) -> dict[int, ReplicaKey]:
    """The primary of each shard that has one. It need not hold what is served: it appends to the WAL of all.

    Not one that leads the log of a later set already: it takes what is split by another routing.
    """
    primaries = {}
    for entry in manifest.shards:
        candidates = {
            key: Candidate(status.state, status.lsn, status.epoch, log_set=status.log_set)
            for key, status in statuses.items()
            if key.shard == entry.shard and status.log_set == manifest.log_set and not status.log_ended
        }
        if (primary := leader(candidates)) is not None:
            primaries[entry.shard] = primary
    return primaries


def _log_start(manifest: Manifest, statuses: Statuses, before: ServedCollection | None) -> int:
    """Where the logs of the manifest's set begin; as known before where no replica tells."""
    known = before.log_start if before is not None and before.generation == manifest.generation else 0
    told = (status.log_start for status in statuses.values() if status.log_set == manifest.log_set)
    return max(known, *told, 0)


def known_endpoints(statuses: Statuses, before: Mapping[ReplicaKey, ShardEndpoint]) -> dict[ReplicaKey, ShardEndpoint]:
    """Where replicas take direct connections. `before` has what was known until now.

    While a replica does not answer, that stays: it may only be slow, and calls to it that are under way go on.
    """
    told = {key: s.endpoint if s.pid else before.get(key) for key, s in sorted(statuses.items())}
    return {key: endpoint for key, endpoint in told.items() if endpoint is not None}


def without_points(table: ServingTable) -> ServingTable:
    """What two tables have to be compared by: points change with every write."""
    collections = {name: replace(served, shard_points={}) for name, served in table.collections.items()}
    return replace(table, stamp="", collections=collections)


def why_unready(served: ServedCollection | None, statuses: Statuses) -> str:
    """Which of the replicas that are to answer do not, or lack what is served; "" where there are none.

    `statuses` are those of `wanted_replicas.serving_replicas`.
    """
    reasons = [_not_ready(key, status) for key, status in sorted(statuses.items()) if status.state != "ready"]
    if served is not None:
        lacking = [key for key in sorted(statuses) if statuses[key].state == "ready" and not _holds(served, key)]
        empty = sorted({key.shard for key in lacking if not served.replicas.get(key.shard)})
        reasons += [f"no ready replica of shard {shard} holds generation {served.generation}" for shard in empty]
        reasons += [
            f"replica {key} does not hold generation {served.generation}" for key in lacking if key.shard not in empty
        ]
    elif not reasons:
        reasons.append("its replicas are loading")
    return "; ".join(reasons)


def why_not_switched(newest: Manifest, served: Manifest | None, statuses: Statuses) -> str:
    """Which of the replicas of the newest generation do not come to hold it, where an earlier one is served.

    That makes nothing unready; `statuses` are those of its own replicas. "" also where they are just loading.
    """
    if served is None or served.generation == newest.generation:
        return ""
    reasons = []
    for key, status in sorted(statuses.items()):
        if status.state != "ready":
            reasons.append(_not_ready(key, status))
        elif newest.generation not in status.generations and status.error:
            reasons.append(f"replica {key} does not hold generation {newest.generation} ({status.error})")
    return "; ".join(reasons)


def _not_ready(key: ReplicaKey, status: ReplicaStatus) -> str:
    return f"replica {key} is {status.state}" + (f" ({status.error})" if status.error else "")


def _holds(served: ServedCollection, key: ReplicaKey) -> bool:
    return key in served.replicas.get(key.shard, ())
