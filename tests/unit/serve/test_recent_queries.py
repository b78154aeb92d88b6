"""Samples of recent queries from searches over HTTP to the next import, and their end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.recent_queries import QuerySample, decode_queries, store_queries
from cluster.segment import SegmentDescription
from serve import query_samples
from serve.query_samples import QuerySamples
from tests.fakes import FaultyStore
from tests.unit.actors.points import keys, random_points, random_vectors
from tests.unit.serve.endpoint import (
    Endpoint,
    EndpointOptions,
    another_endpoint,
    memory_url,
    problem,
    run_with_endpoint,
    until,
)

CONFIG = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))
NORMALISED = CollectionConfig(4, index=IndexConfig(kind="flat"))
KEY = paths.recent_queries("words", "endpoint-1")


def samples_of(endpoint: Endpoint, store: Any = None) -> QuerySamples:
    """As the app makes them, but left when a test says so."""
    services = endpoint.services
    recent_queries = services.limits.recent_queries
    return QuerySamples(services.coordinator, store or services.store, services.name, recent_queries)


async def ask(endpoint: Endpoint, vectors: Any, collection: str = "words", **options: Any) -> None:
    response = await endpoint.search(collection, vectors=np.asarray(vectors).tolist(), **options)
    assert response.status_code == 200, response.text


def stored_vectors(endpoint: Endpoint, key: str = KEY) -> list[list[float]]:
    return sorted(decode_queries(endpoint.store.get(key), key).vectors.tolist())


def test_samples_are_left_now_and_then_with_the_vectors_as_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_samples, "PERIOD_S", 0.005)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", NORMALISED, random_points(NORMALISED, 20))
        await ask(endpoint, [[3.0, 0.0, 4.0, 0.0]])
        await until(lambda: keys(endpoint.store, paths.queries_prefix("words")) == [KEY])
        assert stored_vectors(endpoint) == [np.array([0.6, 0.0, 0.8, 0.0], np.float32).tolist()]
        await ask(endpoint, [[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 7.0]])
        await until(lambda: len(stored_vectors(endpoint)) == 3)

    run_with_endpoint(scenario, tmp_path)


def test_samples_are_left_when_the_endpoint_ends(tmp_path: Path) -> None:
    data = memory_url()
    queries = random_vectors(CONFIG, 5, seed=3)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, random_points(CONFIG, 20))
        async with another_endpoint(endpoint.eagleray, data, EndpointOptions(name="endpoint-2")) as other:
            await ask(other, queries)
            assert keys(endpoint.store, paths.queries_prefix("words")) == []
        key = paths.recent_queries("words", "endpoint-2")
        assert stored_vectors(endpoint, key) == sorted(queries.tolist())

    run_with_endpoint(scenario, tmp_path, data)


def test_unchanged_samples_are_not_stored_again(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, random_points(CONFIG, 20))
        store = FaultyStore(endpoint.store, counted=frozenset({"put"}))
        samples = samples_of(endpoint, store)
        await ask(endpoint, random_vectors(CONFIG, 2, seed=1))
        for _ in range(3):
            await samples.leave()
        assert store.calls == 1
        await ask(endpoint, random_vectors(CONFIG, 1, seed=2))
        await samples.leave()
        assert store.calls == 2

    run_with_endpoint(scenario, tmp_path)


def test_sample_that_could_not_be_stored_is_logged_and_stored_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("birds", "words"):
            await endpoint.publish(name, CONFIG, random_points(CONFIG, 20))
            await ask(endpoint, random_vectors(CONFIG, 2, seed=1), collection=name)
        samples = samples_of(endpoint, FaultyStore(endpoint.store, at=1, counted=frozenset({"put"})))
        await samples.leave()
        assert keys(endpoint.store, paths.queries_prefix("birds")) == []
        assert keys(endpoint.store, paths.queries_prefix("words")) == [KEY]
        assert "the sample of recent queries of 'birds': put collections/birds/queries/" in caplog.text
        await samples.leave()
        assert len(keys(endpoint.store, paths.queries_prefix("birds"))) == 1

    run_with_endpoint(scenario, tmp_path)


def test_error_of_an_unknown_kind_is_logged_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_samples, "PERIOD_S", 0.005)
    broken = [True]

    def store(*arguments: Any) -> None:
        if broken:
            broken.clear()
            raise RuntimeError("a bug")
        store_queries(*arguments)

    monkeypatch.setattr(query_samples, "store_queries", store)

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, random_points(CONFIG, 20))
        await ask(endpoint, random_vectors(CONFIG, 2, seed=1))
        await until(lambda: keys(endpoint.store, paths.queries_prefix("words")) == [KEY])
        assert "RuntimeError: a bug" in caplog.text

    run_with_endpoint(scenario, tmp_path)


def test_deleting_a_collection_deletes_its_queries_of_all_coordinators(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("birds", "words"):
            await endpoint.publish(name, CONFIG, random_points(CONFIG, 20))
            await ask(endpoint, random_vectors(CONFIG, 2, seed=1), collection=name)
        samples = samples_of(endpoint)
        await samples.leave()
        store_queries(endpoint.store, "words", "endpoint-2", QuerySample(random_vectors(CONFIG, 3, seed=1), "l2"))
        assert len(keys(endpoint.store, paths.queries_prefix("words"))) == 2
        assert (await endpoint.http.delete("/v1/collections/words")).status_code == 204
        await samples.leave()
        assert keys(endpoint.store, paths.queries_prefix("words")) == []
        assert len(keys(endpoint.store, paths.queries_prefix("birds"))) == 1
        await endpoint.create("words", dimension=4, metric="l2")
        await samples.leave()
        assert keys(endpoint.store, paths.queries_prefix("words")) == []

    run_with_endpoint(scenario, tmp_path)


class SlowStore:
    """A put of queries waits until the collection is deleted."""

    def __init__(self, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        self._endpoint = endpoint
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._endpoint.store, name)

    def put(self, key: str, data: bytes) -> None:
        deleting = asyncio.run_coroutine_threadsafe(self._endpoint.http.delete("/v1/collections/words"), self._loop)
        assert deleting.result(30.0).status_code == 204
        self._endpoint.store.put(key, data)


def test_sample_that_is_stored_while_its_collection_is_deleted_does_not_stay(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, random_points(CONFIG, 20))
        await ask(endpoint, random_vectors(CONFIG, 2, seed=1))
        await samples_of(endpoint, SlowStore(endpoint, asyncio.get_running_loop())).leave()
        problem(await endpoint.http.get("/v1/collections/words"), 404)
        assert keys(endpoint.store, paths.queries_prefix("words")) == []

    run_with_endpoint(scenario, tmp_path)


def test_endpoint_that_is_to_keep_none_deletes_what_was_kept(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.publish("words", CONFIG, random_points(CONFIG, 20))
        store_queries(endpoint.store, "words", "endpoint-0", QuerySample(random_vectors(CONFIG, 3, seed=1), "l2"))
        await ask(endpoint, random_vectors(CONFIG, 2, seed=1))
        store = FaultyStore(endpoint.store, counted=frozenset({"objects", "put"}))
        samples = samples_of(endpoint, store)
        for _ in range(3):
            await samples.leave()
        assert keys(endpoint.store, paths.queries_prefix("words")) == []
        assert store.calls == 1, "it was looked for more than once"

    run_with_endpoint(scenario, tmp_path, limits=Limits(recent_queries=0))


def test_import_over_http_is_tuned_on_what_was_searched_before(tmp_path: Path) -> None:
    """The whole way: searches, the sample, the next import, and what its segments tell."""
    vectors = random_vectors(CONFIG, 1_000, seed=5)
    pq.write_table(pa.table({"id": range(1_000), "vector": vectors_array(vectors)}), tmp_path / "words.parquet")
    data = (tmp_path / "data").as_uri()

    async def scenario(endpoint: Endpoint) -> None:
        await endpoint.create("words", dimension=4, metric="l2", index={"kind": "ivf_flat"})
        body = {"kind": "import", "source": str(tmp_path / "words.parquet")}
        for expected in ("100 rows with noise", "600 recent queries"):
            job = (await endpoint.http.post("/v1/collections/words/jobs", json=body)).json()["job_id"]
            assert (await endpoint.run_import(job)).state == "succeeded"
            (segment_id,) = [s for s in endpoint.store.folders(paths.segments_prefix("words")) if s.startswith(job)]
            key = paths.segment_file("words", segment_id, paths.DESCRIPTION)
            assert SegmentDescription.decode(endpoint.store.get(key), key).built["tuned_on"] == expected
            await ask(endpoint, random_vectors(CONFIG, 600, seed=6))
            await samples_of(endpoint).leave()

    run_with_endpoint(scenario, tmp_path, data)
