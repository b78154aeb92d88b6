"""Memory of a switch of generations: what each node needs beside what is loaded, and in which way that fits.

Pure: who asks gives what replicas said and what is predicted. Replicas of shards that are not there yet may be started
on any node: they are counted on those that would have most left. The memory of GPUs is each replica's own: what it may
still take of its share of one. Where the new generation does not fit beside the old one there, its twin on the host
answers until that is dropped, unless the collection has no such patience.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from cluster.errors import Exhausted
from cluster.gpu_memory import GPU_MARGIN
from cluster.index_policy import MEMORY_MARGIN
from cluster.manifest_format import Switch

SPARE_SHARE = 0.05  # of a node's memory, for what comes and goes
MIB, GIB = 1024.0**2, 1024.0**3


@dataclass(frozen=True)
class NodeMemory:
    """Bytes of a node: those that can still be had, and all."""

    available: int
    total: int


@dataclass(frozen=True)
class ReplicaBytes:
    """One replica of a shard of the new generation: its node ("" where it does not run yet), the predicted bytes of
    what it has loaded now, and those of its shard of the new generation.

    The same on its GPU, and what it may still take there; None: nobody knows, or it has none. `loading` are bytes of
    the host that it takes for a while, on top of those that stay.
    """

    shard: int
    node: str
    loaded: int
    coming: int
    gpu_loaded: int = 0
    gpu_coming: int = 0
    gpu_left: int | None = None
    loading: int = 0

    def lacks_gpu(self, mode: Switch) -> int:
        """Bytes that its GPU is short of, as far as that is known; what is predicted is taken with a margin."""
        if self.gpu_left is None or not self.gpu_coming:
            return 0
        given_back = self.gpu_loaded if mode == "one_at_a_time" else 0
        return max(0, ceil(self.gpu_coming * GPU_MARGIN) - self.gpu_left - given_back)

    @property
    def on_gpu(self) -> str:
        return (
            f"shard {self.shard} needs {_size(ceil(self.gpu_coming * GPU_MARGIN))} on its GPU of node {self.node} "
            f"beside the {_size(self.gpu_loaded)} that are loaded, {_size(self.gpu_left or 0)} are there"
        )


@dataclass(frozen=True)
class NodeNeed:
    """What a switch needs of a node beside what is loaded there, and what there is. Bytes.

    `loading` are those of them that are given back when it is loaded.
    """

    node: str
    replicas: int
    loaded: int
    beside: int
    one_at_a_time: int
    available: int
    loading: int = 0

    def needed(self, mode: Switch) -> int:
        return self.beside if mode == "beside" else self.one_at_a_time

    def fits(self, mode: Switch) -> bool:
        return self.needed(mode) <= self.available

    def __str__(self) -> str:
        meanwhile = f", {_size(self.loading)} of it only while it loads," if self.loading else ""
        return (
            f"node {self.node} needs {_size(self.beside)}{meanwhile} beside the {_size(self.loaded)} that "
            f"{_replicas(self.replicas)} {'has' if self.replicas == 1 else 'have'} loaded, {_size(self.available)} are "
            "there"
        )


@dataclass(frozen=True)
class SwitchMemory:
    """In which way the new generation can be loaded, and what was reckoned with."""

    mode: Switch
    nodes: tuple[NodeNeed, ...] = ()
    unknown: int = 0  # replicas on nodes of which nothing is known
    short_of_gpu: tuple[ReplicaBytes, ...] = ()  # those whose twin answers for a while, the shortest first

    @property
    def statement(self) -> str:
        """For people: the nodes that have least to spare, and the way that was chosen."""
        tight = sorted(self.nodes, key=lambda need: (need.available - need.beside, need.node))[:3]
        told = [str(need) for need in tight]
        if self.unknown:
            told.append(f"of the nodes of {_replicas(self.unknown)} nothing is known")
        if self.short_of_gpu:
            told += [replica.on_gpu for replica in self.short_of_gpu[:3]]
            told.append(f"of {_replicas(len(self.short_of_gpu))} the twin on the host answers until there is room")
        how = "is loaded beside what is served"
        if self.mode == "one_at_a_time":
            how = "is loaded by one replica of each shard at a time, which drops what is served first"
        return "; ".join([*told, f"the new generation {how}"])

    def to_dict(self) -> dict[str, object]:
        """Plain data for a job's report."""
        nodes = [
            {
                "node": need.node,
                "replicas": need.replicas,
                "loaded_bytes": need.loaded,
                "needed_bytes": need.needed(self.mode),
                "available_bytes": need.available,
            }
            for need in self.nodes
        ]
        gpus = [
            {
                "shard": replica.shard,
                "node": replica.node,
                "loaded_bytes": replica.gpu_loaded,
                "needed_bytes": ceil(replica.gpu_coming * GPU_MARGIN),
                "available_bytes": replica.gpu_left,
            }
            for replica in self.short_of_gpu
        ]
        told = {"mode": self.mode, "statement": self.statement, "nodes": nodes, "unknown_replicas": self.unknown}
        return told | ({"short_of_gpu": gpus} if gpus else {})


def switch_memory(
    replicas: Sequence[ReplicaBytes], nodes: Mapping[str, NodeMemory], twin_may_answer: bool = True
) -> SwitchMemory:
    """How a new generation is to be loaded: "beside" where every node has room for it beside what is loaded, else
    "one_at_a_time" where each shard has two replicas and what each gives up makes room.

    Exhausted with the numbers where neither fits; on GPUs only where no twin may answer for a while. What is predicted
    is taken with the policies' margins.
    """
    found = _on_hosts(replicas, nodes)
    short = _short_of_gpu(replicas, found.mode)
    if not short or twin_may_answer:
        return replace(found, short_of_gpu=short)
    if _fewest_replicas(replicas) >= 2 and not _short_of_gpu(replicas, "one_at_a_time"):
        return replace(found, mode="one_at_a_time")
    raise Exhausted(
        f"GPU memory of the switch: {'; '.join(replica.on_gpu for replica in short[:3])}. Have its twin on the host "
        "answer until there is room (index.cpu_twin, and index.gpu_full step_down), or choose a smaller index"
    )


def _short_of_gpu(replicas: Sequence[ReplicaBytes], mode: Switch) -> tuple[ReplicaBytes, ...]:
    short = [replica for replica in replicas if replica.lacks_gpu(mode)]
    return tuple(sorted(short, key=lambda each: (-each.lacks_gpu(mode), each.shard, each.node)))


def _fewest_replicas(replicas: Sequence[ReplicaBytes]) -> int:
    """Of any shard."""
    return min(sum(other.shard == replica.shard for other in replicas) for replica in replicas)


def _on_hosts(replicas: Sequence[ReplicaBytes], nodes: Mapping[str, NodeMemory]) -> SwitchMemory:
    if not nodes:  # replicas do not tell, or none runs
        return SwitchMemory("beside", unknown=len(replicas))
    placed = _placed(replicas, nodes)
    needs = tuple(
        _need(node, [replica for replica in placed if replica.node == node], nodes[node]) for node in sorted(nodes)
    )
    needs = tuple(need for need in needs if need.replicas)
    unknown = sum(replica.node not in nodes for replica in placed)
    if all(need.fits("beside") for need in needs):
        return SwitchMemory("beside", needs, unknown)
    fewest = _fewest_replicas(replicas)
    if fewest >= 2 and all(need.fits("one_at_a_time") for need in needs):
        return SwitchMemory("one_at_a_time", needs, unknown)
    raise Exhausted(_refusal(needs, fewest))


def _placed(replicas: Sequence[ReplicaBytes], nodes: Mapping[str, NodeMemory]) -> list[ReplicaBytes]:
    """Replicas that have no node yet on the one that would have most left, the largest first."""
    placed = [replica for replica in replicas if replica.node]
    left = {node: memory.available for node, memory in nodes.items()}
    for replica in placed:
        if replica.node in left:
            left[replica.node] -= replica.coming + replica.loading
    for replica in sorted((each for each in replicas if not each.node), key=lambda each: -each.coming):
        node = max(sorted(left), key=lambda name: left[name])
        left[node] -= replica.coming + replica.loading
        placed.append(replace(replica, node=node))
    return placed


def _need(node: str, replicas: Sequence[ReplicaBytes], memory: NodeMemory) -> NodeNeed:
    """One at a time, those that grow may come before those that give something back."""
    coming = [ceil(replica.coming * MEMORY_MARGIN) for replica in replicas]
    grown = [max(0, more - replica.loaded) for more, replica in zip(coming, replicas, strict=True)]
    available = max(0, memory.available - ceil(SPARE_SHARE * memory.total))
    loading, loaded = ceil(_loading(replicas) * MEMORY_MARGIN), sum(each.loaded for each in replicas)
    needed = (sum(coming) + loading, sum(grown) + loading)
    return NodeNeed(node, len(replicas), loaded, *needed, available, loading)


def _loading(replicas: Sequence[ReplicaBytes]) -> int:
    """At the worst moment: those of a shard that have something loaded go one after the other (`switch_order`), the
    others may all load at once."""
    in_turn: dict[int, int] = {}
    for replica in replicas:
        if replica.loaded:
            in_turn[replica.shard] = max(replica.loading, in_turn.get(replica.shard, 0))
    return sum(in_turn.values()) + sum(replica.loading for replica in replicas if not replica.loaded)


def _refusal(needs: Sequence[NodeNeed], replicas: int) -> str:
    mode: Switch = "beside" if replicas < 2 else "one_at_a_time"
    lacking = [need for need in needs if not need.fits(mode)]
    told = "; ".join(str(need) for need in lacking[:3])
    if replicas < 2:
        way = "A second replica of each shard would let one at a time drop what it has and load the new generation"
    else:
        most = max(lacking, key=lambda need: need.one_at_a_time - need.available)
        way = (
            f"One replica of each shard at a time, which drops what it has first, still needs "
            f"{_size(most.one_at_a_time)} more on node {most.node}"
        )
    return f"memory of the switch: {told}. {way}. Free memory there, add nodes, or choose a smaller index"


def _size(size: int) -> str:
    """In MiB what is less than a tenth of a GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _replicas(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"
