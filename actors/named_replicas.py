"""Since when serving tables have named which replicas without a break: how long coordinators have known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from actors.shard_client import ServingTable
from cluster.placement import ReplicaKey


class NamedReplicas:
    """`publish` is told of every table."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[ReplicaKey, float] = {}

    def publish(self, table: ServingTable) -> None:
        now = self._clock()
        shards = (replicas for served in table.collections.values() for replicas in served.replicas.values())
        self._since = {key: self._since.get(key, now) for replicas in shards for key in replicas}

    def longest_s(self, keys: Iterable[ReplicaKey]) -> float:
        """For how long the one of these has been named that was so first; 0 where none is."""
        now = self._clock()
        return max((now - self._since.get(key, now) for key in keys), default=0.0)
