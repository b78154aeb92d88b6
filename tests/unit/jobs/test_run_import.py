"""`python -m jobs import` from its first to its last status, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors import ray_jobs, ray_runtime
from cluster.config import Settings
from cluster.errors import Invalid, NotFound, Unavailable
from cluster.object_store import ObjectStore, open_store
from jobs import report
from jobs import run as jobs_run
from jobs.importer import ImportOptions
from jobs.report import JobStatus, read_status
from tests.fakes import FaultyStore, run_tasks_here
from tests.unit.jobs.imports import JOB, log_of, new_data_url, random_table, write

STATUS = JobStatus(JOB, "import", "words")


def run_tasks_and_listen(*args: Any, waiting: Any) -> Any:
    return run_tasks_here(*args)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "run_tasks", run_tasks_and_listen)
    monkeypatch.setattr(ray_jobs, "cluster_cpus", lambda: ray_jobs.ClusterCpus(2, 2, 2))
    monkeypatch.setattr(ray_jobs, "cluster_gpus", ray_jobs.ClusterGpus)
    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: "a supervisor")
    monkeypatch.setattr(ray_runtime, "wait_until_served", lambda *args: None)
    monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0, 0.0))


def run(data: str, source: Path | str) -> JobStatus:
    jobs_run.run_import(Settings(data), ImportOptions("words", str(source)), STATUS)
    return read_status(open_store(data), JOB)


def good_source(tmp_path: Path) -> Path:
    return write(tmp_path / "words.parquet", random_table(10))


def test_import_that_is_served_says_so(tmp_path: Path) -> None:
    status = run(new_data_url(), good_source(tmp_path))
    assert (status.state, status.phase, status.progress) == ("succeeded", "serve", 1.0)
    assert status.report == {"points": 10, "version": 1, "generation": 1, "served": True}


def test_import_tells_what_it_waits_for_until_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, told = new_data_url(), []

    def wait(namespace: str, collection: str, generation: int, timeout_s: float, tell: Any) -> None:
        tell("replica words/0/0/gpu is starting (it asks for 1 GPU)")
        told.append(read_status(open_store(data), JOB))

    monkeypatch.setattr(ray_runtime, "wait_until_served", wait)
    assert "message" not in run(data, good_source(tmp_path)).report
    (status,) = told
    assert (status.state, status.phase) == ("running", "serve")
    assert status.report == {"message": "replica words/0/0/gpu is starting (it asks for 1 GPU)"}


@pytest.mark.parametrize("error", [Unavailable("no replica can be placed"), RuntimeError("a bug"), ConnectionError()])
def test_import_that_committed_has_succeeded_though_it_is_not_served(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(ray_runtime, "wait_until_served", fail)
    status = run(new_data_url(), good_source(tmp_path))
    assert status.state == "succeeded"
    message = f"committed, but not served yet: {error}"
    assert status.report == {"points": 10, "version": 1, "generation": 1, "served": False, "message": message}


def test_import_without_an_eagleray_to_serve_it_has_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: None)
    status = run(new_data_url(), good_source(tmp_path))
    assert (status.state, status.report["served"]) == ("succeeded", False)
    assert "no Eagleray runs" in status.report["message"]


def test_import_that_is_stopped_while_it_waits_to_be_served_has_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray_runtime, "wait_until_served", stop)
    data = new_data_url()
    with pytest.raises(SystemExit):
        run(data, good_source(tmp_path))
    status = read_status(open_store(data), JOB)
    assert (status.state, status.report["served"]) == ("succeeded", False)


def test_import_that_is_stopped_before_its_commit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray_jobs, "run_tasks", stop)
    data = new_data_url()
    with pytest.raises(SystemExit):
        run(data, good_source(tmp_path))
    assert read_status(open_store(data), JOB).state == "stopped"
    assert log_of(open_store(data)).newest() is None


class StatusLessStore:
    """A store that takes everything but job statuses."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, data: bytes) -> None:
        if key.startswith("jobs/"):
            raise Unavailable("no space for statuses")
        self._inner.put(key, data)


def test_import_commits_though_no_status_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = new_data_url()
    monkeypatch.setattr(jobs_run, "open_store", lambda url: StatusLessStore(open_store(url)))
    jobs_run.run_import(Settings(data), ImportOptions("words", str(good_source(tmp_path))), STATUS)
    newest = log_of(open_store(data)).newest()
    assert newest is not None
    assert newest.points == 10


def test_first_error_is_told_though_no_status_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(10).set_column(0, "id", [[*range(9), 0]])
    monkeypatch.setattr(jobs_run, "open_store", lambda url: StatusLessStore(open_store(url)))
    with pytest.raises(Invalid, match="is repeated"):
        jobs_run.run_import(
            Settings(new_data_url()), ImportOptions("words", str(write(tmp_path / "a.parquet", table))), STATUS
        )


def test_failed_import_says_why(tmp_path: Path) -> None:
    data = new_data_url()
    with pytest.raises(NotFound):
        run(data, tmp_path / "nowhere.parquet")
    status = read_status(open_store(data), JOB)
    assert (status.state, status.report["error"]) == ("failed", "NotFound")


def test_outcome_is_written_though_the_store_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, source = new_data_url(), good_source(tmp_path)
    counted = FaultyStore(open_store(data), counted=frozenset({"put"}))
    monkeypatch.setattr(jobs_run, "open_store", lambda url: counted)
    run(data, source)
    failing = FaultyStore(open_store(data), at=counted.calls, counted=frozenset({"put"}))
    monkeypatch.setattr(jobs_run, "open_store", lambda url: failing)
    assert run(data, source).report["version"] == 2
