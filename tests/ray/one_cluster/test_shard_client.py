"""The suite of `tests/contract/test_shard_client.py` against a real actor, by both ways to call it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray

from actors.direct_client import DirectShardClient, ShardConnection
from actors.ray_replica import ActorShardClient, answer
from actors.shard_client import ShardClient, ShardEndpoint
from actors.shard_server import ShardServer
from cluster.placement import ReplicaKey
from tests.contract.shard_clients import CASES, EchoReplica

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("one_cluster")]
KEY = ReplicaKey("words", 2, 1)


class EchoActor(EchoReplica):
    """Its methods are for actor calls; beside them a server takes direct ones."""

    def __init__(self) -> None:
        super().__init__()
        server = ShardServer(EchoReplica(), KEY, 64 * 1024 * 1024)  # one of its own: its events belong to one loop
        self._endpoint = server.start(ray.util.get_node_ip_address(), range(0))

    async def endpoint(self) -> ShardEndpoint:
        return self._endpoint


@pytest.fixture
def actor(cluster: None) -> Iterator[Any]:
    handle = ray.remote(num_cpus=0)(EchoActor).remote()
    yield handle
    ray.kill(handle)


@pytest.mark.parametrize("transport", ["direct", "actor"])
def test_shard_client(transport: str, actor: Any) -> None:
    async def run_all() -> None:
        for case in CASES:
            print(case.__name__)
            async with asyncio.timeout(60.0):
                await run(case)

    async def run(case: Callable[[ShardClient], Awaitable[None]]) -> None:
        if transport == "actor":
            await case(ActorShardClient(actor, KEY))
            return
        connection = ShardConnection(KEY, await answer(actor.endpoint.remote(), "the actor"))
        await case(DirectShardClient(connection))
        connection.close()

    asyncio.run(run_all())
