"""The memory of a switch, from what a collection's replicas say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.replica_status import ReplicaStatus
from cluster.config import CollectionConfig
from cluster.index_costs import replica_memory
from cluster.placement import ReplicaKey, replicas_of
from cluster.switch_memory import NodeMemory, ReplicaBytes, SwitchMemory, switch_memory

Statuses = Mapping[ReplicaKey, ReplicaStatus]
IndexSize = tuple[int, int]  # predicted bytes of a shard's indexes, and its points


def memory_of_switch(
    collection: str, config: CollectionConfig, statuses: Statuses, coming: Sequence[IndexSize]
) -> SwitchMemory:
    """How replicas can load a new generation: Exhausted, with the numbers, where there is no memory for it.

    `config` is the new one, `coming` the indexes of each of its shards, `statuses` are those of the collection's
    replicas as they are now (`Directory.describe`).
    """
    replicas = []
    for key in replicas_of(collection, config, len(coming)):
        status = statuses.get(key)
        node, loaded = ("", 0) if status is None else (status.node, _loaded(status, config))
        replicas.append(ReplicaBytes(key.shard, node, loaded, _bytes(*coming[key.shard], config)))
    return switch_memory(replicas, _nodes(statuses))


def _loaded(status: ReplicaStatus, config: CollectionConfig) -> int:
    """Of its newest generation."""
    index = sum(int(segment["predicted_bytes"]) for segment in status.segments)
    return _bytes(index, sum(int(segment["count"]) for segment in status.segments), config)


def _bytes(index: int, count: int, config: CollectionConfig) -> int:
    """What stays in memory: the index and the ids. Rows are pages that the system takes back."""
    memory = replica_memory(index, count, config)
    return memory.index + memory.ids


def _nodes(statuses: Statuses) -> dict[str, NodeMemory]:
    """By name. Of the processes of one node, which may be bounded differently, the one counts that has least."""
    nodes: dict[str, NodeMemory] = {}
    for status in statuses.values():
        if status.node and status.node_memory is not None:
            told = NodeMemory(*status.node_memory)
            before = nodes.get(status.node)
            if before is None or told.available < before.available:
                nodes[status.node] = told
    return nodes
