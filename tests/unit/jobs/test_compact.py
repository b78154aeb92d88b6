"""`jobs.compact` without Ray: one segment per shard with exactly the live points."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from actors.segment_upkeep import merge_segments
from cluster.errors import Conflict, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore, open_store
from cluster.upkeep import SegmentFacts, build_bytes, largest_build
from jobs import compact
from jobs.compact import merge_groups
from jobs.report import JobStatus
from jobs.sealing import CONFLICTS_MAX
from tests.fakes import Fault, FaultyStore
from tests.unit.actors.points import keys
from tests.unit.actors.written import Written
from tests.unit.jobs.compactions import (
    ONE_SHARD,
    SEALED_GONE,
    TAIL_GONE,
    assert_compacted,
    assert_served_as_written,
    churned,
    merge_all,
    new_shards,
    run_compact,
    seal,
)
from tests.unit.jobs.imports import new_data_url

# --- what becomes of a collection -------------------------------------------------------------------------------


def test_compaction_makes_one_segment_per_shard_of_exactly_the_live_points(tmp_path: Path) -> None:
    data = new_data_url()
    shards = churned(data, tmp_path)
    before = shards[0].newest
    assert [len(entry.segments) for entry in before.shards] == [3, 3]
    assert [sum(ref.count for ref in entry.tombstones) for entry in before.shards] == [SEALED_GONE] * 2
    told = run_compact(data, tmp_path)
    for written in shards:
        assert_compacted(written)
    after = shards[0].newest
    assert after.generation == before.generation
    points, gone = [len(written.live) for written in shards], SEALED_GONE + TAIL_GONE
    assert told == {
        "points": sum(points),
        "version": after.version,
        "generation": after.generation,
        "segments_before": 6,
        "segments_after": 2,
        "tombstones_dropped": 2 * gone,
        "left": 0,
        "seconds": 0.0,
        "shards": [
            {
                "shard": shard,
                "points": points[shard],
                "segments_before": 3,
                "segments_after": 1,
                "tombstones_dropped": gone,
                "left": 0,
            }
            for shard in (0, 1)
        ],
    }


def test_compaction_again_finds_nothing_to_do(tmp_path: Path) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    run_compact(data, tmp_path)
    version, stored = written.newest.version, keys(written.store, "collections/")
    told = run_compact(data, tmp_path)
    assert (told["version"], told["tombstones_dropped"], told["segments_after"]) == (version, 0, 1)
    assert keys(written.store, "collections/") == stored


def test_compaction_of_a_collection_without_points(tmp_path: Path) -> None:
    data = new_data_url()
    written, other = new_shards(data, tmp_path)
    other.claim()
    told = run_compact(data, tmp_path)
    assert (told["points"], told["segments_after"], told["version"]) == (0, 0, 1)
    written.write([1, 2])
    written.write(deletes=[1, 2])
    told = run_compact(data, tmp_path)
    assert (told["points"], told["segments_after"]) == (0, 0)
    assert_served_as_written(written)


def test_compaction_of_a_long_tail_seals_it_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.sealing.SEAL_POINTS_MIN", 5)
    monkeypatch.setattr("jobs.sealing.SEAL_POINTS_MAX", 5)
    data = new_data_url()
    (written,) = new_shards(data, tmp_path, ONE_SHARD)
    for number in range(6):
        written.write([3 * number, 3 * number + 1, 30], deletes=[3 * number + 2])
    told = run_compact(data, tmp_path)
    assert (told["segments_before"], told["tombstones_dropped"]) == (0, 2)  # point 30, written again in each seal
    assert_compacted(written)


def test_progress_of_a_long_tail_never_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows beforehand how much of it one seal takes."""
    monkeypatch.setattr("jobs.sealing.SEAL_POINTS_MIN", 5)
    monkeypatch.setattr("jobs.sealing.SEAL_POINTS_MAX", 5)
    data = new_data_url()
    (written,) = new_shards(data, tmp_path, ONE_SHARD)
    for number in range(6):
        written.write([3 * number, 3 * number + 1, 30])
    seen: list[JobStatus] = []
    run_compact(data, tmp_path, listener=seen.append)
    shares = [status.progress for status in seen if status.phase == "compact"]
    assert shares == sorted(shares)
    assert len({share for share in shares if share < compact.SEAL_SHARE}) > 3


def test_compaction_of_one_shard_leaves_the_others_alone(tmp_path: Path) -> None:
    data = new_data_url()
    first, second = churned(data, tmp_path)
    before = first.newest
    told = run_compact(data, tmp_path, shard=1)
    assert [each["shard"] for each in told["shards"]] == [1]
    assert told["segments_before"] == 3
    assert first.newest.shards[0] == before.shards[0]
    assert_served_as_written(first)
    assert_compacted(second)


def test_shard_or_collection_that_is_not_there_is_refused(tmp_path: Path) -> None:
    data = new_data_url()
    new_shards(data, tmp_path)
    with pytest.raises(Invalid, match="shards 0 to 1") as error:
        run_compact(data, tmp_path, shard=2)
    assert [each.field for each in error.value.errors] == ["shard"]
    with pytest.raises(NotFound, match="others"):
        run_compact(data, tmp_path, collection="others")
    with pytest.raises(Invalid):
        run_compact(data, tmp_path, collection="../words")


def test_memory_bound_gives_as_few_segments_as_it_takes(tmp_path: Path) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    memory_bytes = ceil(build_bytes(ONE_SHARD, 21))
    most = largest_build(ONE_SHARD, memory_bytes)
    told = run_compact(data, tmp_path, memory_bytes=memory_bytes)
    entry = written.newest.shards[0]
    counts = sorted(ref.count for ref in entry.segments)
    assert told["segments_after"] == len(counts) > 1
    assert counts[-1] <= most < counts[0] + counts[1]
    assert (told["left"], entry.tombstones, sum(counts)) == (0, (), len(written.live))
    assert_served_as_written(written)


def test_tail_is_not_sealed_point_by_point_however_little_memory_there_is(tmp_path: Path) -> None:
    data = new_data_url()
    (written,) = new_shards(data, tmp_path, ONE_SHARD)
    for number in range(12):
        written.write([number])
    assert run_compact(data, tmp_path, memory_bytes=1)["segments_after"] == 1
    assert_served_as_written(written)


def test_memory_bound_holds_for_what_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.sealing.SEAL_POINTS_MIN", 1)
    data = new_data_url()
    (written,) = new_shards(data, tmp_path, ONE_SHARD)
    for number in range(10):
        written.write(list(range(5 * number, 5 * number + 5)))
    memory_bytes = ceil(build_bytes(ONE_SHARD, 14))
    run_compact(data, tmp_path, memory_bytes=memory_bytes)
    most = largest_build(ONE_SHARD, memory_bytes)
    counts = [ref.count for ref in written.newest.shards[0].segments]
    assert sum(counts) == 50
    assert max(counts) < most + 5, "of the records that a seal takes only the last goes over the bound"
    assert_served_as_written(written)


def test_segment_that_memory_is_too_small_for_is_left_and_told(tmp_path: Path) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    largest = written.newest.shards[0].segments[0]
    told = run_compact(data, tmp_path, memory_bytes=ceil(build_bytes(ONE_SHARD, 12)))
    assert largest in written.newest.shards[0].segments
    assert told["left"] == 1
    assert_served_as_written(written)


def test_groups_are_disjoint_fit_and_leave_no_deleted_rows_that_fit() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    for _ in range(500):
        most = dice.randint(1, 60)
        segments = []
        for number in range(dice.randint(0, 9)):
            count = dice.randint(1, 80)
            gone = dice.choice((0, dice.randint(0, count)))
            segments.append(SegmentFacts(f"s{number}", count, gone, gone))
        by_name = {segment.segment_id: segment for segment in segments}
        groups = merge_groups(segments, most)
        merged = [name for group in groups for name in group]
        assert len(set(merged)) == len(merged)
        assert all(sum(by_name[name].live for name in group) <= most for group in groups)
        left = [segment for segment in segments if segment.segment_id not in merged]
        assert all(segment.live > most for segment in left if segment.sealed_tombstones)
        after = sorted([sum(by_name[n].live for n in g) for g in groups] + [segment.live for segment in left])
        small = [live for live in after if 2 * live <= most]
        assert len(small) <= 1, (segments, most)
        if sum(segment.live for segment in segments) <= most:
            assert len(after) <= 1


# --- others at the same time ------------------------------------------------------------------------------------


class BusyStore:
    """Before each of the first `times` commits of a manifest something else is done."""

    def __init__(self, inner: ObjectStore, others: Callable[[], None], times: int = 1) -> None:
        self._inner = inner
        self._others = others
        self.left = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if "/manifest/" in key and self.left:
            self.left -= 1
            self._others()
        return self._inner.put_if_absent(key, data)


def use_in_tasks(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    monkeypatch.setattr(compact, "open_store", lambda url: store)


def write_and_seal(written: Written) -> None:
    written.write([500 + written.lsn], deletes=[5])
    seal(written)


@pytest.mark.parametrize("others", [seal, merge_all, write_and_seal])
def test_conflict_with_the_shards_own_upkeep_is_tried_again(
    others: Callable[[Written], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    store = BusyStore(written.store, lambda: others(written), times=2)
    use_in_tasks(monkeypatch, store)
    run_compact(data, tmp_path)
    assert store.left == 0
    assert_served_as_written(written)
    use_in_tasks(monkeypatch, written.store)
    run_compact(data, tmp_path)
    assert_compacted(written)


def test_tail_is_sealed_in_the_generation_that_is_committed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    before = written.newest

    def rebuilt() -> None:
        written.log.commit_generation(before, before.config, before.shards)

    use_in_tasks(monkeypatch, BusyStore(written.store, rebuilt))
    assert run_compact(data, tmp_path)["generation"] == before.generation + 1
    assert_compacted(written)


def test_merge_that_conflicts_is_planned_again_on_what_there_is_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    seal(written)
    tried: list[tuple[str, ...]] = []

    def merge(*place: Any, progress: Any) -> Manifest | None:
        tried.append(place[3])
        if len(tried) == 1:
            merge_segments(*place[:3], place[3][:2], *place[4:])  # the shard's own is faster
        return merge_segments(*place, progress=progress)

    monkeypatch.setattr(compact, "merge_segments", merge)
    run_compact(data, tmp_path)
    assert [len(names) for names in tried] == [4, 3]
    assert_compacted(written)


def test_conflicts_without_end_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def overtaken(*place: Any, progress: Any) -> Manifest | None:
        calls.append(place)
        raise Conflict("overtaken")

    monkeypatch.setattr(compact, "merge_segments", overtaken)
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    with pytest.raises(Conflict, match="overtaken"):
        run_compact(data, tmp_path)
    assert len(calls) == CONFLICTS_MAX + 1
    assert_served_as_written(written)


def test_collection_that_is_deleted_meanwhile_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    use_in_tasks(monkeypatch, BusyStore(written.store, lambda: written.log.delete() and None))
    with pytest.raises(NotFound):
        run_compact(data, tmp_path)


# --- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["fail", "lose_answer"])
def test_failing_store_loses_nothing_and_the_job_succeeds_when_it_is_run_again(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (original,) = churned(new_data_url(), tmp_path / "original", ONE_SHARD)
    stored = {key: original.store.get(key) for key in keys(original.store, "collections/")}
    for at in range(1, 300):
        data, folder = new_data_url(), tmp_path / str(at)
        written = replace(original, store=open_store(data), cache_dir=folder)
        for key, content in stored.items():
            written.store.put(key, content)
        failing = FaultyStore(written.store, at, fault)
        use_in_tasks(monkeypatch, failing)
        failed = False
        try:
            run_compact(data, folder)
        except Unavailable:
            failed = True
        assert written.held() == written.live
        if failing.calls < at:
            assert not failed
            break
        if at % 3 == 0:
            use_in_tasks(monkeypatch, written.store)
            run_compact(data, folder)
            assert_compacted(written)
    else:
        pytest.fail("the compaction never ends")
    assert at > 20


def test_progress_grows_over_all_shards_and_what_is_told_can_be_written(tmp_path: Path) -> None:
    data = new_data_url()
    churned(data, tmp_path)
    seen: list[JobStatus] = []
    run_compact(data, tmp_path, listener=seen.append)
    shares = [status.progress for status in seen if status.phase == "compact"]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 0.99)
    assert any(0.05 < share < 0.5 for share in shares)
    assert any(0.5 < share < 0.95 for share in shares)
