"""CPU time that the coordinator itself spends on a single-vector search, by concurrency and shards.

    python -m benchmarks.coordinator_cost [--seconds 1.0] [--call-ms 1.0]

One process under uvloop; the shards are stand-ins which answer at once, or after `--call-ms`. What the stand-in itself
costs is measured alone and taken off. Ratios count, not absolutes: the machine is printed with them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import uvloop

from actors.coordinator import Coordinator
from actors.shard_client import CALL_TIMEOUT_S, ServedCollection, ServingTable
from cluster.config import CollectionConfig, Limits
from cluster.errors import EaglerayError
from cluster.placement import ReplicaKey
from cluster.query import Fetched, Hits, Query, SearchParams, ShardSearch
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome

DIMENSION, K = 784, 10
CONCURRENCY = (1, 8, 64, 256)
SHARDS = (1, 2)
BATCH_MAX = 4_096
WARM_UP = 1_000


class InstantShard:
    """A `ShardClient` whose answers were made beforehand; `call_s` is how long one call takes."""

    def __init__(self, shard: int, call_s: float) -> None:
        self.calls = 0
        self._call_s = call_s
        scores = np.arange(K, dtype=np.float32) * 2.0 + shard
        self._counts = np.full(BATCH_MAX, K, np.int64)
        self._ids = pa.array(np.tile(np.arange(K) * 2 + shard, BATCH_MAX))
        self._scores = np.tile(scores, BATCH_MAX)

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        self.calls += 1
        if self._call_s:
            await asyncio.sleep(self._call_s)
        return tuple(self._hits(group.stop - group.start) for group in request.groups)

    def _hits(self, queries: int) -> Hits:
        return Hits(self._counts[:queries], self._ids.slice(0, queries * K), self._scores[: queries * K])

    async def fetch(
        self, generation: int, ids: Any, columns: Sequence[str], min_lsn: int = 0, timeout_s: float = CALL_TIMEOUT_S
    ) -> Fetched:
        raise NotImplementedError("this stand-in only searches")

    async def write(
        self, writes: Sequence[PointWrite], timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[WriteOutcome | EaglerayError, ...]:
        raise NotImplementedError("this stand-in only searches")


class InstantDirectory:
    """A `Directory` of one collection, all of whose shards are `InstantShard`s."""

    def __init__(self, shards: int, call_s: float) -> None:
        self.clients = {ReplicaKey("words", shard, 0): InstantShard(shard, call_s) for shard in range(shards)}
        config = CollectionConfig(DIMENSION, metric="l2", shards=shards)
        replicas = {key.shard: (key,) for key in self.clients}
        points = dict.fromkeys(range(shards), 1_000)
        served = ServedCollection(config, Routing(shards), 1, 1, points, {}, replicas)
        self.table = ServingTable("1", {"words": served})

    def client(self, key: ReplicaKey) -> InstantShard:
        return self.clients[key]

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        return self.table

    async def refresh(self, collection: str) -> None:
        raise NotImplementedError("nothing changes here")

    async def describe(self, collection: str) -> dict[str, Any]:
        raise NotImplementedError("nothing is described here")


class NoObserver:
    def batch(self, collection: str, shard: int, vectors: int) -> None:
        """Counts nothing."""


@dataclass(frozen=True)
class Cost:
    """Of one trial: CPU microseconds per search, searches per second, vectors per call."""

    cpu_us: float
    per_second: float
    batch: float


async def trial(shards: int, concurrency: int, call_s: float, seconds: float) -> Cost:
    """`concurrency` clients ask one after the other for that long."""
    directory = InstantDirectory(shards, call_s)
    coordinator = Coordinator(directory, Limits(), NoObserver())
    coordinator.apply(directory.table)
    vectors = np.random.default_rng(1).random((64, 1, DIMENSION), dtype=np.float32)
    coordinator.recent.offer("words", vectors.repeat(WARM_UP, axis=0)[:, 0], "l2")  # as after some minutes
    done = 0

    async def client(number: int) -> None:
        nonlocal done
        while time.perf_counter() < stop:
            result = await coordinator.search("words", Query(vectors[number % 64], K, SearchParams()))
            assert len(result.hits.scores) == K
            done += 1

    began, cpu = time.perf_counter(), time.process_time()
    stop = began + seconds
    await asyncio.gather(*(client(number) for number in range(concurrency)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    calls = sum(client.calls for client in directory.clients.values())
    return Cost((cpu - calls * stand_in_s()) / done * 1e6, done / wall, done * shards / calls)


def stand_in_s() -> float:
    """CPU seconds that one answer of the stand-in takes."""
    if not _STAND_IN_S:
        shard, began, count = InstantShard(0, 0.0), time.process_time(), 20_000
        for _ in range(count):
            shard._hits(8)
        _STAND_IN_S.append((time.process_time() - began) / count)
    return _STAND_IN_S[0]


_STAND_IN_S: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one trial")
    parser.add_argument("--call-ms", type=float, default=1.0, help="of a call in the second table")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="trials of each, of which the cheapest counts: others may use the machine",
    )
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, uvloop {uvloop.__version__}"
    )
    for call_s in (0.0, options.call_ms / 1_000.0):
        print(f"\ncalls of {call_s * 1_000:g} ms\nshards  concurrent  CPU us a search  searches/s  vectors a call")
        for shards in SHARDS:
            for concurrency in CONCURRENCY:
                costs = [
                    uvloop.run(trial(shards, concurrency, call_s, options.seconds)) for _ in range(options.repeats)
                ]
                cost = min(costs, key=lambda each: each.cpu_us)
                print(f"{shards:6} {concurrency:11} {cost.cpu_us:16.1f} {cost.per_second:11,.0f} {cost.batch:15.1f}")


if __name__ == "__main__":
    main()
