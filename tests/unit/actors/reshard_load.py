"""Writers and searchers at a collection whose number of shards changes: what was acknowledged, and what is found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from actors.coordinator import Coordinator
from actors.shard_client import ServedCollection, ServingTable, ShardClient
from cluster.config import Limits
from cluster.errors import Unavailable
from cluster.ids import id_array
from cluster.placement import ReplicaKey
from cluster.query import Query, SearchParams
from cluster.write import PointWrite
from tests.fakes import Serving
from tests.unit.actors.batches import delete, upsert

PATIENT_S = 15.0
PAUSE_S = 0.004  # between the requests of one client, so that what is tested gets time of the processor
GONE = -1.0  # where a deleted point lies


class Nobody:
    """A `CoordinatorObserver`."""

    def batch(self, collection: str, shard: int, vectors: int) -> None: ...


class Relay:
    """A `Directory` that asks whichever supervisor is there now."""

    def __init__(self, eagleray: Serving) -> None:
        self._eagleray = eagleray
        self._moved = asyncio.Event()

    def move_to(self, eagleray: Serving) -> None:
        self._eagleray = eagleray
        self._moved.set()
        self._moved = asyncio.Event()

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        asked = asyncio.ensure_future(self._eagleray.directory.next_table(known_stamp))
        moved = asyncio.ensure_future(self._moved.wait())
        done, _ = await asyncio.wait((asked, moved), return_when=asyncio.FIRST_COMPLETED)
        moved.cancel()
        if asked in done:
            return asked.result()
        asked.cancel()
        raise Unavailable("another supervisor is there")

    async def refresh(self, collection: str) -> None:
        await self._eagleray.directory.refresh(collection)

    async def describe(self, collection: str) -> dict[str, Any]:
        return await self._eagleray.directory.describe(collection)

    def client(self, key: ReplicaKey) -> ShardClient:
        return self._eagleray.directory.client(key)


@dataclass
class Load:
    """`acknowledged`: id -> where its last acknowledged version lies; the versions of an id lie ever farther out.

    `wrong` is what a search found that it must not.
    """

    coordinator: Coordinator
    relay: Relay
    acknowledged: dict[int, float] = field(default_factory=dict)
    attempted: dict[int, float] = field(default_factory=dict)
    lsn: dict[int, int] = field(default_factory=dict)  # by shard, the highest that was acknowledged
    writes: int = 0
    searches: int = 0
    wrong: list[str] = field(default_factory=list)
    monotonic: bool = True  # searches reach the primaries
    faults: bool = False  # while a shard's only replica is dead, searches fail
    longest_s: float = 0.0
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def write_for_ever(self, first: int, ids: int = 12) -> None:
        """Own ids, in their turn; each third write deletes. What is not acknowledged is sent again."""
        loop = asyncio.get_running_loop()
        for number in range(1_000_000):
            if self._stop.is_set():
                return
            some = [first + (number * 3 + k) % ids for k in range(3)]
            at = float(number + 1)
            gone = number % 3 == 2
            for point_id in some:
                self.attempted[point_id] = at
            began = loop.time()
            await self.acknowledge(delete(*some) if gone else upsert(*some, at=at))
            self.longest_s = max(self.longest_s, loop.time() - began)
            for point_id in some:
                self.acknowledged[point_id] = GONE if gone else at
            self.writes += 1
            await asyncio.sleep(PAUSE_S)

    async def acknowledge(self, write: PointWrite) -> None:
        while True:
            try:
                written = await self.coordinator.write("words", write, PATIENT_S)
                self.lsn |= {shard: max(lsn, self.lsn.get(shard, 0)) for shard, lsn in written.lsn.items()}
                return
            except Unavailable:
                await asyncio.sleep(0.005)

    async def search_for_ever(self) -> None:
        while not self._stop.is_set():
            before = dict(self.acknowledged)
            try:
                found = await self.found()
            except Unavailable:
                if not self.faults:
                    raise
                await asyncio.sleep(0.005)
                continue
            self.searches += 1
            for point_id, at in found.items():
                if at > self.attempted.get(point_id, 0.0):
                    self.wrong.append(f"{point_id} at {at} was never written")
                if self.monotonic and 0.0 < at < before.get(point_id, 0.0):
                    self.wrong.append(f"{point_id} at {at}, acknowledged before was {before[point_id]}")
            await asyncio.sleep(PAUSE_S)

    async def found(self, min_lsn: dict[int, int] | None = None) -> dict[int, float]:
        """Every live point by an exact search; one that is found twice is an error."""
        exact, vectors = SearchParams(exact=True), np.zeros((1, 4), np.float32)
        query = Query(vectors, 10_000, exact, PATIENT_S * 1000, with_vectors=True, min_lsn=min_lsn or {})
        result = await self.coordinator.search("words", query)
        ids = result.hits.ids.to_pylist()
        assert len(ids) == len(set(ids)), f"found twice: {sorted(ids)}"
        stored = result.hits.columns["vector"].to_pylist() if ids else []
        return {point_id: vector[0] for point_id, vector in zip(ids, stored, strict=True)}

    async def check(self) -> None:
        """Once nobody writes: all that was acknowledged is there on any replica, exactly once, and nothing else."""
        live = {point_id: at for point_id, at in self.acknowledged.items() if at != GONE}
        assert await self.found(self.lsn) == live
        ids = sorted(self.acknowledged)
        columns = ["id", "vector"]
        fetched = await self.coordinator.fetch("words", id_array(ids, "int64"), columns, PATIENT_S, self.lsn)
        assert pa.array(ids).filter(pa.array(fetched.found)).to_pylist() == sorted(live)
        assert self.wrong == []

    def served(self) -> ServedCollection | None:
        table = self.coordinator.table
        return table.collections.get("words") if table is not None else None

    async def until_served(self, generation: int) -> ServedCollection:
        """Until this coordinator sees the generation, and a primary of each of its shards."""

        def is_so() -> bool:
            served = self.served()
            return (
                served is not None
                and served.generation == generation
                and served.primaries.keys() == served.replicas.keys()
            )

        await until(is_so)
        served = self.served()
        assert served is not None
        return served

    async def more(self, writes: int = 3, searches: int = 1) -> None:
        """Until so many more are done."""
        wanted = self.writes + writes, self.searches + searches
        await until(lambda: self.writes >= wanted[0] and self.searches >= wanted[1])

    async def stop(self) -> None:
        self._stop.set()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def following(eagleray: Serving) -> AsyncIterator[Load]:
    """A coordinator that serves the collection."""
    relay = Relay(eagleray)
    coordinator = Coordinator(relay, Limits(), Nobody())
    task = asyncio.create_task(coordinator.follow())
    made = Load(coordinator, relay)
    await until(lambda: (served := made.served()) and served.primaries.keys() == served.replicas.keys())
    yield made
    task.cancel()


@asynccontextmanager
async def load(eagleray: Serving, monotonic: bool = True, writers: int = 2) -> AsyncIterator[Load]:
    """A coordinator under load; in the end nobody writes, and what is there is checked."""
    async with following(eagleray) as made:
        made.monotonic = monotonic
        async with asyncio.TaskGroup() as group:
            for writer in range(writers):
                group.create_task(made.write_for_ever(1_000 * writer))
            group.create_task(made.search_for_ever())
            try:
                await made.more()
                yield made
                await made.more()
            finally:
                await made.stop()
        await made.check()
