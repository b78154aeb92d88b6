"""Entries of the serving table as functions of a manifest and of what its replicas said: who serves it, and why not."""

from __future__ import annotations

from collections.abc import Mapping

from actors.shard import ReplicaStatus
from actors.shard_client import ServedCollection
from cluster.manifest import Manifest
from cluster.placement import ReplicaKey

Statuses = Mapping[ReplicaKey, ReplicaStatus]


def served_collection(manifest: Manifest, statuses: Statuses, before: ServedCollection | None) -> ServedCollection:
    """A version as its ready replicas serve it. `statuses` are its collection's, `before` is its entry until now.

    Attributes once known for this version stay known: a replica that is away must not make a valid search Invalid.
    """
    known = before.attributes if before is not None and before.version == manifest.version else ()
    told = {name for status in statuses.values() for name in status.attributes.get(manifest.generation, ())}
    replicas: dict[int, tuple[ReplicaKey, ...]] = {entry.shard: () for entry in manifest.shards}
    for key in sorted(statuses):
        status = statuses[key]
        if key.shard in replicas and status.state == "ready" and manifest.generation in status.generations:
            replicas[key.shard] += (key,)
    return ServedCollection(
        manifest.config,
        manifest.routing,
        manifest.version,
        manifest.generation,
        {entry.shard: entry.points for entry in manifest.shards},
        tuple(sorted({*known, *told})),
        replicas,
    )


def why_unready(served: ServedCollection | None, statuses: Statuses) -> str:
    """Replicas that are not ready, and shards whose ready replicas lack what is served; "" where there are none."""
    reasons = []
    for key in sorted(statuses):
        status = statuses[key]
        if status.state != "ready":
            reasons.append(f"replica {key} is {status.state}" + (f" ({status.error})" if status.error else ""))
    if served is not None:
        ready = {key.shard for key, status in statuses.items() if status.state == "ready"}
        lacking = [shard for shard in sorted(ready) if served.replicas.get(shard) == ()]
        reasons += [f"no ready replica of shard {shard} holds generation {served.generation}" for shard in lacking]
    elif not reasons:
        reasons.append("its replicas are loading")
    return "; ".join(reasons)
