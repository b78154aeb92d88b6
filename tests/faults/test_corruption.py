"""Every byte region of every stored object is changed or cut in turn: an error names the object, nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from actors.segment_loader import cached_path
from actors.segment_rows import read_description
from cluster import paths
from cluster.errors import Corrupt
from cluster.file_store import FileStore
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.segment import FileEntry
from cluster.wal import Wal, lsn_of
from tests.faults.corruption import (
    KINDS,
    Answers,
    Damage,
    Example,
    ReadStore,
    assert_refused,
    everywhere,
    example,
    kind_of,
    read_by,
    readers,
    sampled,
    served,
    started,
)
from tests.faults.shards import (
    ANSWER_S,
    COLLECTION,
    CONFIG,
    OTHER,
    copied,
    entry,
    lead,
    loaded,
    log,
    merge,
    new_nonce,
    seal,
    upsert,
    write,
)

OFFSETS = 4  # of an object that is damaged under whatever takes some ms
FEW_OFFSETS = 2
OTHERS = 5  # objects that are put in the place of each


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    return {kind: example(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def flat(examples: dict[str, Example]) -> Example:
    """On a store of its own, which may be damaged."""
    return Example(copied(examples["flat"].store), examples["flat"].answers)


def keys(store: ObjectStore, text: str = "") -> list[str]:
    return [info.key for info in store.objects("collections/") if text in info.key]


def newest_manifest(store: ObjectStore) -> str:
    return paths.manifest(COLLECTION, log(store).newest_live().version)


def read_by_a_load(store: MemoryStore, folder: Path) -> list[str]:
    return read_by(store, lambda reads: loaded(reads, folder / new_nonce()))


# --- a replica starts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_what_a_load_reads_is_verified(kind: str, examples: dict[str, Example], tmp_path: Path) -> None:
    store = copied(examples[kind].store)
    known = readers(store, tmp_path)
    assert sorted(known) == read_by_a_load(store, tmp_path)
    one_of_each = {kind_of(key): key for key in known}
    for key, read in known.items():
        data = store.get(key)
        new_here = kind in ("flat", "names") or kind_of(key) == paths.INDEX
        whole = kind_of(key) == "wal" or (new_here and key in one_of_each.values())
        for damage in everywhere(key, data) if whole else sampled(data, OFFSETS):
            store.put(key, damage.data)
            assert_refused(key, damage, read)
        store.put(key, data)
        read()
    assert started(store, tmp_path) == examples[kind].answers


@pytest.mark.parametrize("kind", KINDS)
def test_load_of_a_damaged_object_names_it(kind: str, examples: dict[str, Example], tmp_path: Path) -> None:
    store = copied(examples[kind].store)
    whole = kind in ("flat", "names")  # the others differ in their segments only
    for key in [key for key in read_by_a_load(store, tmp_path) if whole or "/segments/" in key]:
        data = store.get(key)
        for damage in sampled(data, OFFSETS if kind == "flat" else FEW_OFFSETS):
            store.put(key, damage.data)
            assert_refused(key, damage, partial(started, store, tmp_path, key))
        store.put(key, data)
    assert started(store, tmp_path) == examples[kind].answers


def test_object_in_the_place_of_another_of_its_kind_is_refused(flat: Example, tmp_path: Path) -> None:
    for collection in (COLLECTION, OTHER):
        for shard in range(2):
            write_more(flat.store, tmp_path, collection, shard)
            seal(flat.store, tmp_path, collection, shard)
            write_more(flat.store, tmp_path, collection, shard)
    answers, everything = started(flat.store, tmp_path), {key: flat.store.get(key) for key in keys(flat.store)}
    kinds = set()
    for key in read_by_a_load(flat.store, tmp_path):
        alike = [other for other in everything if kind_of(other) == kind_of(key)]
        others = [other for other in alike if everything[other] != everything[key]]
        assert others, f"nothing is like {key}"
        kinds.add(kind_of(key))
        others.sort(key=lambda other: other.rsplit("/", 1)[-1] != key.rsplit("/", 1)[-1])  # the same number first
        start = partial(started, flat.store, tmp_path, key)
        for other in others[:OTHERS]:
            flat.store.put(key, everything[other])
            assert_refused(key, Damage(f"replaced by {other}", b""), start)
        flat.store.put(key, everything[key])
    assert kinds == {"manifest", "wal", "tombstones", *paths.SEGMENT_FILES}
    assert started(flat.store, tmp_path) == answers


def test_object_that_the_manifest_names_and_that_is_gone_is_named(flat: Example, tmp_path: Path) -> None:
    for key in read_by_a_load(flat.store, tmp_path):
        if "/segments/" in key or "/tombstones/" in key:
            data = flat.store.get(key)
            flat.store.delete(key)
            assert_refused(key, Damage("deleted", b""), lambda: started(flat.store, tmp_path))
            flat.store.put(key, data)


def test_objects_that_no_load_reads_do_not_matter(flat: Example, tmp_path: Path) -> None:
    read = read_by_a_load(flat.store, tmp_path)
    rest = [key for key in keys(flat.store) if key not in read]
    assert {key.split("/")[1] for key in rest} == {COLLECTION, OTHER}
    assert any(key.startswith(paths.manifest_prefix(COLLECTION)) for key in rest)
    assert any(key.startswith(paths.wal_prefix(COLLECTION, 0)) for key in rest)
    for damage in (Damage("cut", b""), Damage("noise", bytes(range(256)))):
        for key in rest:
            flat.store.put(key, damage.data)
        for prefix in (paths.manifest_prefix(COLLECTION), paths.wal_prefix(COLLECTION, 0)):
            for name in ("README.md", f"{10**6:020d}.tmp", f"{10**6:019d}.json", "x.arrow"):
                flat.store.put(prefix + name, damage.data)
        assert started(flat.store, tmp_path) == flat.answers, damage.name


def test_space_after_a_manifest_is_not_damage(flat: Example, tmp_path: Path) -> None:
    key = newest_manifest(flat.store)
    flat.store.put(key, flat.store.get(key) + b"\n")
    assert started(flat.store, tmp_path) == flat.answers


# --- cached and local files -------------------------------------------------------------------------------------


def cached_files(store: MemoryStore, folder: Path) -> list[tuple[str, Path]]:
    """(key, cached copy) of every file of the shard's segments."""
    found = []
    for ref in entry(store).segments:
        files: dict[str, FileEntry] = read_description(store, COLLECTION, ref).files
        for name, expected in files.items():
            found.append((paths.segment_file(COLLECTION, ref.segment_id, name), cached_path(folder, expected)))
    return found


@pytest.mark.parametrize("kind", ["hnsw", "names"])
def test_damaged_cached_file_is_fetched_again(kind: str, examples: dict[str, Example], tmp_path: Path) -> None:
    store, cache = examples[kind].store, tmp_path / "cache"
    loaded(store, cache)
    for key, cached in cached_files(store, cache):
        data = cached.read_bytes()
        assert data == store.get(key)
        for damage in sampled(data, FEW_OFFSETS):
            cached.write_bytes(damage.data)
            assert served(loaded(store, cache)) == examples[kind].answers, f"cached {key}: {damage.name}"
            assert cached.read_bytes() == data, f"cached {key}: {damage.name}: stays as it is"


def test_damaged_cached_file_of_a_damaged_object_is_refused(flat: Example, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    loaded(flat.store, cache)
    for key, cached in cached_files(flat.store, cache):
        data = flat.store.get(key)
        for damage in sampled(data, FEW_OFFSETS):
            flat.store.put(key, damage.data)
            assert served(loaded(flat.store, cache)) == flat.answers, "the cached copy is sound"
            cached.write_bytes(damage.data)
            assert_refused(key, damage, lambda: loaded(flat.store, cache))
            cached.write_bytes(data)
        flat.store.put(key, data)
    assert len(list(cache.iterdir())) == len(cached_files(flat.store, cache))


def test_damaged_file_that_is_mapped_where_it_lies_is_refused(flat: Example, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "data")
    for key in keys(flat.store, f"/{COLLECTION}/"):
        store.put(key, flat.store.get(key))
    assert served(loaded(store, tmp_path)) == flat.answers
    for key in (key for key in read_by_a_load(flat.store, tmp_path) if "/segments/" in key):
        path, data = tmp_path / "data" / key, flat.store.get(key)
        for damage in sampled(data, FEW_OFFSETS):
            path.unlink()
            path.write_bytes(damage.data)
            assert_refused(key, damage, lambda: loaded(store, tmp_path))
        path.unlink()
        path.write_bytes(data)
    assert served(loaded(store, tmp_path)) == flat.answers


# --- a replica serves -------------------------------------------------------------------------------------------


def write_more(store: ObjectStore, folder: Path, collection: str = COLLECTION, shard: int = 0) -> None:
    primary = lead(loaded(store, folder, collection, shard))
    write(primary, {1: 50.0, 13: 50.0, 600: 50.0})
    write(primary, gone=[14])
    primary.stop()


def written_and_sealed(store: ObjectStore, folder: Path) -> None:
    """A newer version with more points."""
    write_more(store, folder)
    assert seal(store, folder) is not None


def answers_by_lsn(store: MemoryStore, version: int, folder: Path) -> dict[int, Answers]:
    """What a replica of a version answers whose log ends at an LSN, for each after what its files hold."""
    store = copied(store)
    for key in keys(store, f"/{COLLECTION}/manifest/"):
        if (paths.manifest_version(key) or 0) > version:
            store.delete(key)
    wal, found = Wal(store, COLLECTION, 0, 0), dict[int, Answers]()
    for lsn in range(wal.last_listed(), entry(store).applied_lsn, -1):
        found[lsn] = started(store, folder)
        store.delete(paths.wal_record(COLLECTION, 0, lsn))
    return found


def copy_new(source: MemoryStore, target: MemoryStore) -> None:
    """Put what others have written."""
    for key in keys(source):
        target.put(key, source.get(key))


def test_replica_that_cannot_load_a_newer_version_goes_on_with_what_it_has(flat: Example, tmp_path: Path) -> None:
    newer, version = copied(flat.store), log(flat.store).newest_live().version
    written_and_sealed(newer, tmp_path / "upkeep")
    allowed = answers_by_lsn(newer, version, tmp_path)
    replica = loaded(reads := ReadStore(store := copied(flat.store)), tmp_path / new_nonce())
    copy_new(newer, store)
    reads.read.clear()
    replica.load()
    needed = sorted(reads.read)
    assert {kind_of(key) for key in needed} == {"manifest", "wal", "tombstones", *paths.SEGMENT_FILES}
    for key in needed:
        store, cache = copied(flat.store), tmp_path / new_nonce()
        replica = loaded(store, cache)
        before = set(cache.iterdir())
        copy_new(newer, store)
        for damage in sampled(newer.get(key), FEW_OFFSETS):
            store.put(key, damage.data)
            assert_refused(key, damage, replica.load)
            assert served(replica) == allowed[replica.applied_lsn], f"{key}: {damage.name}"
            for path in set(cache.iterdir()) - before:
                path.unlink()
        store.put(key, newer.get(key))
        replica.load()
        assert served(replica) == allowed[max(allowed)], f"{key}, mended"


def test_follower_of_a_damaged_log_applies_what_is_before_it_and_nothing_behind(flat: Example, tmp_path: Path) -> None:
    newer = copied(flat.store)
    write_more(newer, tmp_path)
    allowed = answers_by_lsn(newer, log(newer).newest_live().version, tmp_path)
    first, last = Wal(flat.store, COLLECTION, 0, 0).last_listed() + 1, max(allowed)
    assert last == first + 2
    for lsn in range(first, last + 1):
        store, key = copied(flat.store), paths.wal_record(COLLECTION, 0, lsn)
        replica = loaded(store, tmp_path / "cache")
        copy_new(newer, store)
        data = newer.get(key)
        for damage in everywhere(key, data):
            store.put(key, damage.data)
            assert_refused(key, damage, replica.catch_up)
            assert replica.applied_lsn == lsn - 1, f"{key}: {damage.name}"
        assert served(replica) == allowed[lsn - 1]
        store.put(key, data)
        replica.catch_up()
        assert served(replica) == allowed[last]


def says_lsn(data: bytes) -> int | None:
    try:
        return lsn_of(data)
    except Corrupt:
        return None


def test_damaged_record_that_is_pushed_is_not_applied(flat: Example, tmp_path: Path) -> None:
    newer = copied(flat.store)
    write_more(newer, tmp_path)
    replica = loaded(flat.store, tmp_path / "cache")
    first = replica.applied_lsn + 1
    for lsn in range(first, first + 3):
        data = newer.get(key := paths.wal_record(COLLECTION, 0, lsn))
        view = replica.view(1)
        for damage in everywhere(key, data):
            if says_lsn(damage.data) in (lsn, None):
                assert_refused("record", damage, partial(replica.receive, damage.data))
            else:  # of another LSN: it was applied before, or the log is read, which has no more
                replica.receive(damage.data)
            assert replica.view(1) is view, f"pushed record {lsn}: {damage.name}"
        replica.receive(data)
        assert replica.applied_lsn == lsn
    assert served(replica) == started(newer, tmp_path)


# --- those who write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [seal, merge])
def test_upkeep_of_a_damaged_object_commits_nothing(
    work: Callable[[ObjectStore, Path], object], flat: Example, tmp_path: Path
) -> None:
    needed = read_by(copied(flat.store), lambda reads: work(reads, tmp_path / new_nonce()))
    wanted = {"manifest", "tombstones", paths.DESCRIPTION, paths.ROWS}
    assert {kind_of(key) for key in needed} == (wanted | {"wal"} if work is seal else wanted)
    for key in needed:
        data, before = flat.store.get(key), keys(flat.store)
        for damage in sampled(data, FEW_OFFSETS):
            flat.store.put(key, damage.data)
            assert_refused(key, damage, lambda: work(flat.store, tmp_path / new_nonce()))
            left = [new for new in keys(flat.store) if new not in before and kind_of(new) != "tombstones"]
            assert not left, f"{key}: {damage.name}: {left}"
        flat.store.put(key, data)
    assert started(flat.store, tmp_path) == flat.answers
    assert work(flat.store, tmp_path) is not None
    assert started(flat.store, tmp_path) == flat.answers


def test_damaged_newest_manifest_is_read_and_followed_by_nobody(flat: Example) -> None:
    manifests, manifest = log(flat.store), log(flat.store).newest_live()
    key, before = newest_manifest(flat.store), keys(flat.store)
    data = flat.store.get(key)
    work: dict[str, Callable[[], object]] = {
        "newest": manifests.newest,
        "newest_live": manifests.newest_live,
        "read": lambda: manifests.read(manifest.version),
        "named_segments": manifests.named_segments,
        "create": lambda: manifests.create(CONFIG),
        "declare": lambda: manifests.declare_attributes({"word": "string"}),
        "generation": lambda: manifests.commit_generation(manifest, manifest.config, manifest.shards),
        "delete": manifests.delete,
    }
    for damage in sampled(data, 40):
        flat.store.put(key, damage.data)
        for name, call in work.items():
            assert_refused(key, Damage(f"{damage.name}, {name}", b""), call)
    assert keys(flat.store) == before
    flat.store.put(key, data)
    assert manifests.newest_live() == manifest


def test_primary_that_finds_a_damaged_record_in_its_place_acknowledges_nothing(flat: Example, tmp_path: Path) -> None:
    primary = lead(replica := loaded(flat.store, tmp_path / "cache"))
    lsn = write(primary, {2: 60.0})
    good = flat.store.get(key := paths.wal_record(COLLECTION, 0, lsn))
    before = served(replica)
    taken = paths.wal_record(COLLECTION, 0, lsn + 1)
    for number, damage in enumerate(sampled(good, FEW_OFFSETS)):
        flat.store.put(taken, damage.data)
        outcome = primary.write(upsert({3: 70.0 + number}))
        assert_refused(taken, damage, partial(outcome.result, ANSWER_S))
        assert flat.store.get(taken) == damage.data, f"{taken}: {damage.name}: was replaced"
        primary.stop()  # its threads have ended
        assert served(replica) == before
        assert_refused(taken, damage, lambda: lead(replica))
        assert replica.status().epoch == 0
        assert served(replica) == before
        flat.store.delete(taken)
        primary = lead(replica)
        taken = paths.wal_record(COLLECTION, 0, replica.applied_lsn + 1)
    primary.stop()
    assert flat.store.get(key) == good
