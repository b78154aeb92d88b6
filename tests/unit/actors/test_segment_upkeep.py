from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import segment_upkeep, shard_place
from actors.segment_rows import open_rows
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from actors.shard_place import ShardPlace
from cluster import paths
from cluster.config import CollectionConfig, IdType, IndexConfig, VectorDtype
from cluster.errors import Conflict, Corrupt, NotFound, Unavailable
from cluster.ids import id_array
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.segment import SegmentDescription
from tests.fakes import Fault, FaultyStore
from tests.unit.actors.points import flipped, keys
from tests.unit.actors.written import COLLECTION, Written

CONFIG = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))


def new_nonce() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def shard(tmp_path: Path) -> Written:
    return new_shard(tmp_path)


def new_shard(folder: Path, config: CollectionConfig = CONFIG) -> Written:
    written = Written(MemoryStore(), config, folder)
    written.create()
    return written


def seal(written: Written, store: ObjectStore | None = None, **bounds: int) -> Manifest | None:
    return seal_tail(store or written.store, COLLECTION, written.shard, written.cache_dir, new_nonce, **bounds)


def merge(written: Written, *names: str, store: ObjectStore | None = None) -> Manifest | None:
    chosen = names or tuple(written.segments)
    return merge_segments(store or written.store, COLLECTION, written.shard, chosen, written.cache_dir, new_nonce)


def schema_of(written: Written, place: int = -1) -> Any:
    ref = written.newest.shards[written.shard].segments[place]
    return open_rows(written.store, COLLECTION, ref, written.cache_dir).schema


def names(*values: str | None) -> Any:
    return pa.array(values, pa.large_string())


def assert_as_written(written: Written) -> None:
    """The store holds exactly the live points, and a replica that loads it serves them."""
    assert written.held() == written.live
    replica = Shard(written.store, COLLECTION, written.shard, written.cache_dir)
    view = replica.load()
    assert (view.points, replica.applied_lsn) == (len(written.live), written.lsn)
    if written.live:
        ids = id_array(list(written.live), written.config.id_type)
        found, table = replica.fetch(view.generation, ids, ["id", "vector"])
        assert found.all()
        assert [row["vector"] for row in table.to_pylist()] == [vector for vector, _ in written.live.values()]


# --- seal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_seal_makes_a_segment_of_what_is_live_in_the_tail(id_type: IdType, dtype: VectorDtype, tmp_path: Path) -> None:
    written = new_shard(tmp_path, CollectionConfig(4, "l2", id_type, vector_dtype=dtype))
    ids = [-7, 0, 1, 2, 2**63 - 1, -(2**63)] if id_type == "int64" else ["", "a", "b", "ß", "c", "d" * 50]
    written.claim()
    written.write(ids[:4])
    written.write([ids[1], ids[4]], deletes=[ids[0]])
    written.write([ids[5]], deletes=[ids[2], ids[1]])
    written.write([ids[1]])
    manifest = seal(written)
    assert manifest is not None
    (entry,) = manifest.shards
    assert (entry.applied_lsn, entry.epoch, entry.points, len(entry.segments)) == (5, 2, 4, 1)
    assert manifest.generation == 1
    assert entry.tombstones == ()
    assert_as_written(written)


def test_seal_marks_replaced_and_deleted_rows_of_all_other_segments(shard: Written) -> None:
    shard.import_points(40, segments=2)
    ids = list(shard.live)
    shard.write([ids[0], ids[30], 10_000], deletes=[ids[1], ids[35], 20_000], name=names("x", None, "z"))
    manifest = seal(shard)
    assert manifest is not None
    assert [ref.count for ref in manifest.shards[0].tombstones] == [2, 2]
    assert_as_written(shard)
    shard.write([ids[0]], deletes=[ids[2]])
    manifest = seal(shard)
    assert manifest is not None
    assert [ref.lsn for ref in manifest.shards[0].tombstones] == [2, 1, 2]  # of the second segment nothing changed
    assert_as_written(shard)


def test_seal_of_deletes_alone_commits_their_tombstones(shard: Written) -> None:
    shard.import_points(20)
    before = shard.segments
    shard.write(deletes=list(shard.live)[:3])
    manifest = seal(shard)
    assert manifest is not None
    assert (shard.segments, manifest.shards[0].points, manifest.shards[0].applied_lsn) == (before, 17, 1)
    assert_as_written(shard)


def test_seal_drops_a_segment_without_live_rows(shard: Written) -> None:
    shard.import_points(20, segments=2)
    first, second = shard.newest.shards[0].segments
    rows = open_rows(shard.store, COLLECTION, first, shard.cache_dir)
    shard.write(deletes=rows.ids().to_pylist())
    seal(shard)
    assert shard.segments == [second.segment_id]
    assert_as_written(shard)
    shard.write(deletes=list(shard.live))
    seal(shard)
    assert shard.segments == []
    assert_as_written(shard)


def test_seal_without_writes_does_nothing(shard: Written) -> None:
    assert seal(shard) is None
    shard.claim()
    shard.claim()
    assert seal(shard) is None
    shard.write([1])
    assert seal(shard) is not None
    assert seal(shard) is None


def test_seal_of_a_long_wal_ends_with_a_record(shard: Written) -> None:
    for number in range(6):
        shard.write([3 * number, 3 * number + 1, 1_000], deletes=[3 * number + 2])
    ends = []
    while (manifest := seal(shard, points_max=5)) is not None:
        ends.append(manifest.shards[0].applied_lsn)
        assert_as_written(shard)
    assert ends == [2, 4, 6]


def test_seal_is_bounded_by_bytes(shard: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_upkeep, "SEAL_BYTES_MAX", 1)
    shard.write([1])
    shard.write([2])
    manifest = seal(shard)
    assert manifest is not None
    assert manifest.shards[0].applied_lsn == 1


def test_seal_keeps_attributes_in_the_types_that_the_collection_has(shard: Written) -> None:
    shard.import_points(5)
    shard.log.declare_attributes({"rank": "int64", "unused": "double"})
    shard.write([1, 2], rank=pa.array([7, None]), name=names("one", None))
    shard.write([3], loose=pa.array([True]))
    seal(shard)
    types = {field.name: str(field.type) for field in schema_of(shard)}
    assert types["name"] == "large_string"
    assert (types["rank"], types["unused"], types["loose"]) == ("int64", "double", "bool")
    assert_as_written(shard)


def test_seal_makes_values_null_that_do_not_fit_the_type_of_an_import(
    shard: Written, caplog: pytest.LogCaptureFixture
) -> None:
    shard.import_points(5)
    shard.write([1, 2, 3], name=pa.array([b"\xff\xfe", b"good", None]))
    seal(shard)
    assert "1 values of attribute 'name' become null" in caplog.text
    held = shard.held()
    assert [held[point_id][1] for point_id in (1, 2, 3)] == [{}, {"name": "good"}, {}]


def test_seal_of_dictionary_columns_that_differ(shard: Written) -> None:
    for number, word in enumerate(("noun", "verb", "noun")):
        shard.write([number], pos=pa.array([word]).dictionary_encode())
    seal(shard)
    assert str(schema_of(shard).field("pos").type) == "string"
    assert_as_written(shard)


def test_rows_of_a_seal_are_ordered_as_those_of_any_segment(shard: Written) -> None:
    shard.write(list(range(500)))
    seal(shard)
    ref = shard.newest.shards[0].segments[0]
    rows = open_rows(shard.store, COLLECTION, ref, shard.cache_dir)
    table = rows.take(np.arange(ref.count), ["id", "id_hash"])
    hashes = table.column("id_hash").to_numpy()
    assert (hashes[1:] > hashes[:-1]).all()
    assert rows.rows_of_ids(table.column("id")).tolist() == list(range(500))


def test_ids_of_equal_hash_are_told_apart(shard: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_hash(ids: Any) -> Any:
        return np.full(len(ids), 7, dtype=np.uint64)

    for module in ("actors.tail_rows.hash_ids", "cluster.segment.hash_ids", "actors.live_generation.hash_ids"):
        monkeypatch.setattr(module, one_hash)
    monkeypatch.setattr("actors.tail.hash_ids", one_hash)
    shard.write([5, 3, 9])
    shard.write([3, 1], deletes=[9])
    seal(shard)
    shard.write([2, 3], deletes=[5])
    seal(shard)
    assert_as_written(shard)
    merge(shard)
    assert len(shard.segments) == 1
    assert_as_written(shard)


def description_of(written: Written, place: int = -1) -> SegmentDescription:
    key = paths.segment_file(COLLECTION, written.segments[place], paths.DESCRIPTION)
    return SegmentDescription.decode(written.store.get(key), key)


def test_seal_gives_its_segment_a_share_of_the_shards_memory(tmp_path: Path) -> None:
    config = CollectionConfig(64, index=IndexConfig(memory_bytes=700_000))
    written = new_shard(tmp_path, config)
    written.write(list(range(2_000)))
    seal(written)
    assert description_of(written).spec["kind"] == "flat"  # all of it: 512 kB
    written.write(list(range(2_000, 4_000)))
    seal(written)
    assert description_of(written).spec["kind"] != "flat"  # half of it


@pytest.mark.parametrize(
    "index",
    [
        IndexConfig(memory_bytes=10),
        IndexConfig("ivf_flat", nlist=100),
        IndexConfig("factory", factory="IVF512,PQ4x12"),
    ],
)
def test_seal_of_too_few_points_for_the_index_is_done_nevertheless(
    index: IndexConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = new_shard(tmp_path, CollectionConfig(16, metric="l2", index=index))
    written.write(list(range(20)))
    seal(written)
    assert "is built" in caplog.text
    assert_as_written(written)


# --- merge ------------------------------------------------------------------------------------------------------


def churned(written: Written, seed: int = 5) -> None:
    """An import of two segments and two seals, with replaced and deleted points in all but the last, and a tail."""
    written.import_points(40, segments=2)
    ids = list(written.live)
    written.write([*ids[:5], *range(9_000, 9_010)], deletes=ids[38:])
    seal(written)
    written.write([*ids[5:8], 9_000, 9_001, 9_500], deletes=[9_002], name=names(*"abcdef"))
    seal(written)
    written.write([ids[9], 9_003], deletes=[ids[10], 9_500])


def test_merge_makes_one_segment_of_the_live_rows(shard: Written) -> None:
    churned(shard)
    before = shard.newest.shards[0]
    manifest = merge(shard)
    assert manifest is not None
    (entry,) = manifest.shards
    assert [ref.count for ref in entry.segments] == [before.points]
    assert entry.tombstones == ()
    assert (entry.applied_lsn, entry.epoch, manifest.generation) == (2, 1, 2)
    assert_as_written(shard)


def test_merge_of_some_leaves_the_others_alone(shard: Written) -> None:
    churned(shard)
    first, second, third, fourth = shard.newest.shards[0].segments
    manifest = merge(shard, third.segment_id, second.segment_id)
    assert manifest is not None
    (entry,) = manifest.shards
    assert [entry.segments[0], entry.segments[2]] == [first, fourth]
    assert_as_written(shard)


def test_merge_of_one_segment_drops_its_deleted_rows(shard: Written) -> None:
    shard.import_points(20)
    shard.write(deletes=list(shard.live)[:7])
    seal(shard)
    manifest = merge(shard)
    assert manifest is not None
    assert [ref.count for ref in manifest.shards[0].segments] == [13]
    assert_as_written(shard)


def test_merge_unites_the_attributes(shard: Written) -> None:
    shard.import_points(5)
    shard.write([1], rank=pa.array([7]))
    seal(shard)
    shard.write([2], more=pa.array(["x"]))
    seal(shard)
    merge(shard)
    assert set(schema_of(shard).names) == {"id", "vector", "id_hash", "name", "rank", "more"}
    assert_as_written(shard)


def test_merged_rows_are_written_in_blocks(shard: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    churned(shard)
    monkeypatch.setattr(shard_place, "rows_per_batch", lambda config: 7)
    merge(shard)
    assert description_of(shard).rows_per_batch == 7
    assert_as_written(shard)


def test_merge_of_nothing_does_nothing(shard: Written) -> None:
    assert merge(shard) is None


def test_merge_of_a_segment_that_is_gone_is_a_conflict(shard: Written) -> None:
    churned(shard)
    old = shard.segments
    merge(shard, *old[:2])
    with pytest.raises(Conflict, match="is no segment of the newest version"):
        merge(shard, *old[1:])


def test_point_that_is_live_in_two_segments_is_corrupt(shard: Written) -> None:
    shard.import_points(10, seed=1)
    entry = shard.newest.shards[0]
    shard.import_points(10, seed=1)
    other = shard.newest.shards[0]
    both = type(entry)(0, entry.segments + other.segments)
    shard.log.commit_shards(shard.newest, {0: both})
    with pytest.raises(Corrupt, match="is live in another one as well"):
        merge(shard)


# --- others commit meanwhile ------------------------------------------------------------------------------------


class BeforeCommit:
    """The store; before the first manifest is put through it something else is done."""

    def __init__(self, inner: ObjectStore, action: Callable[[], object]) -> None:
        self._inner = inner
        self._action: Callable[[], object] | None = action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if "/manifest/" in key and self._action is not None:
            action, self._action = self._action, None
            action()
        return self._inner.put_if_absent(key, data)


def segments_in_store(written: Written) -> set[str]:
    return {key.split("/")[3] for key in keys(written.store, paths.segments_prefix(COLLECTION))}


def test_seal_takes_a_merge_that_is_committed_meanwhile_into_account(shard: Written) -> None:
    churned(shard)
    manifest = seal(shard, BeforeCommit(shard.store, lambda: merge(shard)))
    assert manifest is not None
    assert len(manifest.shards[0].segments) == 2
    assert_as_written(shard)


def test_merge_marks_rows_that_are_deleted_meanwhile(shard: Written) -> None:
    churned(shard)
    old = shard.segments
    manifest = merge(shard, store=BeforeCommit(shard.store, lambda: seal(shard)))
    assert manifest is not None
    merged, sealed = manifest.shards[0].segments
    assert {merged.segment_id, sealed.segment_id}.isdisjoint(old)
    assert [(ref.segment_id, ref.count) for ref in manifest.shards[0].tombstones] == [(merged.segment_id, 4)]
    assert manifest.shards[0].applied_lsn == 3
    assert_as_written(shard)


def test_merge_whose_rows_are_all_deleted_meanwhile_leaves_no_segment(shard: Written) -> None:
    shard.import_points(10)
    first = shard.newest.shards[0].segments[0]
    ids = list(shard.live)
    shard.write([5_000])
    seal(shard)
    shard.write(deletes=ids[:9])
    seal(shard)

    def delete_the_last() -> None:  # as a seal does that keeps the segment
        shard.write(deletes=ids[9:])
        entry = shard.newest.shards[0]
        place = ShardPlace(shard.store, COLLECTION, 0, shard.cache_dir, new_nonce)
        ref = place.tombstones(shard.lsn, first.segment_id, np.arange(10))
        after = type(entry)(0, entry.segments, shard.lsn, entry.epoch, (ref,))
        shard.log.commit_shards(shard.newest, {0: after})

    manifest = merge(shard, first.segment_id, store=BeforeCommit(shard.store, delete_the_last))
    assert manifest is not None
    assert [ref.count for ref in manifest.shards[0].segments] == [1]
    assert segments_in_store(shard) == {first.segment_id, *shard.segments}
    assert_as_written(shard)


def test_seal_that_another_seal_overtakes_gives_up_and_leaves_no_segment(shard: Written) -> None:
    churned(shard)
    with pytest.raises(Conflict, match="another seal has applied LSN 3"):
        seal(shard, BeforeCommit(shard.store, lambda: seal(shard)))
    assert segments_in_store(shard) == set(shard.segments)
    assert_as_written(shard)


@pytest.mark.parametrize("work", [seal, lambda written, store: merge(written, store=store)], ids=["seal", "merge"])
def test_import_and_deletion_end_the_upkeep_of_what_was_before(work: Callable[..., Any], shard: Written) -> None:
    churned(shard)
    old = segments_in_store(shard)
    with pytest.raises(Conflict, match="generation 3"):
        work(shard, store=BeforeCommit(shard.store, lambda: shard.import_points(10, seed=9)))
    assert segments_in_store(shard) == old | set(shard.segments)
    assert_as_written(shard)
    churned(shard)
    old = segments_in_store(shard)
    with pytest.raises(Conflict, match="deleted meanwhile"):
        work(shard, store=BeforeCommit(shard.store, shard.log.delete))
    assert segments_in_store(shard) == old
    with pytest.raises(NotFound):
        work(shard, store=shard.store)


def test_declaration_of_an_attribute_meanwhile_is_no_conflict(shard: Written) -> None:
    churned(shard)
    store = BeforeCommit(shard.store, lambda: shard.log.declare_attributes({"rank": "int64"}))
    manifest = seal(shard, store)
    assert manifest is not None
    assert manifest.attributes == {"rank": "int64"}
    assert_as_written(shard)


def test_upkeep_of_a_shard_that_is_not_there_is_refused(shard: Written) -> None:
    shard.write([1])
    shard.shard = 1
    with pytest.raises(NotFound, match="no shard 1"):
        seal(shard)


# --- failures ---------------------------------------------------------------------------------------------------


def copied(written: Written) -> Written:
    store = MemoryStore()
    for key in keys(written.store, "collections/"):
        store.put(key, written.store.get(key))
    return replace(written, store=store, live=dict(written.live))


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
@pytest.mark.parametrize("work", [seal, lambda written, store: merge(written, store=store)], ids=["seal", "merge"])
def test_failing_store_loses_nothing_whichever_call_fails(
    work: Callable[..., Any], fault: Fault, tmp_path: Path
) -> None:
    original = new_shard(tmp_path)
    churned(original)
    for at in range(1, 200):
        written = copied(original)
        failing = FaultyStore(written.store, at, fault)
        failed = False
        try:
            work(written, store=failing)
        except Unavailable:
            failed = True
        assert written.held() == written.live
        assert set(written.segments) <= segments_in_store(written)
        if failing.calls < at:
            assert not failed
            break
        work(written, store=written.store)
        assert_as_written(written)
    else:
        pytest.fail("the upkeep never ends")


def test_corrupt_rows_are_not_merged(shard: Written) -> None:
    churned(shard)
    key = paths.segment_file(COLLECTION, shard.segments[0], paths.ROWS)
    before = shard.newest
    shard.store.put(key, flipped(shard.store.get(key), 1_000))
    shard.cache_dir /= "empty"
    for work in (seal, merge):
        with pytest.raises(Corrupt, match=key):
            work(shard)
    assert shard.newest == before


def test_corrupt_record_is_not_sealed(shard: Written) -> None:
    churned(shard)
    key, before = paths.wal_record(COLLECTION, 0, 3), shard.newest
    shard.store.put(key, flipped(shard.store.get(key), 300))
    with pytest.raises(Corrupt, match=key):
        seal(shard)
    assert shard.newest == before


# --- long runs --------------------------------------------------------------------------------------------------


def test_random_writes_seals_and_merges_hold_what_was_written(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    written = new_shard(tmp_path, CollectionConfig(2, "ip", "string"))
    everything = [f"point {number}" for number in range(60)]
    for _ in range(60):
        step = dice.random()
        if step < 0.6:
            chosen = dice.sample(everything, dice.randint(1, 12))
            cut = dice.randint(0, len(chosen))
            more = {"rank": pa.array(range(cut), pa.int64())} if dice.random() < 0.5 and cut else {}
            written.write(chosen[:cut], deletes=chosen[cut:], seed=dice.randrange(99), **more)
        elif step < 0.8:
            seal(written)
        elif step < 0.85:
            written.claim()
        elif written.segments:
            merge(written, *dice.sample(written.segments, dice.randint(1, len(written.segments))))
        assert written.held() == written.live
    assert_as_written(written)
