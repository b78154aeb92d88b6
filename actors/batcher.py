"""Continuous batching for one shard: a small window of calls in flight, each takes whatever has gathered.

While the window has room a search leaves at once (no timer); while it is full, searches gather, and the next free
slot takes them together. Searches that share everything but their vectors become one group of the call. A search that
asks for more of the log than the shard is known to have goes alone, beside the window: it holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.config import Limits
from cluster.errors import EaglerayError, Exhausted
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.topk import split_hits

QUEUE_FULL_RETRY_S = 0.1
CALLS_AHEAD_MAX = 64  # of searches that may wait for an LSN that nobody has seen yet
Send = Callable[[ShardSearch], Awaitable[tuple[Hits | EaglerayError, ...]]]


@dataclass(frozen=True)
class GroupKey:
    """What searches must share to be answered by one FAISS call."""

    k: int
    params: SearchParams
    columns: tuple[str, ...]


@dataclass(eq=False)
class _Waiting:
    vectors: NDArray[np.float32]
    generation: int
    key: GroupKey
    deadline: float
    min_lsn: int
    answer: asyncio.Future[Hits]


class Batcher:
    """Gathers the searches for one shard. `send` performs one call; `window` is the calls in flight allowed.

    `send_ahead` performs one that may wait long for its LSN. `seen_lsn` is the highest LSN that an answer or an
    acknowledged write told of.
    """

    def __init__(
        self, send: Send, limits: Limits, observe_batch: Callable[[int], None], send_ahead: Send | None = None
    ) -> None:
        self._send = send
        self._send_ahead = send_ahead or send
        self._limits = limits
        self._observe_batch = observe_batch
        self._waiting: deque[_Waiting] = deque()
        self._waiting_vectors = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._ahead = 0
        self.window = limits.calls_in_flight_per_replica
        self.seen_lsn = 0

    def saw(self, lsn: int) -> None:
        """The shard has that record."""
        self.seen_lsn = max(self.seen_lsn, lsn)

    async def search(
        self, vectors: NDArray[np.float32], generation: int, key: GroupKey, timeout_s: float = 60.0, min_lsn: int = 0
    ) -> Hits:
        """Answer `vectors` (n, d) with `min_lsn` applied, for someone who waits `timeout_s`. Exhausted when the queue
        is full. Cancel it to give up.
        """
        if min_lsn > self.seen_lsn:
            return await self._search_ahead(vectors, generation, key, timeout_s, min_lsn)
        if self._waiting_vectors + len(vectors) > self._limits.queued_vectors_per_shard:
            raise Exhausted(
                f"queued_vectors_per_shard: {self._waiting_vectors} vectors wait already, "
                f"{self._limits.queued_vectors_per_shard} may",
                QUEUE_FULL_RETRY_S,
            )
        loop = asyncio.get_running_loop()
        item = _Waiting(vectors, generation, key, loop.time() + timeout_s, min_lsn, loop.create_future())
        self._waiting.append(item)
        self._waiting_vectors += len(vectors)
        self._pump()
        return await item.answer

    async def _search_ahead(
        self, vectors: NDArray[np.float32], generation: int, key: GroupKey, timeout_s: float, min_lsn: int
    ) -> Hits:
        """A call of its own: whether there will ever be such an LSN nobody knows."""
        with self.room_ahead(min_lsn):
            group = SearchGroup(0, len(vectors), key.k, key.params, key.columns)
            self._observe_batch(len(vectors))
            (outcome,) = await self._send_ahead(ShardSearch(generation, vectors, (group,), timeout_s, min_lsn))
        if isinstance(outcome, EaglerayError):
            raise outcome
        self.saw(outcome.lsn)
        return outcome

    @contextlib.contextmanager
    def room_ahead(self, min_lsn: int) -> Iterator[None]:
        """Counts a call that waits for an LSN not seen yet; Exhausted where too many do."""
        if self._ahead >= CALLS_AHEAD_MAX:
            raise Exhausted(
                f"{self._ahead} requests wait already for an LSN over {self.seen_lsn}, the last one known; "
                f"min_lsn {min_lsn} must wait too",
                QUEUE_FULL_RETRY_S,
            )
        self._ahead += 1
        try:
            yield
        finally:
            self._ahead -= 1

    def _pump(self) -> None:
        while self._waiting and len(self._calls) < self.window:
            batch = self._take()
            if batch:
                call = asyncio.get_running_loop().create_task(self._call(batch))
                self._calls.add(call)
                call.add_done_callback(self._call_done)

    def _call_done(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._pump()

    def _take(self) -> list[_Waiting]:
        """The oldest searches, of one generation, up to `batch_vectors` vectors; given-up ones are dropped.

        Those that ask for an LSN, and may wait for it, go with their like: others do not wait with them.
        """
        batch: list[_Waiting] = []
        passed_over: list[_Waiting] = []
        vectors = 0
        while self._waiting:
            item = self._waiting[0]
            full = batch and vectors + len(item.vectors) > self._limits.batch_vectors
            if full or (batch and item.generation != batch[0].generation):
                break
            self._waiting.popleft()
            if batch and bool(item.min_lsn) != bool(batch[0].min_lsn):
                passed_over.append(item)
                continue
            self._waiting_vectors -= len(item.vectors)
            if not item.answer.done():
                batch.append(item)
                vectors += len(item.vectors)
        self._waiting.extendleft(reversed(passed_over))
        return batch

    async def _call(self, batch: list[_Waiting]) -> None:
        grouped: dict[GroupKey, list[_Waiting]] = {}
        for item in batch:
            grouped.setdefault(item.key, []).append(item)
        request = _request(grouped)
        self._observe_batch(len(request.vectors))
        try:
            outcomes = await self._send(request)
            for items, outcome in zip(grouped.values(), outcomes, strict=True):
                if isinstance(outcome, Hits):
                    self.saw(outcome.lsn)
                _deliver(items, outcome)
        except asyncio.CancelledError:
            for item in batch:
                item.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # raised to the searches, which must not wait for ever
            _fail(batch, error)


def _request(grouped: dict[GroupKey, list[_Waiting]]) -> ShardSearch:
    items = [item for group in grouped.values() for item in group]
    groups, start = [], 0
    for key, members in grouped.items():
        stop = start + sum(len(item.vectors) for item in members)
        groups.append(SearchGroup(start, stop, key.k, key.params, key.columns))
        start = stop
    vectors = items[0].vectors if len(items) == 1 else np.concatenate([item.vectors for item in items])
    timeout_s = max(item.deadline for item in items) - asyncio.get_running_loop().time()
    min_lsn = max(item.min_lsn for item in items)
    return ShardSearch(items[0].generation, vectors, tuple(groups), max(0.0, timeout_s), min_lsn)


def _deliver(items: list[_Waiting], outcome: Hits | EaglerayError) -> None:
    if isinstance(outcome, EaglerayError):
        _fail(items, outcome)
        return
    for item, hits in zip(items, split_hits(outcome, [len(item.vectors) for item in items]), strict=True):
        if not item.answer.done():
            item.answer.set_result(hits)


def _fail(items: list[_Waiting], error: Exception) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(error)
