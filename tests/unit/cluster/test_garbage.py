"""Garbage collection: everything that is needed stays whole, all else goes, whatever happens at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import ceil

import numpy as np
import pytest

from cluster import garbage, paths
from cluster.entry_log import end_logs
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.garbage import JOB_KEPT_S, MANIFESTS_KEPT, Sweep
from cluster.object_store import ObjectStore
from cluster.references import EVERYWHERE, InUse
from cluster.rollback import roll_back
from cluster.stored_object import parsed
from cluster.tombstones import write_tombstones
from cluster.wal import CLAIM_BYTES, Wal, WalRecord
from tests.fakes import Fault, FaultyStore
from tests.unit.cluster.histories import (
    CONFIG,
    ClockStore,
    History,
    InterruptedStore,
    Turns,
    TurnStore,
    assert_whole,
    branch_of,
    claim,
    contents,
    delete,
    files_of,
    leave_behind,
    log_of,
    needed_versions,
    new_generation,
    put_segment,
    records_after,
    seal,
    snapshot,
    switch,
    write,
)

BATCH = 12  # so that there are several


def collected(store: ObjectStore, now_s: float, delete: bool = True, grace_s: float = 0.0, **options: object) -> Sweep:
    sweep = Sweep(store, now_s, grace_s, batch=BATCH, **options)  # type: ignore[arg-type]
    sweep.run(None, delete)
    return sweep


def swept(store: ClockStore) -> Sweep:
    """Everything that is stored is old; what is written from now on is young."""
    store.now_s += 10.0
    return collected(store, store.now_s - 5.0)


# --- random histories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_what_is_needed_stays_whole_and_all_else_goes(seed: int) -> None:
    store = ClockStore()
    history = History(store, seed)
    for _ in range(8):
        for _ in range(history.random.randrange(1, 12)):
            history.step()
        needed = [needed_versions(store, name) for name in "abc"]
        with_logs = [manifest for versions, _ in needed for manifest in versions]
        named = [manifest for _, versions in needed for manifest in versions]
        records = [records_after(store, manifest) for manifest in with_logs]
        before = contents(store)
        sweep = swept(store)
        left = contents(store)
        assert not sweep.report.failed, sweep.report.failures
        for manifest in (*with_logs, *named):
            assert_whole(store, manifest)
        assert [records_after(store, manifest) for manifest in with_logs] == records, history.steps
        assert_only_needed(store, {key for manifest in (*with_logs, *named) for key in files_of(manifest)}, history)
        told = {kind: tally.objects for kind, tally in sweep.report.garbage.items()}
        assert sum(told.values()) == len(before) - len(left) == sweep.report.removed.objects


def assert_only_needed(store: ClockStore, files: set[str], history: History) -> None:
    """Of segments nothing else; of tombstones what a seal may still use; of logs claims, ends, and what is read."""
    left = contents(store)
    kinds = {key: parsed(key) for key in left}
    segments = {key for key, name in kinds.items() if name and name.kind == "segment"}
    assert segments <= files, history.steps
    assert not [key for key, name in kinds.items() if name and name.kind == "staging"]
    for key, name in kinds.items():
        if name and name.kind == "tombstones" and key not in files:
            newest = log_of(store, name.collection).newest()
            assert newest is not None, history.steps
            floors = [0 if entry.behind else entry.applied_lsn for entry in newest.shards if entry.shard == name.shard]
            assert name.number > min(floors or [0 if e.behind else e.applied_lsn for e in newest.shards]), history.steps


def test_records_below_every_position_go_and_claims_stay() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    for _ in range(3):
        write(store, count=4)
        claim(store)
        seal(store)
    new_generation(store)
    write(store, count=2)
    swept(store)
    left = {lsn for key in contents(store) if (lsn := paths.wal_lsn(key)) is not None and "/wal/" in key}
    assert left == {5, 10, 15, 16, 17}
    assert [record.lsn for record in Wal(store, "a", 0, 0).read_after(15)] == [16, 17]


def test_a_writer_that_was_taken_over_stays_fenced() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    write(store, count=4)
    claim(store)
    write(store, count=4)
    seal(store)
    new_generation(store)
    swept(store)
    sizes = {info.key: info.size_bytes for info in store.objects(paths.wal_prefix("a", 0))}
    assert sizes[paths.wal_record("a", 0, 5)] == CLAIM_BYTES
    assert not store.put_if_absent(paths.wal_record("a", 0, 5), b"late")
    assert set(sizes) == {paths.wal_record("a", 0, 5), paths.wal_record("a", 0, 9)}


def test_the_last_record_of_a_log_stays_so_that_its_end_is_found() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    store.put(paths.wal_record("a", 7, 1), WalRecord(1, 1, "claim", "0" * 32).encode(7, "a") + b"longer than a claim")
    swept(store)
    assert Wal(store, "a", 7, 0).last_listed() == 1


def test_old_manifests_go_but_those_near_the_newest_needed_ones_and_ends_stay() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    delete(store)
    log_of(store).create(replace(CONFIG, shards=1))
    new_generation(store)
    snapshot(store, "kept")
    new_generation(store)
    target = log_of(store).newest_live()
    new_generation(store)
    for number in range(MANIFESTS_KEPT + 10):
        log_of(store).declare_attributes({f"a{number}": "int64"})
    newest = log_of(store).newest_live()
    served = InUse(served={"a": 9})
    collected(store, store.now_s + 1, in_use=lambda: served)
    left = sorted(log_of(store).versions())
    recent = range(newest.version - MANIFESTS_KEPT + 1, newest.version + 1)
    assert left == [2, 4, target.version, *range(9, recent.start), *recent]
    swept(store)
    assert sorted(log_of(store).versions()) == [2, 4, target.version, *recent]
    assert log_of(store).last_of_generation(None, newest) == target
    assert log_of(store).declare_attributes({"one more": "int64"}).version == newest.version + 1


def test_a_version_counts_from_when_it_was_replaced() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    old = new_generation(store)
    new_generation(store)
    store.now_s += 1_000_000.0
    for _ in range(2):
        new_generation(store)
    collected(store, store.now_s, grace_s=1000.0)
    assert_whole(store, log_of(store).read(old.version + 1))
    collected(store, store.now_s + 2000.0, grace_s=1000.0)
    assert files_of(log_of(store).read(old.version + 1)).isdisjoint(contents(store))


def test_a_dry_run_deletes_nothing_and_tells_the_same() -> None:
    store = ClockStore()
    log_of(store).create(CONFIG)
    write(store, count=3)
    seal(store)
    leave_behind(store)
    before = contents(store)
    store.now_s += 10.0
    dry = collected(store, store.now_s - 5.0, delete=False).report
    assert contents(store) == before
    assert dry.removed.objects == 0
    told = {kind: tally.objects for kind, tally in dry.garbage.items()}
    assert told == {"segment": 3, "staging": 1, "tombstones": 1, "wal": 2}
    assert dry.garbage["segment"].bytes == sum(
        info.size_bytes for key, info in before.items() if "/segments/" in key and key not in kept_files(store)
    )
    wet = collected(store, store.now_s - 5.0).report
    assert (wet.garbage, wet.kept, wet.examples) == (dry.garbage, dry.kept, dry.examples)
    assert before.keys() - contents(store).keys() >= set(wet.examples)


def kept_files(store: ObjectStore) -> set[str]:
    return files_of(log_of(store).newest_live())


def resharded(store: ClockStore) -> None:
    """From one shard to two, which have sealed what was written to their own logs."""
    log_of(store).create(replace(CONFIG, shards=1))
    write(store, count=3)
    seal(store)
    write(store, count=2)
    new_generation(store, shards=2)
    switch(store)
    for shard in range(2):
        write(store, count=3)
        seal(store, shard=shard)


def test_a_rollback_over_a_reshard_finds_every_record_since() -> None:
    untouched = ClockStore()
    resharded(untouched)
    store = untouched.copy()
    assert swept(store).report.garbage["wal"].objects == 3  # what was sealed before
    records = []
    for each in (store, untouched):
        rolled = roll_back(each, log_of(each))
        end_logs(each, "a", rolled.behind, lambda: "0" * 32)
        records.append(records_after(each, rolled))
    assert records[0] == records[1] != [[]]


def test_records_of_all_the_sets_that_a_shard_is_behind_stay() -> None:
    store = ClockStore()
    resharded(store)
    rolled = roll_back(store, log_of(store))
    switch(store)
    records = records_after(store, rolled)
    swept(store)
    assert records_after(store, rolled) == records
    assert records[0]


def test_what_is_served_stays_whole_behind_two_generations_that_nobody_has_switched_to() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    served = new_generation(store)
    write(store)
    for shards in (2, 3):
        new_generation(store, shards=shards)
        switch(store)
    records = records_after(store, served)
    swept(store)
    assert_whole(store, served)
    assert records_after(store, served) == records != [[]]


def test_a_tombstone_file_that_the_next_seal_may_find_stays() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    write(store)
    seal(store)
    (ref,) = log_of(store).newest_live().shards[0].segments
    for lsn in (1, 2):
        write_tombstones(store, "a", 0, ref.segment_id, lsn, np.arange(1 + lsn % 3))
    swept(store)
    assert [name.number for key in contents(store) if (name := parsed(key)) and name.kind == "tombstones"] == [2]
    write(store)
    assert_whole(store, seal(store))


def test_what_is_in_memory_of_large_tombstone_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read before they are taken away, to be put back where they are named meanwhile."""
    store = ClockStore()
    log_of(store).create(CONFIG)
    keys = [paths.tombstones("a", 0, f"segment-{number}", 0, "0" * 16) for number in range(12)]
    for key in keys:
        store.put(key, b"rows" * 25)
    taken: list[int] = []
    take = Sweep._take
    monkeypatch.setattr(
        Sweep, "_take", lambda self, batch, delete: taken.append(len(batch)) or take(self, batch, delete)
    )
    monkeypatch.setattr(garbage, "BATCH_BYTES", 300)
    swept(store)
    assert taken == [3, 3, 3, 3]
    assert not contents(store).keys() & set(keys)


def test_young_objects_stay() -> None:
    store = ClockStore()
    log_of(store).create(CONFIG)
    leave_behind(store)
    collected(store, store.now_s + 50.0, grace_s=60.0)
    assert len(contents(store)) == 6
    collected(store, store.now_s + 61.0, grace_s=60.0)
    assert len(contents(store)) == 1


UNKNOWN = (
    "collections/a/segments/segment-x/notes.txt",
    "collections/a/segments/stray",
    "collections/a/manifest/1.json",
    "collections/a/shards/0000/wal-000000/00000000000000000001.arrow",
    "collections/a/shards/0000/wal/1.arrow",
    "collections/a/shards/0000/later/00000000000000000001.arrow",
    "collections/a/shards/00000/tombstones/x-00000000000000000001.arrow",
    "collections/a/staging/job/1/2.arrow",
    "collections/B/segments/x/rows.arrow",
    "jobs/x/status.json.old",
    "jobs/notes",
    "elsewhere/x",
)


def test_objects_of_unknown_keys_are_told_and_never_touched() -> None:
    store = ClockStore()
    for key in UNKNOWN:
        store.put(key, b"?")
    store.now_s += 1e9
    report = collected(store, store.now_s).report
    assert {key for key in UNKNOWN if store.get(key)} == set(UNKNOWN)
    assert (report.unknown.objects, report.garbage) == (len(UNKNOWN) - 1, {})
    assert set(report.unknown_examples) == set(UNKNOWN) - {"elsewhere/x"}


def test_job_statuses_query_samples_and_staging() -> None:
    store = ClockStore()
    log_of(store).create(CONFIG)
    keys = [paths.job_status("gone"), paths.job_status("busy"), paths.recent_queries("a", "x")]
    keys += [paths.staging_piece("a", "gone", 0, 0), paths.staging_piece("a", "busy", 0, 0)]
    for key in keys:
        store.put(key, b"?")
    collected(store, store.now_s + JOB_KEPT_S / 2, grace_s=60.0, busy=lambda job_id: job_id == "busy")
    assert [key in contents(store) for key in keys] == [True, True, False, False, True]
    collected(store, store.now_s + 2 * JOB_KEPT_S, grace_s=60.0, busy=lambda job_id: job_id == "busy")
    assert [key in contents(store) for key in keys] == [False, True, False, False, True]


# --- collections and each other -----------------------------------------------------------------------------------


def test_what_a_branch_names_stays_until_nothing_names_it() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    write(store, count=3)
    seal(store)
    write(store)
    seal(store)
    branched = branch_of(store, "b")
    first = branch_of(store, "c", "b")
    delete(store)
    delete(store, "b")
    swept(store)
    assert_whole(store, first)
    assert not files_of(branched) - files_of(first) & contents(store).keys()
    for _ in range(3):
        new_generation(store, "c")
    swept(store)
    assert not [key for key in contents(store) if "/segments/" in key and key.startswith("collections/a/")]


def test_segments_of_the_earlier_collection_of_a_name_go() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    old = new_generation(store)
    delete(store, files=False)
    log_of(store).create(replace(CONFIG, shards=1))
    new = new_generation(store)
    snapshot(store, "now")
    swept(store)
    assert files_of(old).isdisjoint(contents(store))
    assert_whole(store, new)


def test_snapshots_of_a_deleted_collection_keep_nothing() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    new_generation(store)
    snapshot(store, "s")
    delete(store, files=False)
    swept(store)
    assert {name.kind for key in contents(store) if (name := parsed(key))} == {"manifest"}


def test_the_served_version_stays_while_later_generations_wait() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    served = new_generation(store)
    for _ in range(3):
        new_generation(store)
    store.now_s += 10.0
    collected(store, store.now_s, in_use=lambda: InUse(served={"a": served.version}))
    assert_whole(store, served)
    collected(store, store.now_s)
    assert files_of(served).isdisjoint(contents(store))


@pytest.mark.parametrize("place", ["a", EVERYWHERE])
def test_a_collection_that_a_job_works_on_is_left_alone(place: str) -> None:
    store = ClockStore()
    for name in "ab":
        log_of(store, name).create(replace(CONFIG, shards=1))
        for _ in range(4):
            write(store, name)
            seal(store, name)
            new_generation(store, name)
        put_segment(store, name)
    branch_of(store, "c", "b")
    before = contents(store)
    store.now_s += 10.0
    report = collected(store, store.now_s, in_use=lambda: InUse(held={place: "job j works on it"})).report
    assert not {key for key in before.keys() - contents(store).keys() if key.startswith("collections/a/")}
    assert report.held["a"] == "job j works on it"
    assert ("segment" in report.garbage) == (place == "a")


def test_a_job_on_a_branch_holds_the_files_of_its_origin() -> None:
    store = ClockStore()
    log_of(store).create(replace(CONFIG, shards=1))
    first = new_generation(store)
    branched = branch_of(store, "b")
    for name in ("a", "b"):
        for _ in range(3):
            new_generation(store, name)
    store.now_s += 10.0
    collected(store, store.now_s, in_use=lambda: InUse(held={"b": "a rebuild reads it"}))
    assert_whole(store, branched)
    collected(store, store.now_s)
    assert files_of(first).isdisjoint(contents(store))


@pytest.mark.parametrize("damaged", ["newest", "snapshot"])
def test_where_a_manifest_or_snapshot_cannot_be_read_no_segment_goes(damaged: str) -> None:
    store = ClockStore()
    for name in "ab":
        log_of(store, name).create(replace(CONFIG, shards=1))
        for _ in range(3):
            new_generation(store, name)
            leave_behind(store, name)
    snapshot(store, "s")
    newest = log_of(store).newest_live().version
    key = paths.manifest("a", newest) if damaged == "newest" else paths.snapshot("a", "s")
    store.put(key, b"torn")
    store.now_s += 10.0
    report = collected(store, store.now_s).report
    assert "segment" not in report.garbage
    assert key in report.held["a"]
    assert (report.failed, key in report.failures[0]["message"]) == (1, True)
    assert report.garbage["staging"].objects == 2


# --- at the same time ---------------------------------------------------------------------------------------------


POINTS = 20  # of each run at which something else happens


@cache
def _crowded() -> ClockStore:
    store = ClockStore()
    for name in "ab":
        log_of(store, name).create(replace(CONFIG, shards=1))
        for _ in range(2):
            write(store, name, 2)
            seal(store, name)
        for _ in range(3):
            new_generation(store, name)
            write(store, name)
            seal(store, name)
    snapshot(store, "s")
    new_generation(store)
    new_generation(store)
    write(store)
    leave_behind(store)
    store.now_s += 10.0
    return store


def crowded() -> ClockStore:
    """A collection with garbage of every kind, six generations, a snapshot, and another one beside it."""
    return _crowded().copy()


def seal_again(store: ClockStore) -> None:
    write(store)
    seal(store)


def go_back_far(store: ClockStore) -> None:
    """To a generation of which nothing is retained."""
    log = log_of(store)
    roll_back(store, log, log.newest_live().generation - 3)


ACTORS: tuple[Callable[[ClockStore], object], ...] = (
    seal_again,
    new_generation,
    lambda store: roll_back(store, log_of(store)),
    go_back_far,
    lambda store: branch_of(store, "c"),
    lambda store: snapshot(store, "now"),
    lambda store: (new_generation(store, shards=2), switch(store)),
    lambda store: delete(store, "b"),
    lambda store: (new_generation(store), new_generation(store), new_generation(store)),
)


@pytest.mark.parametrize("actor", ACTORS, ids=range(len(ACTORS)))
def test_what_is_committed_during_a_collection_stays_whole(actor: Callable[[ClockStore], object]) -> None:
    counted = FaultyStore(crowded())
    collected(counted, 1e9)
    assert counted.calls > 100
    for at in range(1, counted.calls + 1, counted.calls // POINTS):
        store = crowded()
        now_s = store.now_s - 5.0
        told: list[EaglerayError] = []

        def act(store: ClockStore = store, told: list[EaglerayError] = told) -> None:
            try:
                actor(store)
            except EaglerayError as error:  # what it refuses is not committed
                told.append(error)

        collected(InterruptedStore(store, at, act), now_s)
        for name in "abc":
            for manifest in (each for versions in needed_versions(store, name) for each in versions):
                assert_whole(store, manifest)
                assert all(dense(shard) for shard in records_after(store, manifest)), f"call {at}: {told}"


def dense(records: list[tuple[int, int, str]]) -> bool:
    lsns = [lsn for lsn, _, _ in records]
    return all(after == before + 1 for before, after in pairwise(lsns))


def test_what_is_taken_away_is_put_back_where_it_was_named_meanwhile() -> None:
    """At every call of the run; who goes back so far looks afterwards whether everything is there."""
    counted = FaultyStore(crowded())
    collected(counted, crowded().now_s - 5.0)
    back = 0
    for at in range(1, counted.calls + 1):
        store = crowded()
        newest = log_of(store).newest_live()
        refused = []

        def act(store: ClockStore = store, refused: list[str] = refused) -> None:
            try:
                go_back_far(store)
            except NotFound as error:
                refused.append(str(error))

        collected(InterruptedStore(store, at, act), store.now_s - 5.0)
        after = log_of(store).newest_live()
        assert_whole(store, after)
        assert refused or after.generation > newest.generation, f"call {at}"
        back += not refused
    assert 0 < back < counted.calls


@pytest.mark.parametrize("actor", ACTORS, ids=range(len(ACTORS)))
def test_a_collection_during_a_commit_leaves_it_whole_or_refuses_it(actor: Callable[[ClockStore], object]) -> None:
    counted = InterruptedStore(crowded())
    actor(counted)  # type: ignore[arg-type]
    refused: list[str] = []
    for at in range(1, counted.calls + 1, ceil(counted.calls / POINTS)):
        store = crowded()
        now_s = store.now_s - 5.0
        try:
            actor(InterruptedStore(store, at, partial(collected, store, now_s)))  # type: ignore[arg-type]
        except EaglerayError as error:
            refused.append(f"call {at}: {error!r}")
            if actor is go_back_far:  # a generation that lacks something lies between
                assert_whole(store, log_of(store).newest_live())
                continue
        for name in "abc":
            for manifest in (each for versions in needed_versions(store, name) for each in versions):
                assert_whole(store, manifest)
    assert bool(refused) == (actor is go_back_far), refused


@pytest.mark.parametrize("seed", range(24))
def test_collection_and_commits_that_take_turns_at_the_store_leave_everything_whole(seed: int) -> None:
    store = crowded()
    now_s = store.now_s - 5.0
    names = ("collector", "other collector", "far", "actor")
    turns = Turns(store, seed, names)
    stores = {name: TurnStore(turns, name, store) for name in names}
    far = (go_back_far, ACTORS[4])[seed % 2]
    work: dict[str, Callable[[], object]] = {
        "collector": lambda: collected(stores["collector"], now_s),
        "other collector": lambda: collected(stores["other collector"], now_s),
        "far": lambda: far(stores["far"]),  # type: ignore[arg-type]
        "actor": lambda: ACTORS[seed % len(ACTORS)](stores["actor"]),  # type: ignore[arg-type]
    }
    told: dict[str, EaglerayError] = {}

    def run(name: str) -> None:
        try:
            work[name]()
        except EaglerayError as error:
            told[name] = error
        finally:
            turns.leave(name)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(run, names))
    assert not {"collector", "other collector"} & told.keys(), told
    for name in "abc":
        newest = log_of(store, name).newest()
        if newest is not None and newest.state == "live":
            assert_whole(store, newest)
            assert all(dense(shard) for shard in records_after(store, newest)), told


def test_a_failing_store_ends_it_with_an_error_and_the_next_run_completes_it() -> None:
    done = crowded()
    whole = FaultyStore(done)
    collected(whole, done.now_s - 5.0)
    faults: tuple[Fault, ...] = ("fail", "lose_answer")
    for fault in faults:
        for at in range(1, whole.calls + 1, whole.calls // POINTS):
            store = crowded()
            now_s = store.now_s - 5.0
            sweep = Sweep(FaultyStore(store, at, fault), now_s, 0.0, batch=BATCH)
            try:
                sweep.run(None, delete=True)
            except Unavailable as error:
                told = str(error)
            else:
                told = str(sweep.report.failures)
            assert f"at call {at}" in told
            for versions in needed_versions(store, "a"):
                for manifest in versions:
                    assert_whole(store, manifest)
            swept(store)  # what was put back is older by now
            assert len(contents(store)) == len(contents(done)), f"call {at}"
