"""Where replicas take direct connections, as the supervisor publishes it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from actors.handshake import new_secret
from actors.replica import Replica
from actors.shard import ReplicaStatus
from actors.shard_client import ServingTable, ShardEndpoint
from cluster.config import CollectionConfig, IndexConfig
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey
from serve.descriptions import describe_collection
from tests.fakes import LocalRuntime, Serving, serving, table_when
from tests.unit.actors.points import commit, random_points

CONFIG = CollectionConfig(4, metric="l2", replicas=2, index=IndexConfig(kind="flat"))
ONE, OTHER = ReplicaKey("words", 0, 0), ReplicaKey("words", 0, 1)


class ListeningRuntime(LocalRuntime):
    """Every process of a replica has an endpoint with a secret of its own; those in `deaf` have none."""

    deaf: frozenset[ReplicaKey] = frozenset()

    async def status(self, key: ReplicaKey) -> ReplicaStatus:
        status = await super().status(key)
        return status if key in self.deaf else replace(status, endpoint=self.endpoint(self.replica(key)))

    def endpoint(self, replica: Replica) -> ShardEndpoint:
        if not hasattr(replica, "endpoint"):
            replica.endpoint = ShardEndpoint("127.0.0.1", 20_000, new_secret())  # type: ignore[attr-defined]
        return replica.endpoint  # type: ignore[attr-defined,no-any-return]


def with_two_replicas(tmp_path: Path, scenario: Callable[[Serving, ListeningRuntime], Awaitable[None]]) -> None:
    async def run() -> None:
        store = MemoryStore()
        commit(store, "words", CONFIG, random_points(CONFIG, 20, seed=1))
        runtime = ListeningRuntime(store, tmp_path)
        async with asyncio.timeout(20), serving(store, tmp_path, runtime=runtime) as eagleray:
            await scenario(eagleray, runtime)
        runtime.close()

    asyncio.run(run())


def complete(table: ServingTable) -> bool:
    return "words" in table.collections and table.collections["words"].replicas[0] == (ONE, OTHER)


def test_endpoints_of_all_replicas_are_published(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, runtime: ListeningRuntime) -> None:
        table = await table_when(eagleray.directory, complete)
        assert table.endpoints == {key: runtime.endpoint(runtime.replica(key)) for key in (ONE, OTHER)}

    with_two_replicas(tmp_path, scenario)


def test_replica_that_does_not_listen_has_no_endpoint(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, runtime: ListeningRuntime) -> None:
        runtime.deaf = frozenset({ONE})
        assert (await table_when(eagleray.directory, complete)).endpoints.keys() == {OTHER}

    with_two_replicas(tmp_path, scenario)


def test_endpoint_stays_while_a_replica_does_not_answer_and_is_replaced_by_its_next_process(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, runtime: ListeningRuntime) -> None:
        before = await table_when(eagleray.directory, complete)
        runtime.kill(ONE)
        without = await table_when(eagleray.directory, lambda table: not complete(table))
        assert without.endpoints == before.endpoints
        runtime.revive(ONE)
        after = await table_when(eagleray.directory, complete)
        assert after.endpoints[ONE] == runtime.endpoint(runtime.replica(ONE))
        assert after.endpoints[ONE] != before.endpoints[ONE]
        assert after.endpoints[OTHER] == before.endpoints[OTHER]

    with_two_replicas(tmp_path, scenario)


def test_restart_that_nobody_saw_is_published_by_its_endpoint(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, runtime: ListeningRuntime) -> None:
        before = await table_when(eagleray.directory, lambda table: complete(table) and 0 in primaries_in(table))
        del runtime.replica(ONE).endpoint  # type: ignore[attr-defined]
        after = await table_when(eagleray.directory, lambda table: table.endpoints[ONE] != before.endpoints[ONE])
        assert replace(after, stamp=before.stamp, endpoints=before.endpoints) == before

    with_two_replicas(tmp_path, scenario)


def primaries_in(table: ServingTable) -> dict[int, ReplicaKey]:
    return table.collections["words"].primaries


def test_descriptions_have_no_secrets(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, runtime: ListeningRuntime) -> None:
        table = await table_when(eagleray.directory, complete)
        facts = await eagleray.directory.describe("words")
        told = pickle.dumps(facts) + repr((facts, describe_collection(facts, None), table)).encode()
        for endpoint in table.endpoints.values():
            assert endpoint.secret not in told
            assert repr(endpoint.secret).encode() not in told

    with_two_replicas(tmp_path, scenario)
