"""The data plane: fans a query out to the shards it needs, merges top-k, reports coverage. Runs without Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.batcher import Batcher, GroupKey
from actors.replica_set import ReplicaSet
from actors.shard_client import Directory, ServedCollection, ServingTable
from cluster.config import Limits
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.query import Hits, Query, SearchResult, coverage_of
from cluster.recent_queries import RecentQueries
from cluster.topk import join_queries, merge_hits

FOLLOW_RETRY_S = 0.5
logger = logging.getLogger(__name__)


class CoordinatorObserver(Protocol):
    """Told what the coordinator does; the endpoint counts it."""

    def batch(self, collection: str, shard: int, vectors: int) -> None: ...


@dataclass(frozen=True)
class _ShardLane:
    replicas: ReplicaSet
    batcher: Batcher


class Coordinator:
    """Answers queries from the serving table that `follow` keeps current, and keeps a sample of them (`recent`)."""

    def __init__(
        self,
        directory: Directory,
        limits: Limits,
        observer: CoordinatorObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._lanes: dict[tuple[str, int], _ShardLane] = {}
        self.table: ServingTable | None = None
        self.recent = RecentQueries(limits.recent_queries, clock)

    async def follow(self) -> None:
        """Keep the table current, for ever. While the supervisor is away the last table is served."""
        while True:
            try:
                self.apply(await self._directory.next_table(self.table.stamp if self.table else None))
            except EaglerayError as error:
                logger.warning("the supervisor does not answer: %s", error)
                await asyncio.sleep(FOLLOW_RETRY_S)
            except Exception:  # without a follower the endpoint would serve one table for ever
                logger.exception("following the supervisor")
                await asyncio.sleep(FOLLOW_RETRY_S)

    def apply(self, table: ServingTable) -> None:
        """Serve a new table: lanes of shards that stay keep their queues and statistics."""
        wanted = {(name, shard): keys for name, c in table.collections.items() for shard, keys in c.replicas.items()}
        lanes = {place: self._lanes.get(place) or self._new_lane(*place) for place in wanted}
        for place, keys in wanted.items():
            lanes[place].replicas.update(keys)
            lanes[place].batcher.window = self._limits.calls_in_flight_per_replica * max(1, len(keys))
        self._lanes = lanes
        self.table = table
        self.recent.keep_only({name: served.config for name, served in table.collections.items()}, table.unready)

    def _new_lane(self, collection: str, shard: int) -> _ShardLane:
        replicas = ReplicaSet(self._directory.client, self._clock)
        batcher = Batcher(
            lambda request: replicas.call(lambda client: client.search(request), request.timeout_s),
            self._limits,
            lambda vectors: self._observer.batch(collection, shard, vectors),
        )
        return _ShardLane(replicas, batcher)

    def served(self, collection: str) -> ServedCollection:
        """The collection as served now; NotFound, or Unavailable while it is not ready."""
        if self.table is None:
            raise Unavailable("the endpoint has not reached the supervisor yet")
        served = self.table.collections.get(collection)
        if served is not None:
            return served
        reason = self.table.unready.get(collection)
        if reason is None:
            raise NotFound(f"no collection {collection!r}")
        raise Unavailable(f"collection {collection!r} is not ready: {reason}")

    async def search(self, collection: str, query: Query) -> SearchResult:
        """Search. Unavailable when coverage stays under `query.min_coverage`."""
        served = self.served(collection)
        shards = served.routing.shards_to_search()
        columns = (*query.with_attributes, *(("vector",) if query.with_vectors else ()))
        key = GroupKey(query.k, query.params, columns)
        calls = {
            shard: asyncio.ensure_future(self._search_shard(collection, served, shard, query, key)) for shard in shards
        }
        answers = await _answers_within(calls, query.timeout_ms / 1000.0)
        coverage = coverage_of({shard: served.shard_points[shard] for shard in shards}, set(answers))
        if coverage.shards < query.min_coverage or not answers:
            reasons = "; ".join(f"shard {s}: {_reason(calls[s], query)}" for s in coverage.missing)
            raise Unavailable(f"coverage {coverage.shards:.3f}: {reasons}", coverage=coverage.to_dict())
        hits = merge_hits([answers[shard] for shard in sorted(answers)], query.k, served.config.metric)
        self._remember(collection, served, query)
        return SearchResult(hits, coverage, served.generation)

    def _remember(self, collection: str, served: ServedCollection, query: Query) -> None:
        """Offer an answered query to the sample, unless the collection was deleted or replaced meanwhile."""
        now = self.table.collections.get(collection) if self.table else None
        if now is not None and now.config == served.config and not query.params.exact:
            self.recent.offer(collection, query.vectors, served.config.metric)

    async def _search_shard(
        self, collection: str, served: ServedCollection, shard: int, query: Query, key: GroupKey
    ) -> Hits:
        """One shard's answer; a large request is cut into batches so that it does not hold up small ones."""
        lane = self._lanes.get((collection, shard))
        if lane is None or not len(lane.replicas):
            raise Unavailable("no replica is ready")
        step, timeout_s = self._limits.batch_vectors, query.timeout_ms / 1000.0
        if len(query.vectors) <= step:
            return await lane.batcher.search(query.vectors, served.generation, key, timeout_s)
        pieces = [query.vectors[start : start + step] for start in range(0, len(query.vectors), step)]
        async with asyncio.TaskGroup() as group:
            parts = [group.create_task(lane.batcher.search(p, served.generation, key, timeout_s)) for p in pieces]
        return join_queries([part.result() for part in parts])

    async def fetch(self, collection: str, ids: Any, columns: Sequence[str], timeout_s: float) -> tuple[Any, Any]:
        """(found (n,) bool, table of `columns` for the found ids, in the order asked) for an Arrow array of ids."""
        served = self.served(collection)
        shard_of = served.routing.shards_of_ids(ids)
        places = {int(shard): np.flatnonzero(shard_of == shard) for shard in np.unique(shard_of)}
        calls = {
            shard: asyncio.ensure_future(
                self._fetch_shard(collection, served, shard, ids.take(pa.array(at)), columns, timeout_s)
            )
            for shard, at in places.items()
        }
        answers = await _answers_within(calls, timeout_s)
        if len(answers) < len(calls):
            lost = sorted(calls.keys() - answers.keys())
            raise Unavailable(f"shards {lost} did not answer")
        return _in_order(len(ids), places, answers)

    async def _fetch_shard(
        self, collection: str, served: ServedCollection, shard: int, ids: Any, columns: Sequence[str], timeout_s: float
    ) -> tuple[Any, Any]:
        lane = self._lanes.get((collection, shard))
        if lane is None:
            raise Unavailable(f"no replica of shard {shard} is ready")
        return await lane.replicas.call(lambda client: client.fetch(served.generation, ids, columns), timeout_s)


async def _answers_within(calls: Mapping[int, asyncio.Future[Any]], timeout_s: float) -> dict[int, Any]:
    """Results of the calls that succeeded in time. Unavailability is a missing answer; other errors are raised."""
    try:
        if calls:
            await asyncio.wait(calls.values(), timeout=timeout_s)
    finally:
        for call in calls.values():
            call.cancel()
    finished = {shard: call for shard, call in calls.items() if call.done() and not call.cancelled()}
    errors = {shard: error for shard, call in finished.items() if (error := _root(call.exception()))}
    for error in errors.values():
        if not isinstance(error, Unavailable):
            raise error
    return {shard: call.result() for shard, call in finished.items() if shard not in errors}


def _root(error: BaseException | None) -> BaseException | None:
    """The first error inside a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _reason(call: asyncio.Future[Any], query: Query) -> str:
    error = _root(call.exception()) if call.done() and not call.cancelled() else None
    return str(error) if isinstance(error, EaglerayError) else f"no answer within {query.timeout_ms:g} ms"


def _in_order(count: int, places: dict[int, Any], answers: dict[int, tuple[Any, Any]]) -> tuple[Any, Any]:
    found = np.zeros(count, dtype=bool)
    tables, positions = [], []
    for shard, (mask, table) in answers.items():
        found[places[shard][mask]] = True
        if table is not None:
            tables.append(table)
            positions.append(places[shard][mask])
    if not tables:
        return found, None
    order = pc.sort_indices(pa.array(np.concatenate(positions)))
    return found, pa.concat_tables(tables).take(order)
