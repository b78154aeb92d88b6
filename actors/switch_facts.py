"""The memory of a switch, from what a collection's replicas say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.replica_status import ReplicaStatus, Statuses
from cluster.config import CollectionConfig
from cluster.index_costs import replica_memory
from cluster.placement import replicas_of
from cluster.switch_memory import NodeMemory, ReplicaBytes, SwitchMemory, switch_memory

IndexSize = tuple[int, int]  # predicted bytes of a shard's indexes, and its points


@dataclass(frozen=True)
class ComingOnGpus:
    """A new generation that is served on GPUs: the share that each replica has of one, the predicted bytes of each
    shard's indexes there, and those that a replica takes of the host while it loads an index (`host_load_bytes`)."""

    num_gpus: float
    shards: Sequence[int]
    loading: int = 0


def memory_of_switch(
    collection: str,
    config: CollectionConfig,
    statuses: Statuses,
    coming: Sequence[IndexSize],
    on_gpus: ComingOnGpus | None = None,
) -> SwitchMemory:
    """How replicas can load a new generation: Exhausted, with the numbers, where there is no memory for it.

    `config` is the new one, `coming` the indexes of each of its shards on the host, `statuses` are those of the
    collection's replicas as they are now (`Directory.describe`). `on_gpus` None: the generation is served on CPUs. Its
    replicas are those with its share of a GPU: with another one they do not run yet.
    """
    replicas = []
    for key in replicas_of(collection, config, len(coming), 0.0 if on_gpus is None else on_gpus.num_gpus):
        status = statuses.get(key)
        node, loaded = ("", 0) if status is None else (status.node, _loaded(status, config))
        index, count = coming[key.shard]
        if on_gpus is None:
            replicas.append(ReplicaBytes(key.shard, node, loaded, _bytes(index, count, config)))
        else:
            size = on_gpus.shards[key.shard]
            gpu = (0, size, None) if status is None else _on_gpu(status, size)
            replicas.append(ReplicaBytes(key.shard, node, loaded, _bytes(0, count, config), *gpu, on_gpus.loading))
    patient = config.index.cpu_twin and config.index.gpu_full == "step_down"
    return switch_memory(replicas, _nodes(statuses), patient)


def _on_gpu(status: ReplicaStatus, coming: int) -> tuple[int, int, int | None]:
    """Bytes of its newest generation on its GPU, of the coming one, and what it may still take there."""
    loaded = sum(
        segment.get("gpu_measured_bytes") or segment.get("gpu_predicted_bytes") or 0 for segment in status.segments
    )
    gpu = status.gpu or {}
    if not gpu.get("total_bytes"):
        return loaded, coming, None
    mine = int(gpu["share"] * gpu["total_bytes"]) - gpu["used_bytes"]
    return loaded, coming, max(0, min(gpu["free_bytes"], mine))


def _loaded(status: ReplicaStatus, config: CollectionConfig) -> int:
    """Of its newest generation."""
    index = sum(int(segment["predicted_bytes"]) for segment in status.segments if segment.get("device") != "gpu")
    return _bytes(index, sum(int(segment["count"]) for segment in status.segments), config)


def _bytes(index: int, count: int, config: CollectionConfig) -> int:
    """What stays in memory: the index and the ids. Rows are pages that the system takes back, and so is the twin of an
    index on a GPU."""
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
