"""Upserts and deletes over HTTP, as JSON."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.errors import Exhausted, Unavailable
from cluster.placement import ReplicaKey
from serve import write_bodies
from serve.arrow_bodies import ARROW
from serve.attribute_columns import AttributeColumns, json_attributes
from tests.unit.actors.points import random_points
from tests.unit.serve.endpoint import Endpoint, arrow_stream, hit_ids, problem, read_stream, run_with_endpoint, until
from tests.unit.serve.writes import WORDS, answer, delete, held, upsert

L2 = {"dimension": 2, "metric": "l2"}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("id_type", "ids"), [("int64", [7, -(2**63), 2**63 - 1, 0]), ("string", ["a", "", "ü", "z" * 50])]
)
def test_upserted_points_are_found_replaced_and_deleted(
    id_type: str, ids: list[Any], shards: int, tmp_path: Path
) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, id_type=id_type, shards=shards)
        points = [{"id": value, "vector": [float(row), 1.0]} for row, value in enumerate(ids)]
        written = answer(await upsert(endpoint, *points))
        assert written["upserted"] == 4
        assert all(lsn >= 1 for lsn in written["lsn"].values())
        found = (await endpoint.search("words", vector=[0, 1], k=10, min_lsn=written["lsn"])).json()
        assert hit_ids(found) == [ids]
        assert found["lsn"].keys() == {str(shard) for shard in range(shards)}
        assert all(found["lsn"][shard] >= lsn for shard, lsn in written["lsn"].items())

        replaced = answer(await upsert(endpoint, {"id": ids[0], "vector": [9.0, 1.0]}))
        found = (await endpoint.search("words", vector=[0, 1], k=10, min_lsn=replaced["lsn"])).json()
        assert hit_ids(found) == [[*ids[1:], ids[0]]]

        unknown = "nobody" if id_type == "string" else 12_345
        deleted = answer(await delete(endpoint, ids[1], ids[1], unknown))
        assert deleted["deleted"] == 1
        assert set(await held(endpoint, deleted, *ids)) == {ids[0], ids[2], ids[3]}
        assert answer(await delete(endpoint, unknown))["deleted"] == 0

    run_with_endpoint(scenario, tmp_path)


def test_upsert_replaces_imported_points_and_keeps_the_others(tmp_path: Path) -> None:
    config = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
    points = random_points(config, 50)
    ids = points.ids.to_pylist()

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        written = answer(await upsert(endpoint, {"id": ids[0], "vector": [50, 0, 0, 0], "attributes": {"name": "new"}}))
        gone = answer(await delete(endpoint, ids[1]))
        lsn = {shard: max(written["lsn"].get(shard, 0), gone["lsn"].get(shard, 0)) for shard in "01"}
        found = (
            await endpoint.search(
                "words", vector=[50, 0, 0, 0], k=50, min_lsn=lsn, with_attributes=["name"], with_vectors=True
            )
        ).json()
        hits = found["results"][0]
        assert sorted(hit["id"] for hit in hits) == sorted(set(ids) - {ids[1]})
        assert hits[0] == {"id": ids[0], "score": 0.0, "vector": [50, 0, 0, 0], "attributes": {"name": "new"}}
        described = (await endpoint.http.get(WORDS)).json()
        assert described["config"]["shards"] == 2

    run_with_endpoint(scenario, tmp_path)


def test_vectors_are_stored_as_an_import_stores_them(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=2, metric="cosine", vector_dtype="float16")
        written = answer(await upsert(endpoint, {"id": 1, "vector": [30, 40]}))
        expected = np.array([0.6, 0.8], np.float16).astype(float).tolist()
        assert (await held(endpoint, written, 1))[1]["vector"] == expected

    run_with_endpoint(scenario, tmp_path)


ONE = {"id": 1, "vector": [1, 2]}
WRONG_UPSERTS: list[tuple[str, Any]] = [
    ("points", []),
    ("points", [ONE | {"id": number} for number in range(6)]),
    ("points[1].id", [ONE, ONE]),
    ("points[2].id", [ONE, ONE | {"id": 2}, ONE]),
    ("points[1].id", [ONE, ONE | {"id": "2"}]),
    ("points[1].id", [ONE, ONE | {"id": 2.0}]),
    ("points[1].id", [ONE, ONE | {"id": True}]),
    ("points[1].id", [ONE, ONE | {"id": None}]),
    ("points[0].id", [ONE | {"id": 2**63}]),
    ("points[0].id", [{"vector": [1, 2]}]),
    ("points[0].vector", [{"id": 1}]),
    ("points[1].vector", [ONE, {"id": 2, "vector": [1]}]),
    ("points[0].vector", [{"id": 2, "vector": []}]),
    ("points[0].vector", [{"id": 2, "vector": None}]),
    ("points[0].vector[1]", [{"id": 2, "vector": [1, "a"]}]),
    ("points[1].vector", [ONE, {"id": 2, "vector": [1, 1e39]}]),
    ("points[1].vector", [ONE, {"id": 2, "vector": [1, 1e20]}]),
    ("points[0].title", [ONE | {"title": "a"}]),
    ("points[0].attributes", [ONE | {"attributes": ["a"]}]),
    ("points[0].attributes.vector", [ONE | {"attributes": {"vector": 1}}]),
    ("points[0].attributes.id", [ONE | {"attributes": {"id": None}}]),
    ("points[1].attributes.score", [ONE, {"id": 2, "vector": [1, 2], "attributes": {"score": 1}}]),
    ("points[0].attributes.", [ONE | {"attributes": {"": 1}}]),
    ("points[0].attributes.tags", [ONE | {"attributes": {"tags": ["a"]}}]),
    ("points[1].attributes.n", [ONE | {"attributes": {"n": 1}}, {"id": 2, "vector": [1, 2], "attributes": {"n": "1"}}]),
    ("points[0].attributes.n", [ONE | {"attributes": {"n": 2**63}}]),
    ("points[0].attributes.a,b", [ONE | {"attributes": {"a,b": 1}}]),
    ("points[0].attributes.a\0", [ONE | {"attributes": {"a\0": None}}]),
    ("points[1].attributes", [ONE, {"id": 2, "vector": [1, 2], "attributes": {"text": "x" * 101}}]),
]


def test_wrong_upsert_names_the_position_and_writes_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        for field, points in WRONG_UPSERTS:
            problem(await upsert(endpoint, *points), 400, field)
        for field, more in [
            ("timeout_ms", {"timeout_ms": 0}),
            ("timeout_ms", {"timeout_ms": 1e9}),
            ("wait", {"wait": 1}),
        ]:
            problem(await upsert(endpoint, ONE, **more), 400, field)
        problem(await endpoint.http.post(f"{WORDS}/points:upsert", json=ONE), 400, "id")
        problem(await endpoint.http.post(f"{WORDS}/points:upsert", json={"points": [ONE]}, params={"k": 1}), 400, "k")
        assert (await endpoint.http.get(WORDS)).json()["points"] == 0

    run_with_endpoint(scenario, tmp_path, limits=Limits(points_per_upsert=5, attribute_bytes=104))


def test_cosine_and_float16_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=2, metric="cosine")
        problem(await upsert(endpoint, ONE, {"id": 2, "vector": [0, 0]}), 400, "points[1].vector")
        await endpoint.create("halves", dimension=2, metric="l2", vector_dtype="float16")
        body = {"points": [ONE, {"id": 2, "vector": [1, 70_000]}]}
        problem(await endpoint.http.post("/v1/collections/halves/points:upsert", json=body), 400, "points[1].vector")

    run_with_endpoint(scenario, tmp_path)


def test_wrong_delete_names_the_position(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        for field, ids in [
            ("ids", []),
            ("ids", range(6)),
            ("ids[1]", [1, "2"]),
            ("ids[1]", [1, 2.0]),
            ("ids[0]", [2**63]),
        ]:
            problem(await delete(endpoint, *ids), 400, field)
        problem(await delete(endpoint, 1, force=True), 400, "force")

    run_with_endpoint(scenario, tmp_path, limits=Limits(ids_per_delete=5))


def test_default_timeout_of_a_write_is_the_bound_of_the_endpoint_where_that_is_lower(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        upserted = await endpoint.http.post(f"{WORDS}/points:upsert", json={"points": [ONE]})
        assert answer(upserted)["upserted"] == 1
        problem(await upsert(endpoint, ONE, timeout_ms=5_001), 400, "timeout_ms")

    run_with_endpoint(scenario, tmp_path, limits=Limits(timeout_ms=5_000))


def test_write_to_no_collection_is_not_found(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        problem(await upsert(endpoint, ONE), 404)
        problem(await delete(endpoint, 1), 404)

    run_with_endpoint(scenario, tmp_path)


def test_new_attributes_are_declared_with_the_type_of_their_values(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, shards=2)
        first = {"flag": True, "count": 1, "rate": 1, "word": "ü", "nothing": None}
        second = {"flag": None, "rate": 0.5}
        written = answer(
            await upsert(endpoint, ONE | {"attributes": first}, {"id": 2, "vector": [1, 3], "attributes": second})
        )
        options = {"k": 2, "min_lsn": written["lsn"], "with_attributes": ["flag", "count", "rate", "word"]}
        response = await endpoint.search("words", vector=[1, 2], **options)  # the same endpoint knows them at once
        assert response.status_code == 200, response.text
        assert [hit["attributes"] for hit in response.json()["results"][0]] == [
            {"flag": True, "count": 1, "rate": 1.0, "word": "ü"},
            {"flag": None, "count": None, "rate": 0.5, "word": None},
        ]
        types = {"flag": "bool", "count": "int64", "rate": "double", "word": "large_string"}
        assert (await asyncio.to_thread(endpoint.services.log("words").newest_live)).attributes == types
        await until(lambda: dict(endpoint.coordinator.served("words").attributes) == types)
        problem(await endpoint.search("words", vector=[1, 2], with_attributes=["nothing"]), 400, "with_attributes")
        assert (await held(endpoint, written, 2))[2]["attributes"] == {
            "flag": None,
            "count": None,
            "rate": 0.5,
            "word": None,
        }

    run_with_endpoint(scenario, tmp_path)


def test_values_of_known_attributes_are_converted_to_their_types_or_refused(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        answer(await upsert(endpoint, ONE | {"attributes": {"rate": 0.5, "count": 1}}))
        written = answer(await upsert(endpoint, {"id": 2, "vector": [1, 2], "attributes": {"rate": 2, "count": 3}}))
        assert (await held(endpoint, written, 2))[2]["attributes"] == {"rate": 2.0, "count": 3}
        wrong = {"id": 3, "vector": [1, 2], "attributes": {"count": 1.5}}
        assert (
            "must be int64, not 1.5"
            in problem(await upsert(endpoint, ONE, wrong), 400, "points[1].attributes.count")["detail"]
        )

    run_with_endpoint(scenario, tmp_path)


def test_attribute_whose_number_json_cannot_hold_is_named(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        for attributes, field in [
            ('{"a": 1, "b.c": 1e999}', "points[1].attributes.b.c"),
            ('{"a": [1, 1e999], "b": 1}', "points[1].attributes.a[1]"),
            ('{"a": 1e999, "a": 1}', "points[1].attributes[...]"),  # the later one counts
        ]:
            point = '{"id": 2, "vector": [1, 2], "attributes": ' + attributes + "}"
            body = f'{{"points": [{{"id": 1, "vector": [1, 2]}}, {point}]}}'
            problem(await endpoint.http.post(f"{WORDS}/points:upsert", content=body), 400, field)
        problem(await endpoint.search("words", vector=[1, 2], **{"params[...]": 1}), 400, "params[...]")

    run_with_endpoint(scenario, tmp_path)


def test_write_that_is_too_large_declares_nothing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, shards=2)
        points = [{"id": n, "vector": [n, 0], "attributes": {"word": "x" * 20}} for n in range(20)]
        refused = problem(await upsert(endpoint, *points), 413)
        assert "queued_write_bytes_per_shard" in refused["detail"]
        assert endpoint.services.log("words").newest_live().attributes == {}
        assert answer(await upsert(endpoint, points[0]))["upserted"] == 1
        assert endpoint.services.log("words").newest_live().attributes == {"word": "large_string"}

    run_with_endpoint(scenario, tmp_path, limits=Limits(queued_write_bytes_per_shard=300))


def test_sparse_attributes_are_checked_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def seen(*arguments: Any) -> AttributeColumns:
        threads.append(threading.current_thread() is threading.main_thread())
        return json_attributes(*arguments)

    monkeypatch.setattr(write_bodies, "json_attributes", seen)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        points = [{"id": n, "vector": [n, 0], "attributes": {f"a{n}": 1}} for n in range(5_000)]
        problem(await upsert(endpoint, *points), 400, "points")
        too_many = problem(
            await upsert(endpoint, *({**p, "attributes": {f"a{p['id'] % 1_000}": 1}} for p in points)), 413
        )
        assert "5000 points x 1000 attributes" in too_many["detail"]
        answer(await upsert(endpoint, points[0]))
        assert threads == [False, False, True]
        assert endpoint.services.log("words").newest_live().attributes == {"a0": "int64"}

    run_with_endpoint(scenario, tmp_path)


def test_write_that_a_shard_did_not_acknowledge_tells_the_shards_as_data(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, shards=2)
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        points = [{"id": n, "vector": [n, 0]} for n in range(20)]
        partial = problem(await upsert(endpoint, *points, timeout_ms=2_000), 503)
        assert (partial["lsn"].keys(), partial["failed"]) == ({"0"}, [1])
        assert partial["lsn"]["0"] >= 1

    run_with_endpoint(scenario, tmp_path)


def test_attribute_that_another_endpoint_declared_meanwhile_is_converted_or_conflicts(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        await asyncio.to_thread(endpoint.services.log("words").declare_attributes, {"rate": "double", "note": "bool"})
        # The table does not know of it: nobody told the supervisor.
        written = answer(await upsert(endpoint, ONE | {"attributes": {"rate": 3}}))
        assert (await held(endpoint, written, 1))[1]["attributes"]["rate"] == 3.0
        response = await upsert(endpoint, ONE | {"attributes": {"note": "text"}})
        assert response.status_code in (400, 409), response.text

    run_with_endpoint(scenario, tmp_path)


def test_concurrent_writes_are_all_acknowledged_and_share_records(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        many = [upsert(endpoint, {"id": number, "vector": [number, 0]}) for number in range(60)]
        written = [answer(response) for response in await asyncio.gather(*many)]
        assert all(one["upserted"] == 1 for one in written)
        lsns = [one["lsn"]["0"] for one in written]
        assert len(set(lsns)) < 40, "nothing was gathered"
        assert len(await held(endpoint, {"lsn": {"0": max(lsns)}}, *range(60))) == 60

    run_with_endpoint(scenario, tmp_path)


def test_search_and_fetch_for_an_lsn_that_never_comes_say_so_and_hold_up_nobody(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        written = answer(await upsert(endpoint, ONE))
        waiting = asyncio.ensure_future(endpoint.search("words", vector=[1, 2], min_lsn={"0": 10**6}, timeout_ms=300))
        for _ in range(5):
            assert hit_ids((await endpoint.search("words", vector=[1, 2])).json()) == [[1]]
        assert not waiting.done()
        detail = problem(await waiting, 503)["detail"]
        assert f"asked for LSN 1000000, the last one known is {written['lsn']['0']}" in detail
        detail = problem(await endpoint.search("words", vector=[1, 2], min_lsn={"1": 9}, timeout_ms=50), 503)["detail"]
        assert "shard 1: asked for LSN 9, but generation 1 has shards 0 to 0" in detail
        body = {"ids": [1], "min_lsn": {"01": 1}}
        problem(await endpoint.http.post(f"{WORDS}/points:fetch", json=body), 400, "min_lsn.01")
        body = {"ids": [1], "min_lsn": {"0": -1}}
        problem(await endpoint.http.post(f"{WORDS}/points:fetch", json=body), 400, "min_lsn.0")
        problem(await endpoint.search("words", vector=[1, 2], min_lsn={"0": 1, "7": "1"}), 400, "min_lsn.7")

    run_with_endpoint(scenario, tmp_path)


def test_search_by_arrow_takes_min_lsn_and_tells_lsn(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2, shards=2)
        written = answer(await upsert(endpoint, *({"id": n, "vector": [n, 0]} for n in range(8))))
        text = ",".join(f"{shard}:{lsn}" for shard, lsn in written["lsn"].items())
        body = arrow_stream(np.zeros((1, 2), np.float32))
        table = read_stream(await endpoint.search_arrow("words", body, ARROW, min_lsn=text))
        assert table["id"].to_pylist() == list(range(8))
        assert table.schema.metadata[b"lsn"].startswith(b'{"0":')
        for wrong in ("0", "0:", "0:a", "0:-1", "0:1,0:2", f"0:{2**63}"):
            problem(await endpoint.search_arrow("words", body, min_lsn=wrong), 400, "min_lsn")
        problem(await endpoint.search_arrow("words", body, min_lsn="1024:1"), 400, "min_lsn.1024")

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [(Exhausted("queue is full", 0.5), 429, "exhausted"), (Unavailable("nobody knows"), 503, "unavailable")],
)
def test_refused_write_is_told_with_when_to_try_again(
    error: Exception, status: int, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)

        async def refuse(*arguments: Any) -> Any:
            raise error

        monkeypatch.setattr(endpoint.coordinator, "write", refuse)
        response = await upsert(endpoint, ONE)
        assert str(error) in problem(response, status)["detail"]
        assert response.headers["retry-after"] == "1"
        metrics = (await endpoint.http.get("/metrics")).text
        assert f'outcome="{outcome}"' in metrics

    run_with_endpoint(scenario, tmp_path)


def test_write_waits_for_a_primary_that_comes_back(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", **L2)
        answer(await upsert(endpoint, ONE))
        key = ReplicaKey("words", 0, 0)
        endpoint.eagleray.runtime.kill(key)
        await until(lambda: not endpoint.coordinator.served("words").primaries)
        waiting = asyncio.ensure_future(upsert(endpoint, {"id": 2, "vector": [3, 4]}))
        await asyncio.sleep(0)
        endpoint.eagleray.runtime.revive(key)
        written = answer(await waiting)
        assert set(await held(endpoint, written, 1, 2)) == {1, 2}

    run_with_endpoint(scenario, tmp_path)


def test_status_and_metrics_tell_of_writes(tmp_path: Path) -> None:
    config = CollectionConfig(2, metric="l2", index=IndexConfig(kind="flat"))
    points = random_points(config, 30)
    ids = points.ids.to_pylist()

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        answer(await upsert(endpoint, {"id": ids[0], "vector": [1, 2]}, {"id": 10**6, "vector": [1, 2]}))
        lsn = answer(await delete(endpoint, ids[1]))["lsn"]["0"]

        async def shard() -> Any:
            return (await endpoint.http.get(WORDS)).json()["shards"][0]

        async with asyncio.timeout(20):
            while (await shard())["lsn"] < lsn:
                await asyncio.sleep(0.01)
        told = await shard()
        assert (told["points"], told["tail_points"], told["tombstones"]) == (30, 2, 2)
        assert told["primary"] == 0
        (replica,) = told["replicas"]
        assert replica["lsn"] == told["lsn"] == lsn
        assert replica["epoch"] >= 1
        assert told["segments"][0]["tombstones"] == 2
        assert (await endpoint.http.get(WORDS)).json()["points"] == 30
        metrics = (await endpoint.http.get("/metrics")).text
        for line in (
            'eagleray_tail_points{collection="words",shard="0"} 2.0',
            'eagleray_tombstones{collection="words",shard="0"} 2.0',
            f'eagleray_lsn{{collection="words",device="cpu",num_gpus="0",replica="0",shard="0"}} {float(lsn)}',
            'eagleray_points_upserted_total{collection="words",coordinator="endpoint-1"} 2.0',
            'eagleray_points_deleted_total{collection="words",coordinator="endpoint-1"} 1.0',
            'eagleray_writes_total{collection="words",coordinator="endpoint-1",operation="upserted",outcome="ok"} 1.0',
        ):
            assert line in metrics, line
        assert "eagleray_write_latency_seconds_bucket" in metrics

    run_with_endpoint(scenario, tmp_path)
