"""`jobs.collect_garbage` without Ray: which jobs hold what, the store's time, options, and how the job ends."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from typer.testing import CliRunner

from actors import ray_runtime
from actors.shard_client import ServedCollection, ServingTable
from cluster import paths
from cluster.config import Settings
from cluster.errors import Invalid, NotFound, Unavailable
from cluster.garbage import GRACE_S
from cluster.memory_store import MemoryStore
from cluster.object_store import open_store
from cluster.references import EVERYWHERE
from jobs import report, run_care
from jobs.__main__ import app
from jobs.collect_garbage import GRACE_MIN_S, SILENT_S, CollectGarbageOptions, GarbageCollector, RunningJobs, stored_now
from jobs.report import JobReporter, JobStatus, read_status
from tests.fakes import ManualClock
from tests.unit.cluster.histories import (
    CONFIG,
    ClockStore,
    assert_whole,
    contents,
    files_of,
    leave_behind,
    log_of,
    new_generation,
    put_segment,
)
from tests.unit.jobs.imports import new_data_url

JOB = "collect_garbage-1"


def status_of(job_id: str, kind: str, collection: str, state: str = "running") -> JobStatus:
    return JobStatus(job_id, kind, collection, state)


def put_status(store: MemoryStore, status: JobStatus) -> None:
    store.put(paths.job_status(status.job_id), json.dumps(asdict(status)).encode())


def crowded(store: MemoryStore | None = None) -> Any:
    """Two collections with generations that nothing needs any more."""
    store = store or ClockStore()
    for name in ("a", "b"):
        log_of(store, name).create(replace(CONFIG, shards=1))
        for _ in range(4):
            new_generation(store, name)
        leave_behind(store, name)
    return store


def aged(store: ClockStore, seconds: float = 2 * GRACE_S) -> ClockStore:
    store.now_s += seconds
    return store


def collected(store: MemoryStore, **options: Any) -> dict[str, Any]:
    status = status_of(JOB, "collect_garbage", options.get("collection") or "")
    reporter = JobReporter(store, status, clock=ManualClock())
    return GarbageCollector(store, CollectGarbageOptions(**options), clock=ManualClock()).run(reporter)


def test_a_dry_run_is_the_default_and_tells_what_a_deletion_takes() -> None:
    store = aged(crowded())
    before = contents(store)
    dry = collected(store)
    assert contents(store).keys() - before.keys() == {paths.job_status(JOB)}
    assert (dry["deleted"], dry["removed"]["objects"], dry["failed"]) == (False, 0, 0)
    assert {kind: told["objects"] for kind, told in dry["garbage"].items()} == {
        "segment": 2 * 3 * 3,
        "staging": 2,
        "tombstones": 2,
    }
    wet = collected(store, delete=True)
    assert wet["removed"] == {
        name: sum(told[name] for told in dry["garbage"].values()) for name in ("objects", "bytes")
    }
    assert len(before) + 1 - len(contents(store)) == wet["removed"]["objects"]
    for name in ("a", "b"):
        assert_whole(store, log_of(store, name).newest_live())
    assert collected(store)["garbage"] == {}


def test_only_the_named_collection_is_looked_through() -> None:
    store = aged(crowded())
    before = contents(store)
    collected(store, collection="a", delete=True)
    gone = before.keys() - contents(store).keys()
    assert gone
    assert all(key.startswith("collections/a/") for key in gone)


def test_a_name_that_never_was_is_refused() -> None:
    with pytest.raises(NotFound, match="'words'"):
        collected(crowded(), collection="words")


def test_time_is_the_stores_own() -> None:
    store = aged(crowded(), GRACE_S / 2)
    put_status(store, status_of(JOB, "collect_garbage", ""))
    assert stored_now(store, JOB) == store.now_s
    assert collected(store)["garbage"] == {}
    with pytest.raises(Unavailable, match=paths.job_status("other")):
        stored_now(store, "other")


@pytest.mark.parametrize(
    ("status", "held"),
    [
        (status_of("rebuild-1", "rebuild", "a"), ["a"]),
        (status_of("rebuild-1", "rebuild", "a", "failed"), []),
        (status_of("collect_garbage-2", "collect_garbage", "a"), []),
        (status_of("branch-1", "branch", "a"), [EVERYWHERE]),
    ],
)
def test_running_jobs_hold_their_collections(status: JobStatus, held: list[str]) -> None:
    store = ClockStore()
    put_status(store, status)
    running = RunningJobs(store, store.now_s + SILENT_S / 2, SILENT_S)
    assert list(running.in_use().held) == held
    assert running.runs(status.job_id) == bool(held)
    silent = RunningJobs(store, store.now_s + SILENT_S + 1, SILENT_S)
    assert (silent.in_use().held, silent.runs(status.job_id)) == ({}, False)


def test_a_status_that_cannot_be_read_holds_everything() -> None:
    store = aged(crowded())
    store.put(paths.job_status("later-version"), b'{"job_id": "later-version", "news": 1}')
    found = collected(store, delete=True)
    assert found["garbage"].keys() == {"staging"}
    assert [each["collection"] for each in found["held"]] == ["a", "b"]
    assert paths.job_status("later-version") in found["held"][0]["why"]


def test_what_a_running_job_has_built_stays_though_it_is_old() -> None:
    store = crowded()
    log_of(store, "new")
    built = put_segment(store, "new", "import-1-000000-00000000")
    piece = paths.staging_piece("new", "import-1", 0, 0)
    store.put(piece, b"piece")
    aged(store)
    put_status(store, status_of("import-1", "import", "new"))
    collected(store, delete=True)
    assert {key for key in contents(store) if key.startswith("collections/new/")} == {
        piece,
        *(paths.segment_file("new", built.segment_id, file) for file in paths.SEGMENT_FILES),
    }
    put_status(store, status_of("import-1", "import", "new", "failed"))
    collected(store, delete=True)
    assert not [key for key in contents(store) if key.startswith("collections/new/")]


@pytest.mark.parametrize("wrong", [{"grace_s": -1.0}, {"grace_s": float("nan")}, {"delete": True, "grace_s": 60.0}])
def test_options_that_could_do_harm_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="grace_s"):
        CollectGarbageOptions(**wrong).check()
    CollectGarbageOptions(delete=True, grace_s=GRACE_MIN_S).check()
    CollectGarbageOptions(grace_s=0.0).check()
    with pytest.raises(Invalid, match="collection"):
        CollectGarbageOptions("No Such Name").check()


# --- from the first to the last status ----------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """No Ray, but a supervisor that serves these versions."""
    served: dict[str, int] = {}

    class Directory:
        def __init__(self, supervisor: str, namespace: str) -> None:
            assert (supervisor, namespace) == ("a supervisor", "eagleray")

        async def next_table(self, known_stamp: str | None) -> ServingTable:
            return ServingTable("1", {name: entry(version) for name, version in served.items()})

    def entry(version: int) -> ServedCollection:
        return ServedCollection(CONFIG, None, version, 1, {}, {}, {}, {})  # type: ignore[arg-type]

    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: "a supervisor")
    monkeypatch.setattr(ray_runtime, "RayDirectory", Directory)
    monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0, 0.0))
    return served


def named_store() -> tuple[str, ClockStore]:
    data, store = new_data_url(), ClockStore()
    MemoryStore._by_name[data] = store
    return data, store


def run_job(data: str, **options: Any) -> JobStatus:
    try:
        run_care.run_collect_garbage(
            Settings(data), CollectGarbageOptions(**options), status_of(JOB, "collect_garbage", "")
        )
    finally:
        ended = read_status(open_store(data), JOB)
    return ended


def test_the_job_reports_what_it_did_and_leaves_what_is_served(table: dict[str, int]) -> None:
    data, store = named_store()
    crowded(store)
    served = log_of(store).read(2)
    table["a"] = served.version
    aged(store)
    ended = run_job(data, delete=True)
    assert (ended.state, ended.progress, ended.report["failed"]) == ("succeeded", 1.0, 0)
    assert ended.report["removed"]["objects"] == 5 * 3 + 4
    assert_whole(store, served)
    del table["a"]
    run_job(data, delete=True)
    assert files_of(served).isdisjoint(contents(store))


def test_the_job_fails_and_says_what_it_did_where_something_cannot_be_read(table: dict[str, int]) -> None:
    data, store = named_store()
    crowded(store)
    key = paths.manifest("a", 5)
    store.put(key, b"torn")
    aged(store)
    with pytest.raises(Unavailable, match=key):
        run_job(data, delete=True)
    ended = read_status(store, JOB)
    assert (ended.state, ended.report["error"], ended.report["failed"]) == ("failed", "Unavailable", 1)
    assert ended.report["removed"]["objects"] == ended.report["garbage"]["staging"]["objects"] + 1  # tombstones of b
    assert key in ended.report["failures"][0]["message"]


def test_nothing_is_deleted_while_it_is_not_known_what_is_served(
    table: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(namespace: str) -> None:
        raise Unavailable("it starts")

    data, store = named_store()
    crowded(store)
    served = log_of(store).read(2)
    table["a"] = served.version
    aged(store)
    before = contents(store).keys()
    with monkeypatch.context() as starting:
        starting.setattr(ray_runtime, "find_supervisor", away)
        assert run_job(data).state == "succeeded"
        with pytest.raises(Unavailable, match=r"which versions are served, .*it starts"):
            run_job(data, delete=True)
        assert before <= contents(store).keys()
    asked: list[str] = []

    def gone_after_the_first(namespace: str) -> str:
        asked.append(namespace)
        if len(asked) > 1:
            away(namespace)
        return "a supervisor"

    monkeypatch.setattr(ray_runtime, "find_supervisor", gone_after_the_first)
    assert run_job(data, delete=True).report["removed"]["objects"] > 0
    assert_whole(store, served)


def test_a_deletion_without_grace_is_refused_before_anything_is_started() -> None:
    ended = CliRunner().invoke(app, ["collect_garbage", "--delete", "--grace-s", "10"])
    assert isinstance(ended.exception, Invalid)
    assert "grace_s" in str(ended.exception)
