from __future__ import annotations

import asyncio
from pathlib import Path

from cluster import paths
from cluster.config import CollectionConfig
from cluster.placement import ReplicaKey
from tests.unit.actors.points import commit, random_points
from tests.unit.serve.endpoint import Endpoint, problem, run_with_endpoint, until

CONFIG = CollectionConfig(3)


def unready(endpoint: Endpoint) -> dict[str, str]:
    table = endpoint.coordinator.table
    assert table is not None
    return table.unready


def test_endpoint_is_alive_and_not_ready_before_it_reached_the_supervisor(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        alive = await endpoint.http.get("/healthz")
        assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
        response = await endpoint.http.get("/readyz")
        assert "supervisor" in problem(response, 503)["detail"]
        assert response.headers["retry-after"] == "1"
        for path in ("/v1/collections", "/metrics"):
            problem(await endpoint.http.get(path), 503)

    run_with_endpoint(scenario, tmp_path, follow=False)


def test_endpoint_without_collections_is_ready(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        ready = await endpoint.http.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})

    run_with_endpoint(scenario, tmp_path)


def test_endpoint_is_unready_with_reasons_while_replicas_are_missing(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for name in ("words", "names"):
            await endpoint.publish(name, CollectionConfig(3, replicas=2), random_points(CONFIG, 5))
        assert (await endpoint.http.get("/readyz")).status_code == 200
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 0, 1))
        endpoint.eagleray.runtime.kill(ReplicaKey("names", 0, 0))
        await until(lambda: unready(endpoint).keys() == {"words", "names"})
        detail = problem(await endpoint.http.get("/readyz"), 503)["detail"]
        first, second = detail.split("; ")
        assert first.startswith("names: ")
        assert second.startswith("words: ")
        assert "dead" in first
        described = (await endpoint.http.get("/v1/collections/words")).json()
        assert (described["ready"], described["reason"]) == (False, second.removeprefix("words: "))
        states = [replica["state"] for replica in described["shards"][0]["replicas"]]
        assert states == ["ready", "unreachable"]
        assert (await endpoint.http.get("/healthz")).status_code == 200
        for key in (ReplicaKey("words", 0, 1), ReplicaKey("names", 0, 0)):
            endpoint.eagleray.runtime.revive(key)
        await until(lambda: not unready(endpoint))
        assert (await endpoint.http.get("/readyz")).status_code == 200

    run_with_endpoint(scenario, tmp_path)


def test_broken_manifest_makes_the_endpoint_unready_and_names_the_object(tmp_path: Path) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        await asyncio.to_thread(commit, endpoint.store, "words", CONFIG, random_points(CONFIG, 5))
        endpoint.store.put(paths.manifest("words", 1), b"{}")
        await endpoint.eagleray.directory.refresh("words")
        await until(lambda: "words" in unready(endpoint))
        assert paths.manifest("words", 1) in problem(await endpoint.http.get("/readyz"), 503)["detail"]
        response = await endpoint.search("words", vector=[1, 0, 0])
        assert "not ready" in problem(response, 503)["detail"]

    run_with_endpoint(scenario, tmp_path)
