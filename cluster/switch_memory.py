"""Memory of a switch of generations: what each node needs beside what is loaded, and in which way that fits.

Pure: who asks gives what replicas said and what is predicted. Replicas of shards that are not there yet may be started
on any node: they are counted on those that would have most left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from cluster.errors import Exhausted
from cluster.index_policy import MEMORY_MARGIN
from cluster.manifest_format import Switch

SPARE_SHARE = 0.05  # of a node's memory, for what comes and goes
GIB = 1024.0**3


@dataclass(frozen=True)
class NodeMemory:
    """Bytes of a node: those that can still be had, and all."""

    available: int
    total: int


@dataclass(frozen=True)
class ReplicaBytes:
    """One replica of a shard of the new generation: its node ("" where it does not run yet), the predicted bytes of
    what it has loaded now, and those of its shard of the new generation."""

    shard: int
    node: str
    loaded: int
    coming: int


@dataclass(frozen=True)
class NodeNeed:
    """What a switch needs of a node beside what is loaded there, and what there is. Bytes."""

    node: str
    replicas: int
    loaded: int
    beside: int
    one_at_a_time: int
    available: int

    def needed(self, mode: Switch) -> int:
        return self.beside if mode == "beside" else self.one_at_a_time

    def fits(self, mode: Switch) -> bool:
        return self.needed(mode) <= self.available

    def __str__(self) -> str:
        return (
            f"node {self.node} needs {_gib(self.beside)} GiB beside the {_gib(self.loaded)} GiB that {self.replicas} "
            f"replica(s) have loaded, {_gib(self.available)} GiB are there"
        )


@dataclass(frozen=True)
class SwitchMemory:
    """In which way the new generation can be loaded, and what was reckoned with."""

    mode: Switch
    nodes: tuple[NodeNeed, ...] = ()
    unknown: int = 0  # replicas on nodes of which nothing is known

    @property
    def statement(self) -> str:
        """For people: the nodes that have least to spare, and the way that was chosen."""
        tight = sorted(self.nodes, key=lambda need: (need.available - need.beside, need.node))[:3]
        told = [str(need) for need in tight]
        if self.unknown:
            told.append(f"of the nodes of {self.unknown} replica(s) nothing is known")
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
        return {"mode": self.mode, "statement": self.statement, "nodes": nodes, "unknown_replicas": self.unknown}


def switch_memory(replicas: Sequence[ReplicaBytes], nodes: Mapping[str, NodeMemory]) -> SwitchMemory:
    """How a new generation is to be loaded: "beside" where every node has room for it beside what is loaded, else
    "one_at_a_time" where each shard has two replicas and what each gives up makes room.

    Exhausted with the numbers where neither fits. What is predicted is taken with the policy's margin.
    """
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
    counts = [sum(other.shard == replica.shard for other in replicas) for replica in replicas]
    if min(counts) >= 2 and all(need.fits("one_at_a_time") for need in needs):
        return SwitchMemory("one_at_a_time", needs, unknown)
    raise Exhausted(_refusal(needs, min(counts)))


def _placed(replicas: Sequence[ReplicaBytes], nodes: Mapping[str, NodeMemory]) -> list[ReplicaBytes]:
    """Replicas that have no node yet on the one that would have most left, the largest first."""
    placed = [replica for replica in replicas if replica.node]
    left = {node: memory.available for node, memory in nodes.items()}
    for replica in placed:
        if replica.node in left:
            left[replica.node] -= replica.coming
    for replica in sorted((each for each in replicas if not each.node), key=lambda each: -each.coming):
        node = max(sorted(left), key=lambda name: left[name])
        left[node] -= replica.coming
        placed.append(replace(replica, node=node))
    return placed


def _need(node: str, replicas: Sequence[ReplicaBytes], memory: NodeMemory) -> NodeNeed:
    """One at a time, those that grow may come before those that give something back."""
    coming = [ceil(replica.coming * MEMORY_MARGIN) for replica in replicas]
    grown = [max(0, more - replica.loaded) for more, replica in zip(coming, replicas, strict=True)]
    available = max(0, memory.available - ceil(SPARE_SHARE * memory.total))
    return NodeNeed(node, len(replicas), sum(each.loaded for each in replicas), sum(coming), sum(grown), available)


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
            f"{_gib(most.one_at_a_time)} GiB more on node {most.node}"
        )
    return f"memory of the switch: {told}. {way}. Free memory there, add nodes, or choose a smaller index"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
