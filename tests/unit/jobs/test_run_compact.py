"""`python -m jobs compact` from its first to its last status, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors import ray_jobs, ray_runtime
from cluster.config import Settings
from cluster.errors import EaglerayError, Unavailable
from cluster.object_store import open_store
from jobs import report
from jobs import run as jobs_run
from jobs.compact import CompactOptions
from jobs.report import JobStatus, read_status
from tests.fakes import run_tasks_here
from tests.unit.actors.written import COLLECTION
from tests.unit.jobs.compactions import JOB, ONE_SHARD, assert_compacted, churned, new_shards
from tests.unit.jobs.imports import new_data_url


def run_tasks_and_listen(*args: Any, waiting: Any) -> Any:
    return run_tasks_here(*args)


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No Ray, but a supervisor; the collections that it is told of."""
    told: list[str] = []

    class Directory:
        def __init__(self, supervisor: str, namespace: str) -> None:
            assert (supervisor, namespace) == ("a supervisor", "eagleray")

        async def refresh(self, collection: str) -> None:
            told.append(collection)

    monkeypatch.setattr(ray_jobs, "run_tasks", run_tasks_and_listen)
    monkeypatch.setattr(ray_jobs, "cluster_cpus", lambda: ray_jobs.ClusterCpus(2, 2, 2))
    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: "a supervisor")
    monkeypatch.setattr(ray_runtime, "RayDirectory", Directory)
    monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0, 0.0))
    return told


def run_job(data: str, folder: Path, **options: Any) -> JobStatus:
    settings = Settings(data, cache_dir=str(folder))
    status = JobStatus(JOB, "compact", COLLECTION)
    jobs_run.run_compact(settings, CompactOptions(COLLECTION, **options), status)
    return read_status(open_store(data), JOB)


def test_job_reports_what_it_did_and_tells_the_supervisor(tmp_path: Path, refreshed: list[str]) -> None:
    data = new_data_url()
    (written,) = churned(data, tmp_path, ONE_SHARD)
    status = run_job(data, tmp_path)
    assert (status.state, status.phase, status.progress) == ("succeeded", "compact", 1.0)
    told = {name: status.report[name] for name in ("segments_before", "segments_after", "points", "version")}
    version = written.newest.version
    assert told == {"segments_before": 3, "segments_after": 1, "points": len(written.live), "version": version}
    assert refreshed == [COLLECTION]
    assert_compacted(written)


@pytest.mark.parametrize("error", [Unavailable("it starts"), RuntimeError("a bug")])
def test_job_has_succeeded_though_the_supervisor_cannot_be_told(
    error: Exception, tmp_path: Path, refreshed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(namespace: str) -> None:
        raise error

    monkeypatch.setattr(ray_runtime, "find_supervisor", fail)
    data = new_data_url()
    churned(data, tmp_path, ONE_SHARD)
    assert run_job(data, tmp_path).state == "succeeded"
    assert refreshed == []


def test_job_without_an_eagleray_has_succeeded(
    tmp_path: Path, refreshed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: None)
    data = new_data_url()
    new_shards(data, tmp_path)
    assert run_job(data, tmp_path).state == "succeeded"
    assert refreshed == []


def test_job_that_fails_says_why(tmp_path: Path, refreshed: list[str]) -> None:
    data = new_data_url()
    new_shards(data, tmp_path)
    with pytest.raises(EaglerayError):
        run_job(data, tmp_path, shard=7)
    status = read_status(open_store(data), JOB)
    assert (status.state, status.report["error"]) == ("failed", "Invalid")
    assert "shards 0 to 1" in status.report["message"]


def test_job_that_is_stopped_says_that_its_commits_stay(
    tmp_path: Path, refreshed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray_jobs, "run_tasks", stop)
    data = new_data_url()
    new_shards(data, tmp_path)
    with pytest.raises(SystemExit):
        run_job(data, tmp_path)
    status = read_status(open_store(data), JOB)
    assert (status.state, status.report["message"]) == ("stopped", "stopped; what it had committed stays")
