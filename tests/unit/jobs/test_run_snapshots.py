"""`python -m jobs rollback`, `snapshot`, `restore`, `branch` and `export` from their first to their last status."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from actors import ray_jobs, ray_runtime
from cluster.config import Settings
from cluster.errors import EaglerayError
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from cluster.snapshots import read_snapshot
from jobs import __main__ as jobs_main
from jobs import report, run_snapshots
from jobs.export import ExportOptions
from jobs.report import JobStatus, read_status
from jobs.rollback import RollbackOptions
from jobs.snapshots import BranchOptions, RestoreOptions, SnapshotOptions
from tests.fakes import run_tasks_here
from tests.unit.jobs.histories import History
from tests.unit.jobs.imports import new_data_url

JOB = "job-1"


def run_tasks_and_listen(*args: Any, waiting: Any) -> Any:
    return run_tasks_here(*args)


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """No Ray, but a supervisor; what was waited for."""
    waited: list[tuple[str, int]] = []

    class Directory:
        def __init__(self, supervisor: str, namespace: str) -> None:
            assert (supervisor, namespace) == ("a supervisor", "eagleray")

        async def refresh(self, collection: str) -> None:
            waited.append((collection, 0))

    monkeypatch.setattr(ray_jobs, "run_tasks", run_tasks_and_listen)
    monkeypatch.setattr(ray_jobs, "cluster_cpus", lambda: ray_jobs.ClusterCpus(2, 2, 2))
    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: "a supervisor")
    monkeypatch.setattr(ray_runtime, "RayDirectory", Directory)
    monkeypatch.setattr(
        ray_runtime, "wait_until_served", lambda n, name, generation, s, tell: waited.append((name, generation))
    )
    monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0, 0.0))
    return waited


@pytest.fixture
def data() -> str:
    return new_data_url()


@pytest.fixture
def made(data: str, tmp_path: Path) -> History:
    """Generation 2, an import with writes on top."""
    made = History(open_store(data), tmp_path)
    made.create()
    made.write([1])
    made.import_ids(range(10))
    made.write([10], [3])
    return made


def run(kind: str, data: str, folder: Path, options: Any) -> JobStatus:
    status = JobStatus(JOB, kind, options.collection)
    getattr(run_snapshots, f"run_{kind}")(Settings(data, cache_dir=str(folder)), options, status)
    return read_status(open_store(data), JOB)


def test_rollback(data: str, made: History, tmp_path: Path, served: list[tuple[str, int]]) -> None:
    status = run("rollback", data, tmp_path, RollbackOptions("words"))
    assert (status.state, status.phase, status.progress) == ("succeeded", "serve", 1.0)
    facts = {"version": 3, "generation": 3, "back_to_generation": 1, "replayed_records": 1, "sealed": False}
    assert status.report == facts | {"served": True}
    assert served == [("words", 3)]
    assert made.held().keys() == {1, 10}


def test_snapshot_and_restore(data: str, made: History, tmp_path: Path, served: list[tuple[str, int]]) -> None:
    contents = made.held()
    status = run("snapshot", data, tmp_path, SnapshotOptions("words", "then"))
    snapshot = read_snapshot(made.store, "words", "then")
    assert (status.state, status.phase) == ("succeeded", "name")
    assert status.report == vars(snapshot)
    assert served == [("words", 0)]
    made.write([77], [1])
    status = run("restore", data, tmp_path, RestoreOptions("words", "then"))
    assert status.state == "succeeded"
    assert status.report == {"version": made.newest.version, "generation": 3, "snapshot": "then", "served": True}
    assert made.held() == contents


@pytest.mark.parametrize("snapshot", [None, "then"])
def test_branch(snapshot: str | None, data: str, made: History, tmp_path: Path, served: list[tuple[str, int]]) -> None:
    contents = made.held()
    run("snapshot", data, tmp_path, SnapshotOptions("words", "then"))
    served.clear()
    status = run("branch", data, tmp_path, BranchOptions("words", "other", snapshot))
    other = ManifestLog(made.store, "other", lambda: uuid.uuid4().hex).newest_live()
    assert made.held(other) == contents
    assert status.report == {
        "version": 1,
        "generation": 1,
        "collection": "other",
        "origin": "words",
        "origin_version": read_snapshot(made.store, "words", "then").version,
        "served": True,
    }
    assert served == [("other", 1)]


@pytest.mark.parametrize("snapshot", [None, "then"])
def test_export(snapshot: str | None, data: str, made: History, tmp_path: Path) -> None:
    run("snapshot", data, tmp_path, SnapshotOptions("words", "then"))
    expected = set(made.held())
    made.write([55])
    status = run("export", data, tmp_path, ExportOptions("words", str(tmp_path / "out"), snapshot))
    assert (status.state, status.progress) == ("succeeded", 1.0)
    assert status.report["points"] == len(expected) + (snapshot is None)
    ids = set(pq.read_table(tmp_path / "out").column("id").to_pylist())
    assert ids == (expected if snapshot else expected | {55})


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("rollback", RollbackOptions("words", 7), "Invalid"),
        ("snapshot", SnapshotOptions("words", "No"), "Invalid"),
        ("restore", RestoreOptions("words", "none"), "NotFound"),
        ("branch", BranchOptions("words", "words"), "Invalid"),
        ("export", ExportOptions("others", "out"), "NotFound"),
    ],
)
def test_job_that_fails_says_why(kind: str, options: Any, error: str, data: str, made: History, tmp_path: Path) -> None:
    with pytest.raises(EaglerayError) as raised:
        run(kind, data, tmp_path, options)
    status = read_status(made.store, JOB)
    assert (status.state, status.report["error"]) == ("failed", error)
    assert status.report["message"] == str(raised.value)
    assert made.newest.version == 2


def test_job_that_is_stopped_says_so(data: str, made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray_jobs, "run_tasks", stop)
    for kind, options, message in (
        ("snapshot", SnapshotOptions("words", "then"), "the snapshot was not taken"),
        ("branch", BranchOptions("words", "other"), "before it was committed"),
        ("export", ExportOptions("words", str(tmp_path / "out")), "nothing was exported"),
    ):
        with pytest.raises(SystemExit):
            run(kind, data, tmp_path, options)
        status = read_status(made.store, JOB)
        assert status.state == "stopped"
        assert message in status.report["message"]
    assert not (tmp_path / "out").exists()


def test_what_was_committed_has_succeeded_though_it_is_not_served(
    data: str, made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray_runtime, "wait_until_served", stop)
    with pytest.raises(SystemExit):
        run("rollback", data, tmp_path, RollbackOptions("words"))
    status = read_status(made.store, JOB)
    assert (status.state, status.report["served"], status.report["generation"]) == ("succeeded", False, 3)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["rollback", "--collection=c"], RollbackOptions("c")),
        (["rollback", "--collection=c", "--generation=3"], RollbackOptions("c", 3)),
        (["snapshot", "--collection=c", "--name=n"], SnapshotOptions("c", "n")),
        (["restore", "--collection=c", "--snapshot=n"], RestoreOptions("c", "n")),
        (["branch", "--collection=c", "--into=d"], BranchOptions("c", "d")),
        (["branch", "--collection=c", "--into=d", "--snapshot=n"], BranchOptions("c", "d", "n")),
        (["export", "--collection=c", "--target=t"], ExportOptions("c", "t")),
        (["export", "--collection=c", "--target=t", "--snapshot=n"], ExportOptions("c", "t", "n")),
    ],
)
def test_command_line(arguments: list[str], options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(ray_runtime, "connect", lambda address: None)
    kind = arguments[0]
    monkeypatch.setattr(jobs_main, f"run_{kind}", lambda *given: called.append(given))
    given = [*arguments, "--data=s3://b", "--namespace=n", "--job-id=j"]
    result = CliRunner().invoke(jobs_main.app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ((settings, parsed, status),) = called
    assert (settings.data, settings.namespace, parsed) == ("s3://b", "n", options)
    assert (status.job_id, status.kind, status.collection) == ("j", kind, "c")
