"""The manifest log: commits, conflicts, lost answers, and bytes that were damaged."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster import paths
from cluster.config import CollectionConfig, Device, IndexConfig
from cluster.errors import Conflict, Corrupt, Fenced, Invalid, NotFound, Unavailable
from cluster.manifest import (
    Manifest,
    ManifestLog,
    SegmentRef,
    ShardEntry,
    TombstonesRef,
    broken_invariants,
    collection_names,
)
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.segment import checksum_bytes
from cluster.tombstones import write_tombstones
from cluster.wal import Wal, WalRecord
from tests.fakes import Fault, FaultyStore

CONFIG = CollectionConfig(dimension=4, shards=2)
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def nonces(writer: str) -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"{writer}-{next(numbers)}"


def log_of(store: ObjectStore, writer: str = "w", collection: str = "c") -> ManifestLog:
    return ManifestLog(store, collection, nonces(writer), lambda: NOW)


def put_segment(store: MemoryStore, segment_id: str, count: int = 5, collection: str = "c") -> SegmentRef:
    data = f"description of {segment_id}".encode()
    store.put(paths.segment_file(collection, segment_id, paths.DESCRIPTION), data)
    return SegmentRef(segment_id, count, checksum_bytes(data))


def manifest_keys(store: MemoryStore) -> list[str]:
    return [info.key for info in store.objects("collections/c/manifest/")]


class LostAnswerStore(MemoryStore):
    """Writes, then reports the failure of the retry that collided with the write."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        super().put_if_absent(key, data)
        return False


class OvertakenStore(MemoryStore):
    """Runs `before` ahead of the next put-if-absent: another writer's commit between our read and our put."""

    before: Callable[[], object] | None = None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.before is not None:
            before, self.before = self.before, None
            before()
        return super().put_if_absent(key, data)


def test_create_commits_version_one_without_points() -> None:
    store = MemoryStore()
    manifest, created = log_of(store).create(CONFIG)
    assert created
    assert manifest == Manifest(
        collection="c",
        version=1,
        config=CONFIG,
        routing=Routing(2),
        generation=1,
        shards=(ShardEntry(0), ShardEntry(1)),
        created_at="2026-01-02T03:04:05+00:00",
        writer="w-1",
        state="live",
        format=5,
        attributes={},
    )
    assert manifest_keys(store) == ["collections/c/manifest/00000000000000000001.json"]
    assert log_of(store).newest() == log_of(store).newest_live() == log_of(store).read(1) == manifest


def test_create_again_with_the_same_config_returns_the_existing_one() -> None:
    store = MemoryStore()
    first, _ = log_of(store, "a").create(CONFIG)
    assert log_of(store, "b").create(CONFIG) == (first, False)
    assert len(manifest_keys(store)) == 1


def test_create_again_with_another_config_is_a_conflict() -> None:
    store = MemoryStore()
    log_of(store).create(CONFIG)
    with pytest.raises(Conflict, match="'c' exists with another config"):
        log_of(store).create(replace(CONFIG, dimension=5))
    assert len(manifest_keys(store)) == 1


def test_commit_generation_counts_versions_and_generations() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    shards = (ShardEntry(0, (put_segment(store, "s0", 3),)), ShardEntry(1, (put_segment(store, "s1", 4),)))
    manifest = log.commit_generation(parent, CONFIG, shards)
    assert (manifest.version, manifest.generation, manifest.points) == (2, 2, 7)
    assert manifest.shards == shards
    assert sorted(manifest.segments) == ["s0", "s1"]
    assert log.newest() == manifest
    assert log.read(1) == parent


@pytest.mark.parametrize(
    ("asked", "num_gpus", "share"),
    [("auto", None, 0.0), ("auto", 0.5, 0.0), ("cpu", 0.5, 0.0), ("gpu", None, 0.125), ("gpu", 0.5, 0.5)],
)
def test_create_serves_on_a_gpu_only_where_one_is_asked_for(
    asked: Device, num_gpus: float | None, share: float
) -> None:
    """What "auto" comes to is decided when something is built, and so is the share where the config leaves that."""
    log = log_of(MemoryStore())
    manifest, _ = log.create(replace(CONFIG, index=IndexConfig(device=asked, num_gpus=num_gpus)))
    assert (manifest.num_gpus, manifest.device) == (share, "gpu" if share else "cpu")
    assert log.newest_live().num_gpus == share
    assert log.newest_live().config.index.num_gpus == num_gpus


def test_commits_within_a_generation_keep_its_share_of_a_gpu() -> None:
    store = MemoryStore()
    log = log_of(store)
    base = log.commit_generation(None, CONFIG, (ShardEntry(0), ShardEntry(1)), num_gpus=0.25)
    assert (base.num_gpus, base.device) == (0.25, "gpu")
    assert log.declare_attributes({"word": "string"}).num_gpus == 0.25
    sealed_entry = ShardEntry(0, (put_segment(store, "s0"),), 3, 1)
    assert log.commit_shards(log.newest_live(), {0: sealed_entry}).num_gpus == 0.25
    assert log.delete().num_gpus == 0.25
    assert (again := log.create(CONFIG)[0]).num_gpus == 0.0
    assert again.device == "cpu"


@pytest.mark.parametrize("num_gpus", [0.25, 0.5, 0.0])
def test_a_generation_is_switched_to_as_its_builder_says(num_gpus: float) -> None:
    """Whatever the one before it has: that may be waiting for GPUs, and not be what is served."""
    log = log_of(MemoryStore())
    base = log.commit_generation(None, CONFIG, (ShardEntry(0), ShardEntry(1)), num_gpus=0.25)
    log.declare_attributes({"word": "string"})
    manifest = log.commit_generation(base, CONFIG, base.shards, switch="one_at_a_time", num_gpus=num_gpus)
    assert (manifest.num_gpus, manifest.switch) == (num_gpus, "one_at_a_time")


def test_config_that_a_generation_was_built_for_has_its_device() -> None:
    manifest, _ = log_of(MemoryStore()).create(replace(CONFIG, index=IndexConfig(target_recall=0.9)))
    assert manifest.config.index.device == "auto"
    assert manifest.built_for == replace(CONFIG, index=IndexConfig(target_recall=0.9, device="cpu"))


def test_commit_generation_without_parent_is_version_one() -> None:
    store = MemoryStore()
    shards = (ShardEntry(0, (put_segment(store, "s0"),)), ShardEntry(1))
    manifest = log_of(store).commit_generation(None, CONFIG, shards)
    assert (manifest.version, manifest.generation) == (1, 1)


def test_commit_generation_may_change_the_number_of_shards() -> None:
    store = MemoryStore()
    parent, _ = log_of(store).create(CONFIG)
    manifest = log_of(store).commit_generation(parent, CONFIG, tuple(ShardEntry(shard) for shard in range(5)))
    assert manifest.routing == Routing(5)


def test_commit_on_a_stale_parent_is_a_conflict_and_changes_nothing() -> None:
    store = MemoryStore()
    parent, _ = log_of(store, "a").create(CONFIG)
    won = log_of(store, "a").commit_generation(parent, CONFIG, parent.shards)
    with pytest.raises(Conflict, match="version 2 was committed by another writer"):
        log_of(store, "b").commit_generation(parent, CONFIG, parent.shards)
    assert log_of(store).newest() == won


def test_create_overtaken_by_another_of_the_same_config_returns_the_other_one() -> None:
    store = OvertakenStore()
    store.before = lambda: log_of(store, "fast").create(CONFIG)
    manifest, created = log_of(store, "slow").create(CONFIG)
    assert (manifest.writer, created) == ("fast-1", False)
    assert log_of(store).newest_live() == manifest


def test_create_overtaken_by_another_of_another_config_is_a_conflict() -> None:
    store = OvertakenStore()
    store.before = lambda: log_of(store, "fast").create(replace(CONFIG, dimension=5))
    with pytest.raises(Conflict, match="'c' exists with another config"):
        log_of(store, "slow").create(CONFIG)
    assert log_of(store).newest_live().writer == "fast-1"


def test_create_overtaken_by_one_that_was_deleted_again_is_a_conflict() -> None:
    store = OvertakenStore()

    def create_and_delete() -> None:
        log_of(store, "fast").create(CONFIG)
        log_of(store, "fast").delete()

    store.before = create_and_delete
    with pytest.raises(Conflict, match="version 1 was committed by another writer"):
        log_of(store, "slow").create(CONFIG)


def test_segments_until_leaves_out_what_an_unreadable_manifest_names(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    for number in range(3):
        entries = (ShardEntry(0, (put_segment(store, f"s{number}"),)), ShardEntry(1))
        parent = log.commit_generation(parent, CONFIG, entries)
    assert log.segments_until(3) == {"s0", "s1"}
    assert log.named_segments() == {"s0", "s1", "s2"}
    store.put(paths.manifest("c", 3), b"{}")
    assert log.segments_until(4) == {"s0", "s2"}
    assert "00000000000000000003.json" in caplog.text
    with pytest.raises(Corrupt, match=r"00000000000000000003\.json"):
        log.named_segments()


def test_delete_overtaken_by_an_import_is_a_conflict() -> None:
    store = OvertakenStore()
    parent, _ = log_of(store).create(CONFIG)
    store.before = lambda: log_of(store, "import").commit_generation(parent, CONFIG, parent.shards)
    with pytest.raises(Conflict):
        log_of(store, "delete").delete()
    assert log_of(store).newest_live().writer == "import-1"


def test_of_many_writers_of_one_version_exactly_one_commits() -> None:
    store = MemoryStore()
    parent, _ = log_of(store).create(CONFIG)
    start, outcomes = threading.Barrier(8), []

    def commit(writer: str) -> None:
        start.wait(timeout=10)
        try:
            outcomes.append(log_of(store, writer).commit_generation(parent, CONFIG, parent.shards).writer)
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=commit, args=(f"w{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert outcomes.count("conflict") == 7
    assert [outcome for outcome in outcomes if outcome != "conflict"] == [log_of(store).newest_live().writer]


def test_put_whose_answer_was_lost_is_recognised_as_our_own() -> None:
    store = LostAnswerStore()
    log = log_of(store)
    manifest, created = log.create(CONFIG)
    assert created
    assert log.commit_generation(manifest, CONFIG, manifest.shards).version == 2
    log.delete()
    assert [key[-6:] for key in manifest_keys(store)] == ["1.json", "2.json", "3.json"]


def test_lost_answer_of_another_writer_is_a_conflict() -> None:
    """The bytes differ only in the nonce: same config, same instant."""
    store = LostAnswerStore()
    parent, _ = log_of(store, "a").create(CONFIG)
    log_of(store, "a").commit_generation(parent, CONFIG, parent.shards)
    with pytest.raises(Conflict):
        log_of(store, "b").commit_generation(parent, CONFIG, parent.shards)


def test_commit_while_the_store_is_unavailable_raises_and_commits_nothing() -> None:
    store = OvertakenStore()

    def refuse() -> None:
        raise Unavailable("no network")

    store.before = refuse
    with pytest.raises(Unavailable):
        log_of(store).create(CONFIG)
    assert log_of(store).newest() is None


def test_delete_ends_the_collection_and_returns_the_manifest_that_says_so() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    log.commit_generation(parent, CONFIG, (ShardEntry(0, (put_segment(store, "s0"),)), ShardEntry(1)))
    newest = log.delete()
    assert log.newest() == newest
    assert (newest.state, newest.version, newest.generation, newest.points) == ("deleted", 3, 2, 0)
    with pytest.raises(NotFound, match="no collection 'c'"):
        log.newest_live()
    with pytest.raises(NotFound):
        log.delete()


def test_recreate_after_delete_goes_on_counting_and_may_change_the_config() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(CONFIG)
    log.delete()
    other = CollectionConfig(dimension=9, metric="ip", shards=1)
    manifest, created = log.create(other)
    assert created
    assert (manifest.version, manifest.generation, manifest.state) == (3, 2, "live")
    assert manifest.config == other
    assert log.newest_live() == manifest


def test_collection_that_never_was_has_no_manifest() -> None:
    log = log_of(MemoryStore())
    assert log.newest() is None
    with pytest.raises(NotFound):
        log.newest_live()
    with pytest.raises(NotFound):
        log.delete()
    with pytest.raises(NotFound):
        log.read(1)


def test_newest_is_the_highest_number_and_other_objects_do_not_count() -> None:
    store = MemoryStore()
    log = log_of(store)
    manifest, _ = log.create(CONFIG)
    for _ in range(10):
        manifest = log.commit_generation(manifest, CONFIG, manifest.shards)
    store.put("collections/c/manifest/99999999999999999999.json.tmp", b"junk")
    store.put("collections/c/manifest/readme", b"junk")
    assert log.newest() == manifest
    assert manifest.version == 11


def test_collections_do_not_see_each_other() -> None:
    store = MemoryStore()
    log_of(store, collection="c").create(CONFIG)
    log_of(store, collection="c2").create(CONFIG)
    log_of(store, collection="c").delete()
    assert log_of(store, collection="c2").newest_live().collection == "c2"
    assert collection_names(store) == ["c", "c2"]


def test_commit_naming_a_missing_segment_is_refused_and_writes_nothing() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    shards = (ShardEntry(0, (SegmentRef("gone", 3, "xxh3_128:00"),)), ShardEntry(1))
    with pytest.raises(Corrupt, match=r"collections/c/segments/gone/segment\.json does not exist"):
        log.commit_generation(parent, CONFIG, shards)
    assert len(manifest_keys(store)) == 1


def test_commit_naming_a_segment_that_was_replaced_is_refused() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    ref = put_segment(store, "s0")
    store.put(paths.segment_file("c", "s0", paths.DESCRIPTION), b"another")
    with pytest.raises(Corrupt, match=r"segment\.json is not the object that was named"):
        log.commit_generation(parent, CONFIG, (ShardEntry(0, (ref,)), ShardEntry(1)))
    assert len(manifest_keys(store)) == 1


REF = SegmentRef("s0", 3, "xxh3_128:0123456789abcdef")
DELETED = TombstonesRef("s0", 5, 2, "xxh3_128:fedcba9876543210")
FULL = Manifest(
    collection="c",
    version=3,
    config=CollectionConfig(
        dimension=4, metric="ip", id_type="string", shards=2, index=IndexConfig("hnsw", 0.9, "cpu", 10**9)
    ),
    routing=Routing(2),
    generation=2,
    shards=(
        ShardEntry(0, (REF, replace(REF, segment_id="s1", count=4)), 5, 2, (DELETED,)),
        ShardEntry(1, applied_lsn=3, epoch=1),
    ),
    created_at=NOW.isoformat(),
    writer="nonce",
    attributes={"word": "string"},
)
PARENT = replace(FULL, version=2)


def changed(**fields: Any) -> Manifest:
    """FULL with fields of its first shard changed."""
    return replace(FULL, shards=(replace(FULL.shards[0], **fields), FULL.shards[1]))


BACK = [
    "shard 0: LSN 0 goes back from 5",
    "shard 0: epoch 0 goes back from 2",
    "shard 1: LSN 0 goes back from 3",
    "shard 1: epoch 0 goes back from 1",
]


@pytest.mark.parametrize(
    ("manifest", "parent", "broken"),
    [
        (FULL, None, []),
        (FULL, PARENT, []),
        (FULL, replace(PARENT, generation=1), []),
        (replace(FULL, version=1), None, []),
        (replace(FULL, version=0), None, ["version 0 does not follow 0"]),
        (replace(FULL, version=4), PARENT, ["version 4 does not follow 2"]),
        (replace(FULL, version=2), PARENT, ["version 2 does not follow 2"]),
        (FULL, replace(PARENT, generation=3), ["generation 2 goes back from 3"]),
        (FULL, replace(PARENT, generation=1, num_gpus=1.0), []),
        (FULL, replace(PARENT, num_gpus=1.0), ["generation 2 goes from 1.0 to 0.0 GPUs"]),
        (replace(FULL, num_gpus=0.25), replace(PARENT, num_gpus=0.5), ["generation 2 goes from 0.5 to 0.25 GPUs"]),
        (replace(FULL, num_gpus=1.5), None, ["1.5 is no share of a GPU"]),
        (replace(FULL, num_gpus=0.0001), None, ["0.0001 is no share of a GPU"]),
        (FULL, replace(PARENT, generation=3, state="deleted"), []),
        (replace(FULL, routing=Routing(3)), None, ["shards are not 0 to 2"]),
        (replace(FULL, shards=(ShardEntry(1), ShardEntry(0))), None, ["shards are not 0 to 1"]),
        (replace(FULL, shards=(ShardEntry(0), ShardEntry(0))), None, ["shards are not 0 to 1"]),
        (
            replace(FULL, shards=(ShardEntry(0, (REF,)), ShardEntry(1, (REF,)))),
            None,
            ["a segment belongs to more than one shard"],
        ),
        (
            replace(FULL, shards=(ShardEntry(0, (REF, REF)), ShardEntry(1))),
            None,
            ["a segment belongs to more than one shard"],
        ),
        (
            replace(FULL, shards=(ShardEntry(0, (replace(REF, count=0),)), ShardEntry(1))),
            None,
            ["a segment holds no rows"],
        ),
        (changed(tombstones=(replace(DELETED, count=3),)), None, []),
        (changed(tombstones=(replace(DELETED, count=4),)), None, ["shard 0: 4 tombstones for 3 rows of 's0'"]),
        (changed(tombstones=(replace(DELETED, count=0),)), None, ["shard 0: 0 tombstones for 3 rows of 's0'"]),
        (changed(tombstones=(replace(DELETED, segment_id="x"),)), None, ["shard 0: 2 tombstones for 0 rows of 'x'"]),
        (changed(tombstones=(DELETED, DELETED)), None, ["shard 0: a segment has more than one tombstone file"]),
        (changed(tombstones=(replace(DELETED, lsn=6),)), None, ["shard 0: tombstones as of LSN 6, after 5"]),
        (
            replace(
                FULL, shards=(replace(FULL.shards[0], tombstones=()), replace(FULL.shards[1], tombstones=(DELETED,)))
            ),
            None,
            ["shard 1: 2 tombstones for 0 rows of 's0'", "shard 1: tombstones as of LSN 5, after 3"],
        ),
        (changed(applied_lsn=6), PARENT, []),
        (changed(applied_lsn=4, tombstones=()), PARENT, ["shard 0: LSN 4 goes back from 5"]),
        (changed(epoch=1), PARENT, ["shard 0: epoch 1 goes back from 2"]),
        (changed(applied_lsn=4, epoch=1, tombstones=()), replace(PARENT, generation=1), []),
        (
            replace(FULL, routing=Routing(1), shards=(ShardEntry(0),)),
            replace(PARENT, generation=2),
            [],
        ),
        (replace(FULL, state="deleted", shards=(ShardEntry(0), ShardEntry(1))), PARENT, BACK),
    ],
)
def test_broken_invariants_are_named(manifest: Manifest, parent: Manifest | None, broken: list[str]) -> None:
    assert broken_invariants(manifest, parent) == broken


def test_points_are_those_of_the_segments_without_the_deleted_ones() -> None:
    assert [entry.points for entry in FULL.shards] == [5, 0]
    assert FULL.points == 5


def test_manifest_survives_encoding() -> None:
    for manifest in (FULL, replace(FULL, state="deleted", shards=(ShardEntry(0), ShardEntry(1)))):
        assert Manifest.decode(manifest.encode(), "k") == manifest


def test_manifest_checksum_covers_every_field() -> None:
    body = json.loads(FULL.encode())
    changes = {
        "collection": "d",
        "version": 4,
        "generation": 3,
        "created_at": "",
        "writer": "x",
        "state": "deleted",
        "routing": {"kind": "hash", "shards": 3},
        "config": body["config"] | {"replicas": 2},
        "shards": [],
        "attributes": {"a": "int64"},
        "log_set": 2,
        "switch": "one_at_a_time",
        "num_gpus": 1.0,
        "checksum": "xxh3_128:00",
    }
    assert set(changes) | {"format"} == set(body)
    for name, value in changes.items():
        with pytest.raises(Corrupt, match="the checksum does not match"):
            Manifest.decode(json.dumps(body | {name: value}).encode(), "k")


def test_manifest_with_any_one_bit_flipped_is_corrupt_or_equal() -> None:
    data = FULL.encode()
    equal = 0
    for position, bit in itertools.product(range(len(data)), range(8)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        try:
            assert Manifest.decode(bytes(damaged), "k") == FULL, (position, bit)
            equal += 1
        except Corrupt as error:
            assert str(error).startswith("k: ")  # noqa: PT017
    assert equal < data.count(b" ")  # only blanks may turn into other blanks


@pytest.mark.parametrize("byte", [0x00, 0x09, 0x20, 0x22, 0x2C, 0x30, 0x31, 0x39, 0x5C, 0x7B, 0x7D, 0x7F, 0x80, 0xFF])
def test_manifest_with_any_one_byte_replaced_is_corrupt_or_equal(byte: int) -> None:
    data = FULL.encode()
    for position in range(len(data)):
        damaged = data[:position] + bytes([byte]) + data[position + 1 :]
        try:
            decoded = Manifest.decode(damaged, "k")
        except Corrupt:
            continue
        assert decoded == FULL, position


def test_manifest_cut_anywhere_is_corrupt() -> None:
    data = FULL.encode()
    for length in range(len(data)):
        with pytest.raises(Corrupt):
            Manifest.decode(data[:length], "k")


def sealed(**changes: object) -> bytes:
    """The manifest's JSON with fields changed and a checksum that fits."""
    body = json.loads(FULL.encode()) | changes
    del body["checksum"]
    body = {name: value for name, value in body.items() if value is not None}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(body | {"checksum": checksum_bytes(canonical)}).encode()


SHARD_0, SHARD_1 = json.loads(FULL.encode())["shards"]
(TOMBSTONES,) = SHARD_0["tombstones"]


def test_sealed_manifest_without_changes_is_read() -> None:
    assert Manifest.decode(sealed(), "k") == FULL
    assert Manifest.decode(sealed(shards=[SHARD_0, SHARD_1]), "k") == FULL


def test_manifest_of_a_later_format_says_which_are_read() -> None:
    with pytest.raises(Corrupt, match=r"^k: format 6, this version reads 1 to 5$"):
        Manifest.decode(sealed(format=6), "k")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        sealed(format=6),
        sealed(format=0),
        sealed(format="5"),
        sealed(device="gpu"),  # a field that format 5 does not have any more
        sealed(num_gpus=None),
        sealed(num_gpus="1"),
        sealed(num_gpus=True),
        sealed(num_gpus=-0.5),
        sealed(format=4),  # with a field that format 4 did not have
        sealed(format=4, num_gpus=None),
        sealed(format=4, num_gpus=None, device="auto"),
        sealed(format=3),
        sealed(format=2),  # with fields that format 2 did not have
        sealed(log_set=None),
        sealed(log_set=-1),
        sealed(switch="at once"),
        sealed(shards=[SHARD_0 | {"behind": None}, SHARD_1]),
        sealed(shards=[SHARD_0 | {"behind": [{"number": 0, "shards": 1}]}, SHARD_1]),
        sealed(shards=[SHARD_0 | {"behind": [{"number": 0, "shards": 1, "positions": []}]}, SHARD_1]),
        sealed(format=1),  # with fields that format 1 did not have
        sealed(format=1, attributes=None),
        sealed(format=1, shards=[{"shard": 0, "segments": []}, {"shard": 1, "segments": []}]),
        sealed(attributes=None),
        sealed(attributes=["a"]),
        sealed(attributes={"a": 1}),
        sealed(shards=[{"shard": 0, "segments": []}, {"shard": 1, "segments": []}]),
        sealed(shards=[SHARD_0 | {"colour": 1}, SHARD_1]),
        sealed(shards=[SHARD_0 | {"applied_lsn": "x", "tombstones": [TOMBSTONES]}, SHARD_1]),
        sealed(shards=[SHARD_0 | {"tombstones": [{"segment_id": "s0"}]}, SHARD_1]),
        sealed(shards=[SHARD_0 | {"tombstones": [TOMBSTONES | {"count": 6}]}, SHARD_1]),
        sealed(colour="red"),
        sealed(writer=None),
        sealed(config={"dimension": 0}),
        sealed(config={"dimension": 4, "colour": 1}),
        sealed(config=3),
        sealed(routing={"kind": "content"}),
        sealed(routing={"kind": "hash"}),
        sealed(routing={"kind": "hash", "shards": 3}),
        sealed(shards=3),
        sealed(shards=[{"shard": 0}]),
        sealed(shards=[{"shard": 0, "segments": [{"segment_id": "s"}]}, {"shard": 1, "segments": []}]),
    ],
)
def test_manifest_of_another_shape_is_corrupt_and_names_the_object(data: bytes) -> None:
    key = paths.manifest("c", 3)
    with pytest.raises(Corrupt, match=f"^{key}: "):
        Manifest.decode(data, key)


def test_read_of_a_manifest_under_another_number_is_corrupt() -> None:
    store = MemoryStore()
    store.put(paths.manifest("c", 4), FULL.encode())
    with pytest.raises(Corrupt, match="holds version 3 of 'c'"):
        log_of(store).read(4)


def test_read_of_a_manifest_of_another_collection_is_corrupt() -> None:
    store = MemoryStore()
    store.put(paths.manifest("d", 3), FULL.encode())
    with pytest.raises(Corrupt, match="holds version 3 of 'c'"):
        log_of(store, collection="d").read(3)


def test_damaged_newest_manifest_is_corrupt_not_skipped() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    log.commit_generation(parent, CONFIG, parent.shards)
    store.put(paths.manifest("c", 2), b"{}")
    with pytest.raises(Corrupt, match=r"00000000000000000002\.json"):
        log.newest()


# --- seals and declarations -------------------------------------------------------------------------------------


def write_records(store: ObjectStore, shard: int, lsns: range, epoch: int = 1) -> None:
    """Writes of a primary of that epoch."""
    wal = Wal(store, "c", shard, 0, lambda seconds: None)
    for lsn in lsns:
        wal.append(WalRecord(lsn, epoch, "write", f"{shard:016x}{lsn:016x}", None, pa.array([lsn])))


def sealed_entry(store: MemoryStore, name: str, lsn: int, shard: int = 0) -> ShardEntry:
    """What a seal commits: one segment, one of its rows deleted since."""
    ref = write_tombstones(store, "c", shard, name, lsn, np.array([1]))
    return ShardEntry(shard, (put_segment(store, name),), lsn, 1, (ref,))


def test_commit_shards_changes_those_and_nothing_else() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(CONFIG)
    parent = log.declare_attributes({"word": "string"})
    entry = sealed_entry(store, "s0", 4)
    manifest = log.commit_shards(parent, {0: entry})
    assert manifest == replace(parent, version=3, shards=(entry, ShardEntry(1)), writer="w-3")
    assert (manifest.generation, manifest.points) == (1, 4)
    assert log.newest() == manifest
    other = sealed_entry(store, "s1", 2, shard=1)
    assert log.commit_shards(manifest, {1: other}).shards == (entry, other)


def test_commit_shards_after_another_commit_is_a_conflict() -> None:
    store = MemoryStore()
    parent, _ = log_of(store).create(CONFIG)
    won = log_of(store, "a").commit_shards(parent, {0: sealed_entry(store, "s0", 4)})
    with pytest.raises(Conflict, match="version 2 was committed by another writer"):
        log_of(store, "b").commit_shards(parent, {1: sealed_entry(store, "s1", 4, shard=1)})
    assert log_of(store).newest() == won


def test_commit_shards_of_a_deleted_collection_is_a_conflict() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    log.delete()
    deleted = log.newest()
    assert deleted is not None
    for known in (parent, deleted):
        with pytest.raises(Conflict):
            log.commit_shards(known, {0: sealed_entry(store, "s0", 4)})
    assert log.newest() == deleted


def test_commit_shards_that_goes_back_or_names_no_shard_is_refused() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(CONFIG)
    parent = log.commit_shards(log.newest_live(), {0: sealed_entry(store, "s0", 4)})
    with pytest.raises(Corrupt, match="shard 0: LSN 3 goes back from 4"):
        log.commit_shards(parent, {0: ShardEntry(0, (), 3, 1)})
    with pytest.raises(Corrupt, match="shards are not 0 to 1"):
        log.commit_shards(parent, {2: ShardEntry(2)})
    with pytest.raises(Corrupt, match="shards are not 0 to 1"):
        log.commit_shards(parent, {0: ShardEntry(1)})
    assert log.newest() == parent


def test_commit_naming_a_missing_or_other_tombstone_file_is_refused() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    entry = sealed_entry(store, "s0", 4)
    (key,) = (info.key for info in store.objects("collections/c/shards/0000/tombstones/"))
    data = store.get(key)
    store.put(key, data + b"x")
    with pytest.raises(Corrupt, match=f"{key} is not the object that was named"):
        log.commit_shards(parent, {0: entry})
    store.delete(key)
    with pytest.raises(Corrupt, match=f"{key} does not exist"):
        log.commit_shards(parent, {0: entry})
    store.put(key, data)
    assert log.commit_shards(parent, {0: entry}).version == 2


def test_commit_looks_only_at_objects_that_the_parent_does_not_name() -> None:
    """Upkeep commits often; what is there already was looked at by the commit that brought it."""
    inner = MemoryStore()
    log = log_of(inner)
    log.create(CONFIG)
    parent = log.commit_shards(log.newest_live(), {0: sealed_entry(inner, "s0", 4)})
    store = FaultyStore(inner, counted=frozenset({"get"}))
    entry = replace(parent.shards[0], segments=(*parent.shards[0].segments, put_segment(inner, "s1")), applied_lsn=7)
    log_of(store).commit_shards(parent, {0: entry})
    assert store.calls == 1


def test_declared_attributes_are_committed_once() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    manifest = log.declare_attributes({"word": "string", "rank": "int16"})
    assert manifest.attributes == {"word": "string", "rank": "int16"}
    assert (manifest.version, manifest.generation, manifest.shards) == (2, 1, parent.shards)
    assert log.declare_attributes({"word": "string"}) == manifest
    assert log.declare_attributes({}) == manifest
    more = log.declare_attributes({"word": "string", "seen": "timestamp[us]"})
    assert more.attributes == manifest.attributes | {"seen": "timestamp[us]"}
    assert log.newest() == more
    assert len(manifest_keys(store)) == 3


def test_declaring_another_type_is_a_conflict_and_commits_nothing() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(CONFIG)
    log.declare_attributes({"word": "string"})
    with pytest.raises(Conflict, match="attribute 'word' has type string, not int64"):
        log.declare_attributes({"rank": "int16", "word": "int64"})
    with pytest.raises(Invalid, match=r"attributes\.rank: 'int99' is not an Arrow type"):
        log.declare_attributes({"rank": "int99"})
    assert log.newest_live().attributes == {"word": "string"}


def test_declaring_for_no_collection_is_not_found() -> None:
    with pytest.raises(NotFound, match="no collection 'c'"):
        log_of(MemoryStore()).declare_attributes({"word": "string"})


def test_declaration_overtaken_is_repeated_on_what_came_between() -> None:
    store = OvertakenStore()
    log_of(store).create(CONFIG)
    store.before = lambda: log_of(store, "fast").declare_attributes({"rank": "int16"})
    manifest = log_of(store, "slow").declare_attributes({"word": "string"})
    assert (manifest.version, manifest.attributes) == (3, {"rank": "int16", "word": "string"})
    store.before = lambda: log_of(store, "fast").declare_attributes({"seen": "bool"})
    with pytest.raises(Conflict, match="attribute 'seen' has type bool, not int8"):
        log_of(store, "slow").declare_attributes({"seen": "int8"})


# --- generations beside seals -----------------------------------------------------------------------------------


def test_generation_is_committed_over_seals_and_declarations_that_came_between() -> None:
    store = OvertakenStore()
    base, _ = log_of(store).create(CONFIG)
    entry = sealed_entry(store, "s0", 4)
    log_of(store, "seal").commit_shards(base, {0: entry})
    store.before = lambda: log_of(store, "fast").declare_attributes({"word": "string"})
    shards = (ShardEntry(0, (put_segment(store, "new"),), 2, 1), ShardEntry(1))
    manifest = log_of(store, "import").commit_generation(base, CONFIG, shards)
    assert (manifest.version, manifest.generation, manifest.shards) == (4, 2, shards)
    assert manifest.attributes == {"word": "string"}
    assert log_of(store).newest() == manifest


def test_generation_brings_the_types_of_its_attributes() -> None:
    store = OvertakenStore()
    log = log_of(store)
    base, _ = log.create(CONFIG)
    log.declare_attributes({"word": "string", "rank": "int16"})
    store.before = lambda: log_of(store, "fast").declare_attributes({"seen": "bool"})
    imported = {"rank": pa.large_string(), "at": pa.timestamp("us"), "tags": pa.list_(pa.int8())}
    manifest = log_of(store, "import").commit_generation(base, CONFIG, base.shards, imported)
    types = {"word": "string", "rank": "large_string", "at": "timestamp[us]", "seen": "bool"}
    assert manifest.attributes == types  # what has no name cannot be written, and is none of the manifest's
    with pytest.raises(
        Conflict, match="attribute 'seen' was written as bool; an import cannot make it list<item: int8>"
    ):
        log.commit_generation(manifest, CONFIG, base.shards, {"seen": pa.list_(pa.int8())})
    assert log.newest_live() == manifest


def another_import(log: ManifestLog, base: Manifest) -> None:
    log.commit_generation(base, CONFIG, base.shards)


def deletion(log: ManifestLog, base: Manifest) -> None:
    log.delete()


def recreation(log: ManifestLog, base: Manifest) -> None:
    log.delete()
    log.create(CONFIG)


@pytest.mark.parametrize("between", [another_import, deletion, recreation])
@pytest.mark.parametrize("late", [False, True])
def test_generation_after_another_import_or_a_deletion_is_a_conflict(
    between: Callable[[ManifestLog, Manifest], None], late: bool
) -> None:
    store = OvertakenStore()
    base, _ = log_of(store).create(CONFIG)
    if late:  # between reading the newest manifest and putting the next
        store.before = lambda: between(log_of(store, "fast"), base)
    else:
        between(log_of(store, "fast"), base)
    with pytest.raises(Conflict, match="was committed by another writer"):
        log_of(store, "import").commit_generation(base, CONFIG, base.shards)
    newest = log_of(store).newest()
    assert newest is not None
    assert newest.writer.startswith("fast")


def test_first_generation_beside_a_creation_is_a_conflict() -> None:
    store = MemoryStore()
    log_of(store).create(CONFIG)
    with pytest.raises(Conflict, match="version 1 was committed by another writer"):
        log_of(store, "import").commit_generation(None, CONFIG, (ShardEntry(0), ShardEntry(1)))


def test_generation_over_a_deleted_collection_takes_no_attributes_from_it() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(CONFIG)
    log.declare_attributes({"word": "string"})
    log.delete()
    deleted = log.newest()
    assert deleted is not None
    assert log.commit_generation(deleted, CONFIG, deleted.shards).attributes == {}


def test_deletion_beside_a_seal_deletes_what_was_sealed() -> None:
    store = OvertakenStore()
    base, _ = log_of(store).create(CONFIG)
    entry = sealed_entry(store, "s0", 4)
    store.before = lambda: log_of(store, "seal").commit_shards(base, {0: entry})
    newest = log_of(store).delete()
    assert (newest.state, newest.version, newest.attributes) == ("deleted", 3, {})
    assert newest.shards == (ShardEntry(0, (), 5, 2), ShardEntry(1))
    assert log_of(store).segments_until(3) == {"s0"}


# --- the WAL across generations and collections -----------------------------------------------------------------


def test_wal_ends_of_a_live_collection_are_found_and_nothing_is_written() -> None:
    store = MemoryStore()
    log = log_of(store)
    base, _ = log.create(CONFIG)
    assert log.wal_ends(base, 2) == (ShardEntry(0), ShardEntry(1))
    write_records(store, 0, range(1, 6))
    write_records(store, 1, range(1, 3), epoch=7)
    keys = [info.key for info in store.objects("collections/")]
    assert log.wal_ends(base, 2) == (ShardEntry(0, (), 5, 1), ShardEntry(1, (), 2, 7))
    assert [info.key for info in store.objects("collections/")] == keys


def test_collection_created_again_starts_after_a_claim_on_every_wal() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(CONFIG)
    write_records(store, 0, range(1, 6), epoch=3)
    log.commit_shards(log.newest_live(), {0: ShardEntry(0, (), 2, 3)})
    assert log.delete().shards == (ShardEntry(0, (), 6, 4), ShardEntry(1))
    with pytest.raises(Fenced, match="claim of epoch 4"):  # its primary has not heard of it yet
        write_records(store, 0, range(6, 7), epoch=3)
    write_records(store, 0, range(7, 9), epoch=5)  # another one took over before it heard of it
    manifest, created = log.create(CONFIG)
    assert created
    assert manifest.shards == (ShardEntry(0, (), 9, 6), ShardEntry(1))
    claim = Wal(store, "c", 0, 0).read(9)
    assert claim is not None
    assert (claim.kind, claim.epoch) == ("claim", 6)
    with pytest.raises(Fenced, match="claim of epoch 6"):
        write_records(store, 0, range(9, 10), epoch=5)
    assert Wal(store, "c", 1, 0).end(0, 0) == (0, 0)


def test_collection_created_again_with_another_number_of_shards_fences_every_wal_it_uses() -> None:
    store = MemoryStore()
    log = log_of(store)
    log.create(replace(CONFIG, shards=3))
    for shard, last in enumerate((4, 5, 6)):
        write_records(store, shard, range(1, last + 1), epoch=2)
    log.delete()
    fewer, _ = log.create(replace(CONFIG, shards=1))
    assert fewer.shards == (ShardEntry(0, (), 6, 4),)
    Wal(store, "c", 2, 0).delete_before(7)  # as the files of the deleted collection are
    write_records(store, 2, range(8, 40), epoch=3)  # shard 2 is in no manifest now
    log.delete()
    more, _ = log.create(replace(CONFIG, shards=4))
    assert more.shards == (ShardEntry(0, (), 8, 6), ShardEntry(1, (), 7, 4), ShardEntry(2, (), 40, 4), ShardEntry(3))
    for shard, lsn in ((0, 8), (1, 7), (2, 40)):
        with pytest.raises(Fenced):
            write_records(store, shard, range(lsn, lsn + 1), epoch=2)


def test_creation_again_goes_on_where_its_claim_collides() -> None:
    store = OvertakenStore()
    log = log_of(store)
    log.create(CONFIG)
    write_records(store, 0, range(1, 4))
    log.delete()
    store.before = lambda: write_records(store, 0, range(5, 7), epoch=3)
    manifest, _ = log.create(CONFIG)
    assert manifest.shards[0] == ShardEntry(0, (), 7, 4)


def test_two_creations_at_once_after_a_deletion_make_one_collection_behind_all_old_writes() -> None:
    store = OvertakenStore()
    log_of(store).create(CONFIG)
    write_records(store, 0, range(1, 4))
    log_of(store).delete()
    store.before = lambda: log_of(store, "fast").create(CONFIG)
    manifest, created = log_of(store, "slow").create(CONFIG)
    assert not created
    assert manifest.writer.startswith("fast")
    assert manifest.shards[0].applied_lsn == 5
    records = [record.kind for record in Wal(store, "c", 0, 0).read_after(3)]
    assert records == ["claim", "claim", "claim"]  # the last fences nobody who has written


def test_collection_of_format_1_goes_on_as_before() -> None:
    store = MemoryStore()
    log = log_of(store)
    ref = put_segment(store, "s0")
    old = replace(FULL, version=1, shards=(ShardEntry(0, (ref,)), ShardEntry(1)), attributes={}, format=1)
    body = json.loads(old.encode()) | {"format": 1}
    del body["attributes"], body["checksum"]
    del body["log_set"], body["switch"], body["num_gpus"]
    for entry in body["shards"]:
        for name in ("applied_lsn", "epoch", "tombstones", "behind"):
            del entry[name]
        for segment in entry["segments"]:
            del segment["origin"]
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    store.put(paths.manifest("c", 1), json.dumps(body | {"checksum": checksum_bytes(canonical)}).encode())
    base = log.newest_live()
    assert base == old
    assert log.wal_ends(base, 2) == (ShardEntry(0), ShardEntry(1))
    assert log.declare_attributes({"word": "string"}).format == 5
    assert log.commit_generation(base, base.config, base.shards).generation == 3
    log.delete()
    manifest, created = log.create(CONFIG)
    assert created
    assert manifest.shards == (ShardEntry(0), ShardEntry(1))


# --- stores that fail at any call -------------------------------------------------------------------------------

STEPS: dict[str, Callable[[ManifestLog], object]] = {
    "seal": lambda log: log.commit_shards(log.newest_live(), {0: ShardEntry(0, (), 5, 1)}),
    "declare": lambda log: log.declare_attributes({"word": "string"}),
    "import": lambda log: replace_all(log),
    "delete": lambda log: log.delete(),
    "create": lambda log: log.create(CONFIG),
}
AFTER = {  # state, generation, LSNs
    "seal": ("live", 1, (5, 0)),
    "declare": ("live", 1, (0, 0)),
    "import": ("live", 2, (5, 2)),
    "delete": ("deleted", 1, (6, 3)),
    "create": ("live", 2, (6, 3)),
}


def replace_all(log: ManifestLog) -> Manifest:
    base = log.newest_live()
    return log.commit_generation(base, CONFIG, log.wal_ends(base, 2))


def collection_before(step: str) -> MemoryStore:
    store = MemoryStore()
    log_of(store).create(CONFIG)
    write_records(store, 0, range(1, 6))
    write_records(store, 1, range(1, 3))
    if step == "create":
        log_of(store).delete()
    return store


def state_of(store: MemoryStore) -> tuple[str, int, tuple[int, ...]]:
    newest = log_of(store).newest()
    assert newest is not None
    return newest.state, newest.generation, tuple(entry.applied_lsn for entry in newest.shards)


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
@pytest.mark.parametrize("step", STEPS)
def test_store_that_fails_at_any_call_of_a_commit_leaves_it_undone_or_done(step: str, fault: Fault) -> None:
    counted = FaultyStore(collection_before(step))
    STEPS[step](log_of(counted))
    assert counted.calls > 2
    for at in range(1, counted.calls + 1):
        inner = collection_before(step)
        before = log_of(inner).newest()
        store = FaultyStore(inner, at, fault)
        try:
            STEPS[step](log_of(store))
            reported = True
        except Unavailable:
            reported = False
        assert store.calls >= at
        committed = log_of(inner).newest() != before
        assert reported == committed, f"call {at}"
        if not committed:
            STEPS[step](log_of(inner, "again"))  # no repair by hand is needed
        state, generation, lsns = state_of(inner)
        assert (state, generation) == AFTER[step][:2], f"call {at}"
        assert all(lsn >= least for lsn, least in zip(lsns, AFTER[step][2], strict=True)), f"call {at}"
        ends = [Wal(inner, "c", shard, 0).end(0, 0)[0] for shard in range(2)]
        if step in ("create", "delete"):  # claims of attempts that failed may lie before
            assert list(lsns) == ends
            assert all(end - least <= 3 for end, least in zip(ends, AFTER[step][2], strict=True))
        else:
            assert ends == [5, 2]
