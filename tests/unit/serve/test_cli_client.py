"""`serve.client.Client` against the endpoint, through a real socket on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from cluster.config import CollectionConfig, IndexConfig, Limits
from cluster.errors import Conflict, EaglerayError, Exhausted, Invalid, NotFound, Unavailable
from cluster.placement import ReplicaKey
from serve.client import Client
from tests.unit.actors.points import brute_force, random_points
from tests.unit.serve.endpoint import Endpoint, EndpointOptions, memory_url, pass_over_unread_calls, running_endpoint

CONFIG = CollectionConfig(3, metric="l2", shards=2, index=IndexConfig(kind="flat"))
POINTS = random_points(CONFIG, 25)
DEFAULT_LIMITS = Limits()


class ListeningEndpoint:
    """An endpoint in a thread of its own that listens on a port of the operating system's choice."""

    def __init__(self, cache_dir: Path, limits: Limits) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._cache_dir = cache_dir
        self._options = EndpointOptions(limits)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.endpoint: Endpoint
        self.target = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(20)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        asyncio.get_running_loop().set_exception_handler(pass_over_unread_calls)
        async with running_endpoint(memory_url(), self._cache_dir, self._options) as self.endpoint:
            await self.endpoint.publish("words", CONFIG, POINTS)
            self._server = uvicorn.Server(uvicorn.Config(self.endpoint.app, lifespan="off", log_level="error"))
            self._started.set()
            await self._server.serve([self._socket])


@contextmanager
def listening(tmp_path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[tuple[Client, Endpoint]]:
    server = ListeningEndpoint(tmp_path, limits)
    server.start()
    client = Client(server.target)
    try:
        yield client, server.endpoint
    finally:
        client.close()
        server.stop()


def test_client_creates_lists_describes_and_deletes(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, _):
        created = client.create("others", {"dimension": 2})
        assert client.collection("others") == created
        assert [collection["name"] for collection in client.collections()] == ["others", "words"]
        client.delete("others")
        assert [collection["name"] for collection in client.collections()] == ["words"]


def test_client_searches_and_fetches(tmp_path: Path) -> None:
    queries = POINTS.vectors[:4]
    with listening(tmp_path) as (client, _):
        answer = client.search("words", queries, k=3, with_attributes=["name"])
        found = [[hit["id"] for hit in hits] for hits in answer["results"]]
        assert found == brute_force(POINTS, queries, 3, "l2")
        point_id = POINTS.ids[2].as_py()
        assert client.fetch("words", [point_id])["points"][0]["attributes"] == {"name": f"name of {point_id}"}
        vector = client.vector_of("words", point_id)
        assert vector.dtype == np.float32
        assert vector.tolist() == [POINTS.vectors[2].tolist()]
        with pytest.raises(NotFound, match="10000000"):
            client.vector_of("words", 10_000_000)


@pytest.mark.parametrize(
    ("expected", "method", "path", "body"),
    [
        (Invalid, "PUT", "/v1/collections/words", {"dimension": 0}),
        (Invalid, "GET", "/v1/collections/WORDS", None),
        (NotFound, "GET", "/v1/collections/nothing", None),
        (NotFound, "GET", "/v1/jobs/import-1", None),
        (Conflict, "PUT", "/v1/collections/words", {"dimension": 9}),
        (Exhausted, "POST", "/v1/collections/words/points:search", {"vector": [1.0] * 1_000}),
    ],
)
def test_problem_comes_back_as_the_error_it_was(
    expected: type[EaglerayError], method: str, path: str, body: Any, tmp_path: Path
) -> None:
    with listening(tmp_path, Limits(body_bytes=1_000)) as (client, _):
        with pytest.raises(expected) as error:
            client.call(method, path, body)
        assert type(error.value) is expected
        assert not str(error.value).startswith("{")


def test_unavailable_shard_comes_back_as_unavailable(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        endpoint.eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        with pytest.raises(Unavailable, match="coverage"):
            client.search("words", POINTS.vectors[:1])


def test_endpoint_that_does_not_listen_is_unavailable_and_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}")
    with pytest.raises(Unavailable, match="eagleray up"):
        client.collections()
    client.close()


def test_client_follows_a_job_to_its_end(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):
        seen: list[str] = []

        def listener(status: dict[str, Any]) -> None:
            seen.append(status["state"])
            if status["state"] == "pending":  # what Ray does with a submitted job
                endpoint.jobs.run(status["job_id"], endpoint.data)

        body = {"kind": "import", "source": str(tmp_path / "nowhere.parquet")}
        with pytest.raises(Invalid, match=r"failed: .*nowhere\.parquet"):
            client.run_job("words", body, listener)
        assert seen == ["pending", "failed"]


def test_client_tells_of_a_stopped_job(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, endpoint):

        def listener(status: dict[str, Any]) -> None:
            endpoint.jobs.stop_job(status["job_id"])

        with pytest.raises(Invalid, match="stopped"):
            client.run_job("words", {"kind": "import", "source": "rows.parquet"}, listener)
