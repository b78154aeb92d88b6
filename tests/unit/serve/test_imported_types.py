"""Attributes whose type an import changes: shards with and without imported points agree on it, writes follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.arrow_rows import vectors_array
from tests.unit.serve.endpoint import Endpoint, Json, problem, run_with_endpoint
from tests.unit.serve.writes import WORDS, answer, upsert

L2 = {"dimension": 2, "metric": "l2"}


async def import_one(endpoint: Endpoint, folder: Path, column: Any) -> Json:
    """Import a single point, 1, with the attribute x; its job's status."""
    path = folder / "points.parquet"
    vectors = vectors_array(np.ones((1, 2), np.float32))
    pq.write_table(pa.table({"id": pa.array([1]), "vector": vectors, "x": column}), path)
    body = {"kind": "import", "source": f"file://{path}", "attribute_columns": ["x"]}
    job_id = (await endpoint.http.post(f"{WORDS}/jobs", json=body)).json()["job_id"]
    status = await endpoint.run_import(job_id)
    return {"state": status.state, "report": status.report}


async def written(endpoint: Endpoint, first_id: int, value: Any) -> list[int]:
    """Upsert six points, some on either shard."""
    ids = list(range(first_id, first_id + 6))
    answer(await upsert(endpoint, *({"id": n, "vector": [1.0, 2.0], "attributes": {"x": value}} for n in ids)))
    return ids


async def values(endpoint: Endpoint, *ids: int) -> dict[int, Any]:
    """x by id, as a fetch has it and as a search has it."""
    fetched = answer(await endpoint.http.post(f"{WORDS}/points:fetch", json={"ids": list(ids)}))["points"]
    (hits,) = answer(await endpoint.search("words", vector=[1, 2], k=50, with_attributes=["x"]))["results"]
    found = {hit["id"]: hit["attributes"]["x"] for hit in hits}
    assert found == {point["id"]: point["attributes"]["x"] for point in fetched}
    return found


def test_type_that_an_import_changed_holds_for_a_shard_without_imported_points(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, shards=2)
        await written(endpoint, 10, 7)
        assert (await import_one(endpoint, tmp_path, ["abc"]))["state"] == "succeeded"
        await endpoint.served("words", 3)
        assert endpoint.services.log("words").newest_live().attributes == {"x": "large_string"}
        problem(
            await upsert(endpoint, {"id": 9, "vector": [1, 2], "attributes": {"x": 7}}), 400, "points[0].attributes.x"
        )
        ids = await written(endpoint, 20, "new")
        assert await values(endpoint, 1, *ids) == {1: "abc"} | dict.fromkeys(ids, "new")

    run_with_endpoint(scenario, tmp_path)


def test_import_cannot_give_a_written_attribute_a_type_that_writes_cannot_have(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, shards=2)
        ids = await written(endpoint, 10, 7)
        status = await import_one(endpoint, tmp_path, [[1, 2]])
        assert status["state"] == "failed"
        assert "attribute 'x' was written as int64; an import cannot make it list<" in status["report"]["message"]
        assert await values(endpoint, *ids) == dict.fromkeys(ids, 7)

    run_with_endpoint(scenario, tmp_path)
