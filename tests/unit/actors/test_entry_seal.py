"""Seals of what is in several logs, and of entries that nobody sees yet."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import entry_seal, segment_upkeep
from actors.entry_seal import DraftEntry, finished_entry, seal_entry
from actors.point_sums import sum_of_points
from actors.segment_rows import HashRange, LiveRows, open_part, open_span
from actors.segment_upkeep import seal_tail
from actors.shard_place import ShardPlace
from cluster.config import CollectionConfig, IndexConfig
from cluster.entry_log import end_logs
from cluster.errors import Conflict
from cluster.file_store import FileStore
from cluster.gate import PointSum
from cluster.ids import hash_ids, id_array
from cluster.manifest import Manifest, ShardEntry
from cluster.routing import slots_of_hashes
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from tests.unit.actors.points import in_row_order, publish, random_points, write_points
from tests.unit.jobs.imports import log_of
from tests.unit.jobs.rebuilds import CONFIG, Collection


def new_nonce() -> str:
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_seal, "LITTLE_POINTS", 0)
    monkeypatch.setattr(entry_seal, "LITTLE_RECORDS", 0)


def behind_all(collection: Collection, shards: int, at: int = 0) -> tuple[ShardEntry, ...]:
    """Empty entries of so many shards that have read nothing of the logs."""
    old = len(collection.newest.shards)
    positions = tuple(LogPosition(shard, at, at) for shard in range(old))
    return tuple(behind_logs(ShardEntry(shard), LogSet(0, old, positions)) for shard in range(shards))


def commit(collection: Collection, entries: tuple[ShardEntry, ...]) -> Manifest:
    base = collection.newest
    return log_of(collection.store).commit_generation(base, replace(base.config, shards=len(entries)), entries)


def end(collection: Collection) -> None:
    end_logs(collection.store, "words", collection.newest.behind, new_nonce)


def seal(collection: Collection, shard: int, **bounds: int) -> Manifest | None:
    return seal_tail(collection.store, "words", shard, collection.folder, new_nonce, **bounds)


# --- committed entries --------------------------------------------------------------------------------------------


def test_seal_reads_logs_of_earlier_sets_to_their_ends_and_the_own_log_after_them(tmp_path: Path) -> None:
    collection = Collection(replace(CONFIG, shards=2), tmp_path)
    collection.write(range(100))
    collection.write(range(50, 120), range(10))
    commit(collection, behind_all(collection, 3))
    collection.live = collection.held()
    assert len(collection.live) == 110
    end(collection)
    collection.write(range(110, 130), [20])
    for shard in range(3):
        manifest = seal(collection, shard)
        assert manifest is not None
        entry = manifest.shards[shard]
        assert (entry.behind, len(entry.segments)) == ((), 1)
    assert collection.held() == collection.live
    assert collection.newest.points == len(collection.live)
    assert not collection.newest.crossing
    assert [seal(collection, shard) for shard in range(3)] == [None] * 3
    collection.write(range(5))
    collection.seal()
    assert collection.newest.points == len(collection.live)


def test_seal_of_a_shard_that_nothing_was_written_to_arrives_all_the_same(tmp_path: Path) -> None:
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(3))
    collection.seal()
    old = collection.newest.shards[0]
    at = LogSet(0, 1, (LogPosition(0, old.applied_lsn, old.epoch),))
    commit(collection, tuple(behind_logs(ShardEntry(shard), at) for shard in range(2)))
    end(collection)
    manifest = seal(collection, 1)
    assert manifest is not None
    assert (manifest.shards[1].behind, manifest.shards[1].segments) == ((), ())
    assert manifest.shards[1].applied_lsn == old.applied_lsn + 2  # a claim and the end
    assert seal(collection, 1) is None


def test_seal_while_earlier_logs_are_written_to_is_a_conflict_before_any_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_upkeep, "read_tail", lambda *_: pytest.fail("for nothing, and again after each pause"))
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(30))
    before = commit(collection, behind_all(collection, 2))
    with pytest.raises(Conflict, match="shard 1 of 'words' still reads logs of the generation before 2"):
        seal(collection, 1)
    assert collection.newest == before


def test_seal_of_much_in_earlier_logs_makes_several_segments(tmp_path: Path) -> None:
    collection = Collection(CONFIG, tmp_path)
    for first in range(0, 100, 10):
        collection.write(range(first, first + 10))
    commit(collection, behind_all(collection, 1))
    end(collection)
    manifest = seal(collection, 0, points_max=30)
    assert manifest is not None
    assert [ref.count for ref in manifest.shards[0].segments] == [34, 33, 33]
    assert collection.held() == collection.live


# --- drafts -------------------------------------------------------------------------------------------------------


def rounds(collection: Collection, draft: DraftEntry, **bounds: Any) -> DraftEntry:
    """Until nothing is left."""
    base = collection.newest
    config = replace(base.config, shards=3)
    while True:
        place = ShardPlace(collection.store, "words", draft.entry.shard, collection.folder, new_nonce)
        before = draft
        draft, ids = seal_entry(place, draft, base, config, "draft", **bounds)
        if draft is before or not ids:
            return draft


@pytest.mark.parametrize("points_max", [7, 1_000])
def test_drafts_hold_what_was_written_since_in_rounds_of_any_size(points_max: int, tmp_path: Path) -> None:
    collection = Collection(replace(CONFIG, shards=2), tmp_path)
    drafts = [DraftEntry(entry) for entry in behind_all(collection, 3)]
    for number in range(4):
        first = 20 * number
        collection.write(range(first, first + 30), [first, first + 1])
        collection.write([first], [first + 2, 999])
        version = collection.newest.version
        drafts = [rounds(collection, draft, points_max=points_max) for draft in drafts]
        assert collection.newest.version == version
        assert sum(draft.points for draft in drafts) == len(collection.live)
    places = [ShardPlace(collection.store, "words", n, tmp_path, new_nonce) for n in range(3)]
    manifest = commit(collection, tuple(map(finished_entry, places, drafts)))
    assert manifest.points == len(collection.live)
    assert collection.held() == collection.live
    assert all(entry.behind for entry in manifest.shards)
    end(collection)
    collection.write(range(100, 110), [5])
    assert collection.held() == collection.live


def test_draft_stays_as_it_is_where_little_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_seal, "LITTLE_POINTS", 20)
    monkeypatch.setattr(entry_seal, "LITTLE_RECORDS", 3)
    collection = Collection(CONFIG, tmp_path)
    draft = DraftEntry(ShardEntry(0))
    collection.write(range(19))
    place = ShardPlace(collection.store, "words", 0, tmp_path, new_nonce)
    left, ids = seal_entry(place, draft, collection.newest, CONFIG, "draft")
    assert left is draft
    assert ids == 19
    part, ids = seal_entry(place, draft, collection.newest, CONFIG, "draft", points_max=5)
    assert (part.points, ids) == (19, 19)  # one record is not cut; and it says nothing of what comes after it
    for _ in range(2):
        collection.write([1])
    many, _ = seal_entry(place, draft, collection.newest, CONFIG, "draft")
    assert many.points == 19  # three records are not little


def test_draft_of_a_generation_that_was_replaced_is_a_conflict(tmp_path: Path) -> None:
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(5))
    base = collection.newest
    commit(collection, (ShardEntry(0),))
    place = ShardPlace(collection.store, "words", 0, tmp_path, new_nonce)
    with pytest.raises(Conflict, match="generation 2 of 'words' has replaced 1"):
        seal_entry(place, DraftEntry(ShardEntry(0)), base, CONFIG, "draft")
    assert collection.store.folders("collections/words/segments/") == []


# --- ranges of hashes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 48, 1_000, 2**20 + 1])
def test_ranges_of_hashes_are_the_slots_of_routing(slots: int) -> None:
    random = np.random.default_rng(slots)
    edges = np.array([(n * 2**32 // slots + d) % 2**32 for n in range(min(slots, 500)) for d in (-1, 0, 1)], np.uint64)
    hashes = np.concatenate([edges << np.uint64(32), random.integers(0, 2**64, 500, np.uint64)])
    for digest, slot in zip(hashes.tolist(), slots_of_hashes(hashes, slots).tolist(), strict=True):
        span = HashRange.of_slot(slot, slots)
        assert span.start <= digest < span.stop
    assert HashRange.of_slot(slots - 1, slots).stop == 2**64
    assert HashRange.of_slot(0, slots).start == 0


def test_rows_of_a_range_are_those_that_routing_gives_to_it(tmp_path: Path) -> None:
    store, config = FileStore(tmp_path / "store"), CollectionConfig(4, "l2", "string", index=IndexConfig("flat"))
    points = in_row_order(random_points(config, 500))
    refs = tuple(publish(store, "words", config, points.take(np.arange(n, 500, 3))) for n in range(3))
    entry = ShardEntry(0, refs)
    found: list[Any] = []
    for slot in range(7):
        span = HashRange.of_slot(slot, 7)
        parts = [part for ref in refs if (part := open_span(store, "words", entry, ref, tmp_path, span)) is not None]
        live = LiveRows(parts)
        schema = parts[0].rows.schema
        ids = [point_id for block in live.blocks(schema, 40) for point_id in block.column("id").to_pylist()]
        slots = slots_of_hashes(hash_ids(id_array(ids, "string")), 7)
        assert set(slots.tolist()) == {slot}
        assert live.count == len(ids)
        found += ids
    assert found == points.ids.to_pylist()


def test_only_segments_with_rows_in_a_range_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config = FileStore(tmp_path / "store"), CollectionConfig(4, "l2", index=IndexConfig("flat"))
    points = in_row_order(random_points(config, 500))
    refs = tuple(publish(store, "words", config, points.take(rows)) for rows in np.array_split(np.arange(500), 5))
    entry = ShardEntry(0, refs)
    opened = []
    monkeypatch.setattr("actors.segment_rows.open_part", lambda *args: opened.append(args[3]) or open_part(*args))
    span = HashRange.of_slot(2, 5)
    parts = [part for ref in refs if (part := open_span(store, "words", entry, ref, tmp_path, span)) is not None]
    assert 1 <= len(opened) <= 3
    assert [part.ref for part in parts] == opened


# --- sums ---------------------------------------------------------------------------------------------------------


def test_sum_of_points_tells_any_change_and_no_order(tmp_path: Path) -> None:
    config = CollectionConfig(3, "l2", index=IndexConfig("flat"))
    points = in_row_order(random_points(config, 200))
    everything = np.arange(200)
    whole = sum_of_points(write_points(new_folder(tmp_path), config, points), everything)
    halves = [write_points(new_folder(tmp_path), config, points.take(everything[n::2])) for n in range(2)]
    assert sum((sum_of_points(rows, np.arange(100)) for rows in halves), PointSum()) == whole
    assert whole.count == 200
    vectors = points.vectors.copy()
    vectors[7, 1] = np.nextafter(vectors[7, 1], np.float32(9))
    changed = write_points(new_folder(tmp_path), config, replace(points, vectors=vectors))
    assert sum_of_points(changed, everything).total != whole.total
    swapped = points.vectors[[1, 0, *range(2, 200)]]
    assert (
        sum_of_points(write_points(new_folder(tmp_path), config, replace(points, vectors=swapped)), everything) != whole
    )
    some = write_points(new_folder(tmp_path), config, points)
    assert sum_of_points(some, everything[:150]) + sum_of_points(some, everything[150:]) == whole
    assert sum_of_points(some, everything[:0]) == PointSum()


def new_folder(tmp_path: Path) -> Path:
    folder = tmp_path / new_nonce()
    folder.mkdir()
    return folder
