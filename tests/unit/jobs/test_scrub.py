"""`jobs.scrub` without Ray: sound collections pass, and every kind of damage is found and named."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import ray_jobs
from actors.segment_loader import LoadedSegment
from actors.segment_upkeep import seal_tail
from cluster import paths
from cluster.config import Settings
from cluster.deletion import delete_files
from cluster.errors import Corrupt, Invalid, NotFound
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import open_store
from cluster.recent_queries import QuerySample, store_queries
from cluster.routing import Routing
from cluster.snapshots import create_snapshot
from cluster.tombstones import write_tombstones
from cluster.wal import Wal
from jobs import report, run_care
from jobs.build_plan import Workers
from jobs.report import JobReporter, JobStatus, read_status
from jobs.scrub import Scrubber, ScrubOptions
from jobs.snapshots import BranchOptions, branch, named_version, now_utc
from tests.fakes import ManualClock, run_tasks_here
from tests.unit.actors.points import manifest_log
from tests.unit.actors.written import COLLECTION, Written
from tests.unit.jobs.compactions import CONFIG
from tests.unit.jobs.imports import new_data_url, random_table, run_import
from tests.unit.jobs.imports import write as write_parquet

JOB = "scrub-1"
SHARDS = 2
POINTS = 300


def routed(shard: int, start: int, count: int) -> list[int]:
    """Ids from `start` on that belong to a shard."""
    numbers = np.arange(start, start + 20 * count)
    return [int(n) for n in numbers[Routing(SHARDS).shards_of_ids(pa.array(numbers)) == shard][:count]]


def imported(data: str, folder: Path, job_id: str, **index: Any) -> Manifest:
    source = write_parquet(folder / f"{job_id}.parquet", random_table(POINTS, 8, seed=len(job_id)))
    create = {"shards": SHARDS, "metric": "l2", "index": {"kind": "flat"} | index}
    return run_import(data, source, create=create, job_id=job_id)


def write_and_seal(data: str, folder: Path, manifest: Manifest, start: int) -> list[Written]:
    """Some of the points are replaced or deleted in each shard, and some are new."""
    shards = []
    for shard in range(SHARDS):
        written = Written(open_store(data), manifest.config, folder, shard)
        written.lsn, written.epoch = written.wal.end(0, 0)
        written.claim()
        written.write(routed(shard, start, 10), deletes=routed(shard, 0, 3))
        written.write(routed(shard, 10, 5))
        seal_tail(written.store, COLLECTION, shard, folder, lambda: new_data_url()[9:])
        shards.append(written)
    return shards


@cache
def _example() -> dict[str, Any]:
    """Objects of a collection with a snapshot, a generation to go back to, two segments a shard, tombstones, a tail."""
    data = new_data_url()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = imported(data, folder, "import-a")
        write_and_seal(data, folder, first, 1_000)
        store = open_store(data)
        create_snapshot(store, "before", manifest_log(store, COLLECTION).newest_live(), now_utc())
        second = imported(data, folder, "import-bb")
        for written in write_and_seal(data, folder, second, 2_000):
            written.write(routed(written.shard, 3_000, 4))
        imported(data, folder, "import-ccc")
        for written in write_and_seal(data, folder, second, 4_000):
            written.write(routed(written.shard, 5_000, 4), deletes=routed(written.shard, 20, 2))
        queries = QuerySample(np.random.default_rng(1).normal(size=(30, 8)).astype(np.float32), "l2")
        store_queries(store, COLLECTION, "coordinator", queries)
    objects: dict[str, Any] = MemoryStore.named(data)._objects
    return objects


def example() -> str:
    """The URL of a new store that holds it."""
    data = new_data_url()
    MemoryStore.named(data)._objects = dict(_example())
    return data


def scrubbed(data: str, folder: Path, listener: Callable[[JobStatus], None] = lambda s: None, **options: Any) -> Any:
    store, chosen = open_store(data), ScrubOptions(**{"collection": COLLECTION} | options)
    log = manifest_log(store, chosen.collection)
    scrubber = Scrubber(data, store, log, chosen, Workers(run_tasks_here, 2), str(folder), ManualClock())
    return scrubber.run(JobReporter(store, JobStatus(JOB, "scrub", COLLECTION), listener, ManualClock()))


def test_a_sound_collection_passes(tmp_path: Path) -> None:
    data, told = example(), []
    before = dict(MemoryStore.named(data)._objects)
    found = scrubbed(data, tmp_path, lambda status: told.append((status.phase, status.progress)))
    newest = manifest_log(open_store(data), COLLECTION).newest_live()
    assert found["findings"] == []
    assert (found["sound"], found["findings_total"], found["manifests"]) == (True, 0, 3)
    assert (found["version"], found["points"], found["segments"]) == (newest.version, newest.points, 12)
    assert found["wal_records"] == 2 * (4 + 1)
    recall = found["recall"]
    assert (recall["queries"], recall["recall_at_10"], recall["recall_low"]) == (200, 1.0, 1.0)
    assert (recall["recent_queries"], recall["recent_recall_at_10"]) == (30, 1.0)
    assert [(each["rows"], each["recall_at_10"]) for each in recall["segments"]] == [
        (ref.count, 1.0) for entry in newest.shards for ref in entry.segments
    ]
    assert list(dict.fromkeys(phase for phase, _ in told)) == ["starting", "manifests", "verify", "logs", "recall"][1:]
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert {key for key in MemoryStore.named(data)._objects if key not in before} == {paths.job_status(JOB)}


def test_a_collection_without_points_passes(tmp_path: Path) -> None:
    data = new_data_url()
    manifest_log(open_store(data), COLLECTION).create(CONFIG)
    found = scrubbed(data, tmp_path)
    assert (found["sound"], found["segments"], found["recall"]) == (
        True,
        0,
        {"queries": 0, "recent_queries": 0, "segments": []},
    )


def needed_keys(data: str) -> dict[str, str]:
    """One object of every kind that is needed: what it is -> its key."""
    store = open_store(data)
    log = manifest_log(store, COLLECTION)
    newest = log.newest_live()
    target = log.last_of_generation(None, newest)
    named = log.read(next(iter(sorted(log.versions())[2:3])))
    keys = {"newest": paths.manifest(COLLECTION, newest.version - 1), "snapshot": paths.snapshot(COLLECTION, "before")}
    for what, manifest in (("newest", newest), ("target", target), ("named", named)):
        entry = manifest.shards[1]
        for file in paths.SEGMENT_FILES:
            keys[f"{what} {file}"] = paths.segment_file(COLLECTION, entry.segments[0].segment_id, file)
        ref = entry.tombstones[0]
        keys[f"{what} tombstones"] = paths.tombstones(COLLECTION, 1, ref.segment_id, ref.lsn, ref.variant)
        if what != "named":
            keys[f"{what} record"] = paths.wal_record(COLLECTION, 1, entry.applied_lsn + 1)
    return keys


KINDS = [
    *("newest", "snapshot"),
    *(f"{what} {kind}" for what in ("newest", "target", "named") for kind in (*paths.SEGMENT_FILES, "tombstones")),
    *("newest record", "target record"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_every_kind_of_object_is_found_and_named(kind: str, tmp_path: Path) -> None:
    data = example()
    store, key = open_store(data), needed_keys(data)[kind]
    sound = store.get(key)
    damaged = bytearray(sound)
    damaged[len(sound) // 2] ^= 1
    for stored in (bytes(damaged), None):
        store.put(key, stored) if stored is not None else store.delete(key)
        if stored is None and kind in ("newest", "snapshot", "newest record"):
            continue  # nobody can tell that the last one was there
        found = scrubbed(data, tmp_path, sample=0)
        assert not found["sound"]
        assert {each["object"] for each in found["findings"]} == {key}


def test_a_missing_record_is_found(tmp_path: Path) -> None:
    data = example()
    store = open_store(data)
    entry = manifest_log(store, COLLECTION).newest_live().shards[0]
    gap = Wal(store, COLLECTION, 0, 0).last_listed()
    assert gap == entry.applied_lsn + 1
    (record,) = Wal(store, COLLECTION, 0, 0).read_after(entry.applied_lsn)
    Wal(store, COLLECTION, 0, 0).append(replace(record, lsn=gap + 2))
    found = scrubbed(data, tmp_path, sample=0)
    missing = paths.wal_record(COLLECTION, 0, gap + 1)
    assert found["findings"] == [{"object": missing, "problem": f"is missing; the log goes on at LSN {gap + 2}"}]


def test_an_epoch_that_goes_back_and_a_record_behind_the_end_are_found(tmp_path: Path) -> None:
    data = example()
    store = open_store(data)
    wal = Wal(store, COLLECTION, 0, 0)
    last = wal.read(wal.last_listed())
    assert last is not None
    wal.append(replace(last, lsn=last.lsn + 1, epoch=last.epoch - 1))
    end = wal.finish(last.lsn + 1, last.epoch, lambda: "0" * 32)
    wal.append(replace(last, lsn=end.lsn + 1, epoch=end.epoch))
    problems = {each["object"][-12:-6]: each["problem"] for each in scrubbed(data, tmp_path, sample=0)["findings"]}
    told = {f"{last.lsn + 1:06d}": f"its epoch {last.epoch - 1} goes back from {last.epoch}"}
    assert problems == told | {f"{end.lsn + 1:06d}": "is behind the end record of its log"}


def test_damage_in_a_store_of_files_is_found(tmp_path: Path) -> None:
    data = f"file://{tmp_path}/data"
    store = open_store(data)
    for key, (stored, _) in _example().items():
        store.put(key, stored)
    assert scrubbed(data, tmp_path, sample=0)["sound"]
    for what in ("newest index.faiss", "target rows.arrow"):
        key = needed_keys(data)[what]
        sound = store.get(key)
        store.put(key, sound[:-1] + bytes([sound[-1] ^ 1]))
        assert [each["object"] for each in scrubbed(data, tmp_path, sample=0)["findings"]] == [key]
        store.put(key, sound)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each segment file was fetched from a store that is not local."""
    counts: Counter[str] = Counter()
    download = MemoryStore.download

    def counted(self: MemoryStore, key: str, *args: Any) -> None:
        counts[key] += 1
        download(self, key, *args)

    monkeypatch.setattr(MemoryStore, "download", counted)
    return counts


def files_of_segments(data: str) -> set[str]:
    return {key for key in MemoryStore.named(data)._objects if key.endswith((paths.ROWS, paths.INDEX))}


def test_every_file_of_a_store_elsewhere_is_fetched_once_whether_or_not_it_is_cached(
    tmp_path: Path, fetched: Counter[str]
) -> None:
    data = example()
    assert scrubbed(data, tmp_path)["sound"]
    assert fetched.keys() <= files_of_segments(data)
    assert len(fetched) > 8
    assert set(fetched.values()) == {1}
    once = dict(fetched)
    assert scrubbed(data, tmp_path)["sound"]
    assert fetched == dict.fromkeys(once, 2), "the store is read whatever is cached"


def test_files_are_not_kept_where_the_disk_is_nearly_full(
    tmp_path: Path, fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is opened: rows when they are verified, indexes when they are measured, one by one."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=1_000_000, free=100_001))
    data = example()
    assert scrubbed(data, tmp_path)["sound"]
    assert set(fetched.values()) == {2}


@pytest.mark.parametrize("name", [paths.ROWS, paths.INDEX])
def test_damage_in_the_store_is_found_though_a_sound_copy_is_cached(name: str, tmp_path: Path) -> None:
    data = example()
    assert scrubbed(data, tmp_path)["sound"]
    key = needed_keys(data)[f"newest {name}"]
    sound = open_store(data).get(key)
    open_store(data).put(key, sound[:-1] + bytes([sound[-1] ^ 1]))
    assert [each["object"] for each in scrubbed(data, tmp_path)["findings"]] == [key]
    open_store(data).put(key, sound)
    for copy in tmp_path.glob("xxh3_128-*"):  # copies are none of the store's damage
        copy.write_bytes(b"torn")
    assert scrubbed(data, tmp_path)["sound"]


def test_a_branch_is_checked_with_the_files_of_its_origin(tmp_path: Path) -> None:
    data = example()
    store = open_store(data)
    log, into = manifest_log(store, COLLECTION), manifest_log(store, "branched")
    origin = named_version(store, log, COLLECTION, "before")
    branch(store, log, into, origin, BranchOptions(COLLECTION, "branched", "before"))
    assert scrubbed(data, tmp_path, collection="branched")["sound"]
    key = needed_keys(data)["named rows.arrow"]
    store.put(key, b"torn")
    assert [each["object"] for each in scrubbed(data, tmp_path, collection="branched")["findings"]] == [key]


@pytest.mark.parametrize("again", [False, True])
def test_a_collection_that_is_deleted_meanwhile_is_not_found_and_not_damaged(again: bool, tmp_path: Path) -> None:
    data = example()
    store = open_store(data)
    log = manifest_log(store, COLLECTION)
    config = log.newest_live().config

    def run_and_delete(*args: Any) -> Any:
        newest = log.newest()
        if newest is not None and newest.segments:
            delete_files(store, log, log.delete())
            if again:
                log.create(config)
        return run_tasks_here(*args)

    scrubber = Scrubber(data, store, log, ScrubOptions(COLLECTION), Workers(run_and_delete, 2), str(tmp_path))
    with pytest.raises(NotFound, match="that was deleted" if again else "no collection"):
        scrubber.run(JobReporter(store, JobStatus(JOB, "scrub", COLLECTION), clock=ManualClock()))


def test_a_snapshot_whose_version_is_gone_is_found(tmp_path: Path) -> None:
    data = example()
    store = open_store(data)
    named = named_version(store, manifest_log(store, COLLECTION), COLLECTION, "before")
    store.delete(paths.manifest(COLLECTION, named.version))
    (found,) = scrubbed(data, tmp_path, sample=0)["findings"]
    assert found["object"] == paths.snapshot(COLLECTION, "before")
    assert paths.manifest(COLLECTION, named.version) in found["problem"]


# --- what checksums do not tell -----------------------------------------------------------------------------------


def test_an_id_that_is_live_twice_is_found(tmp_path: Path) -> None:
    data = example()
    log = manifest_log(open_store(data), COLLECTION)
    newest = log.newest_live()
    log.commit_shards(newest, {0: replace(newest.shards[0], tombstones=())})
    found = scrubbed(data, tmp_path)
    assert found["findings_total"] == 1
    assert found["findings"][0]["object"] == paths.manifest(COLLECTION, newest.version + 1)
    assert "is live in another one as well" in found["findings"][0]["problem"]


def test_segments_in_the_wrong_shard_are_found(tmp_path: Path) -> None:
    data = example()
    log = manifest_log(open_store(data), COLLECTION)
    newest = log.newest_live()
    first, second = newest.shards
    swapped = {
        0: replace(first, segments=second.segments, tombstones=()),
        1: replace(second, segments=first.segments, tombstones=()),
    }
    log.commit_shards(newest, swapped)
    found = scrubbed(data, tmp_path, sample=0)
    problems = [each["problem"] for each in found["findings"]]
    assert len(problems) == 4
    assert all("the id belongs to another shard" in problem for problem in problems)


def test_tombstones_out_of_range_are_found(tmp_path: Path) -> None:
    data = example()
    store = open_store(data)
    log = manifest_log(store, COLLECTION)
    newest = log.newest_live()
    entry = newest.shards[0]
    large = entry.segments[0]
    wrong = write_tombstones(store, COLLECTION, 0, large.segment_id, entry.applied_lsn, np.array([0, large.count]))
    log.commit_shards(newest, {0: replace(entry, tombstones=(wrong, *entry.tombstones[1:]))})
    found = scrubbed(data, tmp_path, sample=0)
    assert [each["object"].split("/")[-2] for each in found["findings"]] == ["tombstones"]
    assert f"rows from 0 to {large.count}" in found["findings"][0]["problem"]


def test_recall_that_is_lower_than_what_was_met_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = new_data_url()
    source = write_parquet(tmp_path / "source.parquet", random_table(3_000, 16), 1_000)
    create = {"metric": "l2", "index": {"kind": "hnsw"}}
    run_import(data, source, create=create)
    sound = scrubbed(data, tmp_path)
    assert sound["findings"] == []
    assert 0.9 < sound["recall"]["recall_at_10"] <= 1.0
    search = LoadedSegment.search

    def half(self: Any, queries: Any, *args: Any) -> Any:
        rows, scores = search(self, queries, *args)
        return (rows, scores) if len(queries) < 100 else (rows[:, ::2], scores[:, ::2])

    monkeypatch.setattr(LoadedSegment, "search", half)
    worse = scrubbed(data, tmp_path)
    assert (
        "recall@10 is 0.5" in worse["findings"][0]["problem"] or "recall@10 is 0.4" in worse["findings"][0]["problem"]
    )
    assert worse["recall"]["recall_at_10"] < 0.6


# --- the job ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_and_listen(*args: Any, waiting: Any) -> Any:
        return run_tasks_here(*args)

    monkeypatch.setattr(ray_jobs, "run_tasks", run_and_listen)
    monkeypatch.setattr(ray_jobs, "cluster_cpus", lambda: ray_jobs.ClusterCpus(2, 2, 2))
    monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0, 0.0))


def test_the_job_ends_with_an_error_where_something_is_wrong(tmp_path: Path, no_ray: None) -> None:
    data = example()
    settings = Settings(data, cache_dir=str(tmp_path))
    options, status = ScrubOptions(COLLECTION, sample=0), JobStatus(JOB, "scrub", COLLECTION)
    run_care.run_scrub(settings, options, status)
    ended = read_status(open_store(data), JOB)
    assert (ended.state, ended.report["sound"], ended.progress) == ("succeeded", True, 1.0)
    key = needed_keys(data)["target rows.arrow"]
    open_store(data).put(key, b"torn")
    with pytest.raises(Corrupt, match=r"^one thing is wrong; first ") as raised:
        run_care.run_scrub(settings, options, status)
    assert key in str(raised.value)
    ended = read_status(open_store(data), JOB)
    assert (ended.state, ended.report["error"]) == ("failed", "Corrupt")
    assert [each["object"] for each in ended.report["findings"]] == [key]


def test_options_that_are_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="sample"):
        ScrubOptions(COLLECTION, sample=-1).check()
    with pytest.raises(NotFound):
        scrubbed(new_data_url(), tmp_path)
