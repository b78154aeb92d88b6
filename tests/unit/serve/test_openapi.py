from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import schemathesis
from jsonschema import Draft202012Validator, ValidationError
from starlette.applications import Starlette
from starlette.routing import Route

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.placement import ReplicaKey
from cluster.snapshots import create_snapshot
from serve.arrow_bodies import ARROW
from serve.job_bodies import decode_job
from serve.openapi import openapi_document, openapi_json
from tests.unit.actors.points import manifest_log, random_points
from tests.unit.serve.endpoint import Endpoint, Json, arrow_stream, run_with_endpoint

ROOT = Path(__file__).resolve().parents[3]
COPY = ROOT / "serve" / "openapi.json"
DOCUMENT = openapi_document()
CONFIG = CollectionConfig(3, shards=2, index=IndexConfig(kind="flat"))


def test_committed_copy_is_current() -> None:
    assert COPY.read_bytes() == openapi_json(), "run: python -m serve.openapi > serve/openapi.json"


def test_module_writes_the_document() -> None:
    run = subprocess.run([sys.executable, "-m", "serve.openapi"], cwd=ROOT, capture_output=True, check=True)
    assert run.stdout == openapi_json()


def test_document_is_valid_openapi() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_wrong_document_is_not_valid_openapi() -> None:
    wrong = json.loads(openapi_json())
    wrong["paths"]["/healthz"]["get"]["responses"]["200"]["description"] = 7
    with pytest.raises(Exception, match="7 is not"):
        schemathesis.openapi.from_dict(wrong).validate()


def references_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        here = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return here.union(*(references_in(child) for child in value.values()))
    return set().union(*(references_in(child) for child in value)) if isinstance(value, list) else set()


def test_every_schema_is_valid_and_used_and_every_reference_resolves() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert references_in(DOCUMENT) == {f"#/components/schemas/{name}" for name in schemas}


def operations_of(app: Starlette) -> set[tuple[str, str]]:
    """(path, method) of every route; HEAD comes with GET and is not described."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes)
    return {(route.path_format, method) for route in routes for method in route.methods or () if method != "HEAD"}


def described_operations() -> set[tuple[str, str]]:
    return {(path, key.upper()) for path, item in DOCUMENT["paths"].items() for key in item if key != "parameters"}


def test_document_has_every_route_and_no_other(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert operations_of(endpoint.app.rest) == described_operations()

    run_with_endpoint(scenario, tmp_path)


def test_path_parameters_are_described(tmp_path: Path) -> None:
    for path, item in DOCUMENT["paths"].items():
        named = [parameter["name"] for parameter in item.get("parameters", [])]
        assert named == [part[1:].split("}")[0] for part in path.split("/") if part.startswith("{")]


def test_served_document_is_the_copy(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        response = await endpoint.http.get("/openapi.json")
        assert response.content == COPY.read_bytes()
        assert response.headers["content-type"] == "application/json"

    run_with_endpoint(scenario, tmp_path)


# ---- what the handlers answer is what the document says


def closed(schema: Any) -> Any:
    """The schema, refusing fields that an object schema does not name."""
    if isinstance(schema, list):
        return [closed(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    children = {key: closed(child) for key, child in schema.items()}
    return {"additionalProperties": False} | children if "properties" in schema else children


CLOSED = closed(DOCUMENT["components"]["schemas"])


def validate(value: Any, schema: Json) -> None:
    Draft202012Validator({**schema, "components": {"schemas": CLOSED}}).validate(value)


def test_undocumented_field_is_not_valid() -> None:
    schema = {"$ref": "#/components/schemas/Status"}
    validate({"status": "alive"}, schema)
    with pytest.raises(ValidationError):
        validate({"status": "alive", "colour": "red"}, schema)


JOB_BODIES: list[tuple[Json, bool]] = [
    ({"kind": "import", "source": "x.parquet"}, True),
    ({"kind": "import"}, False),
    ({"kind": "compact"}, True),
    ({"kind": "compact", "shard": 0, "memory_bytes": 1}, True),
    ({"kind": "compact", "shard": -1}, False),
    ({"kind": "compact", "source": "x.parquet"}, False),
    ({"kind": "rebuild"}, True),
    ({"kind": "rebuild", "index": {"kind": "hnsw", "m": None}, "shards": 3, "memory_bytes": 1, "seed": 0}, True),
    ({"kind": "rebuild", "shards": 0}, False),
    ({"kind": "rebuild", "target_recall": 0.9}, False),
    ({"kind": "rollback", "generation": 3}, True),
    ({"kind": "rollback", "generation": 0}, False),
    ({"kind": "snapshot", "name": "before"}, True),
    ({"kind": "snapshot"}, False),
    ({"kind": "snapshot", "name": "../x"}, False),
    ({"kind": "restore", "snapshot": "before"}, True),
    ({"kind": "restore"}, False),
    ({"kind": "branch", "into": "other", "snapshot": "before"}, True),
    ({"kind": "branch", "into": "OTHER"}, False),
    ({"kind": "export", "target": "s3://bucket/words"}, True),
    ({"kind": "export", "target": ""}, False),
    ({"kind": "collect_garbage", "delete": True, "grace_s": 3600.0}, True),
    ({"kind": "collect_garbage", "grace_s": -1}, False),
    ({"kind": "scrub", "sample": 0, "seed": 1}, True),
    ({"kind": "scrub", "sample": -1}, False),
    ({"kind": "reindex"}, False),
    ({"source": "x.parquet"}, False),
    ({}, False),
]


@pytest.mark.parametrize(("body", "valid"), JOB_BODIES)
def test_job_bodies_are_described_as_they_are_decoded(body: Json, valid: bool) -> None:
    schema = DOCUMENT["paths"][JOBS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if valid:
        validate(body, schema)
        decode_job(json.dumps(body).encode())
    else:
        with pytest.raises(ValidationError):
            validate(body, schema)
        with pytest.raises(Invalid):
            decode_job(json.dumps(body).encode())


class Conversation:
    """Requests by the path of the document; every answer must be one that the document describes."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.seen: set[tuple[str, str, int]] = set()

    async def ask(self, method: str, path: str, status: int, name: str = "words", **request: Any) -> Any:
        url = path.replace("{collection}", name).replace("{job_id}", name).replace("{name}", "before")
        response = await self._endpoint.http.request(method, url, **request)
        assert response.status_code == status, response.text
        self.seen.add((path, method, status))
        described = DOCUMENT["paths"][path][method.lower()]["responses"][str(status)]
        if "content" not in described:
            assert response.content == b""
            return None
        media_type = response.headers["content-type"].split(";")[0]
        schema = described["content"][media_type]["schema"]
        if media_type.endswith("json"):
            validate(response.json(), schema)
            return response.json()
        assert schema["type"] == "string"
        return response.content


COLLECTION = "/v1/collections/{collection}"
SEARCH, FETCH, UPSERT, DELETE, JOBS, JOB = (
    f"{COLLECTION}/points:search",
    f"{COLLECTION}/points:fetch",
    f"{COLLECTION}/points:upsert",
    f"{COLLECTION}/points:delete",
    f"{COLLECTION}/jobs",
    "/v1/jobs/{job_id}",
)
ROLLBACK, SNAPSHOTS, SNAPSHOT, ALL_JOBS = (
    f"{COLLECTION}:rollback",
    f"{COLLECTION}/snapshots",
    f"{COLLECTION}/snapshots/{{name}}",
    "/v1/jobs",
)


async def talk_of_collections(talk: Conversation) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/collections"):
        await talk.ask("GET", path, 200)
    await talk.ask("GET", COLLECTION, 200)
    await talk.ask("GET", COLLECTION, 400, "WORDS")
    await talk.ask("GET", COLLECTION, 404, "nothing")
    await talk.ask("PUT", COLLECTION, 200, json=CONFIG.to_dict())
    await talk.ask("PUT", COLLECTION, 201, "others", json={"dimension": 2, "id_type": "string"})
    await talk.ask("PUT", COLLECTION, 409, json={"dimension": 2})
    await talk.ask("PUT", COLLECTION, 400, json={"dimension": 0})
    await talk.ask("PUT", COLLECTION, 415, content=b"{}", headers={"Content-Type": "text/plain"})
    await talk.ask("DELETE", COLLECTION, 204, "others")
    await talk.ask("DELETE", COLLECTION, 404, "others")
    await talk.ask("DELETE", COLLECTION, 400, "WORDS")


async def talk_of_points(talk: Conversation, endpoint: Endpoint, ids: list[int]) -> None:
    one = {"vector": [1, 2, 3], "timeout_ms": 20_000, "with_attributes": ["name"], "with_vectors": True}
    answer = await talk.ask("POST", SEARCH, 200, json=one)
    assert len(answer["results"][0]) == 10
    arrow = arrow_stream(np.ones((2, 3), np.float32))
    await talk.ask("POST", SEARCH, 200, content=arrow, headers={"Content-Type": ARROW, "Accept": ARROW})
    await talk.ask("POST", SEARCH, 400, json={"vector": [1]})
    await talk.ask("POST", SEARCH, 404, "nothing", json=one)
    await talk.ask("POST", SEARCH, 413, content=b"", headers={"Content-Length": str(2**40)})
    await talk.ask("POST", SEARCH, 415, content=b"", headers={"Content-Type": "text/plain"})
    fetched = await talk.ask("POST", FETCH, 200, json={"ids": [*ids[:2], 10**12], "with_vectors": True})
    assert (len(fetched["points"]), len(fetched["missing"])) == (2, 1)
    await talk.ask("POST", FETCH, 400, json={"ids": []})
    await talk.ask("POST", FETCH, 404, "nothing", json={"ids": [1]})
    await talk_of_writes(talk, ids)
    endpoint.eagleray.runtime.kill(ReplicaKey("words", 0, 0))
    refused = await talk.ask("POST", SEARCH, 503, json=one)
    assert refused["coverage"]["missing"] == [0]
    await talk.ask("POST", SEARCH, 200, json=one | {"min_coverage": 0.5})
    await talk.ask("POST", FETCH, 503, json={"ids": ids})
    await talk.ask("GET", COLLECTION, 200)
    endpoint.eagleray.runtime.revive(ReplicaKey("words", 0, 0))


async def talk_of_writes(talk: Conversation, ids: list[int]) -> None:
    point = {"id": ids[0], "vector": [1, 2, 3], "attributes": {"name": "new", "rank": 1}}
    written = await talk.ask("POST", UPSERT, 200, json={"points": [point]})
    assert written["upserted"] == 1
    arrow = {"Content-Type": ARROW}
    await talk.ask("POST", UPSERT, 400, content=b"", headers=arrow)
    await talk.ask("POST", UPSERT, 400, json={"points": []})
    await talk.ask("POST", UPSERT, 404, "nothing", json={"points": [point]})
    await talk.ask("POST", UPSERT, 413, content=b"", headers={"Content-Length": str(2**40)})
    await talk.ask("POST", UPSERT, 415, content=b"", headers={"Content-Type": "text/plain"})
    answer = await talk.ask("POST", SEARCH, 200, json={"vector": [1, 2, 3], "k": 1, "min_lsn": written["lsn"]})
    assert answer["results"][0][0]["id"] == ids[0]
    assert (await talk.ask("POST", DELETE, 200, json={"ids": [ids[0], 10**12]}))["deleted"] == 1
    await talk.ask("POST", DELETE, 400, json={"ids": ["a"]})
    await talk.ask("POST", DELETE, 400, content=b"", headers=arrow)
    await talk.ask("POST", DELETE, 404, "nothing", json={"ids": [1]})
    await talk.ask("POST", DELETE, 413, content=b"", headers={"Content-Length": str(2**40)})
    await talk.ask("POST", DELETE, 415, content=b"", headers={"Content-Type": "text/plain"})


async def talk_of_jobs(talk: Conversation, endpoint: Endpoint, source: str) -> None:
    await talk.ask("POST", JOBS, 400, json={"kind": "import"})
    await talk.ask("POST", JOBS, 404, "nothing", json={"kind": "import", "source": source})
    body = {"kind": "import", "source": source, "attribute_columns": "all"}
    job_id = (await talk.ask("POST", JOBS, 202, json=body))["job_id"]
    await talk.ask("GET", JOB, 200, job_id)
    endpoint.jobs.logs[job_id] = ["a line"]
    await endpoint.run_import(job_id)
    assert (await talk.ask("GET", JOB, 200, job_id))["state"] == "succeeded"
    failing = await talk.ask("POST", JOBS, 202, json=body | {"source": f"{source}.not"})
    await endpoint.run_import(failing["job_id"])
    assert (await talk.ask("GET", JOB, 200, failing["job_id"]))["state"] == "failed"
    stopped = await talk.ask("POST", JOBS, 202, json=body)
    await talk.ask("DELETE", JOB, 204, stopped["job_id"])
    assert (await talk.ask("GET", JOB, 200, stopped["job_id"]))["state"] == "stopped"
    await talk.ask("POST", JOBS, 202, json={"kind": "compact", "shard": 1})
    await talk.ask("POST", JOBS, 400, json={"kind": "compact", "source": source})
    await talk.ask("POST", JOBS, 404, "nothing", json={"kind": "compact"})
    for method in ("GET", "DELETE"):
        await talk.ask(method, JOB, 404, "import-9")
        await talk.ask(method, JOB, 400, "a.b")


async def talk_of_versions(talk: Conversation, endpoint: Endpoint) -> None:
    assert len((await talk.ask("GET", ALL_JOBS, 200))["jobs"]) == 4
    await talk.ask("POST", ALL_JOBS, 202, json={"kind": "collect_garbage"})
    await talk.ask("POST", ALL_JOBS, 400, json={"kind": "compact"})
    await talk.ask("POST", JOBS, 202, json={"kind": "branch", "into": "more"})
    await talk.ask("POST", JOBS, 409, json={"kind": "branch", "into": "words"})
    await talk.ask("POST", JOBS, 404, json={"kind": "restore", "snapshot": "before"})
    manifest = manifest_log(endpoint.store, "words").newest_live()
    create_snapshot(endpoint.store, "before", manifest, datetime.now(UTC))
    assert len((await talk.ask("GET", SNAPSHOTS, 200))["snapshots"]) == 1
    await talk.ask("GET", SNAPSHOTS, 404, "nothing")
    await talk.ask("GET", SNAPSHOTS, 400, "WORDS")
    await talk.ask("DELETE", SNAPSHOT, 204)
    await talk.ask("DELETE", SNAPSHOT, 404)
    await talk.ask("DELETE", SNAPSHOT, 400, "WORDS")
    rolled_back = await talk.ask("POST", ROLLBACK, 200, json={})
    assert rolled_back["generation"] == rolled_back["serving_generation"] == manifest.generation + 1
    await talk.ask("POST", ROLLBACK, 400, json={"generation": 100})
    await talk.ask("POST", ROLLBACK, 404, "nothing", json={})
    await talk.ask("POST", ROLLBACK, 415, content=b"{}", headers={"Content-Type": "text/plain"})


def test_answers_are_as_described(tmp_path: Path) -> None:
    points = random_points(CONFIG, 30)
    rows = {"id": points.ids, "vector": vectors_array(points.vectors), "name": points.names}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, points)
        talk = Conversation(endpoint)
        await talk_of_collections(talk)
        await talk_of_points(talk, endpoint, points.ids.to_pylist())
        await talk_of_jobs(talk, endpoint, str(tmp_path / "rows.parquet"))
        await talk_of_versions(talk, endpoint)
        assert {(path, method) for path, method, status in talk.seen if status < 300} == described_operations()

    run_with_endpoint(scenario, tmp_path)


def test_answers_of_an_endpoint_that_is_starting_are_as_described(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        talk = Conversation(endpoint)
        await talk.ask("GET", "/healthz", 200)
        for path in ("/readyz", "/metrics", "/v1/collections"):
            await talk.ask("GET", path, 503)
        await talk.ask("POST", SEARCH, 503, json={"vector": [1]})
        await talk.ask("POST", FETCH, 503, json={"ids": [1]})

    run_with_endpoint(scenario, tmp_path, follow=False)
