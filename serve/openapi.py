"""openapi.json, made from the bodies that the routes decode. A committed copy is compared by the tests.

`python -m serve.openapi > serve/openapi.json` writes the copy.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import version
from typing import Any, get_args

import msgspec

from cluster.config import COLLECTION_NAME, ServedOn
from cluster.snapshots import NAME as SNAPSHOT_NAME
from jobs.report import JOB_ID
from serve.arrow_bodies import ARROW
from serve.job_bodies import JOB_BODIES, CollectGarbageBody, RollbackNowBody
from serve.problems import PROBLEM
from serve.schemas import CollectionBody
from serve.search_bodies import FetchBody, SearchBody, SearchOptions
from serve.write_bodies import DeleteBody, UpsertBody, WriteOptions

JSON = "application/json"
Json = dict[str, Any]


@cache
def openapi_json() -> bytes:
    """The document, with a stable order and layout."""
    return msgspec.json.format(msgspec.json.encode(openapi_document(), order="sorted"), indent=2) + b"\n"


def openapi_document() -> Json:
    """OpenAPI 3.1 of everything the endpoint serves."""
    bodies = (CollectionBody, SearchBody, FetchBody, UpsertBody, DeleteBody, *JOB_BODIES, RollbackNowBody)
    _, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    _describe_search(components["SearchBody"])
    components["RebuildBody"]["properties"]["index"] = {"$ref": "#/components/schemas/IndexBody"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Eagleray", "version": version("eagleray"), "description": "A sharded vector index."},
        "paths": _paths() | _job_paths(),
        "components": {"schemas": {**components, **_answers(), **_job_answers()}},
    }


def _describe_search(body: Json) -> None:
    """Exactly one of the two ways to give vectors."""
    body["oneOf"] = [
        {"required": ["vectors"], "properties": {"vectors": {"type": "array", "minItems": 1}, "vector": False}},
        {"required": ["vector"], "properties": {"vector": {"type": "array", "minItems": 1}, "vectors": False}},
    ]


def _paths() -> Json:
    collection = [_path_parameter("collection", COLLECTION_NAME.pattern)]
    one = "/v1/collections/{collection}"
    return {
        "/v1/collections": {"get": _operation("List collections", {200: _json("Collections")}, 503)},
        one: {
            "parameters": collection,
            "put": _operation(
                "Create a collection; the same config again is no change",
                {200: _json("Collection"), 201: _json("Collection")},
                400, 404, 408, 409, 413, 415, 503,
                body=_json_body("CollectionBody"),
            ),
            "get": _operation("Config, points, shards, replicas, indexes", {200: _json("Collection")}, 400, 404, 503),
            "delete": _operation("Delete a collection", {204: {"description": "Deleted"}}, 400, 404, 409, 503),
        },
        f"{one}/points:search": {"parameters": collection, "post": _search_operation()},
        f"{one}/points:fetch": {
            "parameters": collection,
            "post": _operation(
                "Points by id", {200: _json("Points")}, 400, 404, 408, 413, 415, 429, 503, body=_json_body("FetchBody")
            ),
        },
        f"{one}/points:upsert": {"parameters": collection, "post": _upsert_operation()},
        f"{one}/points:delete": {"parameters": collection, "post": _delete_operation()},
        "/healthz": {"get": _operation("Alive", {200: _json("Status")})},
        "/readyz": {"get": _operation("Every collection is served", {200: _json("Status")}, 503)},
        "/metrics": {
            "get": _operation("Prometheus text", {200: _content("text/plain", {"type": "string"})}, 503)
        },
        "/openapi.json": {"get": _operation("This document", {200: _content(JSON, {"type": "object"})})},
    }  # fmt: skip


def _job_paths() -> Json:
    """Jobs, and what is done with versions of a collection."""
    collection, job = (
        [_path_parameter("collection", COLLECTION_NAME.pattern)],
        _path_parameter("job_id", JOB_ID.pattern),
    )
    snapshot = _path_parameter("name", SNAPSHOT_NAME.pattern)
    one = "/v1/collections/{collection}"
    return {
        f"{one}/jobs": {
            "parameters": collection,
            "post": _operation(
                "Start a job", {202: _json("JobId")}, 400, 404, 408, 409, 413, 415, 503, body=_job_body(*JOB_BODIES)
            ),
        },
        f"{one}/snapshots": {
            "parameters": collection,
            "get": _operation("The named snapshots", {200: _json("Snapshots")}, 400, 404, 503),
        },
        f"{one}/snapshots/{{name}}": {
            "parameters": [*collection, snapshot],
            "delete": _operation("Delete a snapshot", {204: {"description": "Deleted"}}, 400, 404, 503),
        },
        f"{one}:rollback": {
            "parameters": collection,
            "post": _operation(
                "Serve an earlier generation again, with every write since; 409 says what else to do",
                {200: _json("RolledBack")},
                400, 404, 408, 409, 413, 415, 503,
                body=_json_body("RollbackNowBody"),
            ),
        },
        "/v1/jobs": {
            "get": _operation("The last jobs, newest first", {200: _json("Jobs")}, 503),
            "post": _operation(
                "Start a job on all collections",
                {202: _json("JobId")},
                400, 408, 413, 415, 503,
                body=_job_body(CollectGarbageBody),
            ),
        },
        "/v1/jobs/{job_id}": {
            "parameters": [job],
            "get": _operation("A job's state, plan, progress, report and log", {200: _json("Job")}, 400, 404, 503),
            "delete": _operation("Stop a job", {204: {"description": "Told to stop"}}, 400, 404, 503),
        },
    }  # fmt: skip


def _search_operation() -> Json:
    operation = _operation(
        "The nearest points of each query vector",
        {200: _json("SearchAnswer")},
        400, 404, 408, 413, 415, 429, 503,
        body=_json_body("SearchBody"),
    )  # fmt: skip
    operation["responses"]["200"]["content"][ARROW] = _stream()
    operation["requestBody"]["content"][ARROW] = _stream()
    operation["description"] = (
        f"With Content-Type {ARROW} the body is a record batch stream with the column `vector` "
        "(FixedSizeList of float32 or float16), one row per query, and the options are URL parameters: "
        f"{', '.join(msgspec.structs.asdict(SearchOptions()))}. With Accept {ARROW} the answer is a stream with "
        "the columns query, id, score and the attributes; coverage, generation and lsn are in its metadata, and "
        "degraded where the answer is."
    )
    return operation


def _upsert_operation() -> Json:
    operation = _write_operation("Insert points, or replace those with the same ids", "Upserted", "UpsertBody")
    operation["description"] = (
        f"With Content-Type {ARROW} the body is a record batch stream, uncompressed, with the columns `id`, `vector` "
        f"(FixedSizeList of float32 or float16) and one per attribute; {_write_parameters()}. Answered once the points "
        "are in object storage; a search with the answer's `lsn` as `min_lsn` sees them on any replica. An attribute "
        "that the collection does not have yet is declared, with the type of its values."
    )
    return operation


def _delete_operation() -> Json:
    operation = _write_operation("Delete points by id; ids that there are not do no harm", "Deleted", "DeleteBody")
    operation["description"] = (
        f"With Content-Type {ARROW} the body is a record batch stream with the one column `id`; {_write_parameters()}."
    )
    return operation


def _write_operation(summary: str, answer: str, body: str) -> Json:
    operation = _operation(summary, {200: _json(answer)}, 400, 404, 408, 409, 413, 415, 429, 503, body=_json_body(body))
    operation["requestBody"]["content"][ARROW] = _stream()
    return operation


def _write_parameters() -> str:
    return f"the options are URL parameters: {', '.join(msgspec.structs.asdict(WriteOptions()))}"


def _stream() -> Json:
    return {"schema": {"type": "string", "contentMediaType": ARROW}}


def _operation(summary: str, answers: dict[int, Json], *problems: int, body: Json | None = None) -> Json:
    problem = _content(PROBLEM, {"$ref": "#/components/schemas/Problem"})
    responses = {str(status): {"description": summary} | answer for status, answer in answers.items()}
    responses |= {str(status): {"description": "Problem"} | problem for status in (*problems, 500)}
    return {"summary": summary, "responses": responses} | ({"requestBody": body} if body else {})


def _path_parameter(name: str, pattern: str) -> Json:
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _content(media_type: str, schema: Json) -> Json:
    return {"content": {media_type: {"schema": schema}}}


def _json(name: str) -> Json:
    return _content(JSON, {"$ref": f"#/components/schemas/{name}"})


def _json_body(name: str) -> Json:
    return {"required": True} | _json(name)


def _job_body(*bodies: type[msgspec.Struct]) -> Json:
    """One of each kind."""
    kinds = {str(body.__struct_config__.tag): f"#/components/schemas/{body.__name__}" for body in bodies}
    discriminator = {"propertyName": "kind", "mapping": kinds}
    schema = {"oneOf": [{"$ref": place} for place in kinds.values()], "discriminator": discriminator}
    return {"required": True} | _content(JSON, schema)


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answers() -> Json:
    string, integer, number, boolean = ({"type": t} for t in ("string", "integer", "number", "boolean"))
    anything: Json = {"type": "object"}
    device = {"enum": list(get_args(ServedOn))}
    identifier = {"anyOf": [integer, string]}
    vector = {"type": "array", "items": number}
    hit = _object(id=identifier, score=number)
    hit["properties"] |= {"attributes": anything, "vector": vector}
    point = _object(id=identifier)
    point["properties"] |= {"attributes": anything, "vector": vector}
    coverage = _object(shards=number, points=number, missing=_list(integer))
    lsn = {"type": "object", "description": "LSN by shard number", "additionalProperties": integer}
    replica = _object(
        replica=integer, device=device, num_gpus=number, state=string, node=string, pid=integer, threads=integer,
        error=string, generations=_list(integer), lsn=integer, epoch=integer, upkeep=string, gpu=_or_null(_gpu()),
        degraded=string,
    )  # fmt: skip
    observed = _object(
        replica=integer, device=device, num_gpus=number, generation=integer, recall=number, low=number, high=number,
        queries=integer, k=integer, dropped=integer,
    )  # fmt: skip
    shard = _object(
        shard=integer, points=integer, lsn=integer, primary=_or_null(integer), tail_points=integer, tombstones=integer,
        upkeep=string, replicas=_list(replica), segments=_list(anything), observed=_list(observed),
    )  # fmt: skip
    searched = _object(results=_list(_list(hit)), coverage=coverage, generation=integer, lsn=lsn, took_ms=number)
    searched["properties"]["degraded"] = {
        "enum": ["cpu"], "description": "The CPU answered, in part at least, where a GPU should have; else absent"
    }  # fmt: skip
    problem = _object(type=string, title=string, status=integer, detail=string)
    problem["properties"] |= {"errors": _list(_object(field=string, message=string)), "coverage": coverage}
    problem["properties"] |= {
        "lsn": lsn | {"description": "Of a write: LSN by shard number, of the shards that acknowledged it"},
        "failed": _list(integer) | {"description": "Of a write: the shards that did not; some may have applied it"},
    }
    return {
        "Problem": problem,
        "Status": _object(status=string),
        "Points": _object(points=_list(point), missing=_list(identifier), lsn=lsn),
        "Upserted": _object(upserted=integer, lsn=lsn),
        "Deleted": _object(deleted=integer, lsn=lsn),
        "SearchAnswer": searched,
        "Collections": _object(collections=_list({"$ref": "#/components/schemas/Collection"})),
        "Collection": _object(
            name=string,
            config=anything,
            points=integer,
            version=integer,
            generation=integer,
            device=_or_null(device),
            num_gpus=_or_null(number),
            serving_generation=_or_null(integer),
            ready=boolean,
            reason=string,
            switching=string,
            rebuild_advised=_or_null(string),
            rebuild_reasons=_list(string),
            shards=_list(shard),
        ),
    }


def _gpu() -> Json:
    """A replica's GPU, and what its indexes take of it."""
    string, integer, number = ({"type": t} for t in ("string", "integer", "number"))
    return _object(
        name=string, total_bytes=_or_null(integer), free_bytes=_or_null(integer), used_bytes=integer, share=number,
        lost=string, index_predicted_bytes=integer, index_measured_bytes=_or_null(integer), out_of_memory=integer,
    )  # fmt: skip


def _job_answers() -> Json:
    string, integer, boolean, anything = ({"type": t} for t in ("string", "integer", "boolean", "object"))
    return {
        "JobId": _object(job_id=string),
        "Job": _job(submitted=boolean, report=anything, plan=anything, log=_list(string)),
        "Jobs": _object(jobs=_list(_job(message=string, updated_at=string))),
        "Snapshots": _object(snapshots=_list(_object(name=string, version=integer, created_at=string, points=integer))),
        "RolledBack": _object(generation=integer, version=integer, serving_generation=_or_null(integer)),
    }


def _job(**more: Json) -> Json:
    string, number = ({"type": t} for t in ("string", "number"))
    return _object(
        job_id=string,
        kind=string,
        collection=string,
        state={"enum": ["pending", "running", "succeeded", "failed", "stopped"]},
        phase=string,
        progress=number,
        rate=number,
        unit=string,
        remaining_s=_or_null(number),
        **more,
    )


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


if __name__ == "__main__":
    sys.stdout.buffer.write(openapi_json())
