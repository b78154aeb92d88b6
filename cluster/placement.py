"""Wanted replicas against observed ones -> what to do next. Pure: the supervisor performs the actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.config import CollectionConfig, Settings
from cluster.errors import Invalid

ReplicaState = Literal["starting", "ready", "failed", "unreachable"]


@dataclass(frozen=True, order=True)
class ReplicaKey:
    """One replica of one shard of one collection."""

    collection: str
    shard: int
    replica: int

    def __str__(self) -> str:
        return f"{self.collection}/{self.shard}/{self.replica}"

    @classmethod
    def parse(cls, text: str) -> ReplicaKey:
        collection, shard, replica = text.split("/")
        return cls(collection, int(shard), int(replica))


@dataclass(frozen=True)
class WantedReplica:
    """The manifest version a replica should hold, its generation, how many shards there are, and its resources.

    `served` is the version that is served until `version` can be: the replica should hold it too.
    """

    version: int
    generation: int
    shards: int
    num_cpus: float
    num_gpus: float = 0.0
    served: int | None = None

    @property
    def versions(self) -> tuple[int, ...]:
        """What to hold, the most urgent first."""
        return (self.version,) if self.served is None or self.served == self.version else (self.served, self.version)


@dataclass(frozen=True)
class ObservedReplica:
    """What a replica last said of itself: the manifest versions it holds, newest last."""

    state: ReplicaState
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Start:
    key: ReplicaKey
    wanted: WantedReplica


@dataclass(frozen=True)
class Stop:
    key: ReplicaKey


@dataclass(frozen=True)
class Load:
    """Load a manifest version beside what the replica serves now."""

    key: ReplicaKey
    version: int


Action = Start | Stop | Load


def plan(wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica]) -> list[Action]:
    """Actions that bring `observed` to `wanted`: retire what is not wanted, start what is missing, load what is old.

    A replica that is starting or unreachable is left alone: Ray restarts it, and it loads the newest version. One that
    lacks more than one version has a `Load` for each, the most urgent first.
    """
    actions: list[Action] = [Stop(key) for key in sorted(observed.keys() - wanted.keys())]
    for key in sorted(wanted):
        replica = observed.get(key)
        if replica is None:
            actions.append(Start(key, wanted[key]))
        elif replica.state in ("ready", "failed"):
            actions += [Load(key, version) for version in wanted[key].versions if version not in replica.versions]
    return actions


def replicas_of(collection: str, config: CollectionConfig, shards: int) -> list[ReplicaKey]:
    return [ReplicaKey(collection, s, r) for s in range(shards) for r in range(config.replicas)]


def replica_resources(config: CollectionConfig, settings: Settings) -> tuple[float, float]:
    """(num_cpus, num_gpus) a replica asks of Ray: one GPU where the collection asks for GPUs, else CPUs."""
    return (settings.shard_cpus, 1.0) if config.index.device == "gpu" else (settings.shard_cpus, 0.0)


def search_threads(shards: int, settings: Settings, node_cores: int) -> int:
    """FAISS threads of one replica: as set, else its CPUs, else its share of the node's cores."""
    if settings.shard_threads is not None:
        if settings.shard_threads < 1:
            raise Invalid.at("shard_threads", f"must be at least 1, not {settings.shard_threads}")
        return settings.shard_threads
    if settings.shard_cpus >= 1:
        return int(settings.shard_cpus)
    return max(1, node_cores // shards)


def publishable_version(
    wanted: Mapping[ReplicaKey, WantedReplica], observed: Mapping[ReplicaKey, ObservedReplica], version: int
) -> bool:
    """True when a collection may switch to `version`: every replica that can answer holds it, each shard has one.

    `wanted` are the replicas of one collection.
    """
    holding: dict[int, bool] = {key.shard: False for key in wanted}
    for key in wanted:
        replica = observed.get(key)
        if replica is None or replica.state != "ready":
            continue
        if version not in replica.versions:
            return False
        holding[key.shard] = True
    return all(holding.values())


def held_by_every_shard(
    collection: str, shards: int, observed: Mapping[ReplicaKey, ObservedReplica], version: int
) -> bool:
    """True when a ready replica of each of the shards holds `version`."""
    holding = {
        key.shard
        for key, replica in observed.items()
        if key.collection == collection and replica.state == "ready" and version in replica.versions
    }
    return holding >= set(range(shards))
