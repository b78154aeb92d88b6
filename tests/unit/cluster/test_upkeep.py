from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import ceil, log, log2

import pytest

from cluster.config import CollectionConfig, IndexConfig, Upkeep
from cluster.gpu_memory import GpuFacts
from cluster.index_policy import MEMORY_MARGIN
from cluster.shard_entry import SegmentRef, ShardEntry, TombstonesRef
from cluster.upkeep import (
    Merge,
    Seal,
    SegmentFacts,
    ShardFacts,
    build_bytes,
    largest_build,
    segment_facts,
    wanted_merge,
    wanted_seal,
    wanted_upkeep,
)

UPKEEP = Upkeep(seal_points=1_000, seal_bytes=50_000, seal_records=100, segments_max=4, tombstone_ratio=0.2)


def shard(*sizes: int, points_max: int = 2**40) -> ShardFacts:
    """Segments called s0, s1, ... without deleted rows."""
    return ShardFacts(tuple(SegmentFacts(f"s{n}", size) for n, size in enumerate(sizes)), points_max=points_max)


def merged(facts: ShardFacts, upkeep: Upkeep = UPKEEP) -> list[int]:
    """The live sizes of what is merged, ascending."""
    merge = wanted_merge(facts, upkeep)
    chosen = merge.segment_ids if merge is not None else ()
    return sorted(segment.live for segment in facts.segments if segment.segment_id in chosen)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (ShardFacts(tail_points=1_000), "1000 points, seal_points is 1000"),
        (ShardFacts(tail_bytes=50_000), "50000 bytes, seal_bytes"),
        (ShardFacts(tail_records=100), "100 records, seal_records"),
    ],
)
def test_tail_is_sealed_at_its_bounds(facts: ShardFacts, reason: str) -> None:
    seal = wanted_seal(facts, UPKEEP)
    assert seal is not None
    assert reason in seal.reason


def test_small_tail_is_left_alone() -> None:
    assert wanted_upkeep(ShardFacts(tail_points=999, tail_bytes=49_999, tail_records=99), UPKEEP) is None


def test_deleted_rows_are_sealed_first_and_rebuilt_then() -> None:
    upkeep = Upkeep(seal_points=1_000)
    assert wanted_upkeep(ShardFacts((SegmentFacts("s", 1_000, 200),)), upkeep) is None
    waiting = ShardFacts((SegmentFacts("s", 1_000, 201),))
    assert isinstance(wanted_upkeep(waiting, upkeep), Seal)
    assert wanted_merge(waiting, upkeep) is None  # it would drop none of them
    sealed = ShardFacts((SegmentFacts("s", 1_000, 201, 201),))
    assert wanted_upkeep(sealed, upkeep) == Merge(("s",), "201 of 1000 rows of s are deleted")


def test_few_deleted_rows_of_a_small_segment_wait_for_the_next_seal() -> None:
    assert wanted_upkeep(ShardFacts((SegmentFacts("s", 10, 10),)), Upkeep(seal_points=1_000)) is None


def test_rebuild_takes_along_what_is_smaller_and_what_is_due_as_well() -> None:
    segments = (
        SegmentFacts("huge", 100_000),
        SegmentFacts("worst", 1_000, 900, 900),
        SegmentFacts("small", 80),
        SegmentFacts("larger", 300),
        SegmentFacts("due", 500, 120, 120),
    )
    merge = wanted_merge(ShardFacts(segments), UPKEEP)
    assert merge is not None
    assert set(merge.segment_ids) == {"worst", "due", "small", "larger"}


def test_rebuild_stays_within_what_can_be_built() -> None:
    segments = (SegmentFacts("a", 1_000, 500, 500), SegmentFacts("b", 1_000, 300, 300), SegmentFacts("c", 100))
    merge = wanted_merge(ShardFacts(segments, points_max=800), UPKEEP)
    assert merge is not None
    assert set(merge.segment_ids) == {"a", "c"}


def test_merge_begins_over_segments_max() -> None:
    assert merged(shard(1, 1, 1, 1)) == []
    assert merged(shard(1, 1, 1, 1, 1)) == [1, 1, 1, 1, 1]


def test_huge_segment_is_not_rebuilt_for_small_ones() -> None:
    assert merged(shard(1_000_000, 5, 5, 5, 5)) == [5, 5, 5, 5]
    assert merged(shard(100_000, 10_000, 1_000, 100, 10, 1)) == []
    assert merged(shard(100_000, 10_000, 10_000, 100, 10, 1)) == [1, 10, 100, 10_000, 10_000]


def test_full_segments_do_not_count() -> None:
    sizes = [100] * 20
    assert merged(shard(*sizes, 5, 5, 5, 5, points_max=120)) == []
    assert merged(shard(*sizes, 5, 5, 5, 5, 5, points_max=120)) == [5, 5, 5, 5, 5]


def test_merge_stays_within_what_can_be_built() -> None:
    assert merged(shard(40, 40, 40, 40, 40, points_max=100)) == [40, 40]
    assert merged(shard(34, 36, 38, 40, 42, points_max=100)) == [34, 36]


def test_what_was_built_once_can_be_built_again() -> None:
    assert merged(shard(60, 60, 60, 60, 60, 500, points_max=10)) == [60, 60, 60, 60, 60]


def test_seal_and_merge_may_run_at_the_same_time() -> None:
    facts = ShardFacts(shard(1, 1, 1, 1, 1).segments, tail_points=5_000)
    assert isinstance(wanted_upkeep(facts, UPKEEP), Seal)
    assert isinstance(wanted_upkeep(facts, UPKEEP, {Seal}), Merge)
    assert isinstance(wanted_upkeep(facts, UPKEEP, {Merge}), Seal)
    assert wanted_upkeep(facts, UPKEEP, {Seal, Merge}) is None


def test_facts_of_an_entry() -> None:
    refs = (SegmentRef("a", 10, "x"), SegmentRef("b", 20, "y"))
    entry = ShardEntry(0, refs, 7, 1, (TombstonesRef("a", 7, 3, "z"),))
    assert segment_facts(entry) == (SegmentFacts("a", 10, 3, 3), SegmentFacts("b", 20, 0, 0))
    assert segment_facts(entry, {"a": 5, "b": 1}) == (SegmentFacts("a", 10, 5, 3), SegmentFacts("b", 20, 1, 0))


# --- a long life ------------------------------------------------------------------------------------------------


class Life:
    """Seals, deletions, and the merges that the policy asks for; counts how often points are rewritten."""

    def __init__(self, upkeep: Upkeep, points_max: int = 2**40) -> None:
        self.upkeep = upkeep
        self.points_max = points_max
        self.sizes: dict[str, tuple[int, int]] = {}  # count, deleted
        self.rewrites: dict[str, int] = {}  # at most so often was a point of the segment rewritten
        self.written = self.rewritten = self.deleted = self.made = 0

    def _add(self, count: int, rewrites: int) -> None:
        self.made += 1
        name = f"{self.made:08d}"
        self.sizes[name], self.rewrites[name] = (count, 0), rewrites

    def seal(self, count: int) -> None:
        self.written += count
        self._add(count, 0)

    def delete(self, share: float) -> None:
        for name, (count, deleted) in self.sizes.items():
            more = int((count - deleted) * share)
            self.sizes[name] = (count, deleted + more)
            self.deleted += more

    def facts(self) -> ShardFacts:
        segments = tuple(SegmentFacts(name, count, gone, gone) for name, (count, gone) in self.sizes.items())
        return ShardFacts(segments, points_max=self.points_max)

    def merge(self) -> None:
        """Until nothing more is wanted, which must come."""
        for _ in range(100):
            merge = wanted_merge(self.facts(), self.upkeep)
            if merge is None:
                return
            parts = [self.sizes.pop(name) for name in merge.segment_ids]
            total = sum(count - gone for count, gone in parts)
            most = max([self.points_max, *(count for count, _ in [*self.sizes.values(), *parts])])
            assert total <= most
            self.rewritten += total
            rewrites = 1 + max(self.rewrites.pop(name) for name in merge.segment_ids)
            if total:
                self._add(total, rewrites)
        pytest.fail("the policy never comes to rest")


def same_size(dice: random.Random) -> int:
    return 100


def any_size(dice: random.Random) -> int:
    return int(2 ** (dice.random() * 14))


def growing(dice: random.Random) -> int:
    return dice.choice([1, 10, 1_000, 50_000])


@pytest.mark.parametrize("segments_max", [1, 2, 8])
@pytest.mark.parametrize("new_size", [same_size, any_size, growing])
def test_segments_stay_few_and_points_are_rarely_rewritten(
    new_size: Callable[[random.Random], int], segments_max: int
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice, life = random.Random(seed), Life(Upkeep(segments_max=segments_max))
    for _ in range(1_500):
        life.seal(new_size(dice))
        life.merge()
        sizes = [count for count, _ in life.sizes.values()]
        assert len(sizes) <= max(segments_max, 1 + log2(max(sizes) / min(sizes)))
        assert max(life.rewrites.values()) <= log(life.written, 1.5)
    assert life.rewritten <= life.written * log2(life.written)


def test_deletions_are_paid_for_by_themselves() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice, life = random.Random(seed), Life(Upkeep())
    for _ in range(1_000):
        life.seal(any_size(dice))
        life.delete(dice.random() * 0.05)
        life.merge()
        assert all(gone <= 0.2 * count for count, gone in life.sizes.values())
    assert life.rewritten <= (life.written + life.deleted / 0.2) * log2(life.written)


def test_segments_grow_to_what_can_be_built_and_no_further() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice, life = random.Random(seed), Life(Upkeep(), points_max=100_000)
    for _ in range(1_500):
        life.seal(any_size(dice))
        life.merge()
    sizes: Sequence[int] = [count for count, _ in life.sizes.values()]
    assert max(sizes) <= 100_000
    growing_now = [size for size in sizes if 2 * size <= 100_000]
    assert len(growing_now) <= max(8, 1 + log2(100_000))
    assert len(sizes) <= 2 * life.written / 100_000 + len(growing_now)


# --- what can be built ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [8, 384, 1_536])
def test_largest_build_fits_and_is_nearly_the_largest(dimension: int) -> None:
    config = CollectionConfig(dimension)
    most = largest_build(config, 2**30)
    assert build_bytes(config, most) <= 2**30
    assert build_bytes(config, most + most // 16) > 2**30


def test_largest_build_fits_the_memory_of_the_shard() -> None:
    bounded = CollectionConfig(384, index=IndexConfig("hnsw", memory_bytes=10**8))
    assert largest_build(bounded) < 10**8 / 384
    assert largest_build(CollectionConfig(384, index=IndexConfig(memory_bytes=1))) == 1


def test_lists_that_few_points_cannot_train_do_not_keep_segments_small() -> None:
    lists = CollectionConfig(16, index=IndexConfig("ivf_flat", nlist=100))
    assert largest_build(lists, 2**20) > 5_000


def test_host_memory_of_a_gpu_s_graph_is_its_file_and_a_copy_of_the_vectors() -> None:
    there = CollectionConfig(768, index=IndexConfig("cagra", device="gpu"))
    assert build_bytes(there, 1_000_000) == ceil(1_000_000 * (4 * 768 + 4 * 64 + 16 + 4 * 768) * MEMORY_MARGIN)
    wanted = CollectionConfig(768, index=IndexConfig("cagra"))
    assert build_bytes(wanted, 1_000_000, GpuFacts()) == build_bytes(there, 1_000_000)
    assert largest_build(wanted, 2**30, GpuFacts()) == largest_build(there, 2**30) < largest_build(wanted, 2**30)
