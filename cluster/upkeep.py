"""When a shard's tail is sealed into a segment, and which of its segments are merged. Pure functions of plain data.

Merges are size-tiered: one writes points only into a segment of at least 1.5 times the size of the one they come from,
so that a point is rewritten at most log1.5(n) times by merges in all (rebuilds that drop deleted rows come on top, and
are paid for by the deletions), and a huge segment is not rebuilt for the sake of small ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from cluster.config import CollectionConfig, Upkeep
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts, host_build_bytes
from cluster.index_policy import MEMORY_MARGIN, plan_index
from cluster.index_spec import clamped_nlist
from cluster.shard_entry import ShardEntry

MERGE_BYTES_MAX = 4 * 1024**3  # for building one segment, where nothing else is said: what an import takes
POINTS_MAX = 2**40  # of a segment, whatever memory there is
GROWTH_SHARE = 2  # a merge takes in no segment larger than this many times the others together
SEALED_SHARE = 10  # deleted rows are sealed for the sake of a merge from this fraction of `seal_points` on


@dataclass(frozen=True)
class SegmentFacts:
    """`tombstones` are its rows that are deleted now, `sealed_tombstones` those of them that the manifest names.

    A merge drops only the latter, so that only they can ask for one.
    """

    segment_id: str
    count: int
    tombstones: int = 0
    sealed_tombstones: int = 0

    @property
    def live(self) -> int:
        """The rows that a merge would write."""
        return self.count - self.sealed_tombstones


@dataclass(frozen=True)
class ShardFacts:
    """What upkeep is decided on. The tail is what lies in the WAL after the manifest's LSN: live points, bytes of
    all points, records. `points_max` is the largest segment that may be made (`largest_build`)."""

    segments: tuple[SegmentFacts, ...] = ()
    tail_points: int = 0
    tail_bytes: int = 0
    tail_records: int = 0
    points_max: int = POINTS_MAX


@dataclass(frozen=True)
class Seal:
    """Make a segment of the tail (`actors.segment_upkeep.seal_tail`)."""

    reason: str


@dataclass(frozen=True)
class Merge:
    """Make one segment of these (`actors.segment_upkeep.merge_segments`)."""

    segment_ids: tuple[str, ...]
    reason: str


def segment_facts(entry: ShardEntry, tombstones: Mapping[str, int] | None = None) -> tuple[SegmentFacts, ...]:
    """Of a manifest's entry, and the deleted rows by segment as a replica has them; None: as the manifest has them."""
    sealed = {ref.segment_id: ref.count for ref in entry.tombstones}
    now = sealed if tombstones is None else tombstones
    return tuple(
        SegmentFacts(ref.segment_id, ref.count, now.get(ref.segment_id, 0), sealed.get(ref.segment_id, 0))
        for ref in entry.segments
    )


def wanted_upkeep(
    facts: ShardFacts, upkeep: Upkeep, under_way: Collection[type[Seal | Merge]] = ()
) -> Seal | Merge | None:
    """The next thing to do, the seal first; None where nothing is to be done.

    `under_way` are the kinds that are being done already: one seal and one merge may run at the same time, so that a
    long merge does not keep the tail from being sealed, nor seals the merge.
    """
    seal = None if Seal in under_way else wanted_seal(facts, upkeep)
    return seal or (None if Merge in under_way else wanted_merge(facts, upkeep))


def wanted_seal(facts: ShardFacts, upkeep: Upkeep) -> Seal | None:
    for what, value, bound in (
        ("points", facts.tail_points, upkeep.seal_points),
        ("bytes", facts.tail_bytes, upkeep.seal_bytes),
        ("records", facts.tail_records, upkeep.seal_records),
    ):
        if value >= bound:
            return Seal(f"the tail has {value} {what}, seal_{what} is {bound}")
    for segment in facts.segments:
        if _waits_for_seal(segment, upkeep):
            return Seal(f"{segment.tombstones} of {segment.count} rows of {segment.segment_id} are deleted")
    return None


def _waits_for_seal(segment: SegmentFacts, upkeep: Upkeep) -> bool:
    """Whether a segment is due for a rebuild once its deleted rows are in the manifest, and these are worth a seal."""
    bound = upkeep.tombstone_ratio * segment.count
    unsealed = segment.tombstones - segment.sealed_tombstones
    worth = unsealed >= max(1, upkeep.seal_points // SEALED_SHARE)
    return worth and segment.tombstones > bound >= segment.sealed_tombstones


def wanted_merge(facts: ShardFacts, upkeep: Upkeep) -> Merge | None:
    """A rebuild of what has too many deleted rows; else, with more than `segments_max`, a merge of small ones.

    A segment of more than half of the most points does not count: it cannot grow much. There stay more than
    `segments_max` only where each is more than twice as large as the next smaller one.
    """
    most = max([facts.points_max, *(segment.count for segment in facts.segments)])  # what was built can be built again
    heavy = [s for s in facts.segments if s.sealed_tombstones > upkeep.tombstone_ratio * s.count]
    if heavy:
        return _rebuild(heavy, facts.segments, most)
    growing = sorted((s for s in facts.segments if 2 * s.live <= most), key=lambda s: (s.live, s.segment_id))
    if len(growing) <= upkeep.segments_max:
        return None
    window = _first_window([segment.live for segment in growing], most)
    names = tuple(segment.segment_id for segment in growing[slice(*window)])
    reason = f"{len(growing)} segments may grow, segments_max is {upkeep.segments_max}"
    return Merge(names, reason) if names else None


def _rebuild(heavy: Sequence[SegmentFacts], segments: Sequence[SegmentFacts], most: int) -> Merge:
    """The one with the largest share of deleted rows, others with too many, and what is smaller than these."""
    worst = max(heavy, key=lambda s: (s.sealed_tombstones / s.count, s.segment_id))
    chosen, total = [worst], worst.live
    for candidates, any_size in ((heavy, True), (segments, False)):
        for segment in sorted(candidates, key=lambda s: (s.live, s.segment_id)):
            if segment not in chosen and total + segment.live <= most and (any_size or segment.live <= total):
                chosen.append(segment)
                total += segment.live
    reason = f"{worst.sealed_tombstones} of {worst.count} rows of {worst.segment_id} are deleted"
    return Merge(tuple(segment.segment_id for segment in chosen), reason)


def _first_window(sizes: Sequence[int], most: int) -> tuple[int, int]:
    """(start, stop) of the smallest of the ascending sizes that go together; (0, 0) where none do."""
    for start in range(len(sizes)):
        stop = _window_from(sizes, start, most)
        if stop:
            return start, stop
    return 0, 0


def _window_from(sizes: Sequence[int], start: int, most: int) -> int:
    """How far to merge from `start` on, so that the whole is at least 1.5 times the largest part; 0: it cannot be."""
    total, found = sizes[start], 0
    for position in range(start + 1, len(sizes)):
        size = sizes[position]
        fits = size <= (total if found else GROWTH_SHARE * total)
        if total + size > most or (found and not fits):
            break
        total += size
        if fits:
            found = position + 1
    return found


def largest_build(config: CollectionConfig, memory_bytes: int = MERGE_BYTES_MAX, gpu: GpuFacts | None = None) -> int:
    """The most points of a segment, at least one, whose index is built in `memory_bytes`, and fits the config's own."""
    fitting, too_many = 1, 2
    while too_many < POINTS_MAX and build_bytes(config, too_many, gpu) <= memory_bytes:
        fitting, too_many = too_many, 2 * too_many
    while too_many - fitting > max(1, fitting // 64):
        middle = (fitting + too_many) // 2
        if build_bytes(config, middle, gpu) <= memory_bytes:
            fitting = middle
        else:
            too_many = middle
    return fitting


def build_bytes(config: CollectionConfig, count: int, gpu: GpuFacts | None = None) -> float:
    """Host memory of building an index of `count` points, its training sample with it; infinite where no index fits.

    Of so few that the config's lists cannot be trained it is that of as many lists as they allow.
    """
    lists = config.index.nlist
    if lists is not None and clamped_nlist(lists, count) < lists:
        config = replace(config, index=replace(config.index, nlist=None))
    try:
        spec = plan_index(count, config, gpu=gpu).spec
    except Invalid:
        return float("inf")
    return ceil((spec.predicted_bytes + host_build_bytes(spec, count, config.dimension)) * MEMORY_MARGIN)
