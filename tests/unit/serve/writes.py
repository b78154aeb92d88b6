"""What the tests of upserts and deletes share: requests, and what the collection holds afterwards."""

from __future__ import annotations

from typing import Any

import httpx
import pyarrow as pa

from serve.arrow_bodies import ARROW
from tests.unit.serve.endpoint import Endpoint, Json, stream_of

WORDS = "/v1/collections/words"
PATIENT = {"timeout_ms": 20_000}


async def upsert(endpoint: Endpoint, *points: Json, **options: Any) -> httpx.Response:
    return await endpoint.http.post(f"{WORDS}/points:upsert", json={"points": list(points)} | PATIENT | options)


async def delete(endpoint: Endpoint, *ids: int | str, **options: Any) -> httpx.Response:
    return await endpoint.http.post(f"{WORDS}/points:delete", json={"ids": list(ids)} | PATIENT | options)


async def send_arrow(endpoint: Endpoint, verb: str, body: bytes, **parameters: Any) -> httpx.Response:
    headers = {"Content-Type": ARROW}
    return await endpoint.http.post(
        f"{WORDS}/points:{verb}", content=body, headers=headers, params=PATIENT | parameters
    )


def stream(**columns: Any) -> bytes:
    """A stream of one batch."""
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    return stream_of([batch], batch.schema)


def answer(response: httpx.Response) -> Json:
    assert response.status_code == 200, response.text
    return dict(response.json())


async def held(endpoint: Endpoint, written: Json, *ids: int | str) -> dict[int | str, Json]:
    """Points by id, as a fetch that includes a write gives them."""
    body = {"ids": list(ids), "with_vectors": True, "min_lsn": written["lsn"]}
    fetched = answer(await endpoint.http.post(f"{WORDS}/points:fetch", json=body))
    assert all(fetched["lsn"].get(shard, lsn) >= lsn for shard, lsn in written["lsn"].items())
    assert fetched["lsn"]
    return {point["id"]: point for point in fetched["points"]}
