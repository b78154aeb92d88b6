"""The direct connection between processes that Ray started: endpoints in the serving table, and kills under load."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import ray_runtime
from actors.direct_client import DirectShardClient
from actors.ray_replica import ActorShardClient
from actors.replica_set import ReplicaSet
from actors.shard_client import ServingTable
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Settings
from cluster.manifest import ManifestLog
from cluster.object_store import open_store
from cluster.placement import ReplicaKey
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.write import PointWrite, WriteOutcome

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("one_cluster")]
KEYS = (ReplicaKey("words", 0, 0), ReplicaKey("words", 0, 1))
NEAREST = SearchGroup(0, 1, 1, SearchParams())


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """Of an Eagleray with an empty collection of one shard and two replicas; its actors are ended after the test."""
    config = CollectionConfig(dimension=2, metric="l2", replicas=2)
    ManifestLog(open_store(str(tmp_path)), "words", lambda: uuid.uuid4().hex).create(config)
    settings = Settings(str(tmp_path), f"eagleray-{tmp_path.name}", 0.0, shard_transport=request.param)
    yield settings
    ray_runtime.stop_actors(settings.namespace)


async def table_when(directory: ray_runtime.RayDirectory, wanted: Any, stamp: str | None = None) -> ServingTable:
    while not wanted(table := await directory.next_table(stamp)):
        stamp = table.stamp
    return table


def complete(table: ServingTable) -> bool:
    """Both replicas serve, and one leads."""
    served = table.collections.get("words")
    return served is not None and served.replicas[0] == KEYS and 0 in served.primaries


def near(number: int, min_lsn: int = 0) -> ShardSearch:
    return ShardSearch(1, np.full((1, 2), number, np.float32), (NEAREST,), 20.0, min_lsn)


async def write_points(directory: ray_runtime.RayDirectory, table: ServingTable, count: int) -> int:
    """Point i at (i, i); the LSN of the write."""
    vectors = np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, axis=1)
    batch = pa.record_batch([pa.array(range(count)), vectors_array(vectors)], names=["id", "vector"])
    (outcome,) = await directory.client(table.collections["words"].primaries[0]).write([PointWrite(batch)])
    assert isinstance(outcome, WriteOutcome), outcome
    return outcome.lsn


@pytest.mark.parametrize("settings", ["direct"], indirect=True)
def test_killed_replica_under_load_fails_no_search_and_is_reached_again(settings: Settings) -> None:
    async def test() -> None:
        directory = ray_runtime.RayDirectory(await ray_runtime.ensure_supervisor(settings), settings.namespace)
        before = await table_when(directory, complete)
        assert all(isinstance(directory.client(key), DirectShardClient) for key in KEYS)
        lsn = await write_points(directory, before, 10)
        replicas = ReplicaSet(directory.client, time.monotonic)
        replicas.update(KEYS)
        stop, answered = asyncio.Event(), 0

        async def search_on(number: int) -> None:
            nonlocal answered
            while not stop.is_set():
                (hits,) = await replicas.call(lambda client: client.search(near(number, lsn)), 20.0)
                assert isinstance(hits, Hits), hits
                assert hits.ids.to_pylist() == [number]
                answered += 1

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(search_on(number))
            while answered < 200:
                await asyncio.sleep(0.001)
            described = await directory.describe("words")
            os.kill(described["statuses"][KEYS[0]].pid, signal.SIGKILL)
            at_the_kill = answered
            after = await table_when(
                directory, lambda t: complete(t) and t.endpoints[KEYS[0]] != before.endpoints[KEYS[0]], before.stamp
            )
            assert answered > at_the_kill
            replicas.update(KEYS)
            stop.set()
        (hits,) = await directory.client(KEYS[0]).search(near(3, lsn))
        assert isinstance(hits, Hits)
        assert hits.ids.to_pylist() == [3]
        assert isinstance(directory.client(KEYS[0]), DirectShardClient)
        assert after.endpoints[KEYS[1]] == before.endpoints[KEYS[1]]
        for endpoint in (*before.endpoints.values(), *after.endpoints.values()):
            assert endpoint.secret not in pickle.dumps(described)
        directory.close()

    asyncio.run(asyncio.wait_for(test(), 90.0))


@pytest.mark.parametrize("settings", ["actor"], indirect=True)
def test_transport_by_actor_calls_opens_no_port(settings: Settings) -> None:
    async def test() -> None:
        directory = ray_runtime.RayDirectory(await ray_runtime.ensure_supervisor(settings), settings.namespace)
        table = await table_when(directory, complete)
        assert table.endpoints == {}
        lsn = await write_points(directory, table, 10)
        client = directory.client(KEYS[1])
        assert isinstance(client, ActorShardClient)
        (hits,) = await client.search(near(7, lsn))
        assert isinstance(hits, Hits)
        assert hits.ids.to_pylist() == [7]
        directory.close()

    asyncio.run(asyncio.wait_for(test(), 90.0))
