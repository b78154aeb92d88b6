"""Requests made up from openapi.json, right and wrong ones, against an endpoint that serves a collection.

The seed is fixed, and so is the number of examples. Collections and jobs that paths name mostly exist.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from actors.faiss_index import use_threads
from cluster.arrow_rows import vectors_array
from cluster.config import COLLECTION_NAME, CollectionConfig, IndexConfig
from cluster.snapshots import NAME as SNAPSHOT_NAME
from cluster.snapshots import create_snapshot
from jobs.report import JOB_ID, JobReporter, JobStatus
from serve.arrow_bodies import ARROW
from serve.openapi import openapi_document
from tests.unit.actors.points import manifest_log, random_points
from tests.unit.serve.endpoint import Endpoint, arrow_stream, memory_url, running_endpoint, stream_of

SEED = 20_240_601
EXAMPLES = 60  # per operation, beside the schema's own edge cases
FEW_EXAMPLES = 15  # of those whose bodies and answers are small
DIMENSION = 1  # so that made-up vectors often fit
COLLECTIONS = ("words", "names")
SCRATCH = tuple(f"scratch-{number}" for number in range(12))
JOB = "import-1"
SNAPSHOTS = tuple(f"snapshot-{number}" for number in range(12))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
    allow_header_conformance,
]
CONFIG = schemathesis.Config.from_dict(
    {
        "seed": SEED,
        "generation": {"max-examples": EXAMPLES, "database": "none"},
        "operations": [
            {"include-path-regex": "(snapshots|rollback|/v1/jobs)", "generation": {"max-examples": FEW_EXAMPLES}}
        ],
        # A search may be given a timeout of a nanosecond.
        "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503"]}},
    }
)


def streams() -> list[bytes]:
    """Arrow streams, whole and damaged."""
    whole = arrow_stream(np.ones((2, DIMENSION), np.float32), np.full((1, DIMENSION), 3, np.float32))
    chance = random.Random(SEED)
    cut = [whole[: chance.randrange(len(whole))] for _ in range(10)]
    damaged = []
    for _ in range(30):
        copy = bytearray(whole)
        copy[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
        damaged.append(bytes(copy))
    wrong = [arrow_stream(np.full((1, DIMENSION), np.nan, np.float32)), arrow_stream(np.ones((1, 9), np.float16))]
    return [whole, *cut, *damaged, *wrong, *written()]


def written() -> list[bytes]:
    """Streams of upserts and deletes, for ids of both types."""
    vectors = vectors_array(np.ones((2, DIMENSION), np.float32))
    batches = []
    for ids in (pa.array([1, 2]), pa.array(["a", "b"])):
        batches += [
            pa.record_batch([ids], names=["id"]),
            pa.record_batch([ids, vectors], names=["id", "vector"]),
            pa.record_batch([ids, vectors, pa.array(["x", None])], names=["id", "vector", "name"]),
            pa.record_batch([ids, vectors, pa.array([1.5, None])], names=["id", "vector", "rate"]),
        ]
    return [stream_of([batch], batch.schema) for batch in batches]


schemathesis.openapi.media_type(ARROW, st.sampled_from(streams()) | st.binary())
SCHEMA = schemathesis.openapi.from_dict(openapi_document(), config=CONFIG)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class FuzzedApp:
    """An ASGI application whose lifespan is a whole Eagleray with points and a job, for schemathesis to call."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._endpoint: Endpoint
        self.answers: Counter[tuple[str, int]] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._endpoint.app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        use_threads(1)
        async with running_endpoint(memory_url(), self._cache_dir) as self._endpoint:
            await self._fill(self._endpoint)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _fill(self, endpoint: Endpoint) -> None:
        for name, id_type in zip(COLLECTIONS, ("int64", "string"), strict=True):
            config = CollectionConfig(DIMENSION, "l2", id_type, shards=2, index=IndexConfig("hnsw"))  # type: ignore[arg-type]
            await endpoint.publish(name, config, random_points(config, 40))
            await endpoint.publish(name, config, random_points(config, 40))  # to roll back from
            manifest = manifest_log(endpoint.store, name).newest_live()
            for snapshot in SNAPSHOTS:
                create_snapshot(endpoint.store, snapshot, manifest, datetime.now(UTC))
        for name in SCRATCH[::2]:
            await endpoint.create(name, dimension=DIMENSION)
        await asyncio.to_thread(JobReporter, endpoint.store, JobStatus(JOB, "import", COLLECTIONS[0]))
        endpoint.jobs.states[JOB] = "RUNNING"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzedApp]:
    yield FuzzedApp(tmp_path_factory.mktemp("fuzz"))
    shutdown_lifespans()


def aim(case: Any) -> None:
    """Let most requests hit what exists; keep the number of replicas and the prepared collections as they are."""
    dice = crc32(repr((case.path_parameters, case.body)).encode())
    name = case.path_parameters.get("collection")
    if case.method in ("PUT", "DELETE") and name is not None and case.path.endswith("{collection}"):
        if not isinstance(name, str) or COLLECTION_NAME.fullmatch(name):
            case.path_parameters["collection"] = SCRATCH[dice % len(SCRATCH)]
    elif name is not None and dice % 8:
        case.path_parameters["collection"] = COLLECTIONS[dice % len(COLLECTIONS)]
    job_id = case.path_parameters.get("job_id")
    if isinstance(job_id, str) and JOB_ID.fullmatch(job_id) and dice % 4:
        case.path_parameters["job_id"] = JOB
    snapshot = case.path_parameters.get("name")
    if isinstance(snapshot, str) and SNAPSHOT_NAME.fullmatch(snapshot) and dice % 4:
        case.path_parameters["name"] = SNAPSHOTS[dice // 4 % len(SNAPSHOTS)]
    if isinstance(case.body, dict):
        case.body.update(fitted(case.body, dice))
    if case.path.endswith(":search") and dice % 3 == 0:
        case.headers["Accept"] = ARROW


def fitted(body: dict[str, Any], dice: int) -> dict[str, Any]:
    """The body's fields that must change: few shards and replicas, and vectors that mostly have the dimension."""
    fields: dict[str, Any] = {
        name: 1 + body[name] % 2 for name in ("shards", "replicas") if type(body.get(name)) is int and body[name] > 2
    }
    if dice % 4:
        if isinstance(body.get("vector"), list):
            fields["vector"] = body["vector"][:DIMENSION]
        if isinstance(body.get("vectors"), list):
            fields["vectors"] = [v[:DIMENSION] if isinstance(v, list) else v for v in body["vectors"]]
        if isinstance(body.get("points"), list):
            fields["points"] = [p | fitted(p, dice) if isinstance(p, dict) else p for p in body["points"]]
    return fields


@SCHEMA.parametrize()
def test_made_up_requests_are_answered_as_described(case: Any, app: FuzzedApp) -> None:
    aim(case)
    response = case.call(app=app)
    app.answers[case.operation.label, response.status_code] += 1
    case.validate_response(response, checks=CHECKS)


def test_made_up_requests_succeed_and_fail_on_every_operation(app: FuzzedApp) -> None:
    """Looks back at the operations that ran in this module: requests that all fail early would test little."""
    labels = {label for label, _ in app.answers}
    succeeded = {label for label, status in app.answers if 200 <= status < 300}
    refused = {label for label, status in app.answers if status == 400}
    assert labels - succeeded == set()
    assert {label for label in labels if label.startswith(("POST", "PUT"))} <= refused


def test_answer_that_is_not_described_is_found() -> None:
    """The checks can fail: here every answer is an error of the server, as text."""

    async def broken(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 502, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Bad Gateway"})

    case = SCHEMA["/healthz"]["GET"].Case()
    with pytest.raises(FailureGroup) as failures:
        case.validate_response(case.call(app=broken), checks=CHECKS)
    assert len(failures.value.exceptions) >= 2
