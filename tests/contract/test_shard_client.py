"""One suite for both ways to call a replica, here in one process; its namesake below `tests/ray` has a real actor."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from actors.direct_client import DirectShardClient, ShardConnection
from actors.ray_replica import ActorShardClient
from actors.shard_client import ShardClient
from actors.shard_server import ShardServer
from cluster.errors import EaglerayError
from cluster.placement import ReplicaKey
from tests.contract.shard_clients import CASES, EchoReplica

KEY = ReplicaKey("words", 2, 1)
FRAME_BYTES_MAX = 64 * 1024 * 1024
RUNNERS: dict[str, Callable[[Any], Any]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


class PicklingHandle:
    """An actor's handle whose actor is in this process; arguments and answers are pickled as between processes."""

    def __init__(self, replica: EchoReplica) -> None:
        self._replica = replica

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._replica, name))


class _Method:
    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self._method = method

    def remote(self, *args: Any) -> Awaitable[Any]:
        async def call() -> Any:
            try:
                return pickle.loads(pickle.dumps(await self._method(*pickle.loads(pickle.dumps(args)))))
            except EaglerayError as error:
                raise pickle.loads(pickle.dumps(error)) from None
            except ValueError as error:
                raise EaglerayError(repr(error)) from error  # as `answer` makes of Ray's error

        return call()


@asynccontextmanager
async def client_of(transport: str) -> AsyncIterator[ShardClient]:
    replica = EchoReplica()
    if transport == "actor":
        yield ActorShardClient(PicklingHandle(replica), KEY)
        return
    server = ShardServer(replica, KEY, FRAME_BYTES_MAX)
    connection = ShardConnection(KEY, server.start("127.0.0.1", range(0)))
    try:
        yield DirectShardClient(connection)
    finally:
        connection.close()
        await asyncio.to_thread(server.close)


@pytest.mark.parametrize("loop", RUNNERS)
@pytest.mark.parametrize("transport", ["direct", "actor"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_shard_client(case: Callable[[ShardClient], Awaitable[None]], transport: str, loop: str) -> None:
    async def run() -> None:
        async with asyncio.timeout(30.0), client_of(transport) as client:
            await case(client)

    RUNNERS[loop](run())
