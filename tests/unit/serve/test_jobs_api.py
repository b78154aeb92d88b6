from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Unavailable
from jobs.report import JobReporter, JobStatus
from tests.unit.actors.points import brute_force, keys, random_points, random_vectors
from tests.unit.serve.endpoint import Endpoint, Json, LocalJobs, hit_ids, memory_url, problem, run_with_endpoint

JOBS = "/v1/collections/words/jobs"
CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 50)
IMPORT = {"kind": "import", "source": "rows.parquet", "create": {}}


def write_points(path: Path) -> str:
    table = pa.table({"key": POINTS.ids, "embedding": vectors_array(POINTS.vectors), "name": POINTS.names})
    pq.write_table(table, path)
    return str(path)


async def submitted(endpoint: Endpoint, **body: Any) -> str:
    response = await endpoint.http.post(JOBS, json={"kind": "import"} | body)
    assert response.status_code == 202, response.text
    assert list(response.json()) == ["job_id"]
    return str(response.json()["job_id"])


async def job(endpoint: Endpoint, job_id: str) -> Json:
    response = await endpoint.http.get(f"/v1/jobs/{job_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_import_is_submitted_runs_and_is_served(tmp_path: Path) -> None:
    source = write_points(tmp_path / "rows 'quoted' $HOME.parquet")
    create = {"metric": "l2", "shards": 2, "index": {"kind": "flat"}}
    queries = random_vectors(CONFIG, 3, seed=8)

    async def scenario(endpoint: Endpoint) -> None:
        job_id = await submitted(
            endpoint,
            source=source,
            id_column="key",
            vector_column="embedding",
            attribute_columns=["name"],
            create=create,
            memory_bytes=2**40,
            seed=3,
        )
        waiting = await job(endpoint, job_id)
        assert (waiting["state"], waiting["kind"], waiting["progress"]) == ("pending", "import", 0.0)
        assert endpoint.jobs.arguments(job_id) == {
            "collection": "words",
            "source": source,
            "data": None,
            "id_column": "key",
            "vector_column": "embedding",
            "attribute_columns": "name",
            "create": json.dumps(create, separators=(",", ":")),
            "memory_bytes": 2**40,
            "seed": 3,
            "address": None,
            "namespace": "eagleray",
            "job_id": job_id,
        }
        endpoint.jobs.logs[job_id] = [f"line {number}" for number in range(80)]
        await endpoint.run_import(job_id)
        await endpoint.served("words")
        done = await job(endpoint, job_id)
        assert (done["state"], done["progress"], done["remaining_s"]) == ("succeeded", 1.0, 0.0)
        assert done["report"] == {"points": 50, "generation": 1}
        assert waiting["plan"] == {}
        assert (done["plan"]["index"]["kind"], done["plan"]["segments"]) == ("flat", 2)
        assert done["plan"]["predicted_bytes"] == 2 * 25 * 4 * 4
        assert [candidate["kind"] for candidate in done["plan"]["considered"]] == ["flat"]
        assert done["log"] == [f"line {number}" for number in range(30, 80)]
        answer = (await endpoint.search("words", vectors=queries.tolist(), with_attributes=["name"])).json()
        assert hit_ids(answer) == brute_force(POINTS, queries, 10, "l2")

    run_with_endpoint(scenario, tmp_path)


def test_import_into_an_existing_collection_replaces_its_points(tmp_path: Path) -> None:
    source = write_points(tmp_path / "rows.parquet")

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, random_points(CONFIG, 5, seed=77))
        job_id = await submitted(endpoint, source=source, id_column="key", vector_column="embedding")
        assert endpoint.jobs.arguments(job_id)["create"] == "{}"
        await endpoint.run_import(job_id)
        await endpoint.served("words", version=2)
        described = (await endpoint.http.get("/v1/collections/words")).json()
        assert (described["points"], described["generation"]) == (50, 2)

    run_with_endpoint(scenario, tmp_path)


def test_import_into_an_unknown_collection_needs_create(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        response = await endpoint.http.post(JOBS, json={"kind": "import", "source": "rows.parquet"})
        assert "create" in problem(response, 404)["detail"]
        assert endpoint.jobs.entrypoints == {}
        await submitted(endpoint, source="rows.parquet", create={})
        assert len(endpoint.jobs.entrypoints) == 1

    run_with_endpoint(scenario, tmp_path)


def test_failed_import_tells_why_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        job_id = await submitted(endpoint, source=str(tmp_path / "nowhere.parquet"), create={})
        await endpoint.run_import(job_id)
        status = await job(endpoint, job_id)
        assert status["state"] == "failed"
        assert status["report"]["error"] == "NotFound"
        assert "nowhere.parquet" in status["report"]["message"]
        problem(await endpoint.http.get("/v1/collections/words"), 404)
        assert keys(endpoint.store, "collections/") == []

    run_with_endpoint(scenario, tmp_path)


WRONG: list[tuple[str, Any]] = [
    ("source", {"source": None}),
    ("source", {"source": ""}),
    ("kind", {"kind": "reindex"}),
    ("kind", {"kind": None}),
    ("source", {"kind": "compact"}),
    ("mode", {"mode": "upsert"}),
    ("id_column", {"id_column": 3}),
    ("attribute_columns", {"attribute_columns": "some"}),
    ("attribute_columns[0]", {"attribute_columns": [1]}),
    ("attribute_columns[1]", {"attribute_columns": ["a", "b,c"]}),
    ("attribute_columns[0]", {"attribute_columns": [""]}),
    ("attribute_columns[0]", {"attribute_columns": ["all"]}),
    ("memory_bytes", {"memory_bytes": 0}),
    ("memory_bytes", {"memory_bytes": 2**63}),
    ("seed", {"seed": -1}),
    ("shards", {"shards": 2}),
    ("shard", {"shard": 2}),
    ("create", {"create": []}),
    ("create.colour", {"create": {"colour": "red"}}),
    ("create.metric", {"create": {"metric": "manhattan"}}),
    ("create.dimension", {"create": {"dimension": 0}}),
    ("create.index.nlist", {"create": {"index": {"nlist": 3}}}),
    ("create.index.device", {"create": {"index": {"device": "gpu"}}}),
    ("body", {"source": "a\0b"}),
    ("body", {"source": "a" * 40_000}),
    ("body", {"attribute_columns": ["a"] * 40_000}),
]


def test_wrong_import_names_the_field_and_submits_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for field, change in WRONG:
            problem(await endpoint.http.post(JOBS, json=IMPORT | change), 400, field)
        problem(await endpoint.http.post(JOBS, json={"kind": "import"}), 400, "source")
        problem(await endpoint.http.post(JOBS, json={"source": "rows.parquet"}), 400, "kind")
        problem(await endpoint.http.post(JOBS, json=[]), 400, "body")
        assert endpoint.jobs.entrypoints == {}

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("source", ["--collection=others", "; rm -rf /", "$(id)", "a b\nc", "'", '"', "ä😀"])
def test_source_reaches_the_job_as_it_is(source: str, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        arguments = endpoint.jobs.arguments(await submitted(endpoint, source=source, create={}))
        assert (arguments["source"], arguments["collection"]) == (source, "words")

    run_with_endpoint(scenario, tmp_path)


def test_jobs_have_names_of_their_own(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert len({await submitted(endpoint, source="x", create={}) for _ in range(5)}) == 5

    run_with_endpoint(scenario, tmp_path)


RUNNING = JobStatus("import-1", "import", "words", phase="build", progress=0.5)
STATES: list[tuple[str | None, str]] = [
    ("PENDING", "running"),
    ("RUNNING", "running"),
    ("FAILED", "failed"),
    ("STOPPED", "stopped"),
    ("SUCCEEDED", "succeeded"),  # its end could not be written
    (None, "failed"),
]


@pytest.mark.parametrize(("ray_state", "told"), STATES)
def test_job_that_wrote_no_end_is_as_ray_says(ray_state: str | None, told: str, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        JobReporter(endpoint.store, RUNNING)
        endpoint.jobs.logs["import-1"] = ["Killed"]
        if ray_state is not None:
            endpoint.jobs.states["import-1"] = ray_state
        status = await job(endpoint, "import-1")
        progress = 1.0 if told == "succeeded" else 0.5
        assert (status["state"], status["phase"], status["progress"]) == (told, "build", progress)
        assert status["log"] == (["Killed"] if ray_state in ("SUCCEEDED", "FAILED", "STOPPED") else [])
        assert status["report"].get("error") == ("Crashed" if told == "failed" else None)

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("ray_state", ["RUNNING", "SUCCEEDED", "FAILED", None])
@pytest.mark.parametrize("end", ["succeeded", "failed"])
def test_job_that_wrote_its_end_is_believed(end: str, ray_state: str | None, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        reporter = JobReporter(endpoint.store, RUNNING)
        reporter.finish(end, {"error": "Invalid", "message": "row 3"})
        if ray_state is not None:
            endpoint.jobs.states["import-1"] = ray_state
        assert await job(endpoint, "import-1") == asdict(reporter.status) | {"log": []}

    run_with_endpoint(scenario, tmp_path)


def test_job_that_wrote_nothing_is_pending_until_ray_says_otherwise(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        job_id = await submitted(endpoint, source="x", create={})
        for ray_state, told in (("PENDING", "pending"), ("RUNNING", "pending"), ("FAILED", "failed")):
            endpoint.jobs.states[job_id] = ray_state
            assert (await job(endpoint, job_id))["state"] == told

    run_with_endpoint(scenario, tmp_path)


class AwayJobs(LocalJobs):
    """A job server that does not answer."""

    def job_state(self, job_id: str) -> str | None:
        raise Unavailable("away")

    def job_log_tail(self, job_id: str, lines: int) -> list[str]:
        raise Unavailable("away")

    def stop_job(self, job_id: str) -> bool:
        raise Unavailable("away")


def test_job_of_a_server_that_is_away_is_unavailable_unless_it_wrote_its_end(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.services.jobs._runner = AwayJobs()
        problem(await endpoint.http.get("/v1/jobs/import-1"), 503)
        reporter = JobReporter(endpoint.store, RUNNING)
        problem(await endpoint.http.get("/v1/jobs/import-1"), 503)
        problem(await endpoint.http.delete("/v1/jobs/import-1"), 503)
        reporter.finish("succeeded", {"points": 3})
        assert await job(endpoint, "import-1") == asdict(reporter.status) | {"log": []}

    run_with_endpoint(scenario, tmp_path)


def test_job_that_ended_is_told_though_its_log_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        JobReporter(endpoint.store, RUNNING)
        endpoint.jobs.states["import-1"] = "FAILED"
        endpoint.services.jobs._runner.job_log_tail = AwayJobs().job_log_tail  # type: ignore[method-assign]
        status = await job(endpoint, "import-1")
        assert (status["state"], status["log"]) == ("failed", [])
        assert "the log of job import-1 cannot be read" in caplog.text

    run_with_endpoint(scenario, tmp_path)


def test_job_is_stopped(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        job_id = await submitted(endpoint, source="x", create={})
        response = await endpoint.http.delete(f"/v1/jobs/{job_id}")
        assert (response.status_code, response.content) == (204, b"")
        assert (await job(endpoint, job_id))["state"] == "stopped"

    run_with_endpoint(scenario, tmp_path)


def test_unknown_job_is_not_found(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        problem(await endpoint.http.get("/v1/jobs/import-9"), 404)
        problem(await endpoint.http.delete("/v1/jobs/import-9"), 404)

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize(
    ("job_id", "status"),
    [
        ("%2e%2e", 400),
        ("%2e", 400),
        ("a%0a", 400),
        ("a%00b", 400),
        ("a.b", 400),
        ("ä", 400),
        ("a" * 129, 400),
        ("a%5c..%5cb", 400),
        ("..%2fcollections%2fwords", 404),
        ("a%2f..%2f..%2fcollections", 404),
        ("%252e%252e%252fx", 400),
    ],
)
def test_job_id_that_could_leave_its_folder_is_refused(job_id: str, status: int, tmp_path: Path) -> None:
    data = memory_url()

    async def scenario(endpoint: Endpoint) -> None:
        endpoint.store.put("jobs/status.json", b"secret")
        endpoint.store.put("status.json", b"secret")
        for method in ("GET", "DELETE"):
            response = await endpoint.http.request(method, f"/v1/jobs/{job_id}")
            problem(response, status, *(["job_id"] if status == 400 else []))
            assert "secret" not in response.text

    run_with_endpoint(scenario, tmp_path, data=data)


def test_damaged_job_status_is_an_error_of_the_server_that_names_it(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for damage in (b"{", b"[]", b'{"job_id": "x", "colour": 1}', b"\xff"):
            endpoint.store.put(paths.job_status("import-1"), damage)
            assert paths.job_status("import-1") in problem(await endpoint.http.get("/v1/jobs/import-1"), 500)["detail"]

    run_with_endpoint(scenario, tmp_path)
