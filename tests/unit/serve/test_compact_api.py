"""Compactions over the HTTP API."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import CollectionConfig, IndexConfig
from jobs.importer import DEFAULT_MEMORY_BYTES
from tests.unit.actors.points import brute_force, random_points, random_vectors
from tests.unit.serve.compactions import CompactJobs
from tests.unit.serve.endpoint import Endpoint, Json, hit_ids, problem, run_with_endpoint

JOBS = "/v1/collections/words/jobs"
CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 50)


async def submitted(endpoint: Endpoint, **options: Any) -> str:
    response = await endpoint.http.post(JOBS, json={"kind": "compact"} | options)
    assert response.status_code == 202, response.text
    return str(response.json()["job_id"])


async def job(endpoint: Endpoint, job_id: str) -> Json:
    response = await endpoint.http.get(f"/v1/jobs/{job_id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_compaction_is_submitted_runs_and_is_served(tmp_path: Path) -> None:
    queries = random_vectors(CONFIG, 3, seed=8)
    gone = POINTS.ids.to_pylist()[:9]
    left = POINTS.take(np.arange(9, len(POINTS)))

    async def scenario(endpoint: Endpoint) -> None:
        jobs = CompactJobs.of(endpoint, tmp_path)
        await endpoint.publish("words", CONFIG, POINTS)
        deleted = await endpoint.http.post("/v1/collections/words/points:delete", json={"ids": gone})
        assert deleted.json()["deleted"] == 9
        job_id = await submitted(endpoint, memory_bytes=2**40)
        waiting = await job(endpoint, job_id)
        assert (waiting["state"], waiting["kind"], waiting["progress"]) == ("pending", "compact", 0.0)
        assert jobs.arguments(job_id) == {
            "collection": "words",
            "shard": None,
            "data": None,
            "memory_bytes": 2**40,
            "address": None,
            "namespace": "eagleray",
            "job_id": job_id,
        }
        await asyncio.to_thread(jobs.compact, job_id)
        done = await job(endpoint, job_id)
        assert (done["state"], done["progress"], done["remaining_s"]) == ("succeeded", 1.0, 0.0)
        assert (done["report"]["points"], done["report"]["tombstones_dropped"]) == (41, 9)
        await endpoint.eagleray.directory.refresh("words")
        await endpoint.served("words", done["report"]["version"])
        described = (await endpoint.http.get("/v1/collections/words")).json()
        assert (described["points"], described["generation"], described["version"]) == (
            41,
            1,
            done["report"]["version"],
        )
        assert [len(shard["segments"]) for shard in described["shards"]] == [1, 1]
        answer = (await endpoint.search("words", vectors=queries.tolist())).json()
        assert hit_ids(answer) == brute_force(left, queries, 10, "l2")

    run_with_endpoint(scenario, tmp_path)


def test_compaction_of_one_shard_names_it(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        jobs = CompactJobs.of(endpoint, tmp_path)
        await endpoint.publish("words", CONFIG, POINTS)
        arguments = jobs.arguments(await submitted(endpoint, shard=0))
        assert (arguments["shard"], arguments["memory_bytes"]) == (0, DEFAULT_MEMORY_BYTES)

    run_with_endpoint(scenario, tmp_path)


WRONG_COMPACTIONS: list[tuple[str, Any]] = [
    ("shard", {"shard": -1}),
    ("shard", {"shard": 2}),
    ("shard", {"shard": 1024}),
    ("shard", {"shard": "0"}),
    ("shard", {"shard": True}),
    ("memory_bytes", {"memory_bytes": 0}),
    ("memory_bytes", {"memory_bytes": 2**63}),
    ("memory_bytes", {"memory_bytes": "4 GiB"}),
    ("source", {"source": "rows.parquet"}),
    ("shards", {"shards": [0]}),
    ("kind", {"kind": "Compact"}),
    ("kind", {"kind": 3}),
]


def test_wrong_compaction_names_the_field_and_submits_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, POINTS)
        for field, change in WRONG_COMPACTIONS:
            problem(await endpoint.http.post(JOBS, json={"kind": "compact"} | change), 400, field)
        problem(await endpoint.http.post("/v1/collections/WORDS/jobs", json={"kind": "compact"}), 400, "collection")
        problem(await endpoint.http.post("/v1/collections/others/jobs", json={"kind": "compact"}), 404)
        assert endpoint.jobs.entrypoints == {}

    run_with_endpoint(scenario, tmp_path)
