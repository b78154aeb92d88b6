"""The manifest log: commits, conflicts, lost answers, and bytes that were damaged."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Conflict, Corrupt, NotFound, Unavailable
from cluster.manifest import (
    Manifest,
    ManifestLog,
    SegmentRef,
    ShardEntry,
    broken_invariants,
    collection_names,
)
from cluster.memory_store import MemoryStore
from cluster.routing import Routing
from cluster.segment import checksum_bytes

CONFIG = CollectionConfig(dimension=4, shards=2)
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def nonces(writer: str) -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"{writer}-{next(numbers)}"


def log_of(store: MemoryStore, writer: str = "w", collection: str = "c") -> ManifestLog:
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
        format=1,
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


def test_delete_ends_the_collection_and_returns_its_last_manifest() -> None:
    store = MemoryStore()
    log = log_of(store)
    parent, _ = log.create(CONFIG)
    live = log.commit_generation(parent, CONFIG, (ShardEntry(0, (put_segment(store, "s0"),)), ShardEntry(1)))
    assert log.delete() == live
    newest = log.newest()
    assert newest is not None
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
FULL = Manifest(
    collection="c",
    version=3,
    config=CollectionConfig(
        dimension=4, metric="ip", id_type="string", shards=2, index=IndexConfig("hnsw", 0.9, "cpu", 10**9)
    ),
    routing=Routing(2),
    generation=2,
    shards=(ShardEntry(0, (REF, replace(REF, segment_id="s1", count=4))), ShardEntry(1)),
    created_at=NOW.isoformat(),
    writer="nonce",
)
PARENT = replace(FULL, version=2)


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
    ],
)
def test_broken_invariants_are_named(manifest: Manifest, parent: Manifest | None, broken: list[str]) -> None:
    assert broken_invariants(manifest, parent) == broken


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


def test_sealed_manifest_without_changes_is_read() -> None:
    assert Manifest.decode(sealed(), "k") == FULL


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        sealed(format=2),
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
