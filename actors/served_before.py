"""What an earlier supervisor served of a collection, found again from its replicas and object storage."""

from __future__ import annotations

from actors.known_manifests import KnownManifests
from actors.wanted_replicas import own_replicas
from actors.watched_replicas import WatchedReplicas
from cluster.manifest import Manifest
from cluster.placement import held_by_every_shard


async def served_before(newest: Manifest, known: KnownManifests, replicas: WatchedReplicas) -> Manifest | None:
    """The version to serve while the newest one cannot be; None where nobody knows of one. Unavailable.

    That is what every shard holds. Where some restarted, too, it is at least what the logs are written for, until
    those have ended. And where that waits for other replicas, such as for their share of a GPU, it is what those that
    are still there were started for: they hold only what is to come, if they restarted meanwhile.
    """
    found = await _newest_held(newest, known, replicas) or await known.in_use(newest)
    written = found or newest
    if _every_shard_began(written, replicas):
        return found
    shares = {key.num_gpus for key in replicas.statuses(newest.collection)}
    return await known.with_another_share(written, shares) or found


async def _newest_held(newest: Manifest, known: KnownManifests, replicas: WatchedReplicas) -> Manifest | None:
    """The newest version of a collection whose generation every one of its shards holds."""
    manifest = newest
    for version in replicas.versions(newest.collection):
        if version > newest.version:
            continue
        earlier = await known.earlier(manifest, version)  # from the last one on: each is read once
        if earlier is None:
            return None
        manifest = earlier
        if held_by_every_shard(own_replicas(manifest), replicas.observed(), manifest.generation):
            return manifest
    return None


def _every_shard_began(manifest: Manifest, replicas: WatchedReplicas) -> bool:
    """Whether of each shard a replica runs that does not just start, or wait for a place."""
    began = {key.shard for key in own_replicas(manifest) if replicas.status(key).state != "starting"}
    return len(began) == len(manifest.shards)
