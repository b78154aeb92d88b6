"""Searches whose bodies are Arrow streams: options, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Limits
from serve.arrow_bodies import ARROW
from tests.unit.actors.points import brute_force, random_points, random_vectors
from tests.unit.serve.endpoint import Endpoint, arrow_stream, hit_ids, problem, run_with_endpoint, stream_of

SEARCH = "/v1/collections/words/points:search"
CONFIG = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat", target_recall=1.0))
POINTS = random_points(CONFIG, 30)
QUERIES = random_vectors(CONFIG, 3, seed=5)
LIMITS = Limits(vectors_per_search=8, k=20, timeout_ms=20_000)
SEED = 20_240_601


def with_words(scenario: Any, tmp_path: Path, config: CollectionConfig = CONFIG, limits: Limits = LIMITS) -> None:
    async def run(endpoint: Endpoint) -> None:
        await endpoint.publish("words", config, POINTS)
        await scenario(endpoint)

    run_with_endpoint(run, tmp_path, limits=limits)


def column_stream(column: Any, name: str = "vector") -> bytes:
    batch = pa.record_batch([column], names=[name])
    return stream_of([batch], batch.schema)


def test_float16_vectors_are_searched_as_the_numbers_they_are(tmp_path: Path) -> None:
    halves = QUERIES.astype(np.float16)

    async def scenario(endpoint: Endpoint) -> None:
        expected = brute_force(POINTS, halves.astype(np.float32), 10, "l2")
        assert hit_ids((await endpoint.search_arrow("words", arrow_stream(halves))).json()) == expected

    with_words(scenario, tmp_path)


def test_batches_of_a_stream_are_one_request_and_empty_ones_do_not_count(tmp_path: Path) -> None:
    stream = arrow_stream(QUERIES[:0], QUERIES[:1], QUERIES[:0], QUERIES[1:])

    async def scenario(endpoint: Endpoint) -> None:
        expected = brute_force(POINTS, QUERIES, 10, "l2")
        assert hit_ids((await endpoint.search_arrow("words", stream)).json()) == expected

    with_words(scenario, tmp_path)


def test_sliced_vectors_are_read_from_their_own_place(tmp_path: Path) -> None:
    column = vectors_array(np.concatenate([np.full((2, 4), np.nan, np.float32), QUERIES])).slice(2)

    async def scenario(endpoint: Endpoint) -> None:
        expected = brute_force(POINTS, QUERIES, 10, "l2")
        assert hit_ids((await endpoint.search_arrow("words", column_stream(column))).json()) == expected

    with_words(scenario, tmp_path)


REFUSED_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("k", {"k": 0}),
    ("k", {"k": 21}),
    ("k", {"k": "ten"}),
    ("k", {"k": ""}),
    ("k", {"k": "9" * 30}),
    ("k", {"k": "9" * 5_000}),
    ("k", {"k": [3, 4]}),
    ("timeout_ms", {"timeout_ms": "nan"}),
    ("timeout_ms", {"timeout_ms": "inf"}),
    ("timeout_ms", {"timeout_ms": 20_001}),
    ("min_coverage", {"min_coverage": "nan"}),
    ("min_coverage", {"min_coverage": 2}),
    ("nprobe", {"nprobe": 0}),
    ("params.nprobe", {"nprobe": 4}),
    ("params.ef_search", {"ef_search": 4}),
    ("nprobe", {"nprobe": 4, "exact": "true"}),
    ("target_recall", {"target_recall": 0.9, "exact": "1"}),
    ("ef_search", {"ef_search": 4, "target_recall": 0.9}),
    ("target_recall", {"target_recall": "nan"}),
    ("target_recall", {"target_recall": 1.5}),
    ("rerank", {"rerank": "inf"}),
    ("rerank", {"rerank": 0.5}),
    ("exact", {"exact": "perhaps"}),
    ("with_vectors", {"with_vectors": "perhaps"}),
    ("with_attributes", {"with_attributes": "name,title"}),
    ("pretty", {"pretty": "1"}),
    ("params", {"params": "{}"}),
    ("vector", {"vector": "[1,2,3,4]"}),
]


def test_wrong_url_parameter_is_named(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for field, options in REFUSED_OPTIONS:
            problem(await endpoint.search_arrow("words", arrow_stream(QUERIES), **options), 400, field)
        assert (await endpoint.search_arrow("words", arrow_stream(QUERIES), k=20)).status_code == 200

    with_words(scenario, tmp_path)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_that_are_not_finite_are_named_by_position(wrong: float, dtype: type, tmp_path: Path) -> None:
    vectors: NDArray[Any] = QUERIES.astype(dtype)
    vectors[2, 3] = wrong

    async def scenario(endpoint: Endpoint) -> None:
        problem(await endpoint.search_arrow("words", arrow_stream(vectors)), 400, "vector[2]")
        problem(await endpoint.search_arrow("words", arrow_stream(vectors[:2], vectors[2:])), 400, "vector[2]")

    with_words(scenario, tmp_path)


def test_zero_vector_is_refused_under_cosine_only(tmp_path: Path) -> None:
    vectors = QUERIES.copy()
    vectors[1] = 0.0
    cosine = CollectionConfig(4, index=CONFIG.index)

    async def scenario(endpoint: Endpoint) -> None:
        assert (await endpoint.search_arrow("words", arrow_stream(vectors))).status_code == 200
        await endpoint.publish("angles", cosine, random_points(cosine, 5))
        problem(await endpoint.search_arrow("angles", arrow_stream(vectors)), 400, "vector[1]")

    with_words(scenario, tmp_path)


REFUSED_STREAMS: dict[str, tuple[str, bytes]] = {
    "empty body": ("body", b""),
    "not Arrow": ("body", b"ARROW1 but not really, and of some length"),
    "JSON": ("body", b'{"vector": [1, 2, 3, 4]}'),
    "Arrow file": ("body", b"ARROW1\0\0" + arrow_stream(QUERIES)),
    "another column name": ("body", arrow_stream(QUERIES, name="vectors")),
    "no column": ("body", stream_of([pa.record_batch([], names=[])], pa.schema([]))),
    "nothing at all": ("vector", stream_of([], pa.schema([]))),
    "schema only": ("vector", stream_of([], pa.schema([("vector", pa.list_(pa.float32(), 4))]))),
    "no row": ("vectors", arrow_stream(QUERIES[:0])),
    "too many rows": ("vectors", arrow_stream(np.ones((9, 4), np.float32))),
    "too many rows in batches": ("vectors", arrow_stream(*[QUERIES] * 3)),
    "wrong dimension": ("vector", arrow_stream(np.ones((1, 5), np.float32))),
    "dimension 0": ("vector", column_stream(pa.array([[], []], pa.list_(pa.float32(), 0)))),
    "float64": ("vector", arrow_stream(QUERIES.astype(np.float64))),
    "int8": ("vector", column_stream(pa.array([[1, 2, 3, 4]], pa.list_(pa.int8(), 4)))),
    "variable list": ("vector", column_stream(pa.array([[1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float32())))),
    "flat floats": ("vector", column_stream(pa.array([1.0, 2.0], pa.float32()))),
    "text": ("vector", column_stream(pa.array(["[1,2,3,4]"]))),
    "null vector": ("vector", column_stream(pa.array([[1.0] * 4, None], pa.list_(pa.float32(), 4)))),
    "null number": ("vector", column_stream(pa.array([[1.0, 2.0, None, 4.0]], pa.list_(pa.float32(), 4)))),
    "lz4": ("body", arrow_stream(QUERIES, compression="lz4")),
    "zstd": ("body", arrow_stream(QUERIES, QUERIES, compression="zstd")),
}


def two_columns() -> bytes:
    batch = pa.record_batch([vectors_array(QUERIES), pa.array([1, 2, 3])], names=["vector", "id"])
    return stream_of([batch], batch.schema)


def same_column_twice() -> bytes:
    batch = pa.record_batch([vectors_array(QUERIES), vectors_array(QUERIES)], names=["vector", "vector"])
    return stream_of([batch], batch.schema)


def test_wrong_stream_is_refused(tmp_path: Path) -> None:
    more = {"two columns": ("body", two_columns()), "twice": ("body", same_column_twice())}

    async def scenario(endpoint: Endpoint) -> None:
        for field, body in (REFUSED_STREAMS | more).values():
            problem(await endpoint.search_arrow("words", body), 400, field)

    with_words(scenario, tmp_path)


def test_compressed_stream_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = arrow_stream(np.ones((200_000, 64), np.float32), compression="zstd")
    assert len(bomb) < 10_000

    async def scenario(endpoint: Endpoint) -> None:
        before = pa.default_memory_pool().max_memory()
        answer = problem(await endpoint.search_arrow("words", bomb), 400, "body")
        assert "compress" in answer["detail"]
        assert pa.default_memory_pool().max_memory() - before < 10_000_000

    with_words(scenario, tmp_path)


def test_truncated_stream_is_refused_or_ends_at_a_whole_batch(tmp_path: Path) -> None:
    whole = arrow_stream(QUERIES, QUERIES)
    expected = brute_force(POINTS, QUERIES, 10, "l2")

    async def scenario(endpoint: Endpoint) -> None:
        answers = set()
        for length in range(0, len(whole), 8):
            response = await endpoint.search_arrow("words", whole[:length])
            if response.status_code == 200:
                assert hit_ids(response.json()) in (expected, expected * 2)
            else:
                body = problem(response, 400, *(error["field"] for error in response.json()["errors"]))
                assert {error["field"] for error in body["errors"]} <= {"body", "vector"}
            answers.add(response.status_code)
        assert answers == {200, 400}

    with_words(scenario, tmp_path)


def test_damaged_stream_is_answered_or_refused_but_never_fails(tmp_path: Path) -> None:
    whole = arrow_stream(QUERIES, QUERIES)
    chance = random.Random(SEED)
    damaged = []
    for position in range(0, len(whole), 2):
        flipped = bytearray(whole)
        flipped[position] ^= chance.randrange(1, 256)
        damaged.append(bytes(flipped))
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(chance.randrange(2, 8)):
            flipped[chance.randrange(len(whole))] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        damaged.append(bytes(flipped))

    async def scenario(endpoint: Endpoint) -> None:
        statuses = []
        for body in damaged:
            response = await endpoint.search_arrow("words", body)
            statuses.append(response.status_code)
            assert response.status_code in (200, 400), (SEED, body.hex(), response.text)
        assert {200, 400} == set(statuses)

    with_words(scenario, tmp_path)


def test_arrow_content_type_is_read_without_case_or_parameters(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for content_type in (ARROW, f"{ARROW.upper()}; version=5"):
            headers = {"Content-Type": content_type}
            response = await endpoint.http.post(SEARCH, content=arrow_stream(QUERIES), headers=headers)
            assert response.status_code == 200

    with_words(scenario, tmp_path)
