"""Which replicas a collection is to have, from its newest version and the one that is served."""

from __future__ import annotations

from cluster.config import Settings
from cluster.manifest import Manifest
from cluster.placement import ReplicaKey, WantedReplica, replica_resources, replicas_of


def wanted_replicas(newest: Manifest, served: Manifest | None, settings: Settings) -> dict[ReplicaKey, WantedReplica]:
    """Replicas of the newest version's shards, and of those that only the served version has."""
    shards, resources = len(newest.shards), replica_resources(newest.config, settings)
    wanted = dict.fromkeys(
        replicas_of(newest.collection, newest.config, shards),
        WantedReplica(newest.version, newest.generation, shards, *resources, switch=newest.switch),
    )
    if served is None:
        return wanted
    for key in replicas_of(newest.collection, newest.config, len(served.shards)):
        new = wanted.get(key, WantedReplica(served.version, served.generation, len(served.shards), *resources))
        wanted[key] = WantedReplica(
            new.version, new.generation, new.shards, *resources, served.version, served.generation, newest.switch
        )
    return wanted
