"""`serve.client.Client` against the endpoint, through a real socket on a free loopback port."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from cluster.config import Limits
from cluster.errors import Conflict, EaglerayError, Exhausted, Invalid, NotFound, Unavailable
from cluster.placement import ReplicaKey
from serve.client import Client
from tests.unit.actors.points import brute_force
from tests.unit.serve.listening import POINTS, listening


def test_client_creates_lists_describes_and_deletes(tmp_path: Path) -> None:
    with listening(tmp_path) as (client, _):
        created = client.create("others", {"dimension": 2})
        same = {name: value for name, value in created.items() if name != "shards"}  # which get primaries meanwhile
        assert client.collection("others") == same | {"shards": ANY}
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


def test_client_upserts_and_deletes_points(tmp_path: Path) -> None:
    vectors = np.full((2, POINTS.vectors.shape[1]), 9.0, np.float32)
    ids = [10_000_000, POINTS.ids[0].as_py()]
    with listening(tmp_path) as (client, _):
        written = client.upsert("words", ids, vectors, [{"name": "new"}, {}], timeout_ms=20_000)
        assert written["upserted"] == 2
        (hits,) = client.search("words", vectors[:1], k=2, with_attributes=["name"], min_lsn=written["lsn"])["results"]
        assert {hit["id"]: hit["attributes"]["name"] for hit in hits} == {ids[0]: "new", ids[1]: None}
        assert client.upsert("words", ids[:1], vectors[:1])["upserted"] == 1
        assert client.delete_points("words", [*ids, 10_000_001])["deleted"] == 2


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
