from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import paths
from cluster.config import DIMENSION_MAX, REPLICAS_MAX, SHARDS_MAX, CollectionConfig, IndexConfig
from tests.unit.actors.points import commit, keys, random_points
from tests.unit.serve.endpoint import Endpoint, hit_ids, problem, run_with_endpoint

FULL = {
    "dimension": 4,
    "metric": "l2",
    "id_type": "string",
    "shards": 2,
    "replicas": 2,
    "vector_dtype": "float16",
    "index": {"kind": "hnsw", "target_recall": 0.9, "device": "cpu", "memory_bytes": 1_000_000},
}


def facts(collection: dict[str, Any]) -> dict[str, Any]:
    """What only a commit changes; its shards go on meanwhile, such as to a primary."""
    return {name: value for name, value in collection.items() if name != "shards"}


def test_create_answers_the_collection_as_it_is_served(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        created = await endpoint.create("words", **FULL)
        assert created["config"] == FULL
        assert (created["name"], created["points"], created["generation"]) == ("words", 0, 1)
        assert (created["ready"], created["reason"], created["serving_generation"]) == (True, "", 1)
        assert [shard["shard"] for shard in created["shards"]] == [0, 1]
        for shard in created["shards"]:
            assert [(r["replica"], r["state"]) for r in shard["replicas"]] == [(0, "ready"), (1, "ready")]
        assert facts((await endpoint.http.get("/v1/collections/words")).json()) == facts(created)
        (listed,) = (await endpoint.http.get("/v1/collections")).json()["collections"]
        assert facts(listed) == facts(created)

    run_with_endpoint(scenario, tmp_path)


def test_create_fills_in_defaults(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        created = await endpoint.create("words", dimension=3)
        assert created["config"] == CollectionConfig(3).to_dict()

    run_with_endpoint(scenario, tmp_path)


KINDS: list[dict[str, Any]] = [
    {"kind": "auto", "build_seconds": 60.0, "churn": 0.5},
    {"kind": "flat", "target_recall": 1.0},
    {"kind": "hnsw", "m": 16, "ef_construction": 50, "codes": "float32"},
    {"kind": "ivf_flat", "nlist": 8, "codes": "float16"},
    {"kind": "ivf_sq8", "nlist": 8, "rerank_store": "rows"},
    {"kind": "ivf_pq", "pq_m": 2, "pq_bits": 8, "rerank_store": "float32"},
    {"kind": "ivf_rabitq", "rerank_store": "sq8"},
    {"kind": "factory", "factory": "HNSW16,SQ8"},
]


@pytest.mark.parametrize("index", KINDS, ids=lambda index: index["kind"])
def test_create_takes_every_kind_with_its_options_and_the_same_again(index: dict[str, Any], tmp_path: Path) -> None:
    nulls = {"m": None, "nlist": None, "factory": None, "codes": None}

    async def scenario(endpoint: Endpoint) -> None:
        created = await endpoint.create("words", dimension=4, index=index)
        told = created["config"]["index"]
        assert told == {"target_recall": 0.95, "device": "auto", "memory_bytes": None} | index
        for same in (index, told, nulls | index):
            again = await endpoint.http.put("/v1/collections/words", json={"dimension": 4, "index": same})
            assert (again.status_code, facts(again.json())) == (200, facts(created))
        other = {"dimension": 4, "index": index | {"target_recall": 0.5}}
        problem(await endpoint.http.put("/v1/collections/words", json=other), 409)

    run_with_endpoint(scenario, tmp_path)


def test_create_again_is_no_change_and_another_config_a_conflict(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        created = await endpoint.create("words", **FULL)
        again = await endpoint.http.put("/v1/collections/words", json=FULL)
        assert (again.status_code, facts(again.json())) == (200, facts(created))
        for change in ({"metric": "ip"}, {"shards": 1}, {"index": {"kind": "flat"}}):
            response = await endpoint.http.put("/v1/collections/words", json=FULL | change)
            assert "words" in problem(response, 409)["detail"]
        assert facts((await endpoint.http.get("/v1/collections/words")).json()) == facts(created)

    run_with_endpoint(scenario, tmp_path)


WRONG_CONFIGS: list[tuple[str, Any]] = [
    ("dimension", {}),
    ("dimension", {"dimension": 0}),
    ("dimension", {"dimension": -1}),
    ("dimension", {"dimension": DIMENSION_MAX + 1}),
    ("dimension", {"dimension": 10**30}),
    ("dimension", {"dimension": 3.5}),
    ("dimension", {"dimension": True}),
    ("dimension", {"dimension": "3"}),
    ("dimension", {"dimension": None}),
    ("metric", {"metric": "manhattan"}),
    ("metric", {"metric": None}),
    ("id_type", {"id_type": "uuid"}),
    ("shards", {"shards": 0}),
    ("shards", {"shards": SHARDS_MAX + 1}),
    ("replicas", {"replicas": 0}),
    ("replicas", {"replicas": REPLICAS_MAX + 1}),
    ("vector_dtype", {"vector_dtype": "int8"}),
    ("index", {"index": []}),
    ("index.kind", {"index": {"kind": "pq"}}),
    ("index.target_recall", {"index": {"target_recall": 0}}),
    ("index.target_recall", {"index": {"target_recall": 1.01}}),
    ("index.device", {"index": {"device": "tpu"}}),
    ("index.device", {"index": {"device": "gpu"}}),
    ("index.memory_bytes", {"index": {"memory_bytes": 0}}),
    ("index.memory_bytes", {"index": {"memory_bytes": 2**63}}),
    ("colour", {"colour": "red"}),
    ("index.nlist", {"index": {"nlist": 10}}),
    ("index.colour", {"index": {"colour": 10}}),
    ("index.m", {"index": {"kind": "hnsw", "m": 1}}),
    ("index.churn", {"index": {"churn": 1.5}}),
    ("index.build_seconds", {"index": {"build_seconds": 0}}),
    ("index.pq_bits", {"index": {"kind": "ivf_pq", "pq_bits": 6}}),
    ("index.pq_m", {"index": {"kind": "ivf_pq", "pq_m": 5}}),
    ("index.factory", {"index": {"kind": "factory"}}),
    ("index.factory", {"index": {"kind": "factory", "factory": "HNSWx"}}),
    ("index.factory", {"index": {"kind": "factory", "factory": "IDMap,Flat"}}),
    ("index.factory", {"index": {"kind": "hnsw", "factory": "HNSW32"}}),
    ("index.target_recall", {"index": {"kind": "hnsw", "target_recall": 1}}),
    ("index.target_recall", {"index": {"kind": "ivf_pq", "rerank_store": "none"}}),
    ("from", {"from": {"collection": "a", "snapshot": "b"}}),
    ("body", []),
    ("body", "words"),
    ("body", None),
]


def test_create_of_wrong_config_names_the_field(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for field, change in WRONG_CONFIGS:
            body = {"dimension": 4} | change if isinstance(change, dict) and change else change
            problem(await endpoint.http.put("/v1/collections/words", json=body), 400, field)
        problem(
            await endpoint.http.put("/v1/collections/words", json={"dimension": 4}, params={"wait": 1}), 400, "wait"
        )
        assert keys(endpoint.store, "") == []

    run_with_endpoint(scenario, tmp_path)


def test_create_at_the_bounds_is_taken(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("wide", dimension=DIMENSION_MAX, index={"target_recall": 1, "memory_bytes": 2**63 - 1})
        await endpoint.create("many", dimension=1, replicas=REPLICAS_MAX, index={"memory_bytes": 1})

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("name", ["a", "0", "a-b_c", "9" * 63])
def test_collection_name_of_the_right_form_is_taken(name: str, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create(name, dimension=2)
        assert (await endpoint.http.delete(f"/v1/collections/{name}")).status_code == 204

    run_with_endpoint(scenario, tmp_path)


WRONG_NAMES = ["A", "-a", "_a", "a.b", "a b", "ä", "9" * 64, "..", "a%0A", "%00", "a:b", "٣", "%FF"]


def test_collection_name_of_the_wrong_form_is_refused_by_every_route(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in WRONG_NAMES:
            # "%2e%2e", because clients resolve ".." before they send it
            path = f"/v1/collections/{'%2e%2e' if name == '..' else name}"
            problem(await endpoint.http.put(path, json={"dimension": 2}), 400, "collection")
            problem(await endpoint.http.get(path), 400, "collection")
            problem(await endpoint.http.delete(path), 400, "collection")
            body = {"kind": "import", "source": "x", "create": {}}
            problem(await endpoint.http.post(f"{path}/jobs", json=body), 400, "collection")
        assert keys(endpoint.store, "") == []

    run_with_endpoint(scenario, tmp_path)


def test_unknown_collection_is_not_found(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert "'words'" in problem(await endpoint.http.get("/v1/collections/words"), 404)["detail"]
        problem(await endpoint.http.delete("/v1/collections/words"), 404)
        assert (await endpoint.http.get("/v1/collections")).json() == {"collections": []}

    run_with_endpoint(scenario, tmp_path)


def test_list_is_ordered_by_name(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("b", "c", "a"):
            await endpoint.create(name, dimension=2)
        listed = (await endpoint.http.get("/v1/collections")).json()["collections"]
        assert [collection["name"] for collection in listed] == ["a", "b", "c"]

    run_with_endpoint(scenario, tmp_path)


def test_delete_removes_segments_and_logs_and_only_those(tmp_path: Path) -> None:
    config = CollectionConfig(4, shards=2)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, random_points(config, 20))
        await endpoint.publish("others", config, random_points(config, 10))
        endpoint.store.put("collections/words/segments/not-committed/rows.arrow", b"another writer's")
        body = {"points": [{"id": number, "vector": [1, 2, 3, 4]} for number in range(10)]}
        (await endpoint.http.post("/v1/collections/words/points:upsert", json=body)).raise_for_status()
        before = keys(endpoint.store, "")
        response = await endpoint.http.delete("/v1/collections/words")
        assert (response.status_code, response.content) == (204, b"")
        tombstone = paths.manifest("words", 2)
        gone = {key for key in before if key.startswith("collections/words/segments/") and "not-committed" not in key}
        assert len(gone) == 2 * len(paths.SEGMENT_FILES)
        writes = {paths.wal_record("words", shard, 2) for shard in range(2)}  # before them are claims, which stay
        assert writes < set(before)
        ends = {paths.wal_record("words", shard, 3) for shard in range(2)}  # claims as well
        late = {paths.wal_record("words", shard, 4) for shard in range(2)}  # of who was told to lead before it was seen
        assert set(keys(endpoint.store, "")) - late == set(before) - gone - writes | {tombstone} | ends
        problem(await endpoint.http.get("/v1/collections/words"), 404)
        problem(await endpoint.search("words", vector=[1, 0, 0, 0]), 404)
        problem(await endpoint.http.delete("/v1/collections/words"), 404)
        assert len((await endpoint.search("others", vector=[1, 0, 0, 0])).json()["results"][0]) == 10

    run_with_endpoint(scenario, tmp_path)


def test_deleted_collection_can_be_made_again_with_another_config(tmp_path: Path) -> None:
    config = CollectionConfig(4)
    other = CollectionConfig(3, metric="l2", id_type="string", shards=2)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, random_points(config, 20))
        assert (await endpoint.http.delete("/v1/collections/words")).status_code == 204
        created = await endpoint.create("words", **other.to_dict())
        assert (created["points"], created["config"]) == (0, other.to_dict())
        assert hit_ids((await endpoint.search("words", vector=[1, 0, 0])).json()) == [[]]

    run_with_endpoint(scenario, tmp_path)


def test_created_collection_survives_a_restart(tmp_path: Path) -> None:
    data = (tmp_path / "data").as_uri()

    async def create(endpoint: Endpoint) -> None:
        await endpoint.create("words", **FULL)

    async def find(endpoint: Endpoint) -> None:
        await endpoint.served("words")
        assert (await endpoint.http.get("/v1/collections/words")).json()["config"] == FULL

    run_with_endpoint(create, tmp_path, data=data)
    run_with_endpoint(find, tmp_path, data=data)


def test_describe_tells_index_bytes_and_operating_points_of_segments(tmp_path: Path) -> None:
    config = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, random_points(config, 30))
        described = (await endpoint.http.get("/v1/collections/words")).json()
        (shard,) = described["shards"]
        (segment,) = shard["segments"]
        assert (described["points"], shard["points"], segment["count"]) == (30, 30, 30)
        assert segment["index_kind"] == "flat"
        assert segment["index_bytes"] > 30 * 4 * 4
        assert segment["operating_points"][0]["recall"] == 1.0
        assert [r["generations"] for r in shard["replicas"]] == [[1]]

    run_with_endpoint(scenario, tmp_path)


def test_create_over_a_broken_manifest_is_an_error_of_the_server_that_names_it(tmp_path: Path) -> None:
    config = CollectionConfig(4)

    async def scenario(endpoint: Endpoint) -> None:
        commit(endpoint.store, "words", config, random_points(config, 5))
        endpoint.store.put(paths.manifest("words", 1), b"not a manifest")
        response = await endpoint.http.put("/v1/collections/words", json={"dimension": 4})
        assert paths.manifest("words", 1) in problem(response, 500)["detail"]

    run_with_endpoint(scenario, tmp_path)
