"""How a generation is built: index, segments per shard, builds at once, CPUs of each, so that a node's memory suffices.

`memory_bytes` bounds the indexes being built at one time on one node. A shard whose index alone needs more gets
several segments; where several builds together need more, fewer run at once, each with more threads.

What is built for GPUs is built on one where one is free; where replicas hold them all it is a kind that CPUs build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from actors.replica_status import Statuses
from cluster import index_costs
from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig, ServedOn
from cluster.gpu_memory import GpuFacts, host_build_bytes
from cluster.gpu_policy import FRACTIONS, gpu_for, missing_gpus, share_with_rest
from cluster.gpu_share import GpuShare, choose_share, in_words, least_share
from cluster.index_costs import REFERENCE, Rates
from cluster.index_policy import MEMORY_MARGIN, IndexPlan, like, plan_index
from cluster.index_spec import IndexSpec

MEASURED_MIN = 50_000  # rows of a segment whose build takes much longer than measuring how long
HeldGpus = Mapping[float, float]  # GPUs that a collection's replicas have, by the share that each has
NONE_HELD: HeldGpus = MappingProxyType({})
T = TypeVar("T")


class TaskRunner(Protocol):
    """Runs generator functions on items, some at a time (`ray_jobs.run_tasks`)."""

    def __call__(
        self,
        function: Callable[[T], Iterator[Any]],
        items: Sequence[T],
        num_cpus: float,
        in_flight: int,
        num_gpus: float = 0.0,
    ) -> Iterator[tuple[int, Any]]: ...


@dataclass(frozen=True)
class Workers:
    """How tasks are run, and how many CPUs there are for them."""

    run_tasks: TaskRunner
    cpus: int  # of the whole cluster
    cpus_per_node: int | None = None  # of its largest node; None: there is one node
    free_cpus: int | None = None  # the most that others, such as replicas, leave free on one node; None: all
    gpus: Callable[[], ClusterGpus] = ClusterGpus  # of the cluster, as they are when it is asked

    def build(
        self, function: Callable[[T], Iterator[Any]], items: Sequence[T], builds: Builds
    ) -> Iterator[tuple[int, Any]]:
        """Run what builds or loads an index: the one place that says what such a task asks of its node."""
        return self.run_tasks(function, items, builds.num_cpus, builds.at_once, builds.num_gpus)


@dataclass(frozen=True)
class Builds:
    """How many builds run at once, FAISS's threads in each, and the CPUs and GPUs that each asks of Ray."""

    at_once: int
    threads: int
    num_cpus: int
    num_gpus: float = 0.0


@dataclass(frozen=True)
class BuildGpus:
    """What a plan is told of the GPUs, of which `each` is for a replica and for a build, with the reason, and how many
    builds the free ones take."""

    facts: GpuFacts
    each: float
    at_once: int
    reason: str = ""


def build_gpus(
    config: CollectionConfig,
    gpus: Callable[[], ClusterGpus],
    rows: int = 0,
    held: HeldGpus = NONE_HELD,
    had: float = 0.0,
) -> BuildGpus | None:
    """GPUs for a generation of so many rows (0: not known), where it may have some; `held` are those of the
    collection's own replicas.

    Those with the same share are its replicas' again, but not for the build beside them. `had` is the share that the
    collection is served with now. Where GPUs for another one are not free, replicas that have one keep it, with a
    smaller index if need be and the config lets it step down.

    Invalid or Unavailable (`gpu_policy.gpu_for`) where GPUs are asked for, and there are none.
    """
    if config.index.device == "cpu":
        return None
    there, per_shard = gpus(), ceil(rows / config.shards)

    def builds(share: float) -> bool:
        return _builds_at_once(there, share, held) > 0

    chosen = least_share(config, had)
    if rows:
        chosen = choose_share(per_shard, _bounded(config, per_shard), there.memory_bytes, builds, had)
    if config.index.num_gpus is None and not _can_be_had(config, there, chosen.num_gpus, held):
        chosen = _kept_instead(config, there, chosen, held, had)
    return _gpus_with(config, there, chosen, held)


def _kept_instead(
    config: CollectionConfig, there: ClusterGpus, chosen: GpuShare, held: HeldGpus, had: float
) -> GpuShare:
    """A share that the collection's replicas have, for one that they cannot get; that one where they have none."""
    for share in sorted(held, key=lambda share: (share != had, share)):
        holds_it = share > chosen.num_gpus or config.index.gpu_full == "step_down"
        if holds_it and _can_be_had(config, there, share, held):
            why = f"it keeps {in_words(share)}: no GPUs are free for replicas with {in_words(chosen.num_gpus)}"
            return GpuShare(share, why)
    return chosen


def _gpus_with(config: CollectionConfig, there: ClusterGpus, share: GpuShare, held: HeldGpus) -> BuildGpus | None:
    """What there is of the cluster's GPUs for replicas and builds with such a share; None, Invalid or Unavailable as of
    `gpu_policy.gpu_for`."""
    each, at_once = share.num_gpus, _builds_at_once(there, share.num_gpus, held)
    counted = (each, there.total, there.free_in_shares(each, held), there.memory_bytes, there.name)
    others = sum(gpus for share_held, gpus in held.items() if share_held != each)
    facts = gpu_for(config, *counted, held.get(each, 0.0), builds=at_once > 0, held_otherwise=others)
    return None if facts is None else BuildGpus(facts, each, at_once, share.reason)


def _can_be_had(config: CollectionConfig, there: ClusterGpus, share: float, held: HeldGpus) -> bool:
    """Whether each replica can have such a share now."""
    missing = missing_gpus(config, share, held.get(share, 0.0))
    return missing <= there.free_in_shares(share, held) + FRACTIONS


def _builds_at_once(there: ClusterGpus, share: float, held: HeldGpus) -> int:
    return int(there.free_in_shares(share, held) / share_with_rest(share) + FRACTIONS)


def held_gpus(statuses: Statuses) -> dict[float, float]:
    """GPUs that a collection's replicas have, by share; some may still wait for theirs, others load already."""
    held: dict[float, float] = {}
    for key, status in statuses.items():
        if key.num_gpus and not status.waits:
            held[key.num_gpus] = held.get(key.num_gpus, 0.0) + key.num_gpus
    return held


def segment_bytes(spec: IndexSpec, count: int, dimension: int) -> int:
    """Host memory of building a segment: its index, the vectors that the build holds beside it, and the margin.

    Those are the sample that it is trained on; for a GPU what the copy to its memory takes.
    """
    on_gpu = host_build_bytes(spec, count, dimension) if spec.device == "gpu" else 0
    sample = max(on_gpu, spec.training_points(count) * dimension * 4)
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


@dataclass(frozen=True)
class BuildPlan:
    """What becomes of `rows` rows: `partitions` segments, those of one shard next to each other.

    `index` is the choice for a shard of the mean count: all its segments are of that kind.
    """

    config: CollectionConfig
    rows: int
    partitions: int  # shards x segments per shard
    index: IndexPlan
    builds: Builds
    rates: Rates = REFERENCE
    gpus: BuildGpus | None = None

    @property
    def device(self) -> ServedOn:
        """What the generation is served on."""
        return self.index.spec.device

    @property
    def num_gpus(self) -> float:
        """The share of a GPU that each of its replicas gets; 0 on CPUs."""
        if self.device == "cpu":
            return 0.0
        return self.gpus.each if self.gpus else self.config.index.num_gpus or 1.0

    @property
    def count(self) -> int:
        """Rows of the mean segment."""
        return ceil(self.rows / self.partitions)

    @property
    def spec(self) -> IndexSpec:
        """Of the mean segment."""
        return like(self.index.spec, self.count, self.config)

    @property
    def worth_measuring(self) -> bool:
        """Whether the build is long enough to measure first how long it is going to be, which is done on CPUs alone."""
        return self.count >= MEASURED_MIN and self.index.spec.kind != "flat" and not self.builds.num_gpus

    def to_dict(self) -> dict[str, Any]:
        """For the job's status: what is going to be built, what it should take, and what else was considered."""
        spec = self.spec
        return {
            "index": spec.to_dict() | {"reason": self.index.spec.reason},
            "segments": self.partitions,
            "points_per_segment": self.count,
            "predicted_bytes": spec.predicted_bytes * self.partitions,
            "predicted_build_seconds": self._seconds(spec),
            "rates_measured": self.rates.measured,
            "considered": [candidate.to_dict() for candidate in self.index.considered],
        } | self._gpu_facts(spec)

    def _seconds(self, spec: IndexSpec) -> float | None:
        """None for what is built on GPUs."""
        built = spec if self.builds.num_gpus else replace(spec, device="cpu")
        seconds = index_costs.build_seconds(built, self.count, self.config.dimension, self.rates)
        return None if seconds is None else round(seconds * ceil(self.partitions / self.builds.at_once), 1)

    def _gpu_facts(self, spec: IndexSpec) -> dict[str, Any]:
        """Where the generation is served on GPUs: which, and what of their memory its indexes take."""
        if self.gpus is None or spec.device == "cpu":
            return {}
        facts = self.gpus.facts
        return {
            "gpu": {
                "name": facts.name,
                "memory_bytes": facts.memory_bytes,
                "num_gpus": self.gpus.each,
                "num_gpus_reason": self.gpus.reason,
                "predicted_bytes": spec.gpu_bytes * self.partitions,
                "built_on": "gpu" if self.builds.num_gpus else "cpu",
            }
        }


def plan_build(
    rows: int, config: CollectionConfig, memory_bytes: int, workers: Workers, gpus: BuildGpus | None = None
) -> BuildPlan:
    """Before any rate is known. Invalid, with the numbers, where no index of a shard meets the config's bounds."""
    per_shard = ceil(rows / config.shards)
    facts = gpus.facts if gpus else None
    index = plan_index(per_shard, _bounded(config, per_shard), gpu=facts)  # refuses now what no shard could hold
    partitions = config.shards * segments_per_shard(rows, index.spec, config, memory_bytes)
    plan = BuildPlan(config, rows, partitions, _with_reason(index, gpus), Builds(1, 1, 1), gpus=gpus)
    return replace(plan, builds=_builds_of(plan, memory_bytes, workers))


def with_rates(plan: BuildPlan, rates: Rates, memory_bytes: int, workers: Workers) -> BuildPlan:
    """`build_seconds` may ask for another index once the rates are known; its builds are planned anew.

    The partitions stay: an index whose segments would then be over the job's memory is not changed to.
    """
    facts = plan.gpus.facts if plan.gpus else None
    index = plan_index(ceil(plan.rows / plan.config.shards), plan.config, rates, facts)
    changed = replace(plan, rates=rates, index=_with_reason(index, plan.gpus))
    if segment_bytes(changed.spec, plan.count, plan.config.dimension) > memory_bytes:
        changed = replace(plan, rates=rates)
    return replace(changed, builds=_builds_of(changed, memory_bytes, workers))


def _bounded(config: CollectionConfig, per_shard: int) -> CollectionConfig:
    """Without a bound on the seconds of a build where these are measured first."""
    if per_shard < MEASURED_MIN:
        return config
    return replace(config, index=replace(config.index, build_seconds=None))


def _with_reason(index: IndexPlan, gpus: BuildGpus | None) -> IndexPlan:
    """The choice of an index for GPUs says, too, why its replicas get their share of one."""
    if gpus is None or not gpus.reason or index.spec.device == "cpu":
        return index
    return replace(index, spec=replace(index.spec, reason=f"{index.spec.reason}; {gpus.reason}"))


def _builds_of(plan: BuildPlan, memory_bytes: int, workers: Workers) -> Builds:
    needed = segment_bytes(plan.spec, plan.count, plan.config.dimension)
    builds = plan_builds(min(plan.partitions, plan.rows), needed, memory_bytes, workers)
    if plan.gpus is None or plan.device == "cpu" or not plan.gpus.facts.builds:
        return builds
    return replace(builds, at_once=min(builds.at_once, max(1, plan.gpus.at_once)), num_gpus=plan.gpus.each)
