"""The GPUs of a cluster, as its scheduler counts them and as their drivers tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import floor

from cluster.gpu_policy import FRACTIONS


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

        A collection's own replicas have `held` of them, by the share that each has. What these leave of their GPUs is
        free as well; of that counts what holds such a share.
        """
        most = share_with_rest(num_gpus)
        useless = sum(_rest(share, num_gpus) * gpus / share * share_with_rest(share) for share, gpus in held.items())
        of_nodes = sum(floor(free / most + FRACTIONS) * most for free in self.by_node or (self.free,))
        return min(max(0.0, self.free - useless), of_nodes)


def _rest(share: float, num_gpus: float) -> float:
    """Of a GPU that is full of such shares, what is left and holds none of `num_gpus`."""
    left = 1.0 - share / share_with_rest(share)
    return left - floor(left / num_gpus + FRACTIONS) * num_gpus


def share_with_rest(num_gpus: float) -> float:
    """A share of a GPU, with what no other share of that size can use of it: 1 where it is over a half."""
    return 1.0 / floor(1.0 / num_gpus + FRACTIONS)


NO_GPUS = ClusterGpus()
