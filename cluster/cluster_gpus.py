"""The GPUs of a cluster, as its scheduler counts them and as their drivers tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ClusterGpus:
    """`total` and `free` as Ray counts them; of fractions that are free nobody knows whether they are of one GPU.

    `memory_bytes` and `name` are of the one with the least memory. None and "": no driver tells of any.
    """

    total: float = 0.0
    free: float = 0.0
    memory_bytes: int | None = None
    name: str = ""

    @classmethod
    def of(cls, nodes: Iterable[float], free: Iterable[float], seen: Iterable[tuple[int, str]]) -> ClusterGpus:
        """Of each node's GPUs, those that are free there, and (bytes of memory, name) of each GPU that was seen."""
        memory, name = min(seen, default=(None, ""))
        return cls(sum(nodes), sum(free), memory, name)


NO_GPUS = ClusterGpus()
