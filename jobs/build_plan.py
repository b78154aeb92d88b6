"""How an import is built: segments per shard, builds at once, and CPUs of each, so that a node's memory suffices.

`memory_bytes` bounds the indexes being built at one time on one node. A shard whose index alone needs more gets
several segments; where several builds together need more, fewer run at once, each with more threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, TypeVar

from cluster.config import CollectionConfig
from cluster.index_policy import MEMORY_MARGIN, like
from cluster.index_spec import IndexSpec

T = TypeVar("T")


class TaskRunner(Protocol):
    """Runs generator functions on items, some at a time (`ray_jobs.run_tasks`)."""

    def __call__(
        self, function: Callable[[T], Iterator[Any]], items: Sequence[T], num_cpus: float, in_flight: int
    ) -> Iterator[tuple[int, Any]]: ...


@dataclass(frozen=True)
class Workers:
    """How tasks are run, and how many CPUs there are for them."""

    run_tasks: TaskRunner
    cpus: int  # of the whole cluster
    cpus_per_node: int | None = None  # of its largest node; None: there is one node
    free_cpus: int | None = None  # the most that others, such as replicas, leave free on one node; None: all


@dataclass(frozen=True)
class Builds:
    """How many builds run at once, FAISS's threads in each, and the CPUs that each asks of Ray."""

    at_once: int
    threads: int
    num_cpus: int


def segment_bytes(spec: IndexSpec, count: int, dimension: int) -> int:
    """Memory of building a segment: its index, the float32 sample it is trained on, and the margin of both."""
    sample = spec.training_points(count) * dimension * 4
    return ceil((spec.predicted_bytes + sample) * MEMORY_MARGIN)


def segments_per_shard(rows: int, spec: IndexSpec, config: CollectionConfig, memory_bytes: int) -> int:
    """The fewest segments like `spec`, of at most `memory_bytes` each, that a shard's mean share of rows takes."""
    per_shard = ceil(rows / config.shards)
    segments = 1
    while segments < per_shard:
        count = ceil(per_shard / segments)
        needed = segment_bytes(like(spec, count, config), count, config.dimension)
        if needed <= memory_bytes:
            break
        segments = min(per_shard, max(segments + 1, ceil(segments * needed / memory_bytes)))
    return segments


def plan_builds(partitions: int, bytes_each: int, memory_bytes: int, workers: Workers) -> Builds:
    """Share the CPUs among the builds, never more of them on a node than `memory_bytes` takes.

    Ray puts as many tasks on a node as its CPUs take, so the CPUs that a build asks for bound their number there.
    What others hold (replicas) is not asked for, though FAISS uses it: a task that waits for them waits for ever.
    """
    node = max(1, min(workers.cpus, workers.cpus_per_node or workers.cpus))
    free = node if workers.free_cpus is None else workers.free_cpus
    fitting = max(1, memory_bytes // max(1, bytes_each))
    threads = min(node, max(1, ceil(node / fitting), workers.cpus // max(1, partitions)))
    num_cpus = max(1, min(threads, free))
    at_once = min(max(1, partitions), max(1, workers.cpus // threads))
    if node // num_cpus > fitting:  # the CPUs alone would let too many onto one node
        at_once = min(at_once, fitting)
    return Builds(at_once, threads, num_cpus)
