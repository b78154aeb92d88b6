"""When a collection would be better for a rebuild, and why. Pure functions of plain data.

What seals and merges repair by themselves is no reason: those begin without anybody (`cluster.upkeep`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from cluster.config import CollectionConfig, ServedOn, Upkeep
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts
from cluster.gpu_share import choose_share, in_words
from cluster.index_policy import plan_index
from cluster.upkeep import POINTS_MAX, largest_build

ReasonKind = Literal["growth", "scattered", "recall", "index_kind", "gpu_share"]
REASON_KINDS: tuple[ReasonKind, ...] = get_args(ReasonKind)
SMALL_PART = 10  # a segment with less than this fraction of the points that one index could have is small
KIND_SHARE = 0.8  # of the points must ask for another index as well: near a bound of the policy none is worth it
CONFIGS_KEPT, PLANS_KEPT = 256, 4096


@dataclass(frozen=True)
class Advice:
    """One reason for a rebuild, in words and numbers."""

    kind: ReasonKind
    reason: str


@dataclass(frozen=True)
class IndexFacts:
    """A segment: its rows, those of them that are live, the kind of index that was planned for it and it has, where."""

    count: int
    live: int
    planned: str
    kind: str
    device: ServedOn = "cpu"


@dataclass(frozen=True)
class ObservedRecall:
    """The recall of live queries, and its 95% interval (`actors.recall_observer`)."""

    recall: float
    low: float
    high: float
    queries: int


@dataclass(frozen=True)
class FullShare:
    """The share of a GPU that each replica has, where it does not hold all of a shard's indexes: so the CPU answers for
    some. `memory_bytes` are the whole GPU's, `config` is that by which a build chooses."""

    num_gpus: float
    memory_bytes: int
    config: CollectionConfig


@dataclass(frozen=True)
class ShardFacts:
    """A shard as served. `tail_points` are in no segment. `upkeep_due`: a seal or a merge is going to change this.

    `points_max` is the largest segment that would be made. `full_share` None: a GPU has all that it is to have, or
    nobody knows.
    """

    shard: int
    segments: tuple[IndexFacts, ...] = ()
    tail_points: int = 0
    upkeep_due: bool = False
    observed: ObservedRecall | None = None
    points_max: int = POINTS_MAX
    full_share: FullShare | None = None

    @property
    def points(self) -> int:
        return sum(segment.live for segment in self.segments) + self.tail_points

    @property
    def largest(self) -> IndexFacts:
        """The segment that was trained on most points."""
        return max(self.segments, key=lambda segment: segment.count)

    @property
    def whole(self) -> int:
        """The points that one index of the shard would have."""
        return min(self.points, self.points_max)


@dataclass(frozen=True)
class AdviceFacts:
    config: CollectionConfig
    shards: tuple[ShardFacts, ...]


def rebuild_advice(facts: AdviceFacts, bounds: Upkeep) -> tuple[Advice, ...]:
    """Every reason for a rebuild, in the order of `REASON_KINDS`; none where there is no reason."""
    checks: dict[ReasonKind, Callable[[ShardFacts, CollectionConfig, Upkeep], str]] = {
        "growth": _growth,
        "scattered": _scattered,
        "recall": _recall,
        "index_kind": _index_kind,
        "gpu_share": _gpu_share,
    }
    found = []
    for kind in REASON_KINDS:
        reasons = {
            shard.shard: reason for shard in facts.shards if (reason := checks[kind](shard, facts.config, bounds))
        }
        if reasons:
            found.append(Advice(kind, _of_all(reasons, len(facts.shards))))
    return tuple(found)


def _of_all(reasons: dict[int, str], shards: int) -> str:
    """What is said of the first shard, and of how many others the like is true."""
    first = min(reasons)
    others = f", and {len(reasons) - 1} more of {shards} shards" if len(reasons) > 1 else ""
    return f"shard {first}: {reasons[first]}{others}"


def _growth(shard: ShardFacts, config: CollectionConfig, bounds: Upkeep) -> str:
    if not shard.segments or shard.whole <= bounds.rebuild_growth * shard.largest.count:
        return ""
    return (
        f"its largest index was trained on {shard.largest.count:,} points, of {shard.points:,} that there are now; "
        f"rebuild_growth is {bounds.rebuild_growth:g}"
    )


def _scattered(shard: ShardFacts, config: CollectionConfig, bounds: Upkeep) -> str:
    """A tail that is not to be sealed yet is no reason: exact search of so many points was chosen for it."""
    if shard.upkeep_due:
        return ""
    small = sum(segment.live for segment in shard.segments if SMALL_PART * segment.count < shard.whole)
    deleted = sum(segment.count - segment.live for segment in shard.segments)
    loose, rows = small + deleted + shard.tail_points, shard.points + deleted
    if loose <= max(bounds.seal_points, bounds.rebuild_loose_share * rows):
        return ""
    return (
        f"of {rows:,} rows {deleted:,} are deleted, {shard.tail_points:,} in no segment and {small:,} in small ones; "
        f"rebuild_loose_share is {bounds.rebuild_loose_share:g}"
    )


def _recall(shard: ShardFacts, config: CollectionConfig, bounds: Upkeep) -> str:
    """Where the whole interval lies below the target and the margin."""
    observed, target = shard.observed, config.index.target_recall
    if observed is None or observed.high >= target - bounds.rebuild_recall_margin:
        return ""
    return (
        f"live queries have recall {observed.recall:.3f} ({observed.low:.3f} to {observed.high:.3f} with 95% "
        f"confidence, {observed.queries:,} queries), the target is {target:g}"
    )


def _index_kind(shard: ShardFacts, config: CollectionConfig, bounds: Upkeep) -> str:
    """Of the largest segment. What the builder made of a plan for the sake of its vectors it would do again; and so
    it would where it found that its node cannot build the kind within `build_seconds`. What GPUs there are, and what
    fits them, is not known here."""
    if not shard.segments or config.index.device == "gpu" or shard.largest.device == "gpu":
        return ""
    here, now = shard.largest, kind_for(config, shard.points)
    if not now or now in (here.planned, here.kind) or kind_for(config, int(KIND_SHARE * shard.points)) != now:
        return ""
    if config.index.build_seconds is not None and kind_for(config, here.count) != here.planned:
        return ""
    return (
        f"{here.kind} was chosen for {here.count:,} points, {now} would be for the {shard.points:,} that there are now"
    )


def _gpu_share(shard: ShardFacts, config: CollectionConfig, bounds: Upkeep) -> str:
    """Where a build would take a larger share, whether it gets a GPU itself or not. While one generation is replaced by
    another, which does not fit beside it, neither asks for more."""
    full = shard.full_share
    if full is None or full.config.index.num_gpus is not None:
        return ""
    count = _rounded(shard.points)
    larger = min(_share_for(count, full, builds) for builds in (True, False))
    if larger <= full.num_gpus:
        return ""
    return (
        f"{in_words(full.num_gpus)} does not hold the index of its {shard.points:,} points any more, and the CPU "
        f"answers for some of them; {in_words(larger)} would be taken"
    )


@lru_cache(PLANS_KEPT)
def _share_for(count: int, full: FullShare, builds: bool) -> float:
    return choose_share(count, full.config, full.memory_bytes, lambda share: builds, full.num_gpus).num_gpus


def kind_for(config: CollectionConfig, count: int) -> str:
    """The kind of index that the policy chooses for about so many points; "" where nothing meets the bounds."""
    return _kind_for(config, _rounded(count))


@lru_cache(PLANS_KEPT)
def _kind_for(config: CollectionConfig, count: int) -> str:
    try:
        return plan_index(count, config).spec.kind
    except Invalid:
        return ""


def _rounded(count: int) -> int:
    """Two digits: a count that changes with every write is planned for only now and then."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit


@lru_cache(CONFIGS_KEPT)
def largest_segment(config: CollectionConfig, gpu: GpuFacts | None = None) -> int:
    """`cluster.upkeep.largest_build`, which takes milliseconds, remembered."""
    return largest_build(config, gpu=gpu)
