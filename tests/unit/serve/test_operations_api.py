"""Rollback, snapshots and the jobs around them over the HTTP API; jobs run in this process as they are submitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import cluster.rollback
from actors.shard import ReplicaStatus
from cluster.config import CollectionConfig, IndexConfig
from cluster.manifest import Manifest, ShardEntry
from cluster.placement import ReplicaKey
from cluster.routing import Routing
from serve.descriptions import describe_collection
from tests.unit.actors.points import Points, brute_force, manifest_log, random_points, random_vectors
from tests.unit.serve.endpoint import Endpoint, Json, hit_ids, problem, run_with_endpoint
from tests.unit.serve.jobs_here import JobsHere

WORDS = "/v1/collections/words"
CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
OLD, NEW = random_points(CONFIG, 30, seed=1), random_points(CONFIG, 40, seed=2)
QUERIES = random_vectors(CONFIG, 3, seed=8)


async def published(endpoint: Endpoint) -> None:
    """Two generations."""
    await endpoint.publish("words", CONFIG, OLD)
    await endpoint.publish("words", CONFIG, NEW)


async def assert_served(endpoint: Endpoint, points: Points, collection: str = "words") -> None:
    answer = (await endpoint.search(collection, vectors=QUERIES.tolist())).json()
    assert hit_ids(answer) == brute_force(points, QUERIES, 10, "l2")


async def run_job(endpoint: Endpoint, **body: object) -> Json:
    """The last status of a job that runs at once."""
    response = await endpoint.http.post(f"{WORDS}/jobs", json=body)
    assert response.status_code == 202, response.text
    return dict((await endpoint.http.get(f"/v1/jobs/{response.json()['job_id']}")).json())


# --- rollback -------------------------------------------------------------------------------------------------------


def test_rollback_is_answered_when_the_earlier_generation_is_served(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await published(endpoint)
        await assert_served(endpoint, NEW)
        version = manifest_log(endpoint.store, "words").newest_live().version
        back = await endpoint.http.post(f"{WORDS}:rollback", json={})
        assert back.json() == {"generation": 3, "version": version + 1, "serving_generation": 3}
        await assert_served(endpoint, OLD)
        forward = await endpoint.http.post(f"{WORDS}:rollback", json={"generation": 2})
        assert forward.json()["serving_generation"] == 4
        await assert_served(endpoint, NEW)

    run_with_endpoint(scenario, tmp_path)


def test_rollback_to_what_is_not_kept_says_what_is(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, OLD)
        nothing = problem(await endpoint.http.post(f"{WORDS}:rollback", json={}), 404)
        assert nothing["detail"].endswith("no earlier one is kept")
        for _ in range(3):
            await endpoint.publish("words", CONFIG, NEW)
        version = next(v for v in manifest_log(endpoint.store, "words").versions() if generation(endpoint, v) == 2)
        endpoint.store.delete(f"collections/words/manifest/{version:020d}.json")
        told = problem(await endpoint.http.post(f"{WORDS}:rollback", json={"generation": 2}), 404)
        assert told["detail"].endswith("kept are generations 3, 1")
        problem(await endpoint.http.post(f"{WORDS}:rollback", json={"generation": 4}), 400, "generation")
        problem(await endpoint.http.post(f"{WORDS}:rollback", json={"to": 1}), 400, "to")
        problem(await endpoint.http.post("/v1/collections/nothing:rollback", json={}), 404)
        problem(await endpoint.http.post("/v1/collections/WORDS:rollback", json={}), 400, "collection")

    run_with_endpoint(scenario, tmp_path)


def generation(endpoint: Endpoint, version: int) -> int:
    return manifest_log(endpoint.store, "words").read(version).generation


def test_rollback_that_would_replay_too_much_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.rollback, "ROLLBACK_REPLAY_MAX", 0)

    async def scenario(endpoint: Endpoint) -> None:
        await published(endpoint)
        await upserted(endpoint)
        refused = problem(await endpoint.http.post(f"{WORDS}:rollback", json={}), 409)
        assert "job" in refused["detail"]
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        done = await run_job(endpoint, kind="rollback")
        assert (done["state"], done["report"]["back_to_generation"], done["report"]["served"]) == ("succeeded", 1, True)
        await assert_served(endpoint, with_upserted(OLD))

    run_with_endpoint(scenario, tmp_path)


async def upserted(endpoint: Endpoint) -> None:
    points = [{"id": 10**9, "vector": QUERIES[0].tolist(), "attributes": {"name": "new"}}]
    response = await endpoint.http.post(f"{WORDS}/points:upsert", json={"points": points, "timeout_ms": 20_000})
    assert response.status_code == 200, response.text


def with_upserted(points: Points) -> Points:
    """The points with the one of `upserted`."""
    ids = pa.concat_arrays([points.ids, pa.array([10**9], points.ids.type)])
    return Points(ids, np.concatenate([points.vectors, QUERIES[:1]]))


def test_action_of_a_collection_is_no_collection(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, OLD)
        for method in ("GET", "PUT", "DELETE"):
            refused = await endpoint.http.request(method, f"{WORDS}:rollback")
            problem(refused, 405)
            assert refused.headers["allow"] == "POST"
        problem(await endpoint.http.get(f"{WORDS}:fly"), 400, "collection")

    run_with_endpoint(scenario, tmp_path)


# --- snapshots ------------------------------------------------------------------------------------------------------


def test_snapshot_is_taken_listed_branched_restored_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        await endpoint.publish("words", CONFIG, OLD)
        await upserted(endpoint)
        taken = await run_job(endpoint, kind="snapshot", name="before")
        assert (taken["state"], taken["report"]["points"]) == ("succeeded", 31)
        (listed,) = (await endpoint.http.get(f"{WORDS}/snapshots")).json()["snapshots"]
        assert listed == {name: taken["report"][name] for name in ("name", "version", "created_at", "points")}
        await endpoint.publish("words", CONFIG, NEW)
        branched = await run_job(endpoint, kind="branch", into="others", snapshot="before")
        assert (branched["state"], branched["report"]["served"]) == ("succeeded", True)
        await assert_served(endpoint, with_upserted(OLD), "others")
        await assert_served(endpoint, with_upserted(NEW))
        restored = await run_job(endpoint, kind="restore", snapshot="before")
        assert (restored["state"], restored["report"]["served"]) == ("succeeded", True)
        await assert_served(endpoint, with_upserted(OLD))
        gone = await endpoint.http.delete(f"{WORDS}/snapshots/before")
        assert (gone.status_code, gone.content) == (204, b"")
        assert (await endpoint.http.get(f"{WORDS}/snapshots")).json() == {"snapshots": []}
        problem(await endpoint.http.delete(f"{WORDS}/snapshots/before"), 404)
        problem(await endpoint.http.delete(f"{WORDS}/snapshots/BEFORE"), 400, "name")
        problem(await endpoint.http.delete("/v1/collections/nothing/snapshots/before"), 404)
        problem(await endpoint.http.get("/v1/collections/nothing/snapshots"), 404)

    run_with_endpoint(scenario, tmp_path)


def test_snapshot_name_that_has_another_version_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        await endpoint.publish("words", CONFIG, OLD)
        assert (await run_job(endpoint, kind="snapshot", name="before"))["state"] == "succeeded"
        await endpoint.publish("words", CONFIG, NEW)
        failed = await run_job(endpoint, kind="snapshot", name="before")
        assert (failed["state"], failed["report"]["error"]) == ("failed", "Conflict")

    run_with_endpoint(scenario, tmp_path)


# --- rebuild --------------------------------------------------------------------------------------------------------


def test_rebuild_reshards_and_changes_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        await endpoint.publish("words", CONFIG, OLD)
        done = await run_job(endpoint, kind="rebuild", index={"kind": "hnsw", "m": 8}, shards=1)
        assert done["state"] == "succeeded", done
        assert (done["report"]["shards"], done["report"]["points"], done["report"]["gate"]["passed"]) == (1, 30, True)
        described = (await endpoint.http.get(WORDS)).json()
        assert (described["serving_generation"], described["switching"]) == (2, "")
        (shard,) = described["shards"]
        assert [segment["index_kind"] for segment in shard["segments"]] == ["hnsw"]
        assert (described["config"]["index"]["m"], described["config"]["shards"]) == (8, 1)
        await assert_served(endpoint, OLD)

    run_with_endpoint(scenario, tmp_path)


def test_description_says_what_a_switch_waits_for() -> None:
    manifest = Manifest(
        "words", 9, CONFIG, Routing(2), 5, (ShardEntry(0), ShardEntry(1)), created_at="", writer="", log_set=1
    )
    statuses = {
        ReplicaKey("words", 0, 0): ReplicaStatus("ready", generations=(4,), crossing={5: 1_200}),
        ReplicaKey("words", 1, 0): ReplicaStatus("ready", generations=(4,)),
        ReplicaKey("words", 2, 0): ReplicaStatus("ready", generations=(4,)),
    }
    facts = {"manifest": manifest, "serving_generation": 4, "statuses": statuses, "advice": (), "idle_upkeep": {}}
    told = describe_collection(facts, None)["switching"]
    assert told == "switching to generation 5: shard 0 1,200 records behind, shard 1 loads it"
    first, second = statuses.keys() - {ReplicaKey("words", 2, 0)}
    for state, error, words in (
        ("starting", "it asks for 1 GPU", "starts: it asks for 1 GPU"),
        ("failed", "Corrupt: x", "does not load it: Corrupt: x"),
        ("unreachable", "", "does not answer"),
        ("ready", "Exhausted: x", "loads it: Exhausted: x"),
    ):
        held = dict.fromkeys((first, second), ReplicaStatus("ready", generations=(5,)))
        held[ReplicaKey("words", 1, 0)] = ReplicaStatus(state, error=error)  # type: ignore[arg-type]
        told = describe_collection(facts | {"statuses": held}, None)["switching"]
        assert told == f"switching to generation 5: shard 1 {words}"
    assert describe_collection(facts | {"serving_generation": 5}, None)["switching"] == ""
    assert describe_collection(facts | {"serving_generation": None}, None)["switching"] == ""


# --- garbage and scrub ----------------------------------------------------------------------------------------------


def test_garbage_is_listed_and_a_scrub_finds_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        await published(endpoint)
        response = await endpoint.http.post("/v1/jobs", json={"kind": "collect_garbage", "grace_s": 0})
        listed = (await endpoint.http.get(f"/v1/jobs/{response.json()['job_id']}")).json()
        assert (listed["state"], listed["report"]["deleted"]) == ("succeeded", False)
        sound = await run_job(endpoint, kind="scrub", sample=10)
        assert (sound["state"], sound["report"]["sound"]) == ("succeeded", True)
        damage(endpoint)
        found = await run_job(endpoint, kind="scrub", sample=0)
        assert (found["state"], found["report"]["error"]) == ("failed", "Corrupt")
        assert found["report"]["findings"][0]["object"] in found["report"]["message"]

    run_with_endpoint(scenario, tmp_path, data=f"file://{tmp_path}/data")


def damage(endpoint: Endpoint) -> None:
    """One bit of the newest generation's first segment."""
    manifest = manifest_log(endpoint.store, "words").newest_live()
    key = f"collections/words/segments/{manifest.shards[0].segments[0].segment_id}/rows.arrow"
    data = bytearray(endpoint.store.get(key))
    data[len(data) // 2] ^= 1
    endpoint.store.put(key, bytes(data))


def test_job_that_is_run_again_after_it_was_stopped_does_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, OLD)
        first = (await endpoint.http.post(f"{WORDS}/jobs", json={"kind": "snapshot", "name": "before"})).json()
        await endpoint.http.delete(f"/v1/jobs/{first['job_id']}")
        assert (await endpoint.http.get(f"/v1/jobs/{first['job_id']}")).json()["state"] == "stopped"
        JobsHere.of(endpoint, tmp_path, monkeypatch)
        assert (await run_job(endpoint, kind="snapshot", name="before"))["state"] == "succeeded"

    run_with_endpoint(scenario, tmp_path)
