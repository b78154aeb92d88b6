"""Which replicas a collection is to have, from its newest version and the one that is served."""

from __future__ import annotations

from dataclasses import replace

from cluster.config import Settings
from cluster.manifest import Manifest
from cluster.manifest_format import Switch
from cluster.placement import ReplicaKey, WantedReplica, replicas_of


def wanted_replicas(newest: Manifest, served: Manifest | None, settings: Settings) -> dict[ReplicaKey, WantedReplica]:
    """Replicas of the newest version's shards with its share of a GPU, and of those that only the served version has.

    Where that is served with another share, it has all its replicas, beside those that are to take over.
    """
    wanted = dict.fromkeys(own_replicas(newest), _of(newest, settings, newest.switch))
    if served is None:
        return wanted
    for key in serving_replicas(newest, served):
        new = wanted.get(key, _of(served, settings, newest.switch))
        wanted[key] = replace(new, served=served.version, served_generation=served.generation)
    return wanted


def own_replicas(manifest: Manifest) -> list[ReplicaKey]:
    """Those that are to hold a version."""
    return replicas_of(manifest.collection, manifest.config, len(manifest.shards), manifest.num_gpus)


def serving_replicas(newest: Manifest, served: Manifest | None) -> list[ReplicaKey]:
    """Those that are to answer now: the served version's, as many of each shard as the newest has; else the newest's.

    Others that are wanted are to take over later.
    """
    return own_replicas(newest if served is None else replace(served, config=newest.config))


def _of(manifest: Manifest, settings: Settings, switch: Switch) -> WantedReplica:
    resources = (settings.shard_cpus, manifest.num_gpus)
    return WantedReplica(manifest.version, manifest.generation, len(manifest.shards), *resources, switch=switch)
