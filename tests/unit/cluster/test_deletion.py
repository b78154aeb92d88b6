"""Deleting the files of a deleted collection: all of its own, and nothing that a later one needs."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.deletion import delete_files
from cluster.errors import Conflict, Fenced, NotFound, Unavailable
from cluster.garbage import GRACE_S
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.segment import checksum_bytes
from cluster.tombstones import write_tombstones
from cluster.wal import Wal, WalRecord
from tests.fakes import Fault, FaultyStore
from tests.unit.cluster import histories

CONFIG = CollectionConfig(4, "l2", index=IndexConfig("flat"), shards=2)
FAULTS: tuple[Fault, ...] = ("fail", "lose_answer", "die")


def log_of(store: ObjectStore, collection: str = "c") -> ManifestLog:
    return ManifestLog(store, collection, lambda: uuid.uuid4().hex)


def keys(store: ObjectStore, prefix: str = "collections/") -> set[str]:
    return {info.key for info in store.objects(prefix)}


def put_segment(store: ObjectStore, name: str, collection: str = "c") -> SegmentRef:
    """All files of a segment, of five rows."""
    for file in paths.SEGMENT_FILES:
        store.put(paths.segment_file(collection, name, file), f"{file} of {name}".encode())
    return SegmentRef(name, 5, checksum_bytes(f"{paths.DESCRIPTION} of {name}".encode()))


def write(store: ObjectStore, shard: int, count: int, collection: str = "c") -> int:
    """So many records at the end of a shard's WAL; the last LSN."""
    wal = Wal(store, collection, shard, 0)
    last = wal.last_listed()
    end = wal.read(last)
    epoch = end.epoch if end else 1
    for lsn in range(last + 1, last + count + 1):
        wal.append(WalRecord(lsn, epoch, "write", f"{lsn:032x}", None, pa.array([lsn])))
    return last + count


def seal(store: ObjectStore, name: str, shard: int = 0, collection: str = "c") -> None:
    """A version with one more segment in a shard, and tombstones of every one that was there, at the end of its WAL."""
    log = log_of(store, collection)
    base = log.newest_live()
    entry = base.shards[shard]
    lsn, epoch = Wal(store, collection, shard, 0).end(entry.applied_lsn, entry.epoch)
    rows = np.arange(2)
    gone = tuple(write_tombstones(store, collection, shard, ref.segment_id, lsn, rows) for ref in entry.segments)
    segments = (*entry.segments, put_segment(store, name, collection))
    log.commit_shards(base, {shard: ShardEntry(shard, segments, lsn, epoch, gone)})


def collection_before(store: MemoryStore, collection: str = "c") -> None:
    """Shard 0 has been sealed twice and goes on, shard 1 has an imported segment and no records."""
    log_of(store, collection).create(CONFIG)
    for name in ("first", "second"):
        write(store, 0, 4, collection)
        seal(store, f"{collection}-{name}", 0, collection)
    log = log_of(store, collection)
    base = log.newest_live()
    imported = ShardEntry(1, (put_segment(store, f"{collection}-imported", collection),))
    log.commit_generation(base, CONFIG, (base.shards[0], imported))
    write(store, 0, 3, collection)


def what_stays(store: ObjectStore, before: set[str], claims: dict[int, int]) -> set[str]:
    """Manifests, and of each shard's WAL the claim at the LSN given."""
    manifests = {key for key in before if key.startswith(paths.manifest_prefix("c"))}
    return manifests | {paths.wal_record("c", shard, lsn) for shard, lsn in claims.items()}


def test_nothing_but_manifests_and_claims_stays_of_a_deleted_collection() -> None:
    store = MemoryStore()
    collection_before(store)
    kinds = (paths.segments_prefix("c"), paths.wal_prefix("c", 0), paths.tombstones_prefix("c", 0))
    assert all(keys(store, prefix) for prefix in kinds)
    deleted = log_of(store).delete()
    delete_files(store, log_of(store), deleted)
    assert keys(store) == what_stays(store, keys(store), {0: 12})
    newest = log_of(store).newest()
    assert newest == deleted
    delete_files(store, log_of(store), deleted)
    assert keys(store) == what_stays(store, keys(store), {0: 12})


def test_other_collections_and_objects_that_are_nobodys_stay() -> None:
    store = MemoryStore()
    for name in ("c", "cc", "d"):
        collection_before(store, name)
    for key in (
        paths.wal_prefix("c", 0) + "notes.txt",
        paths.tombstones_prefix("c", 1) + "a.arrow",
        "jobs/j/status.json",
    ):
        store.put(key, b"?")
    others = {key for key in keys(store, "") if not key.startswith("collections/c/")}
    delete_files(store, log_of(store), log_of(store).delete())
    left = keys(store, "")
    assert others < left
    assert {paths.wal_prefix("c", 0) + "notes.txt", paths.tombstones_prefix("c", 1) + "a.arrow"} < left


def test_writer_of_a_deleted_collection_stays_fenced_after_its_files_are_gone() -> None:
    store = MemoryStore()
    collection_before(store)
    delete_files(store, log_of(store), log_of(store).delete())
    wal = Wal(store, "c", 0, 0)
    with pytest.raises(Fenced, match="claim of epoch 2"):
        wal.append(WalRecord(12, 1, "write", "0" * 32, None, pa.array([1])))
    assert wal.last_listed() == 12
    manifest, created = log_of(store).create(CONFIG)
    assert created
    assert (manifest.shards[0].applied_lsn, manifest.shards[0].epoch) == (13, 3)
    assert write(store, 0, 2) == 15


def test_files_of_a_collection_that_was_created_meanwhile_stay() -> None:
    store = MemoryStore()
    collection_before(store)
    deleted = log_of(store).delete()
    old = keys(store)
    log_of(store).create(CONFIG)
    for name in ("third", "fourth"):
        write(store, 0, 3)
        write(store, 1, 1)
        seal(store, name)
    write(store, 0, 2)
    new = keys(store) - old
    again = log_of(store).newest_live()
    delete_files(store, log_of(store), deleted)
    assert keys(store) == new | what_stays(store, old, {0: 12})
    assert log_of(store).newest_live() == again
    assert [record.lsn for record in Wal(store, "c", 0, 0).read_after(12)] == list(range(13, 22))
    delete_files(store, log_of(store), log_of(store).delete())
    claims = [paths.wal_record("c", 0, lsn) for lsn in (12, 13, 22)]
    assert {key for key in keys(store) if "/manifest/" not in key} == {*claims, paths.wal_record("c", 1, 3)}


def test_segments_that_an_unreadable_version_names_stay_and_the_rest_goes(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    collection_before(store)
    log = log_of(store)
    base = log.newest_live()
    lone = log.commit_generation(base, CONFIG, (replace(base.shards[0], segments=(), tombstones=()), ShardEntry(1)))
    lost = log.commit_generation(lone, CONFIG, (ShardEntry(0, (put_segment(store, "lost"),), 12, 1), ShardEntry(1)))
    log.commit_generation(lost, CONFIG, (ShardEntry(0, (), 12, 1), ShardEntry(1)))
    deleted = log.delete()
    store.put(paths.manifest("c", lost.version), b"torn")
    with caplog.at_level(logging.WARNING):
        delete_files(store, log, deleted)
    assert paths.manifest("c", lost.version) in caplog.text
    assert keys(store, paths.segments_prefix("c")) == {paths.segment_file("c", "lost", n) for n in paths.SEGMENT_FILES}
    assert not keys(store, paths.tombstones_prefix("c", 0))


@pytest.mark.parametrize("fault", FAULTS)
def test_deletion_through_a_failing_store_is_completed_by_the_next_one(fault: Fault) -> None:
    def before() -> tuple[MemoryStore, Manifest]:
        store = MemoryStore()
        collection_before(store)
        return store, log_of(store).delete()

    def attempt(store: ObjectStore, deleted: Manifest) -> Callable[[], None]:
        return lambda: delete_files(store, log_of(store), deleted)

    inner, deleted = before()
    counted = FaultyStore(inner)
    attempt(counted, deleted)()
    done = keys(inner)
    for at in range(1, counted.calls + 1):
        inner, deleted = before()
        with pytest.raises(Unavailable):
            attempt(FaultyStore(inner, at, fault), deleted)()
        assert done <= keys(inner), f"call {at}"
        attempt(inner, deleted)()
        assert keys(inner) == done, f"call {at}"


# --- branches, snapshots, log sets --------------------------------------------------------------------------------


def branched() -> histories.ClockStore:
    """Collection a with two segments and tombstones, and a branch b of it, which then goes its own way."""
    store = histories.ClockStore()
    histories.log_of(store).create(replace(CONFIG, shards=1))
    for _ in range(2):
        histories.write(store, count=2)
        histories.seal(store)
    histories.branch_of(store, "b")
    histories.write(store, "b")
    histories.seal(store, "b")
    return store


def test_segments_that_a_branch_names_stay_and_all_else_goes() -> None:
    store = branched()
    mine = histories.put_segment(store, "a")
    log = histories.log_of(store)
    base = log.newest_live()
    log.commit_shards(base, {0: replace(base.shards[0], segments=(*base.shards[0].segments, mine))})
    histories.delete(store)
    branch = histories.log_of(store, "b").newest_live()
    histories.assert_whole(store, branch)
    left = {key for key in keys(store, "collections/a/") if "/manifest/" not in key}
    claims = [paths.wal_record("a", 0, 5)]
    assert left == {key for key in histories.files_of(branch) if key.startswith("collections/a/")} | set(claims)


def test_what_only_a_snapshot_or_the_rollback_target_of_a_branch_names_stays() -> None:
    for keep in ("snapshot", "target"):
        store = branched()
        if keep == "snapshot":
            histories.snapshot(store, "s", "b")
        kept = histories.log_of(store, "b").newest_live()
        histories.new_generation(store, "b")
        if keep == "snapshot":
            histories.new_generation(store, "b")
        store.now_s += 2 * GRACE_S
        histories.delete(store)
        histories.assert_whole(store, kept)


def test_segments_go_once_the_branch_is_deleted_as_well() -> None:
    store = branched()
    histories.delete(store, "b")
    store.now_s += 2 * GRACE_S
    histories.delete(store)
    assert not [key for key in keys(store) if "/segments/" in key]


def test_segments_stay_where_what_others_name_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    store = branched()
    newest = histories.log_of(store, "b").newest_live().version
    store.put(paths.manifest("b", newest), b"torn")
    before = keys(store, paths.segments_prefix("a"))
    with caplog.at_level(logging.WARNING):
        histories.delete(store)
    assert keys(store, paths.segments_prefix("a")) == before
    assert paths.manifest("b", newest) in caplog.text
    assert not keys(store, paths.tombstones_prefix("a", 0))


def test_snapshots_go_first_and_those_of_a_later_collection_stay() -> None:
    store = histories.ClockStore()
    log = histories.log_of(store)
    log.create(replace(CONFIG, shards=1))
    histories.snapshot(store, "early")
    store.put(paths.snapshot("a", "torn"), b"torn")
    deleted = log.delete()
    log.create(replace(CONFIG, shards=1))
    histories.snapshot(store, "later")
    store.put(paths.snapshots_prefix("a") + "notes.txt", b"?")
    delete_files(store, log, deleted)
    left = {key.rsplit("/", 1)[-1] for key in keys(store, paths.snapshots_prefix("a"))}
    assert left == {"later.json", "notes.txt"}


def test_records_of_earlier_log_sets_go_but_claims_and_ends() -> None:
    store = histories.ClockStore()
    histories.log_of(store).create(replace(CONFIG, shards=1))
    histories.write(store, count=3)
    histories.new_generation(store, shards=2)
    histories.switch(store)
    histories.write(store, count=3)
    histories.delete(store)
    left = {key.removeprefix("collections/a/shards/") for key in keys(store, paths.shards_prefix("a"))}
    last = {f"{shard:04d}/wal-000001/{9:020d}.arrow" for shard in range(2)}
    assert left == last | {f"0000/wal/{lsn:020d}.arrow" for lsn in (4, 5)}


@pytest.mark.parametrize("at", range(1, 33, 3))
def test_of_a_deletion_and_a_branch_at_the_same_time_one_sees_the_other(at: int) -> None:
    store = branched()
    counted = histories.InterruptedStore(store)
    refused: list[Conflict | NotFound] = []

    def branch() -> None:
        try:
            histories.branch_of(store, "d")
        except (Conflict, NotFound) as error:
            refused.append(error)

    histories.delete(histories.InterruptedStore(counted, at, branch))
    newest = histories.log_of(store, "d").newest()
    assert refused or newest is not None
    if newest is not None and newest.state == "live":
        histories.assert_whole(store, newest)


@pytest.mark.parametrize("at", range(1, 19))
def test_a_branch_during_which_its_origin_is_deleted_is_whole_or_refused(at: int) -> None:
    store = branched()
    try:
        histories.branch_of(histories.InterruptedStore(store, at, lambda: histories.delete(store)), "d")
    except (Conflict, NotFound):
        newest = histories.log_of(store, "d").newest()
        assert newest is None or newest.state == "deleted"
    else:
        histories.assert_whole(store, histories.log_of(store, "d").newest_live())
