"""A coordinator over replicas in memory, which hold points and LSNs and say what they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from actors.coordinator import Coordinator
from actors.shard_client import ServedCollection, ServingTable
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Limits
from cluster.errors import EaglerayError, Fenced, Unavailable
from cluster.placement import ReplicaKey
from cluster.query import Fetched, Hits, ShardSearch
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome

PATIENT_S = 10.0
Outcome = WriteOutcome | EaglerayError


class Replica:
    """A `ShardClient` that holds points by id, one LSN per write; `answers` are given first, instead.

    It hangs while `gate` is shut, leads the log of a routing of `shards` (0: any), and holds `generations` (None: any).
    A read whose LSN it lacks fails, or waits for it where it is `patient`.
    """

    def __init__(self) -> None:
        self.points: dict[int, list[float]] = {}
        self.lsn = 0
        self.shards = 0
        self.answers: list[Outcome] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.patient = False
        self.generations: set[int] | None = None
        self.writes: list[PointWrite] = []
        self.asked_lsn: list[int] = []
        self.asked_generations: list[int] = []
        self.fetch_timeouts_s: list[float] = []

    async def write(self, writes: Sequence[PointWrite], timeout_s: float) -> tuple[Outcome, ...]:
        await self.gate.wait()
        return tuple(self._one(write) for write in writes)

    def _one(self, write: PointWrite) -> Outcome:
        self.writes.append(write)
        if self.answers:
            return self.answers.pop(0)
        if self.shards not in (0, write.shards):
            return Fenced(f"split for {write.shards} shards, this log is one of {self.shards}")
        self.lsn += 1
        if write.upserts is not None:
            columns = (write.upserts.column(name).to_pylist() for name in ("id", "vector"))
            self.points.update(zip(*columns, strict=True))
            return WriteOutcome(self.lsn, write.points)
        existed = [value for value in write.deletes.to_pylist() if self.points.pop(value, None) is not None]
        return WriteOutcome(self.lsn, len(existed))

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        await self._read(request.generation, request.min_lsn)
        hits = Hits(np.zeros(len(request.vectors), np.int64), pa.array([], pa.int64()), np.empty(0, np.float32))
        return (replace(hits, lsn=self.lsn),)

    async def fetch(self, generation: int, ids: Any, columns: Sequence[str], min_lsn: int, timeout_s: float) -> Fetched:
        self.fetch_timeouts_s.append(timeout_s)
        await self._read(generation, min_lsn)
        return Fetched(np.zeros(len(ids), dtype=bool), None, self.lsn)

    async def _read(self, generation: int, min_lsn: int) -> None:
        self.asked_lsn.append(min_lsn)
        self.asked_generations.append(generation)
        await self.gate.wait()
        if self.generations is not None and generation not in self.generations:
            raise Unavailable(f"generation {generation} of 'words' is not loaded here")
        while self.patient and min_lsn > self.lsn:
            await asyncio.sleep(0.001)
        if min_lsn > self.lsn:
            raise Unavailable(f"has applied LSN {self.lsn}, not yet LSN {min_lsn}")


class Cluster:
    """A `Directory` of replicas in memory, and its serving table."""

    def __init__(self, shards: int, replicas: int = 1) -> None:
        self.keys = {shard: tuple(ReplicaKey("words", shard, n) for n in range(replicas)) for shard in range(shards)}
        self.replicas = {key: Replica() for keys in self.keys.values() for key in keys}
        self.stamp = 0

    def of(self, shard: int, number: int = 0) -> Replica:
        return self.replicas[ReplicaKey("words", shard, number)]

    def table(self, shards: int = 0, **changes: Any) -> ServingTable:
        """The first `shards` of its shards (0: all) as they are served."""
        keys = {shard: self.keys[shard] for shard in range(shards or len(self.keys))}
        served = ServedCollection(
            config=CollectionConfig(2, metric="l2", shards=len(keys)),
            routing=Routing(len(keys)),
            version=1,
            generation=1,
            shard_points=dict.fromkeys(keys, 0),
            attributes={},
            replicas=keys,
            primaries={shard: replicas[0] for shard, replicas in keys.items()},
        )
        self.stamp += 1
        return ServingTable(str(self.stamp), {"words": replace(served, **changes)})

    def client(self, key: ReplicaKey) -> Replica:
        if key not in self.replicas:
            raise Unavailable(f"the process of {key} is not known")
        return self.replicas[key]

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        raise AssertionError("tables are applied by the tests")

    async def refresh(self, collection: str) -> None: ...

    async def describe(self, collection: str) -> dict[str, Any]:
        return {}


class Nobody:
    """A `CoordinatorObserver`."""

    def batch(self, collection: str, shard: int, vectors: int) -> None: ...


def with_cluster(
    scenario: Callable[[Coordinator, Cluster], Awaitable[None]],
    shards: int = 2,
    replicas: int = 1,
    limits: Limits = Limits(),  # noqa: B008
    served: int = 0,
) -> Cluster:
    """Run a scenario on a cluster of which the first `served` shards (0: all) are in the table at first."""

    async def run() -> Cluster:
        cluster = Cluster(shards, replicas)
        coordinator = Coordinator(cluster, limits, Nobody())
        coordinator.apply(cluster.table(served))
        async with asyncio.timeout(20):
            await scenario(coordinator, cluster)
        return cluster

    return asyncio.run(run())


def upsert(*ids: int) -> PointWrite:
    vectors = vectors_array(np.array([[value, 1] for value in ids], np.float32))
    return PointWrite(upserts=pa.record_batch([pa.array(ids, pa.int64()), vectors], names=["id", "vector"]))


def delete(*ids: int) -> PointWrite:
    return PointWrite(deletes=pa.array(ids, pa.int64()))


def shard_of(shards: int, value: int) -> int:
    return int(Routing(shards).shards_of_ids(pa.array([value]))[0])


def ids_of_shard(shards: int, shard: int, count: int) -> list[int]:
    return [value for value in range(1_000) if shard_of(shards, value) == shard][:count]
