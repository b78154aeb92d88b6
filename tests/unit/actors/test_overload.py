"""An endpoint under more searches than it can answer, in virtual time: the same on every machine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.coordinator import Coordinator
from actors.shard_client import ServedCollection, ServingTable
from cluster.config import CollectionConfig, Limits
from cluster.errors import EaglerayError, Exhausted
from cluster.placement import ReplicaKey
from cluster.query import Hits, Query, ShardSearch
from cluster.routing import Routing
from tests.unit.actors.virtual_time import in_virtual_time, work

CLIENTS = 256
REFUSAL_S = 0.000_06
ON_THE_WAY_S = 0.000_1  # from an answer to the client's next request
SECONDS = 0.5
SEED = 7


class SteadyShard:
    """A `ShardClient` that answers one call after the other, each after `call_s` and `vector_s` for every vector."""

    def __init__(self, vector_s: float, call_s: float = 0.000_2) -> None:
        self.vector_s = vector_s
        self._call_s = call_s
        self._free_at = 0.0
        self.largest_call = 0

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        loop, count = asyncio.get_running_loop(), len(request.vectors)
        self.largest_call = max(self.largest_call, count)
        self._free_at = max(loop.time(), self._free_at) + self._call_s + count * self.vector_s
        await asyncio.sleep(self._free_at - loop.time())
        return tuple(_hits(group.stop - group.start) for group in request.groups)


def _hits(count: int) -> Hits:
    return Hits(np.ones(count, np.int64), pa.array(np.zeros(count, np.int64)), np.zeros(count, np.float32))


class SteadyDirectory:
    """A `Directory` of collections of one shard each."""

    def __init__(self, shards: dict[str, SteadyShard]) -> None:
        self.shards = shards
        config = CollectionConfig(2, metric="l2")
        replicas = {name: {0: (ReplicaKey(name, 0, 0),)} for name in shards}
        served = {n: ServedCollection(config, Routing(1), 1, 1, {0: 9}, {}, r) for n, r in replicas.items()}
        self.table = ServingTable("1", served)

    def client(self, key: ReplicaKey) -> SteadyShard:
        return self.shards[key.collection]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a search does not need {name}")


class NoObserver:
    def batch(self, collection: str, shard: int, vectors: int) -> None: ...


@dataclass
class Outcomes:
    latencies_s: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    @property
    def p99_s(self) -> float:
        return float(np.percentile(self.latencies_s, 99))


class Endpoint:
    """A coordinator with HTTP around it, which keeps the event loop busy for `work_s` per request."""

    def __init__(self, work_s: float, **shards: SteadyShard) -> None:
        directory = SteadyDirectory(shards)
        self._coordinator = Coordinator(directory, Limits(), NoObserver(), asyncio.get_running_loop().time)  # type: ignore[arg-type]
        self._coordinator.apply(directory.table)
        self._work_s = work_s

    async def request(self, name: str, due: float, outcomes: Outcomes, vectors: int = 1) -> None:
        """Latency is from when the request was due: that the loop is late counts."""
        try:
            with self._coordinator.admit(name):
                work(self._work_s / 2.0)
                await self._coordinator.search(name, Query(np.zeros((vectors, 2), np.float32)))
                work(self._work_s / 2.0)
        except Exhausted:
            work(REFUSAL_S)
            outcomes.refused += 1
        except EaglerayError:
            outcomes.failed += 1
        else:
            outcomes.latencies_s.append(asyncio.get_running_loop().time() - due)

    async def closed_loop(
        self, name: str, clients: int = CLIENTS, seconds: float = SECONDS, vectors: int = 1
    ) -> Outcomes:
        """Each client asks again when it has its answer."""
        loop, outcomes = asyncio.get_running_loop(), Outcomes()
        stop = loop.time() + seconds

        async def client() -> None:
            while (due := loop.time() + ON_THE_WAY_S) < stop:
                await asyncio.sleep(ON_THE_WAY_S)
                await self.request(name, due, outcomes, vectors)

        await asyncio.gather(*(client() for _ in range(clients)))
        return outcomes

    async def open_loop(self, name: str, per_second: float, seconds: float = SECONDS) -> Outcomes:
        """Requests come at random times, whatever becomes of those before."""
        loop, outcomes, tasks = asyncio.get_running_loop(), Outcomes(), []
        print("seed", SEED)
        gaps = np.random.default_rng(SEED).exponential(1.0 / per_second, int(per_second * seconds))
        for due in (loop.time() + np.cumsum(gaps)).tolist():  # what is due comes at once, as from ready sockets
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            tasks.append(asyncio.ensure_future(self.request(name, due, outcomes)))
        await asyncio.gather(*tasks)
        return outcomes


@pytest.mark.parametrize(
    ("work_s", "vector_s"),
    [(0.000_3, 0.000_1), (0.000_6, 0.000_05), (0.000_1, 0.000_6), (0.000_2, 0.000_25)],
    ids=["endpoint", "slow endpoint", "slow shard", "both"],
)
def test_twice_the_load_is_half_refused_and_the_rest_is_answered_nearly_as_fast(work_s: float, vector_s: float) -> None:
    async def scenario() -> tuple[Outcomes, Outcomes]:
        endpoint = Endpoint(work_s, words=SteadyShard(vector_s))
        saturated = await endpoint.closed_loop("words")
        return saturated, await endpoint.open_loop("words", 2.0 * len(saturated.latencies_s) / SECONDS)

    saturated, overloaded = in_virtual_time(scenario())
    assert (saturated.refused, saturated.failed, overloaded.failed) == (0, 0, 0)
    assert overloaded.p99_s < 2.0 * saturated.p99_s
    assert len(overloaded.latencies_s) > 0.75 * len(saturated.latencies_s)
    assert overloaded.refused > 0.5 * len(saturated.latencies_s)


def test_flood_on_one_collection_refuses_nobody_in_another() -> None:
    async def scenario() -> tuple[Outcomes, Outcomes]:
        endpoint = Endpoint(0.000_3, flood=SteadyShard(0.000_1), words=SteadyShard(0.000_1))
        flood = asyncio.ensure_future(endpoint.open_loop("flood", 6_000.0))
        return await endpoint.closed_loop("words", clients=64), await flood

    words, flood = in_virtual_time(scenario())
    assert (words.refused, words.failed) == (0, 0)
    assert flood.refused > 0
    assert len(words.latencies_s) > 300
    assert words.p99_s < 0.3


def test_single_searches_beside_large_ones_wait_for_about_what_a_replica_may_have_in_flight() -> None:
    async def scenario() -> tuple[Outcomes, Outcomes, SteadyShard]:
        shard = SteadyShard(0.000_1)
        endpoint = Endpoint(0.000_2, words=shard)
        await endpoint.closed_loop("words", clients=1, seconds=0.1)  # measures
        large = asyncio.ensure_future(endpoint.closed_loop("words", clients=4, vectors=1_000))
        return await endpoint.closed_loop("words", clients=4), await large, shard

    single, large, shard = in_virtual_time(scenario())
    assert (single.refused, single.failed, large.refused, large.failed) == (0, 0, 0, 0)
    assert shard.largest_call <= 125  # 25 ms are two calls of 12.5 ms
    assert single.p99_s < 0.040
    assert len(large.latencies_s) * 1_000 > 0.8 * SECONDS / shard.vector_s  # they have nearly all of the shard


def test_shard_that_was_slow_for_a_while_answers_what_it_can_and_is_trusted_again() -> None:
    async def scenario() -> tuple[Outcomes, Outcomes]:
        shard = SteadyShard(0.000_1)
        endpoint = Endpoint(0.000_1, words=shard)
        await endpoint.closed_loop("words", clients=8, seconds=0.1)
        shard.vector_s = 0.01
        slow = await endpoint.open_loop("words", 500.0, 5.0)
        shard.vector_s = 0.000_1
        await endpoint.closed_loop("words", clients=8, seconds=1.0)
        return slow, await endpoint.closed_loop("words")

    slow, after = in_virtual_time(scenario())
    assert len(slow.latencies_s) > 0.6 * 5.0 / 0.01
    assert slow.failed < 200  # of the first second, when nobody knew
    assert slow.refused > 1_500
    assert (after.refused, after.failed) == (0, 0)
    assert len(after.latencies_s) > 3_000 * SECONDS
