"""Searches whose bodies are JSON: answers, options, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.placement import ReplicaKey
from serve.arrow_bodies import ARROW
from serve.routes import JSON
from tests.unit.actors.points import (
    all_scores,
    brute_force,
    commit,
    keys,
    name_of,
    points_of_shard,
    random_points,
    random_vectors,
)
from tests.unit.serve.endpoint import (
    Endpoint,
    arrow_stream,
    hit_ids,
    points_of,
    problem,
    read_stream,
    run_with_endpoint,
    until,
)

SEARCH = "/v1/collections/words/points:search"
FLAT = IndexConfig(kind="flat", target_recall=1.0)


def ids_of_table(table: Any, queries: int) -> list[list[int | str]]:
    hits: list[list[int | str]] = [[] for _ in range(queries)]
    for number, point_id in zip(table.column("query").to_pylist(), table.column("id").to_pylist(), strict=True):
        hits[number].append(point_id)
    return hits


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_search_equals_brute_force_in_json_and_arrow_both_ways(metric: str, id_type: str, tmp_path: Path) -> None:
    config = CollectionConfig(8, metric=metric, id_type=id_type, shards=3, index=FLAT)  # type: ignore[arg-type]
    points, queries = random_points(config, 300), random_vectors(config, 5, seed=9)
    expected = brute_force(points, queries, 12, config.metric)
    row_of = {point_id: row for row, point_id in enumerate(points.ids.to_pylist())}
    scores = all_scores(points, queries, config.metric)
    true_scores = [[scores[q, row_of[point_id]] for point_id in ids] for q, ids in enumerate(expected)]

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        body = arrow_stream(queries)
        from_json = (await endpoint.search("words", vectors=queries.tolist(), k=12)).json()
        from_arrow = (await endpoint.search_arrow("words", body, k=12)).json()
        for answer in (from_json, from_arrow):
            assert hit_ids(answer) == expected
            found = [[hit["score"] for hit in hits] for hits in answer["results"]]
            np.testing.assert_allclose(found, true_scores, atol=1e-4, rtol=1e-4)
            assert answer["coverage"] == {"shards": 1.0, "points": 1.0, "missing": []}
            assert answer["generation"] == 1
            assert answer["took_ms"] >= 0.0
        request = {"vectors": queries.tolist(), "k": 12, "timeout_ms": 20_000}
        json_to_arrow = await endpoint.http.post(SEARCH, json=request, headers={"Accept": ARROW})
        for table in (read_stream(json_to_arrow), read_stream(await endpoint.search_arrow("words", body, ARROW, k=12))):
            assert [str(field.type) for field in table.schema][:3:2] == ["int32", "float"]
            assert table.column_names == ["query", "id", "score"]
            assert ids_of_table(table, len(queries)) == expected
            np.testing.assert_allclose(table.column("score").to_numpy(), np.ravel(true_scores), atol=1e-4, rtol=1e-4)
            assert json.loads(table.schema.metadata[b"coverage"]) == from_json["coverage"]
            assert table.schema.metadata[b"generation"] == b"1"

    run_with_endpoint(scenario, tmp_path)


def test_one_vector_is_searched_like_vectors_of_one(tmp_path: Path) -> None:
    config = CollectionConfig(8, shards=2, index=FLAT)
    points, (query,) = random_points(config, 50), random_vectors(config, 1, seed=9).tolist()

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        one = (await endpoint.search("words", vector=query)).json()
        many = (await endpoint.search("words", vectors=[query])).json()
        assert len(one["results"][0]) == 10
        for answer in (one, many):  # a shard may be claimed between the two
            assert answer.pop("lsn").keys() == {"0", "1"}
            assert answer.pop("took_ms") >= 0.0
        assert one == many

    run_with_endpoint(scenario, tmp_path)


def test_search_normalises_the_query_under_cosine_only(tmp_path: Path) -> None:
    points = points_of([1, 2], np.array([[1, 0], [0, 1]], np.float32))

    async def scenario(endpoint: Endpoint) -> None:
        for metric, score in (("cosine", 1.0), ("ip", 5.0), ("l2", 16.0)):
            await endpoint.publish(metric, CollectionConfig(2, metric=metric, index=FLAT), points)  # type: ignore[arg-type]
            best = (await endpoint.search(metric, vector=[5, 0])).json()["results"][0][0]
            assert best["id"] == 1
            assert best["score"] == pytest.approx(score)

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize(
    "values",
    [[-(2**63), -1, 0, 2**53 + 1, 2**63 - 1], ["", "ä", '"\\\n', "😀", "0"]],
    ids=["int64", "string"],
)
def test_extreme_ids_come_back_unchanged(values: list[Any], tmp_path: Path) -> None:
    id_type = "int64" if isinstance(values[0], int) else "string"
    config = CollectionConfig(2, metric="l2", id_type=id_type, shards=2, index=FLAT)  # type: ignore[arg-type]
    vectors = np.arange(10, dtype=np.float32).reshape(5, 2)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points_of(values, vectors))
        assert hit_ids((await endpoint.search("words", vector=[0, 1])).json()) == [values]
        table = read_stream(await endpoint.search_arrow("words", arrow_stream(vectors[:1]), ARROW))
        assert table.column("id").to_pylist() == values

    run_with_endpoint(scenario, tmp_path)


def test_equal_scores_are_ordered_by_id(tmp_path: Path) -> None:
    config = CollectionConfig(2, metric="l2", shards=3, index=FLAT)
    values = [7, -3, 2**40, 0, 12, -9]

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points_of(values, np.ones((6, 2), np.float32)))
        assert hit_ids((await endpoint.search("words", vector=[0, 0])).json()) == [sorted(values)]

    run_with_endpoint(scenario, tmp_path)


def test_k_over_the_number_of_points_gives_all_points_without_padding(tmp_path: Path) -> None:
    config = CollectionConfig(4, shards=3, index=FLAT)
    points = random_points(config, 7)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        answer = (await endpoint.search("words", vectors=random_vectors(config, 2, 1).tolist(), k=2_048)).json()
        assert [sorted(ids) for ids in hit_ids(answer)] == [sorted(points.ids.to_pylist())] * 2

    run_with_endpoint(scenario, tmp_path)


def test_collection_of_one_point_finds_it(tmp_path: Path) -> None:
    config = CollectionConfig(4, shards=2, index=FLAT)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points_of([5], np.eye(1, 4, dtype=np.float32)))
        answer = (await endpoint.search("words", vector=[2, 0, 0, 0], with_vectors=True)).json()
        assert answer["results"] == [[{"id": 5, "score": 1.0, "vector": [1, 0, 0, 0]}]]

    run_with_endpoint(scenario, tmp_path)


def test_empty_collection_gives_empty_lists(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=2, id_type="string", shards=2)
        answer = (await endpoint.search("words", vectors=[[1, 0], [0, 1]], with_vectors=True)).json()
        assert answer["results"] == [[], []]
        assert answer["coverage"] == {"shards": 1.0, "points": 1.0, "missing": []}
        table = read_stream(await endpoint.search_arrow("words", arrow_stream(np.eye(2, dtype=np.float32)), ARROW))
        assert (table.num_rows, table.column_names) == (0, ["query", "id", "score"])
        assert str(table.schema.field("id").type) == "large_string"

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("dimension", [1, 4096])
def test_smallest_and_large_dimension(dimension: int, tmp_path: Path) -> None:
    config = CollectionConfig(dimension, metric="l2", shards=2, index=FLAT)
    points, queries = random_points(config, 20), random_vectors(config, 3, seed=4)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        expected = brute_force(points, queries, 5, "l2")
        assert hit_ids((await endpoint.search("words", vectors=queries.tolist(), k=5)).json()) == expected
        assert hit_ids((await endpoint.search_arrow("words", arrow_stream(queries), k=5)).json()) == expected

    run_with_endpoint(scenario, tmp_path)


def test_with_attributes_and_vectors_tells_each_hits_own(tmp_path: Path) -> None:
    config = CollectionConfig(3, metric="ip", shards=2, index=FLAT)
    points = random_points(config, 40)
    vector_of = dict(zip(points.ids.to_pylist(), points.vectors.tolist(), strict=True))
    options = {"k": 6, "with_attributes": ["name"], "with_vectors": True}

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        answer = (await endpoint.search("words", vectors=[[1, 0, 0], [0, 1, 0]], **options)).json()
        assert [len(hits) for hits in answer["results"]] == [6, 6]
        for hit in (hit for hits in answer["results"] for hit in hits):
            assert list(hit) == ["id", "score", "vector", "attributes"]
            assert hit["attributes"] == {"name": name_of(hit["id"])}
            assert hit["vector"] == pytest.approx(vector_of[hit["id"]])
        body = arrow_stream(np.eye(2, 3, dtype=np.float32))
        table = read_stream(
            await endpoint.search_arrow("words", body, ARROW, k=6, with_attributes="name", with_vectors="true")
        )
        assert table.column_names == ["query", "id", "score", "name", "vector"]
        assert ids_of_table(table, 2) == hit_ids(answer)
        assert table.column("name").to_pylist() == [name_of(value) for value in table.column("id").to_pylist()]
        assert table.column("vector").to_pylist() == [vector_of[value] for value in table.column("id").to_pylist()]

    run_with_endpoint(scenario, tmp_path)


def test_repeated_attribute_is_told_once(tmp_path: Path) -> None:
    config = CollectionConfig(2, index=FLAT)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points_of([1], np.ones((1, 2), np.float32)))
        answer = (await endpoint.search("words", vector=[1, 1], with_attributes=["name", "name"])).json()
        assert answer["results"][0][0]["attributes"] == {"name": "name of 1"}

    run_with_endpoint(scenario, tmp_path)


def test_searches_at_the_same_time_each_get_their_own_answer(tmp_path: Path) -> None:
    config = CollectionConfig(8, metric="l2", shards=2, index=FLAT)
    points = random_points(config, 100)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        answers = await asyncio.gather(
            *(endpoint.search("words", vector=v.tolist(), k=1 + row % 3) for row, v in enumerate(points.vectors))
        )
        ids = points.ids.to_pylist()
        for row, response in enumerate(answers):
            (found,) = hit_ids(response.json())
            assert (found[0], len(found)) == (ids[row], 1 + row % 3)

    run_with_endpoint(scenario, tmp_path)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_query_whose_scores_would_overflow_is_refused_and_shorter_ones_have_finite_scores(
    metric: Any, kind: Any, tmp_path: Path
) -> None:
    config = CollectionConfig(4, metric, index=IndexConfig(kind=kind))

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, random_points(config, 50))
        for vector in ([1e30, -1e30, 1e30, 1], [0, 0, 9.3e18, 0], [3e38] * 4):
            problem(await endpoint.search("words", vectors=[[0, 0, 0, 1], vector]), 400, "vectors[1]")
            arrow = arrow_stream(np.array([[0, 0, 0, 1], vector], np.float32))
            problem(await endpoint.search_arrow("words", arrow), 400, "vector[1]")
        for vector in ([0, 0, 9.2e18, 0], [4e18] * 4, [1e-45, 0, 0, 0]):
            (hits,) = (await endpoint.search("words", vector=vector)).json()["results"]
            assert len(hits) == 10
            assert all(isinstance(hit["score"], float) for hit in hits)

    run_with_endpoint(scenario, tmp_path)


def test_new_generation_is_told_in_the_answer(tmp_path: Path) -> None:
    config = CollectionConfig(2, index=FLAT)

    async def scenario(endpoint: Endpoint) -> None:
        for generation in (1, 2):
            await endpoint.publish("words", config, points_of([generation], np.ones((1, 2), np.float32)))
            answer = (await endpoint.search("words", vector=[1, 1])).json()
            assert (answer["generation"], hit_ids(answer)) == (generation, [[generation]])

    run_with_endpoint(scenario, tmp_path)


# ---- what is refused

LIMITS = Limits(vectors_per_search=3, k=20, timeout_ms=5_000)
GOOD = [1.0, 2.0, 3.0]
REFUSED_JSON: list[tuple[list[str], Any]] = [
    (["vectors"], {}),
    (["vectors"], {"vector": GOOD, "vectors": [GOOD]}),
    (["vectors"], {"vectors": []}),
    (["vectors"], {"vectors": [GOOD] * 4}),
    (["vectors"], {"vectors": GOOD[0]}),
    (["vectors[0]"], {"vectors": GOOD}),
    (["vectors[1]"], {"vectors": [GOOD, GOOD[:2]]}),
    (["vectors[0]", "vectors[2]"], {"vectors": [[], GOOD, [*GOOD, 4.0]]}),
    (["vector"], {"vector": []}),
    (["vector"], {"vector": [*GOOD, 1.0]}),
    (["vector"], {"vector": [1e300, 0.0, 0.0]}),
    (["vectors[1]"], {"vectors": [GOOD, [0.0, -3.5e38, 0.0]]}),
    (["vector"], {"vector": [0.0, 0.0, 0.0]}),
    (["vectors[1]"], {"vectors": [GOOD, [0, -0.0, 0], [0, 0, 0]]}),
    (["vector"], {"vector": [1e-60, 0.0, 0.0]}),
    (["vector[1]"], {"vector": [1.0, "2", 3.0]}),
    (["vector[1]"], {"vector": [1.0, None, 3.0]}),
    (["vector[0]"], {"vector": [True, 1.0, 1.0]}),
    (["k"], {"vector": GOOD, "k": 0}),
    (["k"], {"vector": GOOD, "k": -1}),
    (["k"], {"vector": GOOD, "k": 21}),
    (["k"], {"vector": GOOD, "k": 10**30}),
    (["k"], {"vector": GOOD, "k": 1.5}),
    (["k"], {"vector": GOOD, "k": "10"}),
    (["k"], {"vector": GOOD, "k": None}),
    (["timeout_ms"], {"vector": GOOD, "timeout_ms": 0}),
    (["timeout_ms"], {"vector": GOOD, "timeout_ms": 5_001}),
    (["min_coverage"], {"vector": GOOD, "min_coverage": -0.1}),
    (["min_coverage"], {"vector": GOOD, "min_coverage": 1.1}),
    (["params"], {"vector": GOOD, "params": []}),
    (["params.nprobe"], {"vector": GOOD, "params": {"nprobe": 0}}),
    (["params.ef_search"], {"vector": GOOD, "params": {"ef_search": 65_537}}),
    (["params.nprobe"], {"vector": GOOD, "params": {"nprobe": 65_537}}),
    (["params.rerank"], {"vector": GOOD, "params": {"rerank": 2.0}}),
    (["params.nprobe"], {"vector": GOOD, "params": {"nprobe": 4}}),
    (["params.ef_search"], {"vector": GOOD, "params": {"ef_search": 4}}),
    (["with_attributes"], {"vector": GOOD, "with_attributes": ["title"]}),
    (["with_attributes"], {"vector": GOOD, "with_attributes": ["vector"]}),
    (["with_attributes"], {"vector": GOOD, "with_attributes": ["id_hash"]}),
    (["with_attributes"], {"vector": GOOD, "with_attributes": ["name", ""]}),
    (["with_attributes"], {"vector": GOOD, "with_attributes": "name"}),
    (["with_vectors"], {"vector": GOOD, "with_vectors": 1}),
    (["exact"], {"vector": GOOD, "exact": 1}),
    (["params.nprobe"], {"vector": GOOD, "exact": True, "params": {"nprobe": 4}}),
    (["params.target_recall"], {"vector": GOOD, "exact": True, "params": {"target_recall": 0.9}}),
    (["params.ef_search"], {"vector": GOOD, "params": {"ef_search": 4, "target_recall": 0.9}}),
    (["params.target_recall"], {"vector": GOOD, "params": {"target_recall": 0}}),
    (["params.rerank"], {"vector": GOOD, "params": {"rerank": 0.5}}),
    (["target_recall"], {"vector": GOOD, "target_recall": 0.9}),
    (["min_lsn"], {"vector": GOOD, "min_lsn": [17]}),
    (["min_lsn.0"], {"vector": GOOD, "min_lsn": {"0": -1}}),
    (["min_lsn.0"], {"vector": GOOD, "min_lsn": {"0": "17"}}),
    (["min_lsn.0"], {"vector": GOOD, "min_lsn": {"0": 2**63}}),
    (["min_lsn.1024"], {"vector": GOOD, "min_lsn": {"1024": 17}}),
    (["min_lsn.00"], {"vector": GOOD, "min_lsn": {"00": 17}}),
    (["min_lsn.-1"], {"vector": GOOD, "min_lsn": {"-1": 17}}),
    (["min_lsn.one"], {"vector": GOOD, "min_lsn": {"one": 17}}),
    (["body"], []),
    (["body"], None),
    (["body"], "vector"),
]
RAW: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{'vector': [1,2,3]}",
    "NaN": b'{"vector": [NaN, 1, 1]}',
    "two documents": b'{"vector": [1, 2, 3]} {}',
    "cut": b'{"vector": [1, 2,',
    "not UTF-8": b'{"vector": [1, 2, 3], "with_attributes": ["\xff"]}',
    "lone surrogate": b'{"vector": [1, 2, 3], "with_attributes": ["\\ud800"]}',
    "NUL": b"\0" * 16,
    "Arrow": arrow_stream(np.ones((1, 3), np.float32)),
}
RAW_AT: dict[str, tuple[str, bytes]] = {
    "infinite": ("vector[0]", b'{"vector": [1e999, 1, 1]}'),
    "5000 digits": ("vector[0]", b'{"vector": [1' + b"0" * 5_000 + b", 1, 1]}"),
    "deep arrays": ("body", b"[" * 100_000),
    "deep vector": ("vector[0]", b'{"vector": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep unknown field": ("x", b'{"x": ' + b'{"x": ' * 100_000),
    "k of 5000 digits": ("k", b'{"vector": [1, 2, 3], "k": 1' + b"0" * 5_000 + b"}"),
}


def with_words(scenario: Any, tmp_path: Path, limits: Limits = LIMITS, **config: Any) -> None:
    """Run a scenario on a collection `words` of 30 points, three dimensions."""
    settings: dict[str, Any] = {"dimension": 3, "index": FLAT} | config
    words = CollectionConfig(**settings)

    async def run(endpoint: Endpoint) -> None:
        await endpoint.publish("words", words, random_points(words, 30))
        await scenario(endpoint)

    run_with_endpoint(run, tmp_path, limits=limits)


def test_wrong_json_search_names_the_field(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for fields, body in REFUSED_JSON:
            problem(await endpoint.http.post(SEARCH, json=body), 400, *fields)
        assert (await endpoint.http.post(SEARCH, json={"vector": GOOD, "k": 20})).status_code == 200

    with_words(scenario, tmp_path)


def test_body_that_is_not_json_is_refused(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for body in RAW.values():
            for headers in ({"Content-Type": JSON}, {}):
                problem(await endpoint.http.post(SEARCH, content=body, headers=headers), 400, "body")
        for field, body in RAW_AT.values():
            problem(await endpoint.http.post(SEARCH, content=body), 400, field)

    with_words(scenario, tmp_path)


def test_url_parameters_with_a_json_body_are_refused(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("k", "pretty", "\ud7ff\x00"):
            problem(await endpoint.http.post(SEARCH, json={"vector": GOOD}, params={name: "3"}), 400, name)

    with_words(scenario, tmp_path)


def test_wrong_lengths_of_many_vectors_are_told_by_the_first_ten(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        response = await endpoint.http.post(SEARCH, json={"vectors": [[1.0]] * 40})
        problem(response, 400, *(f"vectors[{position}]" for position in range(10)))

    with_words(scenario, tmp_path, limits=Limits())


@pytest.mark.parametrize(
    ("kind", "fits", "wrong"), [("hnsw", "ef_search", "nprobe"), ("ivf_flat", "nprobe", "ef_search")]
)
def test_params_fit_the_index_kind_or_are_refused(kind: Any, fits: str, wrong: str, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert (await endpoint.search("words", vector=GOOD, params={fits: 64})).status_code == 200
        assert (await endpoint.search("words", vector=GOOD, params={fits: 65_536})).status_code == 200
        for params in ({wrong: 4}, {fits: 4, wrong: 4}):
            refused = problem(await endpoint.search("words", vector=GOOD, params=params), 400, f"params.{wrong}")
            assert fits in refused["detail"]
        query = arrow_stream(np.ones((1, 3), np.float32))
        problem(await endpoint.search_arrow("words", query, accept=JSON, **{wrong: 4}), 400, f"params.{wrong}")

    with_words(scenario, tmp_path, Limits(), index=IndexConfig(kind=kind))


LISTS = IndexConfig("ivf_flat", target_recall=0.9, nlist=16)
CODES = IndexConfig("ivf_pq", target_recall=0.9, nlist=4, pq_m=1, pq_bits=4)


def with_many_words(scenario: Any, tmp_path: Path, index: IndexConfig, dimension: int = 16) -> None:
    """Run a scenario on a collection `words` of 700 points in one shard; it gets queries and their true hits."""
    words = CollectionConfig(dimension, "l2", index=index)
    points, queries = random_points(words, 700), random_vectors(words, 20, seed=5)

    async def run(endpoint: Endpoint) -> None:
        await endpoint.publish("words", words, points)
        await scenario(endpoint, queries, brute_force(points, queries, 10, "l2"))

    run_with_endpoint(run, tmp_path)


async def found(endpoint: Endpoint, queries: Any, **options: Any) -> list[list[int | str]]:
    response = await endpoint.search("words", vectors=queries.tolist(), **options)
    assert response.status_code == 200, response.text
    return hit_ids(response.json())


async def found_by_arrow(endpoint: Endpoint, queries: Any, **options: Any) -> list[list[int | str]]:
    response = await endpoint.search_arrow("words", arrow_stream(queries), **options)
    assert response.status_code == 200, response.text
    return hit_ids(response.json())


def test_exact_search_finds_what_the_index_misses(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, queries: Any, truth: Any) -> None:
        assert await found(endpoint, queries, params={"nprobe": 1}) != truth
        assert await found(endpoint, queries, exact=True) == truth
        assert await found_by_arrow(endpoint, queries, exact="true") == truth

    with_many_words(scenario, tmp_path, LISTS)


def test_nprobe_reaches_the_shard(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, queries: Any, truth: Any) -> None:
        assert await found(endpoint, queries, params={"nprobe": 16}) == truth
        assert await found_by_arrow(endpoint, queries, nprobe=16) == truth
        assert await found_by_arrow(endpoint, queries, nprobe=1) != truth

    with_many_words(scenario, tmp_path, LISTS)


def test_rerank_reaches_the_shard(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, queries: Any, truth: Any) -> None:
        assert await found(endpoint, queries, params={"nprobe": 4, "rerank": 1}) != truth
        assert await found(endpoint, queries, params={"nprobe": 4, "rerank": 70}) == truth  # 10 x 70: every point
        assert await found_by_arrow(endpoint, queries, nprobe=4, rerank=70) == truth

    with_many_words(scenario, tmp_path, CODES)


def test_target_recall_reaches_the_shard_and_one_that_was_not_tuned_is_refused(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint, queries: Any, truth: Any) -> None:
        hits = await found(endpoint, queries, params={"target_recall": 0.95})
        assert sum(len(set(a) & set(b)) for a, b in zip(hits, truth, strict=True)) >= 0.8 * 200
        assert await found_by_arrow(endpoint, queries, target_recall=0.95) == hits
        one = {"vector": queries[0].tolist(), "params": {"target_recall": 0.9999}}
        assert "0.9999" in problem(await endpoint.search("words", **one), 400, "params.target_recall")["detail"]

    with_many_words(scenario, tmp_path, LISTS)


def test_body_over_the_bound_is_refused_by_its_announced_length(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        answer = problem(await endpoint.http.post(SEARCH, content=b" " * 257), 413)
        assert "body_bytes" in answer["detail"]
        for announced in ("257", "9" * 30, "9" * 5_000):
            problem(await endpoint.http.post(SEARCH, content=b"", headers={"Content-Length": announced}), 413)
        whole = json.dumps({"vector": GOOD}).encode().ljust(256)
        assert (await endpoint.http.post(SEARCH, content=whole)).status_code == 200

    with_words(scenario, tmp_path, limits=Limits(body_bytes=256))


def test_body_over_the_bound_is_refused_as_it_streams_in(tmp_path: Path) -> None:
    sent = []

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(100):
            sent.append(number)
            yield b" " * 100

    async def scenario(endpoint: Endpoint) -> None:
        answer = problem(await endpoint.http.post(SEARCH, content=pieces()), 413)
        assert "body_bytes" in answer["detail"]
        assert len(sent) < 10

    with_words(scenario, tmp_path, limits=Limits(body_bytes=256))


def test_body_in_pieces_is_put_together(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in json.dumps({"vector": GOOD}).encode():
            yield bytes([byte])

    async def scenario(endpoint: Endpoint) -> None:
        assert (await endpoint.http.post(SEARCH, content=pieces())).status_code == 200

    with_words(scenario, tmp_path)


def test_content_length_that_is_no_number_is_passed_over(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        body = json.dumps({"vector": GOOD}).encode()
        for strange in (b"\xb2", b"-1", b"1e9", b""):
            headers = httpx.Headers([(b"content-length", strange)])
            assert (await endpoint.http.post(SEARCH, content=body, headers=headers)).status_code == 200

    with_words(scenario, tmp_path)


@pytest.mark.parametrize("path", ["points:search", "points:fetch", "jobs", ""])
def test_other_content_types_are_unsupported(path: str, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        method = "POST" if path else "PUT"
        types = [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonx",
            "multipart/form-data",
            "ä",
        ]
        types += [] if path == "points:search" else [ARROW]
        for content_type in types:
            headers = httpx.Headers([(b"content-type", content_type.encode())])
            url = f"/v1/collections/words/{path}".rstrip("/")
            response = await endpoint.http.request(method, url, content=b"{}", headers=headers)
            problem(response, 415)

    with_words(scenario, tmp_path)


@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=utf-8", " application/json ", ";"])
def test_json_content_type_is_read_without_case_or_parameters(content_type: str, tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        body, headers = json.dumps({"vector": GOOD}), {"Content-Type": content_type}
        assert (await endpoint.http.post(SEARCH, content=body, headers=headers)).status_code == 200

    with_words(scenario, tmp_path)


def test_unknown_paths_and_methods_are_problems(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for path in ("/", "/v2/collections", "/v1/collections/", "/v1/collections/words/", f"{SEARCH}/", "/v1/jobs/"):
            problem(await endpoint.http.get(path), 404)
        for method, path, allowed in (
            ("GET", SEARCH, {"POST"}),
            ("POST", "/v1/collections/words", {"PUT", "GET", "HEAD", "DELETE"}),
            ("PATCH", "/v1/jobs/import-1", {"GET", "HEAD", "DELETE"}),
            ("DELETE", "/v1/collections", {"GET", "HEAD"}),
            ("DELETE", "/v1/jobs", {"GET", "HEAD", "POST"}),
            ("BREW", "/healthz", {"GET", "HEAD"}),
        ):
            response = await endpoint.http.request(method, path)
            problem(response, 405)
            assert set(response.headers["allow"].split(", ")) == allowed

    with_words(scenario, tmp_path)


def test_head_is_answered_like_get(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        assert (await endpoint.http.head("/v1/collections/words")).status_code == 200
        assert (await endpoint.http.head("/v1/collections/nothing")).status_code == 404

    with_words(scenario, tmp_path)


# ---- not served, or not wholly


def test_search_of_unknown_collection_is_not_found(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("nothing", "NOT-A-NAME", "%2e%2e", "ä"):
            url = f"/v1/collections/{name}/points:search"
            problem(await endpoint.http.post(url, json={"vector": GOOD}), 404)
            problem(await endpoint.http.post(url, content=b"\0"), 404)

    with_words(scenario, tmp_path)


def test_search_before_the_supervisor_was_reached_is_unavailable(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        response = await endpoint.http.post(SEARCH, json={"vector": GOOD})
        assert "supervisor" in problem(response, 503)["detail"]
        assert response.headers["retry-after"] == "1"

    run_with_endpoint(scenario, tmp_path, follow=False)


def test_search_of_a_collection_whose_rows_are_damaged_is_unavailable_with_the_reason(tmp_path: Path) -> None:
    config = CollectionConfig(3, index=FLAT)

    async def scenario(endpoint: Endpoint) -> None:
        await asyncio.to_thread(commit, endpoint.store, "words", config, random_points(config, 5))
        (rows,) = [key for key in keys(endpoint.store, "collections/words/segments/") if key.endswith("rows.arrow")]
        endpoint.store.put(rows, b"damaged")
        await endpoint.eagleray.directory.refresh("words")
        await until(lambda: "Corrupt" in endpoint.coordinator.table.unready.get("words", ""))  # type: ignore[union-attr]
        response = await endpoint.search("words", vector=GOOD)
        assert rows in problem(response, 503)["detail"]
        assert rows in (await endpoint.http.get("/v1/collections/words")).json()["reason"]

    run_with_endpoint(scenario, tmp_path)


def test_lost_shard_is_told_with_the_coverage_and_a_partial_answer_must_be_asked_for(tmp_path: Path) -> None:
    config = CollectionConfig(3, metric="l2", shards=2, index=FLAT)
    points = random_points(config, 60)
    kept = points_of_shard(points, 2, 0)
    share = len(kept) / len(points)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, points)
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        coverage = {"shards": 0.5, "points": pytest.approx(share), "missing": [1]}
        for body in ({"vector": GOOD}, {"vector": GOOD, "min_coverage": 0.51}):
            response = await endpoint.search("words", **body)
            answer = problem(response, 503)
            assert answer["coverage"] == coverage
            assert "shard 1" in answer["detail"]
            assert int(response.headers["retry-after"]) >= 1
        expected = brute_force(kept, np.array([GOOD], np.float32), 10, "l2")
        for min_coverage in (0.5, 0.0):
            response = await endpoint.search("words", vector=GOOD, min_coverage=min_coverage)
            assert response.status_code == 200
            assert response.json()["coverage"] == coverage
            assert hit_ids(response.json()) == expected
        arrow = arrow_stream(np.array([GOOD], np.float32))
        table = read_stream(await endpoint.search_arrow("words", arrow, ARROW, min_coverage=0.5))
        assert json.loads(table.schema.metadata[b"coverage"])["missing"] == [1]
        problem(await endpoint.search_arrow("words", arrow, ARROW), 503)
        endpoint.eagleray.runtime.revive(ReplicaKey("words", 1, 0))
        await endpoint.served("words")
        assert (await endpoint.search("words", vector=GOOD)).json()["coverage"]["shards"] == 1.0

    run_with_endpoint(scenario, tmp_path)


def test_no_shard_answering_is_unavailable_even_without_a_coverage_floor(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        response = await endpoint.search("words", vector=GOOD, min_coverage=0, timeout_ms=1_000)
        assert problem(response, 503)["coverage"] == {"shards": 0.0, "points": 0.0, "missing": [0]}

    with_words(scenario, tmp_path)


def test_second_replica_answers_for_a_killed_one(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        for _ in range(4):
            assert (await endpoint.search("words", vector=GOOD, timeout_ms=5_000)).status_code == 200

    with_words(scenario, tmp_path, replicas=2)


def test_shard_that_hangs_is_given_up_at_the_timeout(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        answer = problem(await endpoint.http.post(SEARCH, json={"vector": GOOD, "timeout_ms": 50}), 503)
        assert answer["coverage"]["missing"] == [0]
        assert "50 ms" in answer["detail"]

    with_words(scenario, tmp_path)


def test_full_queue_is_too_many_requests(tmp_path: Path) -> None:
    limits = Limits(queued_vectors_per_shard=2, calls_in_flight_per_replica=1, batch_vectors=1)

    async def scenario(endpoint: Endpoint) -> None:
        endpoint.eagleray.runtime.hang(ReplicaKey("words", 0, 0))
        waiting = [asyncio.ensure_future(endpoint.search("words", vector=GOOD)) for _ in range(8)]
        await until(lambda: sum(call.done() for call in waiting) >= 5)
        refused = [call.result() for call in waiting if call.done()]
        for response in refused:
            assert "queued_vectors_per_shard" in problem(response, 429)["detail"]
            assert response.headers["retry-after"] == "1"
        endpoint.eagleray.runtime.revive(ReplicaKey("words", 0, 0))
        statuses = [response.status_code for response in await asyncio.gather(*waiting)]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) in (2, 3)  # the first one may have left before the others came

    with_words(scenario, tmp_path, limits=limits)
