"""Snapshots, restoring and branching: what they hold, what they leave alone, what becomes of them under failures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.segment_upkeep import seal_tail
from cluster import paths
from cluster.deletion import delete_files
from cluster.errors import Conflict, Corrupt, Invalid, NotFound, Unavailable
from cluster.manifest import Manifest, ManifestLog
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.rollback import roll_back
from cluster.segment import delete_segment
from cluster.snapshots import Snapshot, delete_snapshot, list_snapshots, read_snapshot
from jobs import sealing
from jobs.build_plan import Workers
from jobs.report import JobReporter, JobStatus
from jobs.sealing import Sealer
from jobs.snapshots import (
    BranchOptions,
    RestoreOptions,
    SnapshotOptions,
    branch,
    named_version,
    restore,
    take_snapshot,
)
from tests.fakes import Fault, FaultyStore, ManualClock, run_tasks_here
from tests.unit.actors.points import keys
from tests.unit.jobs.histories import CONFIG, Began, History, new_nonce

NOW = datetime(2026, 1, 2, tzinfo=UTC)


class StoreWith:
    """A store that does something else before each put of a new object."""

    def __init__(self, inner: ObjectStore, before: Callable[[str], None]) -> None:
        self._inner = inner
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._before(key)
        return self._inner.put_if_absent(key, data)


def once_at_manifest_of(collection: str, others: Callable[[], object]) -> Callable[[str], None]:
    left = [others]

    def before(key: str) -> None:
        if key.startswith(paths.manifest_prefix(collection)) and left:
            left.pop()()

    return before


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """Imported points in two shards with writes on top, some of them sealed: generation 2."""
    return made_in(MemoryStore(), tmp_path, monkeypatch)


def made_in(store: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    made = History(store, folder)
    made.create()
    made.import_ids(range(20))
    made.write(range(18, 24), [3])
    made.seal(0)
    made.seal(1)
    made.write([7, 30], [8, 19])
    monkeypatch.setattr(sealing, "open_store", lambda url: made.store)
    return made


def reporter(store: ObjectStore) -> JobReporter:
    return JobReporter(store, JobStatus("job", "snapshot", "words"), clock=ManualClock())


def sealer(made: History, store: ObjectStore | None = None) -> Sealer:
    log = ManifestLog(store or made.store, "words", new_nonce)
    return Sealer("memory://x", log, Workers(run_tasks_here, 2), str(made.folder))


def take(made: History, name: str = "before", store: Any = None) -> Snapshot:
    store = store or made.store
    return take_snapshot(store, sealer(made, store), SnapshotOptions("words", name), reporter(made.store), lambda: NOW)


def bring_back(made: History, name: str = "before", store: Any = None) -> Manifest:
    """Restore; the snapshot's points are what it must hold."""
    store = store or made.store
    snapshot = read_snapshot(made.store, "words", name)
    contents = made.held(made.log.read(snapshot.version), replayed=False)
    manifest = restore(store, ManifestLog(store, "words", new_nonce), RestoreOptions("words", name))
    made.began(manifest, contents)
    made.follow(manifest)
    return manifest


def branched(made: History, into: str = "other", snapshot: str | None = "before", store: Any = None) -> History:
    """Branch; the new collection as a history of its own."""
    store = store or made.store
    log = ManifestLog(store, made.collection, new_nonce)
    origin = (
        named_version(store, log, made.collection, snapshot)
        if snapshot
        else sealer(made).sealed("words", reporter(store))
    )
    options = BranchOptions(made.collection, into, snapshot)
    manifest = branch(store, log, ManifestLog(store, into, new_nonce), origin, options)
    contents = made.held(origin, replayed=False)
    ends = [(entry.applied_lsn, entry.epoch) for entry in manifest.shards]
    found = History(made.store, made.folder, manifest.config, into, log_set=manifest.log_set, ends=ends)
    found.generations[manifest.generation] = Began(contents, 0)
    return found


# --- taking one ------------------------------------------------------------------------------------------------------


def test_snapshot_holds_every_write_before_it_and_none_after(made: History) -> None:
    contents = made.held()
    snapshot = take(made)
    assert snapshot == Snapshot("before", made.newest.version, NOW.isoformat(), len(contents))
    made.write([7, 99], [1])
    made.seal(0)
    made.merge(0)
    version = made.log.read(snapshot.version)
    assert made.held(version, replayed=False) == contents
    assert read_snapshot(made.store, "words", "before") == snapshot
    made.assert_held()


def test_snapshot_of_an_idle_collection_commits_nothing(made: History) -> None:
    first = take(made)
    made.claim(0)  # no write
    assert take(made) == first
    second = take(made, "again")
    assert second.version == first.version == made.newest.version


def test_name_of_another_version_is_a_conflict(made: History) -> None:
    first = take(made)
    made.write([1])
    with pytest.raises(Conflict, match="take another name"):
        take(made)
    assert list_snapshots(made.store, "words") == [first]
    made.assert_held()


def test_snapshot_of_nothing_is_refused(made: History) -> None:
    with pytest.raises(Invalid, match="name"):
        take(made, "No Name")
    of_others = replace(sealer(made), log=ManifestLog(made.store, "others", new_nonce))
    with pytest.raises(NotFound, match="no collection 'others'"):
        of_others.sealed("others", reporter(made.store))
    made.log.delete()
    with pytest.raises(NotFound, match="no collection 'words'"):
        take(made)


def test_snapshot_while_the_number_of_shards_changes(made: History) -> None:
    made.reshard(3)
    made.write([50])
    with pytest.raises(Conflict, match="being switched"):
        take(made)
    made.switch()
    contents = made.held()
    snapshot = take(made)  # nothing was written to the new logs, and their shards have read the old ones
    version = made.log.read(snapshot.version)
    assert not version.crossing
    assert made.held(version, replayed=False) == contents


def test_generation_that_is_committed_meanwhile_is_sealed_too(made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_and_write() -> None:
        made.import_ids(range(60, 66))
        made.write([61, 70])

    store = StoreWith(made.store, once_at_manifest_of("words", import_and_write))
    monkeypatch.setattr(sealing, "open_store", lambda url: store)
    snapshot = take(made)
    assert made.held(made.log.read(snapshot.version), replayed=False).keys() == {*range(60, 66), 70}
    made.assert_held()


def seal_all(made: History) -> None:
    made.seal(0)
    made.seal(1)


def test_conflicts_with_the_shards_own_upkeep_are_tried_again(made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreWith(made.store, once_at_manifest_of("words", lambda: seal_all(made)))
    monkeypatch.setattr(sealing, "open_store", lambda url: store)
    contents = made.held()
    assert made.held(made.log.read(take(made).version), replayed=False) == contents


def test_long_tail_is_sealed_bit_by_bit(made: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SEAL_POINTS_MIN", 1)
    monkeypatch.setattr(sealing, "SEAL_POINTS_MAX", 5)
    for number in range(8):
        made.write([number, 40 + number, 60 + number])
    contents, version = made.held(), made.newest.version
    snapshot = take(made)
    assert snapshot.version > version + 3
    assert made.held(made.log.read(snapshot.version), replayed=False) == contents


@pytest.mark.parametrize("again", [False, True])
def test_snapshot_of_a_collection_that_is_deleted_before_it_has_its_name_is_taken_back(
    again: bool, made: History
) -> None:
    """The deletion has looked for snapshots before this one was there, and deletes the files next."""

    def delete() -> None:
        made.log.delete()
        if again:
            made.log.create(made.config)

    left = [delete]
    store = StoreWith(made.store, lambda key: left.pop()() if "/snapshots/" in key and left else None)
    with pytest.raises(NotFound, match="snapshot 'before' is of a collection 'words' that was deleted"):
        take(made, store=store)
    assert not left
    assert list_snapshots(made.store, "words") == []


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_snapshot_through_a_failing_store_is_whole_or_not_there(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(tmp_path)
    stored = stored_in(made)
    contents, outcomes = made.held(), set()
    for at in range(1, 100):
        again = copied(made, stored)
        failing = FaultyStore(again.store, at, fault)
        monkeypatch.setattr(sealing, "open_store", lambda url, failing=failing: failing)
        try:
            take(again, store=failing)
        except Unavailable:
            outcomes.add("failed")
        for found in list_snapshots(again.store, "words"):
            assert again.held(again.log.read(found.version), replayed=False) == contents
            outcomes.add("taken")
        assert again.held() == contents
        if failing.calls < at:
            assert list_snapshots(again.store, "words")
            break
    else:
        pytest.fail("the snapshot never ends")
    monkeypatch.setattr(sealing, "open_store", lambda url: again.store)
    assert again.held(again.log.read(take(again, "after").version), replayed=False) == contents
    assert outcomes == {"failed", "taken"}


def small(folder: Path) -> History:
    """One shard with a segment, deleted rows of it and a tail."""
    made = History(MemoryStore(), folder, replace(CONFIG, shards=1))
    made.create()
    made.write(range(5))
    made.seal(0)
    made.write([4, 5], [3])
    return made


def stored_in(made: History) -> dict[str, bytes]:
    return {key: made.store.get(key) for key in keys(made.store, "collections/")}


def copied(made: History, stored: dict[str, bytes]) -> History:
    """The same in a store of its own."""
    again = replace(made, store=MemoryStore(), generations=dict(made.generations))
    for key, data in stored.items():
        again.store.put(key, data)
    return again


# --- restoring -------------------------------------------------------------------------------------------------------


def test_restore_replaces_what_was_written_since_and_later_writes_stay(made: History) -> None:
    take(made)
    snapshot = made.held()
    made.write([7, 99], [1])
    generation = made.newest.generation
    manifest = bring_back(made)
    assert (manifest.generation, manifest.log_set) == (generation + 1, 0)
    assert made.held() == snapshot
    made.write([1, 98], [7])
    made.assert_held()
    for shard in (0, 1):
        made.seal(shard)
        made.merge(shard)
    made.assert_held()


def test_restore_can_be_rolled_back_and_done_again(made: History) -> None:
    take(made)
    made.write([7, 99], [1])
    generation = made.newest.generation
    bring_back(made)
    made.write([97])
    made.went_back(roll_back(made.store, made.log), generation)
    made.assert_held()
    assert 99 in made.held()
    assert 97 in made.held()
    bring_back(made)
    made.assert_held()


def test_deleted_rows_of_a_shared_segment_differ_between_generations(made: History) -> None:
    """Both generations seal up to one LSN; the one has deleted a row before it, in the other that came back."""
    take(made)
    made.write(deletes=list(range(12)))
    before = made.newest
    bring_back(made)
    made.write(deletes=[15, 16])
    for shard in (0, 1):
        made.seal(shard)
    made.assert_held()
    made.went_back(roll_back(made.store, made.log), before.generation)
    for shard in (0, 1):
        made.seal(shard)
    made.assert_held()


@pytest.mark.parametrize("now", [1, 3])
def test_restore_of_a_snapshot_with_another_number_of_shards(now: int, made: History) -> None:
    take(made)
    snapshot = made.held()
    made.write([7, 99], [1])
    made.reshard(now)
    made.switch()
    made.write([8, 98])
    manifest = bring_back(made)
    assert (manifest.log_set, len(manifest.shards)) == (2, 2)
    assert made.held() == snapshot
    made.write([1])
    made.assert_held()
    for shard in (0, 1):
        made.seal(shard)
    assert not made.newest.crossing
    made.assert_held()


def test_restore_while_the_number_of_shards_changes_is_a_conflict(made: History) -> None:
    take(made)
    made.reshard(3)
    with pytest.raises(Conflict, match="being switched"):
        bring_back(made)
    made.assert_held()


def test_attributes_and_config_of_the_snapshot_come_back(made: History) -> None:
    made.log.declare_attributes({"a": "int64"})
    take(made)
    base = made.newest
    entries = made.entries_with({1: 1.0}, made.log.wal_ends(base, 2))
    other = replace(base.config, index=replace(base.config.index, kind="hnsw"))
    made.log.commit_generation(base, other, entries, {"a": pa.string(), "b": pa.bool_()})
    manifest = restore(made.store, made.log, RestoreOptions("words", "before"))
    assert manifest.config == base.config
    assert manifest.attributes == {"a": "int64", "b": "bool"}


def test_snapshot_that_is_not_there_or_of_which_a_file_is_gone_is_not_restored(made: History) -> None:
    with pytest.raises(NotFound, match="no snapshot 'before'"):
        restore(made.store, made.log, RestoreOptions("words", "before"))
    snapshot = take(made)
    segment = made.newest.shards[0].segments[0].segment_id
    made.import_ids([1])
    delete_segment(made.store, "words", segment)
    with pytest.raises(NotFound, match=f"snapshot 'before' .* is not kept: .*{segment}"):
        restore(made.store, made.log, RestoreOptions("words", "before"))
    made.store.delete(paths.manifest("words", snapshot.version))
    with pytest.raises(NotFound):
        restore(made.store, made.log, RestoreOptions("words", "before"))
    made.assert_held()


def test_snapshot_of_a_collection_that_was_deleted_since_is_not_restored(made: History) -> None:
    take(made)
    made.log.delete()
    with pytest.raises(NotFound, match="no collection"):
        restore(made.store, made.log, RestoreOptions("words", "before"))
    made.log.create(CONFIG)
    with pytest.raises(NotFound, match="snapshot 'before' is of a collection 'words' that was deleted"):
        restore(made.store, made.log, RestoreOptions("words", "before"))


def test_memory_that_did_not_suffice_for_two_generations_does_not_for_a_snapshot(made: History) -> None:
    take(made)
    base = made.newest
    made.log.commit_generation(base, base.config, made.log.wal_ends(base, 2), switch="one_at_a_time")
    assert restore(made.store, made.log, RestoreOptions("words", "before")).switch == "one_at_a_time"


def test_restore_during_which_the_collection_is_created_again_is_refused(made: History) -> None:
    """Its deletion has not come to the snapshots yet."""
    take(made)
    calls = list[int]()

    class CreatedAgain(ManifestLog):
        def newest_live(self) -> Manifest:
            calls.append(1)
            if len(calls) == 2:
                made.log.delete()
                made.log.create(made.config)
            return super().newest_live()

    with pytest.raises(NotFound, match="snapshot 'before' is of a collection 'words' that was deleted"):
        restore(made.store, CreatedAgain(made.store, "words", new_nonce), RestoreOptions("words", "before"))
    assert made.newest.segments == {}


def test_snapshot_that_is_deleted_meanwhile_brings_back_what_was_newest(made: History) -> None:
    take(made)
    made.write([99])
    before = made.newest
    delete = once_at_manifest_of("words", lambda: delete_snapshot(made.store, "words", "before"))
    log = ManifestLog(StoreWith(made.store, delete), "words", new_nonce)
    with pytest.raises(NotFound, match="no snapshot"):
        restore(made.store, log, RestoreOptions("words", "before"))
    assert made.newest.generation == before.generation + 2
    made.went_back(made.newest, before.generation)
    made.assert_held()


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_restore_through_a_failing_store_is_whole_or_nothing(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(tmp_path)
    monkeypatch.setattr(sealing, "open_store", lambda url: made.store)
    take(made)
    snapshot = made.held()
    made.write([99], [1])
    now, stored = made.held(), stored_in(made)
    generation, outcomes = made.newest.generation, set()
    for at in range(1, 200):
        again = copied(made, stored)
        failing = FaultyStore(again.store, at, fault)
        try:
            restore(failing, ManifestLog(failing, "words", new_nonce), RestoreOptions("words", "before"))
        except Unavailable:
            outcomes.add("failed")
        newest = again.newest.generation
        assert newest in (generation, generation + 1)
        assert again.held() == (now if newest == generation else snapshot)
        outcomes |= {"restored"} if newest > generation else set()
        if failing.calls < at:
            break
    else:
        pytest.fail("the restore never ends")
    assert outcomes == {"failed", "restored"}


# --- branching -------------------------------------------------------------------------------------------------------


def test_branch_has_the_points_of_the_snapshot_and_goes_its_own_way(made: History) -> None:
    snapshot = take(made)
    contents = made.held()
    made.write([99], [1])
    other = branched(made)
    assert other.held() == contents
    assert other.newest.config == made.newest.config
    assert {ref.origin for ref in other.newest.segments.values()} == {"words"}
    assert not keys(made.store, paths.segments_prefix("other"))
    version = made.newest.version
    other.write([1, 200], [2, 7])
    for shard in (0, 1):
        other.seal(shard)
    other.assert_held()
    for shard in (0, 1):
        other.merge(shard)
    other.assert_held()
    assert {ref.origin for ref in other.newest.segments.values()} == {""}
    other.reshard(3)
    other.switch()
    other.write([201])
    other.assert_held()
    made.assert_held()
    assert made.newest.version == version
    assert made.held(made.log.read(snapshot.version), replayed=False) == contents


def test_branch_as_of_now_has_every_write_before_it(made: History) -> None:
    made.write([99], [1])
    contents = made.held()
    other = branched(made, snapshot=None)
    assert other.held() == contents
    assert list_snapshots(made.store, "words") == []


def test_branch_of_a_branch_names_the_first_origin(made: History) -> None:
    take(made)
    other = branched(made)
    other.write([300])
    for shard in (0, 1):
        other.seal(shard)
    sealed = {ref.segment_id for ref in other.newest.segments.values() if not ref.origin}
    options = BranchOptions("other", "third")
    third = branch(other.store, other.log, ManifestLog(other.store, "third", new_nonce), other.newest, options)
    origins = {ref.segment_id: ref.origin for ref in third.segments.values()}
    assert {name for name, origin in origins.items() if origin == "other"} == sealed
    assert set(origins.values()) == {"words", "other"}
    assert other.held(third) == other.held()


def test_branch_back_into_the_name_of_its_origin(made: History) -> None:
    """The origin was deleted; what holds the files then is the new collection of that name itself."""
    take(made)
    other = branched(made)
    made.log.delete()
    again = branch(made.store, other.log, made.log, other.newest, BranchOptions("other", "words"))
    assert {ref.origin for ref in again.segments.values()} == {""}
    assert other.held(again) == other.held()


def test_attributes_are_those_of_the_branched_version(made: History) -> None:
    made.log.declare_attributes({"a": "int64"})
    take(made)
    made.log.declare_attributes({"b": "string"})
    assert branched(made).newest.attributes == {"a": "int64"}


def test_branch_into_a_name_that_was_used_before(made: History) -> None:
    """Writers of the collection that was deleted stay out, and so do its records and its deleted rows."""
    take(made)
    contents = made.held()
    first = branched(made)
    first.write([400, 401], [2])
    first.seal(0)
    with pytest.raises(Conflict, match="collection 'other' exists"):
        branched(made)
    assert first.held()[400]
    first.log.delete()
    second = branched(made)
    assert second.held() == contents
    second.write([402], [3])
    for shard in (0, 1):
        second.seal(shard)
    second.assert_held()


def test_wrong_branches_are_refused(made: History) -> None:
    take(made)
    with pytest.raises(Invalid, match="is the collection to branch"):
        branched(made, "words")
    with pytest.raises(Invalid):
        branched(made, "../x")
    with pytest.raises(NotFound, match="no snapshot 'other'"):
        branched(made, snapshot="other")
    made.reshard(3)
    with pytest.raises(Conflict, match="being switched"):
        branch(made.store, made.log, ManifestLog(made.store, "b", new_nonce), made.newest, BranchOptions("words", "b"))
    assert made.store.folders(paths.collections_prefix()) == ["words"]


def test_collection_that_is_created_meanwhile_stays(made: History) -> None:
    take(made)
    log = ManifestLog(made.store, "other", new_nonce)
    store = StoreWith(made.store, once_at_manifest_of("other", lambda: log.create(replace(CONFIG, shards=1))))
    with pytest.raises(Conflict):
        branched(made, store=store)
    assert log.newest_live().config.shards == 1


def delete_and_create(made: History) -> None:
    made.log.delete()
    made.log.create(CONFIG)


@pytest.mark.parametrize("snapshot", [None, "before"])
def test_version_of_a_collection_that_was_created_again_is_not_branched(snapshot: str | None, made: History) -> None:
    """Its files are still there: its deletion has looked already who names them, and deletes them next."""
    take(made)
    origin = made.newest
    made.log.delete()
    made.log.create(made.config)
    into = ManifestLog(made.store, "other", new_nonce)
    with pytest.raises(NotFound, match=f"version {origin.version} is of a collection 'words' that was deleted"):
        branch(made.store, made.log, into, origin, BranchOptions("words", "other", snapshot))
    assert into.newest() is None


@pytest.mark.parametrize(
    "others",
    [
        lambda made: made.log.delete(),
        delete_and_create,
        lambda made: delete_snapshot(made.store, "words", "before"),
        lambda made: delete_segment(made.store, "words", made.newest.shards[1].segments[0].segment_id),
    ],
    ids=["deleted", "deleted and created again", "snapshot deleted", "collected"],
)
def test_branch_is_deleted_where_its_origin_went_meanwhile(others: Callable[[History], None], made: History) -> None:
    """Who deletes files looks for references after it has ended the collection, or deleted the snapshot: before that
    it may not have seen the branch."""
    take(made)
    store = StoreWith(made.store, once_at_manifest_of("other", lambda: others(made)))
    with pytest.raises(Conflict, match=r"while it was branched: collection 'other' was deleted again"):
        branched(made, store=store)
    newest = ManifestLog(made.store, "other", new_nonce).newest()
    assert newest is not None
    assert newest.state == "deleted"
    assert not keys(made.store, paths.tombstones_prefix("other", 0))


class Interrupted:
    """A store that does something else before its `at`-th call."""

    def __init__(self, inner: ObjectStore, at: int, others: Callable[[], object]) -> None:
        self._inner = inner
        self._at = at
        self._others = others
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                self._others()
            return getattr(self._inner, name)(*args)

        return call


@pytest.mark.parametrize("snapshot", ["before", None])
def test_origin_that_is_deleted_at_any_moment_of_a_branch(
    snapshot: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the deletion has seen the branch, and left it its files, or the branch has seen the deletion."""
    made = small(tmp_path)
    monkeypatch.setattr(sealing, "open_store", lambda url: made.store)
    take(made)
    contents, stored, outcomes = made.held(), stored_in(made), set()
    for at in range(1, 200):
        again = copied(made, stored)
        origin = again.newest
        store = Interrupted(
            again.store, at, lambda again=again: delete_files(again.store, again.log, again.log.delete())
        )
        log, into = (ManifestLog(store, name, new_nonce) for name in ("words", "other"))  # type: ignore[arg-type]
        try:
            branch(store, log, into, origin, BranchOptions("words", "other", snapshot))  # type: ignore[arg-type]
        except (Conflict, NotFound, Corrupt):
            newest = ManifestLog(again.store, "other", new_nonce).newest()
            assert newest is None or newest.state == "deleted"
            outcomes.add("deleted")
        else:
            assert again.held(ManifestLog(again.store, "other", new_nonce).newest_live()) == contents
            outcomes.add("stayed" if store.calls >= at else "undisturbed")
        if store.calls < at:
            break
    else:
        pytest.fail("the branch never ends")
    assert {"deleted", "undisturbed"} <= outcomes


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_branch_through_a_failing_store_is_whole_or_not_there(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(tmp_path)
    monkeypatch.setattr(sealing, "open_store", lambda url: made.store)
    take(made)
    contents, stored = made.held(), stored_in(made)
    outcomes = set()
    for at in range(1, 200):
        again = copied(made, stored)
        failing = FaultyStore(again.store, at, fault)
        try:
            branched(again, store=failing)
        except Unavailable:
            outcomes.add("failed")
        log = ManifestLog(again.store, "other", new_nonce)
        newest = log.newest()
        if newest is None:
            assert branched(again).held() == contents
        else:
            assert newest.state == "live"
            assert again.held(newest) == contents
            outcomes.add("branched")
        if failing.calls < at:
            break
    else:
        pytest.fail("the branch never ends")
    assert outcomes == {"failed", "branched"}


def test_seal_of_the_branch_names_its_own_tombstones(made: History) -> None:
    take(made)
    other = branched(made)
    other.write(deletes=[10, 11, 12])
    seal_tail(other.store, "other", 0, other.folder, new_nonce)
    found = keys(made.store, paths.tombstones_prefix("other", 0))
    named = [
        paths.tombstones("other", 0, ref.segment_id, ref.lsn, ref.variant) for ref in other.newest.shards[0].tombstones
    ]
    assert set(named) <= set(found)
    other.assert_held()
    made.assert_held()


# --- anything in any order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_", range(3))
def test_any_history_can_be_restored(round_: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    made = History(MemoryStore(), tmp_path, replace(CONFIG, shards=dice.randint(1, 3)))
    monkeypatch.setattr(sealing, "open_store", lambda url: made.store)
    made.create()
    for step in range(14):
        made.write(dice.sample(range(30), dice.randint(0, 6)), dice.sample(range(30, 45), 2))
        newest, names = made.newest, [snapshot.name for snapshot in list_snapshots(made.store, "words")]
        what = dice.choice(["import", "reshard", "seal", "back", "take", "take", "restore", "restore", "switch"])
        if newest.log_set != made.log_set or what == "switch":
            made.switch()
        elif what == "import":
            made.import_ids(dice.sample(range(45), 8))
        elif what == "reshard":
            made.reshard(dice.choice([n for n in (1, 2, 3) if n != len(newest.shards)]))
        elif what == "seal":
            made.seal(dice.randrange(len(newest.shards)))
        elif what == "back" and newest.generation > 1:
            old = made.log.last_of_generation(None, newest).generation
            made.went_back(roll_back(made.store, made.log), old)
        elif what == "take":
            version = made.log.read(take(made, f"step-{step}").version)
            assert made.held(version, replayed=False) == made.must_hold(made.newest.generation)
        elif what == "restore" and names:
            bring_back(made, dice.choice(names))
        made.assert_held()
