"""The data plane: fans a query out to the shards it needs, merges top-k, reports coverage. Runs without Ray.

Writes go through `write_router`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actors.admission import Admission, Admissions
from actors.batcher import Batcher
from actors.generation_switch import GenerationSwitch
from actors.replica_set import ReplicaSet
from actors.search_queue import GroupKey
from actors.shard_client import Directory, ServedCollection, ServingTable, ShardClient
from actors.write_batcher import MadeFor, WriteBatcher
from actors.write_parts import places_of
from actors.write_router import WriteRouter
from cluster.attributes import complete_columns
from cluster.config import Limits
from cluster.errors import EaglerayError, NotFound, Unavailable
from cluster.placement import ReplicaKey
from cluster.query import FULL_COVERAGE, Fetched, Hits, Query, SearchResult, coverage_of
from cluster.recent_queries import RecentQueries
from cluster.routing import Routing
from cluster.topk import merge_hits
from cluster.write import PointWrite, WriteResult

FOLLOW_RETRY_S = 0.5
logger = logging.getLogger(__name__)


class CoordinatorObserver(Protocol):
    """Told what the coordinator does; the endpoint counts it."""

    def batch(self, collection: str, shard: int, vectors: int) -> None: ...


@dataclass(frozen=True)
class FetchResult:
    """The answer to a fetch: `found` (n,) bool, and the table of the found points' columns in the order asked (None:
    none was found). `lsn` by shard: how much of its log is in the answer."""

    found: NDArray[np.bool_]
    table: Any
    lsn: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _ShardLane:
    """The queues of one shard. Calls that may wait long for an LSN have a `ReplicaSet` of their own: a replica that is
    merely behind is not suspect, nor busy, to the others."""

    replicas: ReplicaSet
    ahead: ReplicaSet
    batcher: Batcher
    writes: WriteBatcher


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
        self._lanes_of: dict[str, list[_ShardLane]] = {}
        self._admissions = Admissions(limits, self._wait_s)
        self._next_table = asyncio.Event()
        self._switch = GenerationSwitch(self.served, lambda: self._next_table)
        self._router = WriteRouter(self.served, self._writes_of, lambda: self._next_table, limits)
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
            lanes[place].ahead.update(keys)
            lanes[place].batcher.window = self._limits.calls_in_flight_per_replica * max(1, len(keys))
        places = self._lanes | lanes
        moved = [place for place in places if _led_by(self.table, *place) != _led_by(table, *place)]
        self._lanes = lanes
        self._lanes_of = {name: [] for name in table.collections}
        for (name, _), lane in lanes.items():
            self._lanes_of[name].append(lane)
        self.table = table
        self._next_table.set()
        self._next_table = asyncio.Event()
        for place in moved:
            places[place].writes.primary_changed()
        self._switch.table_changed()
        self.recent.keep_only({name: served.config for name, served in table.collections.items()}, table.unready)

    def _new_lane(self, collection: str, shard: int) -> _ShardLane:
        replicas, ahead = (ReplicaSet(self._directory.client, self._clock) for _ in range(2))
        batcher = Batcher(
            lambda request: replicas.call(lambda client: client.search(request), request.timeout_s),
            self._limits,
            lambda vectors: self._observer.batch(collection, shard, vectors),
            lambda request: ahead.call(lambda client: client.search(request), request.timeout_s),
        )
        writes = WriteBatcher(
            lambda made_for: self._primary(collection, shard, made_for),
            self._limits,
            lambda: self._next_table,
            batcher.saw,
        )
        return _ShardLane(replicas, ahead, batcher, writes)

    def _primary(self, collection: str, shard: int, made_for: MadeFor) -> ShardClient:
        """The primary that the table names; Unavailable while there is none."""
        served = self.served(collection)
        made_for.check(collection, MadeFor.of(served))
        key = served.primaries.get(shard)
        if key is None:
            raise Unavailable("the shard has no primary")
        return self._directory.client(key)

    def _writes_of(self, collection: str, shard: int) -> WriteBatcher | None:
        lane = self._lanes.get((collection, shard))
        return lane.writes if lane is not None else None

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

    def admit(self, collection: str) -> Admission:
        """Take on a search, before its body is read; release what it returns when the search is answered.

        Exhausted, at once, where it would only wait; NotFound and Unavailable as in `served`.
        """
        self.served(collection)
        return self._admissions.admit(collection)

    def _wait_s(self, collection: str) -> float:
        """Predicted wait for the shard of a collection that is most in demand."""
        return max((lane.batcher.wait_s() for lane in self._lanes_of.get(collection, ())), default=0.0)

    async def search(self, collection: str, query: Query) -> SearchResult:
        """Search. Unavailable when coverage stays under `query.min_coverage`."""

        def once(served: ServedCollection, timeout_s: float) -> Coroutine[Any, Any, SearchResult]:
            return self._search_generation(collection, served, query, timeout_s)

        return await self._switch.ask(collection, once, query.timeout_ms / 1000.0, query.min_lsn)

    async def _search_generation(
        self, collection: str, served: ServedCollection, query: Query, timeout_s: float
    ) -> SearchResult:
        columns = (*query.with_attributes, "vector") if query.with_vectors else query.with_attributes
        answers, failures = await self._search_shards(collection, served, query, columns, timeout_s)
        coverage = FULL_COVERAGE
        if failures:
            coverage = coverage_of({shard: served.shard_points[shard] for shard in (*answers, *failures)}, answers)
        if coverage.shards < query.min_coverage or not answers:
            reasons = [
                f"shard {shard}: {failures[shard]}{self._behind(collection, shard, query.min_lsn)}"
                for shard in coverage.missing
            ]
            raise Unavailable(f"coverage {coverage.shards:.3f}: {'; '.join(reasons)}", coverage=coverage.to_dict())
        parts = list(answers.values())  # each in order and of at most k hits: one alone is the answer
        hits = parts[0] if len(parts) == 1 else merge_hits(parts, query.k, served.config.metric)
        self._remember(collection, served, query)
        lsn = {shard: part.lsn for shard, part in answers.items()}
        return SearchResult(_complete(hits, columns, served), coverage, served.generation, lsn, hits.degraded)

    async def _search_shards(
        self, collection: str, served: ServedCollection, query: Query, columns: tuple[str, ...], timeout_s: float
    ) -> tuple[dict[int, Hits], dict[int, Unavailable]]:
        """Answers and failures, by shard in ascending order; other errors than Unavailable are raised."""
        key = GroupKey(query.k, query.params, columns)
        asked: dict[int, asyncio.Future[Hits]] = {}
        answers: dict[int, Hits] = {}
        failures: dict[int, Unavailable] = {}
        timer = asyncio.get_running_loop().call_later(timeout_s, _expire, asked, query.timeout_ms)
        try:
            for shard in served.routing.shards_to_search():
                lane = self._lanes.get((collection, shard))
                if lane is None or not len(lane.replicas):
                    failures[shard] = Unavailable("no replica is ready")
                else:
                    asked[shard] = lane.batcher.submit(
                        query.vectors, served.generation, key, timeout_s, query.min_lsn.get(shard, 0)
                    )
            for shard, answer in asked.items():  # all are under way: to await one after the other costs no time
                try:
                    answers[shard] = await answer
                except Unavailable as error:
                    failures[shard] = error
        finally:
            timer.cancel()
            for answer in asked.values():
                _give_up(answer)
        return answers, failures

    def _behind(self, collection: str, shard: int, min_lsn: Mapping[int, int]) -> str:
        """For messages: what of its log a shard was asked to have, where it may not have that."""
        seen, asked = self._seen_lsn(collection, shard), min_lsn.get(shard, 0)
        return f" (asked for LSN {asked}, the last one known is {seen})" if asked > seen else ""

    def _seen_lsn(self, collection: str, shard: int) -> int:
        lane = self._lanes.get((collection, shard))
        return lane.batcher.seen_lsn if lane is not None else 0

    def _remember(self, collection: str, served: ServedCollection, query: Query) -> None:
        """Offer an answered query to the sample, unless the collection was deleted or replaced meanwhile."""
        now = self.table.collections.get(collection) if self.table else None
        if now is not None and (now is served or now.config == served.config) and not query.params.exact:
            self.recent.offer(collection, query.vectors, served.config.metric)

    async def fetch(
        self,
        collection: str,
        ids: Any,
        columns: Sequence[str],
        timeout_s: float,
        min_lsn: Mapping[int, int] = MappingProxyType({}),
    ) -> FetchResult:
        """Points by an Arrow array of ids, with `min_lsn` (by shard) applied; Unavailable unless all shards answer."""

        def once(served: ServedCollection, left_s: float) -> Coroutine[Any, Any, FetchResult]:
            return self._fetch_generation(collection, served, ids, columns, left_s, min_lsn)

        return await self._switch.ask(collection, once, timeout_s, min_lsn)

    async def _fetch_generation(
        self,
        collection: str,
        served: ServedCollection,
        ids: Any,
        columns: Sequence[str],
        timeout_s: float,
        min_lsn: Mapping[int, int],
    ) -> FetchResult:
        places = places_of(served.routing, ids)
        for shard in min_lsn.keys() & served.shard_points.keys() - places.keys():
            if min_lsn[shard] > self._seen_lsn(collection, shard):  # it may be of logs that this routing does not have
                places[shard] = np.empty(0, np.int64)
        calls = {
            shard: asyncio.ensure_future(
                self._fetch_shard(
                    collection, served, shard, ids.take(pa.array(at)), columns, timeout_s, min_lsn.get(shard, 0)
                )
            )
            for shard, at in places.items()
        }
        answers = await _answers_within(calls, timeout_s)
        lost = sorted(calls.keys() - answers.keys())
        if lost:
            reasons = [
                f"shard {shard}: {_reason(calls[shard], timeout_s * 1000.0)}{self._behind(collection, shard, min_lsn)}"
                for shard in lost
            ]
            raise Unavailable(f"shards {lost} did not answer: {'; '.join(reasons)}")
        found, table = _in_order(len(ids), places, answers)
        lsn = {shard: answers[shard].lsn for shard in sorted(answers)}
        return FetchResult(found, complete_columns(table, columns, served.attributes), lsn)

    async def _fetch_shard(
        self,
        collection: str,
        served: ServedCollection,
        shard: int,
        ids: Any,
        columns: Sequence[str],
        timeout_s: float,
        min_lsn: int,
    ) -> Fetched:
        lane = self._lanes.get((collection, shard))
        if lane is None:
            raise Unavailable(f"no replica of shard {shard} is ready")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s

        def ask(client: ShardClient) -> Awaitable[Fetched]:
            return client.fetch(served.generation, ids, columns, min_lsn, max(0.0, deadline - loop.time()))

        if min_lsn <= lane.batcher.seen_lsn:
            return await lane.replicas.call(ask, timeout_s)
        with lane.batcher.room_ahead(min_lsn):
            answer = await lane.ahead.call(ask, timeout_s)
        lane.batcher.saw(answer.lsn)
        return answer

    async def write(self, collection: str, write: PointWrite, timeout_s: float) -> WriteResult:
        """Have a write acknowledged by every shard it falls to (`WriteRouter.write`)."""
        return await self._router.write(collection, write, timeout_s)

    async def check_size(self, collection: str, write: PointWrite) -> None:
        """Exhausted where `write` would refuse it for its size, whatever else waits."""
        await self._router.check_size(collection, write)


async def _answers_within(calls: Mapping[int, asyncio.Future[Any]], timeout_s: float) -> dict[int, Any]:
    """Results of the calls that succeeded in time. Unavailability is a missing answer; other errors are raised."""
    try:
        if calls:
            await asyncio.wait(calls.values(), timeout=timeout_s)
    finally:
        for call in calls.values():
            call.cancel()
    finished = {shard: call for shard, call in calls.items() if call.done() and not call.cancelled()}
    errors = {shard: error for shard, call in finished.items() if (error := call.exception())}
    for error in errors.values():
        if not isinstance(error, Unavailable):
            raise error
    return {shard: call.result() for shard, call in finished.items() if shard not in errors}


def _expire(asked: Mapping[int, asyncio.Future[Hits]], timeout_ms: float) -> None:
    """The request's time is over; what no call has taken yet leaves the queues."""
    for answer in asked.values():
        if not answer.done():
            answer.set_exception(Unavailable(f"no answer within {timeout_ms:g} ms"))


def _give_up(answer: asyncio.Future[Hits]) -> None:
    """Cancel what is not there yet. An error that nobody looked at is no reason for a message in the log."""
    if not answer.cancel() and not answer.cancelled():
        answer.exception()


def _reason(call: asyncio.Future[Any], timeout_ms: float) -> str:
    error = call.exception() if call.done() and not call.cancelled() else None
    return str(error) if isinstance(error, EaglerayError) else f"no answer within {timeout_ms:g} ms"


def _led_by(table: ServingTable | None, collection: str, shard: int) -> tuple[ReplicaKey | None, Routing] | None:
    """The primary of a shard, and what its log holds; None where there is no such collection."""
    served = table.collections.get(collection) if table else None
    return (served.primaries.get(shard), served.routing) if served else None


def _complete(hits: Hits, columns: Sequence[str], served: ServedCollection) -> Hits:
    """With all columns that were asked for."""
    completed = complete_columns(hits.columns, columns, served.attributes)
    return hits if completed is hits.columns else replace(hits, columns=completed)


def _in_order(count: int, places: dict[int, Any], answers: dict[int, Fetched]) -> tuple[Any, Any]:
    found = np.zeros(count, dtype=bool)
    tables, positions = [], []
    for shard, fetched in answers.items():
        at = places[shard][fetched.found]
        found[at] = True
        if fetched.table is not None:
            tables.append(fetched.table)
            positions.append(at)
    if not tables:
        return found, None
    order = pc.sort_indices(pa.array(np.concatenate(positions)))
    return found, pa.concat_tables(tables, promote_options="permissive").take(order)
