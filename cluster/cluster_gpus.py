"""The GPUs of a cluster, as its scheduler counts them and as their drivers tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import floor

from cluster.gpu_policy import FRACTIONS, share_with_rest


@dataclass(frozen=True)
class ClusterGpus:
    """`total` and `free` as Ray counts them; of fractions that are free nobody knows whether they are of one GPU.

    `memory_bytes` and `name` are of the one with the least memory. None and "": no driver tells of any. `by_node` are
    those that are free on each node; empty: there is one node.
    """

    total: float = 0.0
    free: float = 0.0
    memory_bytes: int | None = None
    name: str = ""
    by_node: tuple[float, ...] = ()

    @classmethod
    def of(cls, nodes: Iterable[float], free: Iterable[float], seen: Iterable[tuple[int, str]]) -> ClusterGpus:
        """Of each node's GPUs, those that are free there, and (bytes of memory, name) of each GPU that was seen."""
        memory, name = min(seen, default=(None, ""))
        by_node = tuple(free)
        return cls(sum(nodes), sum(by_node), memory, name, by_node)

    def free_in_shares(self, num_gpus: float, held: Mapping[float, float]) -> float:
        """Of those that are free, what replicas and tasks that ask for `num_gpus` each can get: a share is of one GPU.

        Each counts with what no other one can use of a whole GPU (`share_with_rest`). A collection's own replicas have
        `held` of them, by the share that each has: what these leave of the GPUs that they fill is free as well, and of
        that counts what holds such a share. All else is taken to be of as few GPUs as can be, as Ray fills them.
        """
        fitting, other = 0, self.free
        for share, gpus in held.items():
            each = share_with_rest(share)
            filled, rest = floor(gpus / share * each + FRACTIONS), 1.0 - share / each
            fitting += filled * _fitting(rest, num_gpus)
            other -= filled * rest
        nodes = self.by_node or (self.free,)
        fitting += _fitting(other, num_gpus) if len(nodes) == 1 else floor(max(0.0, other) / num_gpus + FRACTIONS)
        return min(fitting, sum(_fitting(free, num_gpus) for free in nodes)) * share_with_rest(num_gpus)


def _fitting(free: float, num_gpus: float) -> int:
    """How many such shares there are in whole GPUs and a part of one."""
    whole = floor(max(0.0, free) + FRACTIONS)
    return whole * floor(1.0 / num_gpus + FRACTIONS) + floor(max(0.0, free - whole) / num_gpus + FRACTIONS)


NO_GPUS = ClusterGpus()
