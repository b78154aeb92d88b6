"""Snapshot files: what is written is read, a name has one version, and nothing else is taken for a snapshot."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from cluster import paths
from cluster.config import CollectionConfig
from cluster.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.shard_entry import LogPosition, LogSet
from cluster.snapshots import (
    Snapshot,
    create_snapshot,
    delete_snapshot,
    list_snapshots,
    missing_objects,
    read_snapshot,
)
from cluster.tombstones import write_tombstones
from tests.fakes import FaultyStore

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MADE = Snapshot("before", 1, "2026-01-02T03:04:05+00:00", 0)
KEY = paths.snapshot("c", "before")
STORED = (
    b'{"checksum": "xxh3_128:d942d29b14184df38aced62afa2eb155", "created_at": "2026-01-02T03:04:05+00:00", '
    b'"format": 1, "name": "before", "points": 0, "version": 1}'
)


def created(store: MemoryStore) -> Manifest:
    log = ManifestLog(store, "c", lambda: uuid.uuid4().hex)
    return log.create(CollectionConfig(4, shards=2))[0]


def test_snapshot_is_read_as_it_was_made() -> None:
    store = MemoryStore()
    assert create_snapshot(store, "before", created(store), NOW) == MADE
    assert read_snapshot(store, "c", "before") == MADE
    assert store.get(KEY) == STORED


def test_name_can_be_given_to_the_same_version_again_and_to_no_other() -> None:
    store = MemoryStore()
    manifest = created(store)
    create_snapshot(store, "before", manifest, NOW)
    later = replace(manifest, version=2)
    assert create_snapshot(store, "before", manifest, datetime.now(UTC)) == MADE
    with pytest.raises(Conflict, match="'before' of 'c' exists, of version 1; now is version 2"):
        create_snapshot(store, "before", later, NOW)
    assert create_snapshot(store, "after", later, NOW).version == 2
    assert [one.name for one in list_snapshots(store, "c")] == ["after", "before"]


@pytest.mark.parametrize("name", ["", "Upper", "-a", "_a", "a/b", "..", "a.json", "é", "a" * 64])
def test_wrong_name_is_invalid(name: str) -> None:
    store = MemoryStore()
    manifest = created(store)
    for use in (
        lambda: create_snapshot(store, name, manifest, NOW),
        lambda: read_snapshot(store, "c", name),
        lambda: delete_snapshot(store, "c", name),
    ):
        with pytest.raises(Invalid, match="does not match") as error:
            use()
        assert [each.field for each in error.value.errors] == ["name"]


def test_version_that_is_behind_or_deleted_cannot_be_named() -> None:
    store = MemoryStore()
    manifest = created(store)
    logs = LogSet(0, 1, (LogPosition(0, 0, 0),))
    crossing = replace(manifest, shards=(ShardEntry(0, behind=(logs,)), ShardEntry(1)), log_set=1)
    for wrong in (crossing, replace(manifest, state="deleted")):
        with pytest.raises(ValueError, match="none to name"):
            create_snapshot(store, "before", wrong, NOW)
    assert list_snapshots(store, "c") == []


def test_deleted_snapshot_is_gone() -> None:
    store = MemoryStore()
    manifest = created(store)
    for name in ("a", "b", "c"):
        create_snapshot(store, name, manifest, NOW)
    delete_snapshot(store, "c", "b")
    assert [one.name for one in list_snapshots(store, "c")] == ["a", "c"]
    for use in (read_snapshot, delete_snapshot):
        with pytest.raises(NotFound, match="no snapshot 'b' of collection 'c'"):
            use(store, "c", "b")


def test_snapshot_with_any_byte_changed_or_cut_is_corrupt_and_can_be_deleted() -> None:
    store = MemoryStore()
    create_snapshot(store, "before", created(store), NOW)
    data = store.get(KEY)
    damaged = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    damaged += [data[:length] for length in range(0, len(data), 7)]
    for bad in damaged:
        store.put(KEY, bad)
        with pytest.raises(Corrupt, match=f"^{KEY}: "):
            read_snapshot(store, "c", "before")
        with pytest.raises(Corrupt, match=f"^{KEY}: "):
            list_snapshots(store, "c")
    delete_snapshot(store, "c", "before")
    assert list_snapshots(store, "c") == []


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"format": 1}', json.dumps({"format": 2}).encode()])
def test_other_json_is_corrupt(data: bytes) -> None:
    store = MemoryStore()
    store.put(KEY, data)
    with pytest.raises(Corrupt, match=f"^{KEY}: "):
        read_snapshot(store, "c", "before")


def test_snapshot_under_the_name_of_another_is_corrupt() -> None:
    store = MemoryStore()
    store.put(KEY, replace(MADE, name="other").encode())
    with pytest.raises(Corrupt, match="holds the snapshot 'other'"):
        read_snapshot(store, "c", "before")


def test_lost_answer_is_looked_up() -> None:
    inner = MemoryStore()
    manifest = created(inner)
    assert create_snapshot(FaultyStore(inner, 1, "lose_answer"), "before", manifest, NOW) == MADE
    with pytest.raises(Unavailable):
        create_snapshot(FaultyStore(inner, 1, "fail"), "after", manifest, NOW)
    assert list_snapshots(inner, "c") == [MADE]


@pytest.mark.parametrize("origin", ["", "first"])
def test_missing_objects_are_those_that_are_named_and_not_there(origin: str) -> None:
    store = MemoryStore()
    home = origin or "c"
    for segment_id in ("s0", "s1"):
        for name in paths.SEGMENT_FILES:
            store.put(paths.segment_file(home, segment_id, name), b"?")
    gone = write_tombstones(store, "c", 1, "s1", 7, np.array([0]))
    shards = (
        ShardEntry(0, (SegmentRef("s0", 3, "x", origin),)),
        ShardEntry(1, (SegmentRef("s1", 3, "x", origin),), 7, 1, (gone,)),
    )
    manifest = replace(created(store), shards=shards)
    assert missing_objects(store, manifest) == []
    for key in (
        *(paths.segment_file(home, "s0", name) for name in paths.SEGMENT_FILES),
        paths.tombstones("c", 1, "s1", 7, gone.variant),
    ):
        data = store.get(key)
        store.delete(key)
        assert missing_objects(store, manifest) == [key]
        store.put(key, data)
