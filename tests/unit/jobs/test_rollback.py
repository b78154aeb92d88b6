"""Rollback: the points of an earlier generation with every write since, whatever became of the logs meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster import paths, rollback
from cluster.errors import Conflict, Invalid, NotFound, Unavailable
from cluster.garbage import Sweep
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.rollback import Replay, Rollback, commit_rollback, entries_behind, plan_rollback, replay_of, roll_back
from cluster.routing import Routing
from cluster.segment import delete_segment
from cluster.shard_entry import LogPosition, LogSet, ShardEntry
from jobs.build_plan import Workers
from jobs.report import JobReporter, JobStatus
from jobs.rollback import RollbackJob, RollbackOptions
from tests.fakes import Fault, FaultyStore, ManualClock, run_tasks_here
from tests.unit.jobs.histories import CONFIG, History, new_nonce


def history(folder: Path, store: ObjectStore | None = None, shards: int = 2) -> History:
    """Imported points with writes on top, some of them sealed: generation 2."""
    made = History(MemoryStore() if store is None else store, folder, replace(CONFIG, shards=shards))
    made.create()
    made.write(range(5))
    made.import_ids(range(20))
    made.write(range(18, 24), [3])
    for shard in range(shards):
        made.seal(shard)
    made.write([7, 30], [8, 19])
    return made


def go_back(made: History, generation: int | None = None) -> Manifest:
    before = made.newest
    manifest = roll_back(made.store, made.log, generation)
    to = generation or made.log.last_of_generation(None, before).generation
    made.went_back(manifest, to)
    made.assert_held()
    return manifest


# --- what is committed ----------------------------------------------------------------------------------------------


def test_rollback_of_an_import_keeps_every_write_since(tmp_path: Path) -> None:
    made = history(tmp_path)
    made.import_ids(range(100, 110))
    made.write([100, 1], [101, 7])
    made.seal(0)
    newest = made.newest
    manifest = go_back(made)
    assert (manifest.generation, manifest.log_set) == (newest.generation + 1, 0)
    assert made.held()[1] == float(len(made.writes))
    assert 105 not in made.held()
    made.write([2], [1])
    for shard in (0, 1):
        made.seal(shard)
        made.merge(shard)
    made.assert_held()


def test_rollback_of_a_rollback_goes_forward_again(tmp_path: Path) -> None:
    made = history(tmp_path)
    third = made.import_ids(range(100, 110)).generation
    made.write([1])
    go_back(made)
    made.write([2])
    manifest = go_back(made)
    assert made.held().keys() == {*range(100, 110), 1, 2}
    assert manifest.generation == third + 2


@pytest.mark.parametrize("after", [3, 1])
def test_rollback_of_a_reshard_reads_the_logs_of_both_sets(after: int, tmp_path: Path) -> None:
    made = history(tmp_path)
    made.reshard(after)
    made.write([40, 41], [0])
    made.switch()
    made.write([41, 42, 43], [1])
    made.seal(0)
    made.write([42, 2], [43])
    old = made.log.last_of_generation(None, made.newest)
    manifest = go_back(made)
    assert (manifest.log_set, len(manifest.shards)) == (2, 2)
    positions = tuple(LogPosition(entry.shard, entry.applied_lsn, entry.epoch) for entry in old.shards)
    assert manifest.behind == (LogSet(0, 2, positions), LogSet(1, after))
    made.write([44])
    made.switch()
    made.write([45], [44])
    for shard in (0, 1):
        made.seal(shard)
    assert not made.newest.crossing
    made.assert_held()


def test_pending_reshard_is_rolled_back_before_anybody_writes_to_its_logs(tmp_path: Path) -> None:
    made = history(tmp_path)
    made.reshard(3)
    made.write([50], [51])
    manifest = go_back(made)
    assert (manifest.log_set, manifest.behind[1:]) == (2, (LogSet(1, 3),))
    made.write([52], [50])
    made.assert_held()
    made.switch()
    made.write([53])
    made.assert_held()


def test_rollback_over_several_reshards(tmp_path: Path) -> None:
    made = history(tmp_path)
    for shards in (3, 1, 2):
        made.reshard(shards)
        made.write([60 + shards], [shards])
        made.switch()
        made.write([70 + shards])
    manifest = go_back(made, 2)
    assert [(logs.number, logs.shards) for logs in manifest.behind] == [(0, 2), (1, 3), (2, 1), (3, 2)]
    made.switch()
    made.write([80])
    made.assert_held()


def test_rollback_to_a_generation_that_was_still_behind(tmp_path: Path) -> None:
    """One of its shards has sealed what it read of the old logs, the others have not; then an import came."""
    made = history(tmp_path)
    third = made.reshard(3).generation
    made.switch()
    made.write([1, 2, 40], [4])
    made.seal(1)
    made.write([2, 41], [40])
    made.import_ids(range(90, 95))
    made.write([90, 42])
    same_set = go_back(made)
    assert (same_set.log_set, [bool(entry.behind) for entry in same_set.shards]) == (1, [True, False, True])
    made.reshard(2)
    made.switch()
    made.write([43, 90], [41])
    other_set = go_back(made, third)
    assert other_set.log_set == 3
    assert [[logs.number for logs in entry.behind] for entry in other_set.shards] == [[0, 1, 2], [1, 2], [0, 1, 2]]
    made.switch()
    made.write([44])
    made.assert_held()


def test_attributes_and_config_of_the_old_generation_come_back(tmp_path: Path) -> None:
    made = history(tmp_path)
    made.log.declare_attributes({"a": "int64", "b": "string"})
    base = made.newest
    entries = made.entries_with({1: 1.0}, made.log.wal_ends(base, 2))
    other = replace(base.config, index=replace(base.config.index, kind="hnsw"))
    made.log.commit_generation(base, other, entries, {"a": pa.float64()})
    made.log.declare_attributes({"c": "bool"})
    manifest = roll_back(made.store, made.log)
    assert manifest.config == base.config
    assert manifest.attributes == {"a": "int64", "b": "string", "c": "bool"}


def test_memory_that_did_not_suffice_for_two_generations_does_not_on_the_way_back(tmp_path: Path) -> None:
    made = history(tmp_path)
    base = made.newest
    ends = made.log.wal_ends(base, 2)
    made.log.commit_generation(base, base.config, ends, switch="one_at_a_time")
    assert roll_back(made.store, made.log).switch == "one_at_a_time"


def test_entries_behind_are_as_of_the_old_positions() -> None:
    shards = (ShardEntry(0, (), 7, 2), ShardEntry(1, (), 9, 1))
    old = Manifest("c", 1, CONFIG, Routing(2), 1, shards, "", "w", log_set=4)
    first, second = entries_behind(old, {5: 3})
    assert (
        first.behind
        == second.behind
        == (
            LogSet(4, 2, (LogPosition(0, 7, 2), LogPosition(1, 9, 1))),
            LogSet(5, 3),
        )
    )
    assert [(entry.applied_lsn, entry.epoch) for entry in (first, second)] == [(9, 2)] * 2


# --- what is refused ------------------------------------------------------------------------------------------------


def test_generation_that_is_not_before_the_newest_is_refused(tmp_path: Path) -> None:
    made = history(tmp_path)
    for generation in (2, 3):
        with pytest.raises(Invalid, match="is not before 2"):
            roll_back(made.store, made.log, generation)
    with pytest.raises(NotFound):
        roll_back(made.store, made.log, 0)
    fresh = History(MemoryStore(), tmp_path)
    fresh.create()
    with pytest.raises(NotFound, match="an earlier generation"):
        roll_back(fresh.store, fresh.log)
    with pytest.raises(NotFound, match="no collection"):
        roll_back(MemoryStore(), History(MemoryStore(), tmp_path).log)


def test_long_replay_is_refused_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = history(tmp_path, shards=1)
    made.import_ids([1])
    made.write([2])
    made.write([3])
    version = made.newest.version
    monkeypatch.setattr(rollback, "ROLLBACK_REPLAY_MAX", 2)
    with pytest.raises(Conflict, match=r"replay 3 records of \d+ bytes .* run the rollback as a job"):
        roll_back(made.store, made.log)
    assert made.newest.version == version
    monkeypatch.setattr(rollback, "ROLLBACK_REPLAY_MAX", 3)
    monkeypatch.setattr(rollback, "ROLLBACK_REPLAY_BYTES_MAX", 1_000)
    with pytest.raises(Conflict, match="run the rollback as a job"):
        roll_back(made.store, made.log)
    sizes = [info.size_bytes for info in made.store.objects(paths.wal_prefix("words", 0))]
    monkeypatch.setattr(rollback, "ROLLBACK_REPLAY_BYTES_MAX", sum(sizes[-3:]))
    go_back(made)


def test_records_of_all_sets_are_counted(tmp_path: Path) -> None:
    made = history(tmp_path, shards=1)
    made.reshard(2)
    made.switch()  # a claim and an end in the log
    made.write(range(30))  # one record in each of two
    assert replay_of(made.store, plan_rollback(made.store, made.log, made.newest, None)).records == 1 + 2 + 2


@pytest.mark.parametrize("name", paths.SEGMENT_FILES)
def test_file_that_was_collected_is_named_and_nothing_is_committed(name: str, tmp_path: Path) -> None:
    made = history(tmp_path)
    key = paths.segment_file("words", made.newest.shards[1].segments[0].segment_id, name)
    made.import_ids([1])
    version = made.newest.version
    made.store.delete(key)
    with pytest.raises(NotFound, match=f"generation 2 .* {key} .*; kept are generations 1$"):
        roll_back(made.store, made.log)
    assert made.newest.version == version


def test_record_that_was_collected_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    """Without this the reader would take the gap for the end of the log."""
    made = history(tmp_path, shards=1)
    made.import_ids([1])
    made.write([2])
    lsn = made.newest.shards[0].applied_lsn
    version = made.newest.version
    made.store.delete(paths.wal_record("words", 0, lsn))
    with pytest.raises(NotFound, match="not kept"):
        roll_back(made.store, made.log)
    assert made.newest.version == version


def test_ends_of_logs_that_are_not_kept_are_missed(tmp_path: Path) -> None:
    """One of the old shards has read them to their end, and the others are to begin there."""
    made = history(tmp_path)
    third = made.reshard(3).generation
    made.switch()
    made.write([1, 2, 40])
    made.seal(1)
    made.reshard(2)
    made.switch()
    version = made.newest.version
    for shard in range(2):
        for info in list(made.store.objects(paths.wal_prefix("words", shard)))[:-1]:
            made.store.delete(info.key)
    with pytest.raises(NotFound, match=f"generation {third} of 'words' needs the ends of logs of set 0"):
        roll_back(made.store, made.log, third)
    assert made.newest.version == version


def test_set_of_which_no_version_is_kept_is_named(tmp_path: Path) -> None:
    made = history(tmp_path)
    for shards in (3, 1):
        made.reshard(shards)
        made.switch()
    third = made.log.last_of_generation(3, made.newest)
    made.seal(0)  # so that the newest does not say what it was behind
    made.store.delete(paths.manifest("words", third.version))
    with pytest.raises(NotFound, match="log set 1"):
        roll_back(made.store, made.log, 2)


def test_what_is_collected_between_check_and_commit_brings_back_what_was_newest(tmp_path: Path) -> None:
    made = history(tmp_path)
    gone = made.newest.shards[0].segments[0].segment_id
    made.import_ids([1])
    made.write([2])

    class Collecting(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if "/manifest/" in key:
                delete_segment(made.store, "words", gone)
            return made.store.put_if_absent(key, data)

        def __getattribute__(self, name: str) -> object:
            own = name in ("put_if_absent", "__class__")
            return object.__getattribute__(self, name) if own else getattr(made.store, name)

    store, before = Collecting(), made.newest
    log = type(made.log)(store, "words", new_nonce)
    with pytest.raises(NotFound, match=rf"{gone}.* 3 goes on as 5, and 4 is none to go back to"):
        roll_back(store, log)
    assert made.newest.generation == before.generation + 2
    made.went_back(made.newest, before.generation)
    made.assert_held()
    with pytest.raises(NotFound, match=r"generation 4 .* kept are generations 3, 1$"):
        roll_back(made.store, made.log)
    go_back(made, 1)


def test_generation_that_another_writer_commits_first_is_a_conflict(tmp_path: Path) -> None:
    made = history(tmp_path)
    made.import_ids([1])
    plan = plan_rollback(made.store, made.log, made.newest, None)
    made.import_ids([2])
    with pytest.raises(Conflict):
        commit_rollback(made.store, made.log, plan)


@pytest.mark.parametrize("fault", ["fail", "lose_answer", "die"])
def test_rollback_through_a_failing_store_is_whole_or_nothing(fault: Fault, tmp_path: Path) -> None:
    made = History(MemoryStore(), tmp_path, replace(CONFIG, shards=1))
    made.create()
    made.write(range(5), [3])
    made.seal(0)
    made.reshard(2)
    made.switch()
    made.write([1, 2], [3])
    stored = {info.key: made.store.get(info.key) for info in made.store.objects("collections/")}
    newest, outcomes = made.newest, set()
    for at in range(1, 200):
        inner = MemoryStore()
        for key, data in stored.items():
            inner.put(key, data)
        failing = FaultyStore(inner, at, fault)
        again = replace(made, store=inner, generations=dict(made.generations))
        log = type(made.log)(failing, "words", new_nonce)
        try:
            roll_back(failing, log)
        except Unavailable:
            outcomes.add("failed")
        now = again.newest
        assert now.generation in (newest.generation, newest.generation + 1)
        if now.generation > newest.generation:
            again.went_back(now, newest.generation - 1)
            outcomes.add("committed")
        again.assert_held()
        if failing.calls < at:
            assert now.generation == newest.generation + 1
            break
    else:
        pytest.fail("the rollback never ends")
    assert outcomes == {"failed", "committed"}
    assert at > 10


# --- as a job -------------------------------------------------------------------------------------------------------


def run_job(
    made: History, monkeypatch: pytest.MonkeyPatch, replay_max: int, run_tasks: Any = run_tasks_here
) -> Manifest:
    before = made.newest
    workers = Workers(run_tasks, 2)
    job = RollbackJob("memory://x", made.store, made.log, RollbackOptions("words"), workers, str(made.folder))
    reporter = JobReporter(made.store, JobStatus("rollback-1", "rollback", "words"), clock=ManualClock())
    with monkeypatch.context() as patched:
        patched.setattr("jobs.rollback.open_store", lambda url: made.store)
        patched.setattr(rollback, "ROLLBACK_REPLAY_MAX", replay_max)
        patched.setattr("actors.entry_seal.LITTLE_POINTS", 3)
        manifest, report = job.run("rollback-1", reporter)
    old = made.log.last_of_generation(None, before).generation
    assert (report["back_to_generation"], report["generation"]) == (old, manifest.generation)
    made.went_back(manifest, old)
    made.assert_held()
    return manifest


@pytest.mark.parametrize("resharded", [False, True])
def test_job_seals_what_a_replica_would_replay(
    resharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(tmp_path)
    if resharded:
        made.reshard(3)
        made.switch()
    else:
        made.import_ids(range(200, 210))
    made.write(range(100, 140), [5, 6])
    made.write(range(130, 160), [101])
    old = made.log.last_of_generation(None, made.newest)
    manifest = run_job(made, monkeypatch, replay_max=1)
    assert manifest.points > old.points
    assert all(len(new.segments) > len(then.segments) for new, then in zip(manifest.shards, old.shards, strict=True))
    assert replay_of(made.store, Rollback(old, old, manifest.shards, manifest.log_set)) == Replay()
    made.switch()
    made.write([7])
    made.assert_held()
    go_back(made)


@pytest.mark.parametrize("at", ["seal", "commit"])
def test_job_that_another_generation_comes_before_leaves_no_segments(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(tmp_path)
    made.import_ids(range(200, 210))
    made.write(range(100, 140), [5, 6])
    sealed = list[str]()

    def run(
        function: object, items: object, num_cpus: float, in_flight: int, num_gpus: float = 0.0
    ) -> Iterator[tuple[int, Any]]:
        for number, event in run_tasks_here(function, items, num_cpus, in_flight):  # type: ignore[arg-type]
            sealed[:] = [name for name in segment_ids(made) if name.startswith("rollback-1-")]
            if at == "seal" and sealed:
                made.import_ids([1])
            yield number, event
        if at == "commit":
            made.import_ids([1])

    with pytest.raises(Conflict):
        run_job(made, monkeypatch, replay_max=1, run_tasks=run)
    assert sealed
    named = {name for number in made.log.versions() for name in made.log.read(number).segments}
    assert segment_ids(made) == named


def segment_ids(made: History) -> set[str]:
    return set(made.store.folders(paths.segments_prefix("words")))


def test_job_with_little_to_replay_commits_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = history(tmp_path)
    made.import_ids(range(200, 210))
    made.write([1])
    old = made.log.last_of_generation(None, made.newest)
    assert run_job(made, monkeypatch, replay_max=10).shards == old.shards


# --- anything in any order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_", range(4))
def test_any_history_can_be_rolled_back(round_: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the generation before always, whatever was collected; to others as long as they are kept."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    made = History(MemoryStore(), tmp_path, replace(CONFIG, shards=dice.randint(1, 3)))
    made.create()
    for _ in range(14):
        made.write(dice.sample(range(30), dice.randint(0, 6)), dice.sample(range(30, 45), 2))
        newest = made.newest
        pending = newest.log_set != made.log_set
        what = dice.choice(["import", "reshard", "seal", "seal", "back", "far", "job", "collect", "switch"])
        if what == "import" and not pending:
            made.import_ids(dice.sample(range(45), 8))
        elif what == "reshard" and not pending:
            made.reshard(dice.choice([n for n in (1, 2, 3) if n != len(newest.shards)]))
        elif what == "seal" and not pending:
            made.seal(dice.randrange(len(newest.shards)))
        elif what == "back" and newest.generation > 1:
            go_back(made)
        elif what == "far" and newest.generation > 1:
            with suppress(NotFound):
                go_back(made, dice.randint(1, newest.generation - 1))
        elif what == "job" and newest.generation > 1:
            run_job(made, monkeypatch, replay_max=0)
        elif what == "collect":
            Sweep(made.store, time.time() + 1.0, 0.0).run("words", delete=True)
        else:
            made.switch()
        made.assert_held()
