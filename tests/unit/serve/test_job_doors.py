"""Every kind of job from its body to the options that `python -m jobs` reads; wrong bodies; the list of jobs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Unavailable
from cluster.object_store import open_store
from cluster.placement import ReplicaKey
from cluster.snapshots import create_snapshot
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter, JobStatus, read_status
from serve.job_service import JOBS_LISTED, NO_REPORT
from tests.unit.actors.points import keys, manifest_log, random_points
from tests.unit.serve.endpoint import Endpoint, Json, LocalJobs, problem, run_with_endpoint, until

JOBS = "/v1/collections/words/jobs"
CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="hnsw", m=16))
POINTS = random_points(CONFIG, 40)
DAY_S = 86_400.0


async def submitted(endpoint: Endpoint, body: Json, path: str = JOBS) -> Json:
    """The options that the job's command reads."""
    response = await endpoint.http.post(path, json=body)
    assert response.status_code == 202, response.text
    arguments = endpoint.jobs.arguments(response.json()["job_id"])
    assert (arguments.pop("job_id"), arguments.pop("namespace")) == (response.json()["job_id"], "eagleray")
    assert (arguments.pop("data"), arguments.pop("address")) == (None, None)
    return arguments


async def named(endpoint: Endpoint, name: str) -> None:
    manifest = manifest_log(endpoint.store, "words").newest_live()
    create_snapshot(endpoint.store, name, manifest, manifest_log(endpoint.store, "words")._now())


KINDS: list[tuple[Json, Json]] = [
    (
        {"kind": "rebuild"},
        {
            "index": "{}",
            "target_recall": None,
            "shards": None,
            "metric_report": None,
            "memory_bytes": DEFAULT_MEMORY_BYTES,
            "seed": 0,
        },
    ),
    (
        {
            "kind": "rebuild",
            "index": {"kind": "ivf_flat", "nlist": None},
            "shards": 3,
            "memory_bytes": 10**9,
            "seed": 7,
        },
        {
            "index": '{"kind":"ivf_flat","nlist":null}',
            "target_recall": None,
            "shards": 3,
            "metric_report": None,
            "memory_bytes": 10**9,
            "seed": 7,
        },
    ),
    ({"kind": "rollback"}, {"generation": None}),
    ({"kind": "rollback", "generation": 1}, {"generation": 1}),
    ({"kind": "snapshot", "name": "before-2"}, {"name": "before-2"}),
    ({"kind": "restore", "snapshot": "before"}, {"snapshot": "before"}),
    ({"kind": "branch", "into": "others"}, {"into": "others", "snapshot": None}),
    ({"kind": "branch", "into": "others", "snapshot": "before"}, {"into": "others", "snapshot": "before"}),
    ({"kind": "export", "target": "s3://bucket/a b"}, {"target": "s3://bucket/a b", "snapshot": None}),
    ({"kind": "export", "target": "--delete", "snapshot": "before"}, {"target": "--delete", "snapshot": "before"}),
    ({"kind": "collect_garbage"}, {"delete": False, "grace_s": DAY_S}),
    ({"kind": "collect_garbage", "delete": True, "grace_s": 7_200}, {"delete": True, "grace_s": 7_200.0}),
    ({"kind": "collect_garbage", "grace_s": 0}, {"delete": False, "grace_s": 0.0}),
    ({"kind": "scrub"}, {"sample": 200, "seed": 0, "memory_bytes": DEFAULT_MEMORY_BYTES}),
    ({"kind": "scrub", "sample": 0, "memory_bytes": 9}, {"sample": 0, "seed": 0, "memory_bytes": 9}),
]


def test_every_kind_reaches_its_command(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        await named(endpoint, "before")
        for body, options in KINDS:
            assert await submitted(endpoint, body) == options | {"collection": "words"}, body

    run_with_endpoint(scenario, tmp_path)


def test_garbage_of_all_collections_is_a_job_of_none(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        body = {"kind": "collect_garbage", "delete": True}
        assert await submitted(endpoint, body, "/v1/jobs") == {"collection": None, "delete": True, "grace_s": DAY_S}
        (job,) = (await endpoint.http.get("/v1/jobs")).json()["jobs"]
        assert (job["kind"], job["collection"], job["state"]) == ("collect_garbage", "", "pending")
        for wrong, field in (
            ({"kind": "compact"}, "kind"),
            ({"kind": "import", "source": "x"}, "kind"),
            ({"delete": True}, "kind"),
            (body | {"grace_s": 3_599}, "grace_s"),
            (body | {"collection": "words"}, "collection"),
        ):
            problem(await endpoint.http.post("/v1/jobs", json=wrong), 400, field)
        assert len(endpoint.jobs.entrypoints) == 1

    run_with_endpoint(scenario, tmp_path)


WRONG: list[tuple[Json, int, str | None]] = [
    ({"kind": "reindex"}, 400, "kind"),
    ({"kind": "rebuild", "shards": 0}, 400, "shards"),
    ({"kind": "rebuild", "shards": 1_025}, 400, "shards"),
    ({"kind": "rebuild", "target_recall": 0.9}, 400, "target_recall"),
    ({"kind": "rebuild", "index": []}, 400, "index"),
    ({"kind": "rebuild", "index": {"colour": 1}}, 400, "index.colour"),
    ({"kind": "rebuild", "index": {"kind": []}}, 400, "index.kind"),
    ({"kind": "rebuild", "index": {"target_recall": None}}, 400, "index.target_recall"),
    ({"kind": "rebuild", "index": {"nlist": 4}}, 400, "index.nlist"),  # the collection has kind hnsw
    ({"kind": "rebuild", "index": {"kind": "flat", "m": 8}}, 400, "index.m"),
    ({"kind": "rebuild", "index": {"device": "gpu"}}, 400, "index.device"),
    ({"kind": "rebuild", "index": {"kind": "factory", "factory": "HNSWx"}}, 400, "index.factory"),
    ({"kind": "rebuild", "index": {"kind": "ivf_flat", "nlist": 10_000}}, 400, "index.nlist"),
    ({"kind": "rollback", "generation": 0}, 400, "generation"),
    ({"kind": "rollback", "generation": "1"}, 400, "generation"),
    ({"kind": "snapshot"}, 400, "name"),
    ({"kind": "snapshot", "name": "Before"}, 400, "name"),
    ({"kind": "snapshot", "name": "../../x"}, 400, "name"),
    ({"kind": "snapshot", "name": "before\n"}, 400, "name"),
    ({"kind": "restore"}, 400, "snapshot"),
    ({"kind": "restore", "snapshot": "nothing"}, 404, None),
    ({"kind": "branch"}, 400, "into"),
    ({"kind": "branch", "into": "Others"}, 400, "into"),
    ({"kind": "branch", "into": "others\n"}, 400, "into"),
    ({"kind": "branch", "into": "words"}, 409, None),
    ({"kind": "branch", "into": "others", "snapshot": "nothing"}, 404, None),
    ({"kind": "export"}, 400, "target"),
    ({"kind": "export", "target": ""}, 400, "target"),
    ({"kind": "export", "target": "a\0b"}, 400, "body"),
    ({"kind": "export", "target": "/tmp/x", "snapshot": "nothing"}, 404, None),
    ({"kind": "collect_garbage", "delete": "yes"}, 400, "delete"),
    ({"kind": "collect_garbage", "grace_s": -1}, 400, "grace_s"),
    ({"kind": "collect_garbage", "grace_s": 60, "delete": True}, 400, "grace_s"),
    ({"kind": "scrub", "sample": -1}, 400, "sample"),
    ({"kind": "scrub", "sample": 10**6}, 400, "sample"),
]


def test_wrong_job_is_refused_and_submits_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        for body, status, field in WRONG:
            problem(await endpoint.http.post(JOBS, json=body), status, *([field] if field else []))
        for body, _ in KINDS:
            problem(await endpoint.http.post("/v1/collections/nothing/jobs", json=body), 404)
        assert endpoint.jobs.entrypoints == {}
        assert keys(endpoint.store, "jobs/") == []

    run_with_endpoint(scenario, tmp_path)


# --- the list of jobs -----------------------------------------------------------------------------------------------


async def listed(endpoint: Endpoint) -> list[Json]:
    response = await endpoint.http.get("/v1/jobs")
    assert response.status_code == 200, response.text
    return list(response.json()["jobs"])


def test_jobs_are_listed_newest_first_as_ray_says_they_are(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert await listed(endpoint) == []
        for number, (state, ray_state) in enumerate([("failed", "FAILED"), ("running", None), ("running", "RUNNING")]):
            job_id = f"import-{number}"
            reporter = JobReporter(endpoint.store, JobStatus(job_id, "import", "words"))
            reporter.phase("build", unit="vectors")
            if state == "failed":
                reporter.finish("failed", {"error": "Invalid", "message": "row 3", "more": [1]})
            if ray_state is not None:
                endpoint.jobs.states[job_id] = ray_state
            touch(endpoint, tmp_path, job_id, number)
        newest, lost, failed = await listed(endpoint)
        assert [job["job_id"] for job in (newest, lost, failed)] == ["import-2", "import-1", "import-0"]
        assert (newest["state"], newest["phase"], newest["unit"]) == ("running", "build", "vectors")
        assert (lost["state"], lost["message"]) == ("failed", NO_REPORT)
        assert (failed["state"], failed["message"]) == ("failed", "row 3")
        assert failed["updated_at"] == "2001-09-09T01:46:40+00:00"
        assert "report" not in failed

    run_with_endpoint(scenario, tmp_path, data=f"file://{tmp_path}/data")


def touch(endpoint: Endpoint, tmp_path: Path, job_id: str, seconds: int) -> None:
    """Make a job's status as old as the test wants it."""
    path = tmp_path / "data" / "jobs" / job_id / "status.json"
    os.utime(path, (1_000_000_000 + seconds,) * 2)


def test_jobs_that_are_listed_are_bounded_and_damage_hides_none_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for number in range(JOBS_LISTED + 5):
            JobReporter(endpoint.store, JobStatus(f"import-{number:03d}", "import", "words")).finish("succeeded", {})
        assert len(await listed(endpoint)) == JOBS_LISTED
        endpoint.store.put("jobs/import-900/status.json", b"{")
        endpoint.store.put("jobs/import-900/more.json", b"{}")
        assert len(await listed(endpoint)) >= JOBS_LISTED - 1
        assert "jobs/import-900/status.json" in caplog.text

    run_with_endpoint(scenario, tmp_path)


class AwayJobs(LocalJobs):
    """A job server that does not answer."""

    def job_state(self, job_id: str) -> str | None:
        raise Unavailable("away")


def test_list_is_unavailable_only_while_it_would_have_to_guess(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.services.jobs._runner = AwayJobs()
        reporter = JobReporter(endpoint.store, JobStatus("import-1", "import", "words"))
        problem(await endpoint.http.get("/v1/jobs"), 503)
        reporter.finish("succeeded", {})
        assert [job["state"] for job in await listed(endpoint)] == ["succeeded"]
        JobReporter(endpoint.store, JobStatus("import-2", "import", "words", submitted=False))  # run by hand
        assert sorted(job["state"] for job in await listed(endpoint)) == ["running", "succeeded"]

    run_with_endpoint(scenario, tmp_path)


class StartsAtOnce(LocalJobs):
    """The job has written its status before its submission is answered."""

    def __init__(self, data: str) -> None:
        super().__init__()
        self._data = data

    def submit_job(self, job_id: str, entrypoint: str) -> None:
        super().submit_job(job_id, entrypoint)
        JobReporter(open_store(self._data), JobStatus(job_id, "compact", "words")).phase("compact")


def test_pending_status_does_not_replace_what_the_job_wrote(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        job_id = (await endpoint.http.post(JOBS, json={"kind": "compact"})).json()["job_id"]
        assert read_status(endpoint.store, job_id).state == "pending"
        endpoint.services.jobs._runner = StartsAtOnce(endpoint.data)
        job_id = (await endpoint.http.post(JOBS, json={"kind": "compact"})).json()["job_id"]
        assert (read_status(endpoint.store, job_id).state, read_status(endpoint.store, job_id).phase) == (
            "running",
            "compact",
        )

    run_with_endpoint(scenario, tmp_path)


def test_index_of_a_rebuild_is_passed_on_with_its_nulls(tmp_path: Path) -> None:
    """A null is another thing than a field that is left out: the policy decides, and not what was configured."""
    fields: dict[str, Any] = {"m": None, "target_recall": 0.9}

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        arguments = await submitted(endpoint, {"kind": "rebuild", "index": fields})
        assert json.loads(arguments["index"]) == fields

    run_with_endpoint(scenario, tmp_path)


def test_rebuild_is_checked_for_points_that_are_not_in_segments_yet(tmp_path: Path) -> None:
    config = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))
    lists = {"kind": "rebuild", "index": {"kind": "ivf_flat", "nlist": 2}}

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, random_points(config, 10))
        problem(await endpoint.http.post(JOBS, json=lists), 400, "index.nlist")
        points = [{"id": 10**6 + number, "vector": [number, 1, 2, 3]} for number in range(90)]
        written = await endpoint.http.post("/v1/collections/words/points:upsert", json={"points": points})
        assert written.status_code == 200, written.text
        await until(lambda: endpoint.eagleray.runtime.replica(ReplicaKey("words", 0, 0)).status().points == 100)
        described = endpoint.eagleray.supervisor
        await until(lambda: [one.points for one in described.describe("words")["statuses"].values()] == [100])
        await submitted(endpoint, lists)

    run_with_endpoint(scenario, tmp_path)
