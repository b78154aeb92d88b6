"""Continuous batching for one shard: a small window of calls in flight, each takes whatever has gathered.

While the window has room a search leaves at once (no timer); while it is full, searches gather, and the next free
slot takes them together. Searches that share everything but their vectors become one group of the call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.config import Limits
from cluster.errors import EaglerayError, Exhausted
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.topk import split_hits

QUEUE_FULL_RETRY_S = 0.1
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
    answer: asyncio.Future[Hits]


class Batcher:
    """Gathers the searches for one shard. `send` performs one call; `window` is the calls in flight allowed."""

    def __init__(self, send: Send, limits: Limits, observe_batch: Callable[[int], None]) -> None:
        self._send = send
        self._limits = limits
        self._observe_batch = observe_batch
        self._waiting: deque[_Waiting] = deque()
        self._waiting_vectors = 0
        self._calls: set[asyncio.Task[None]] = set()
        self.window = limits.calls_in_flight_per_replica

    async def search(
        self, vectors: NDArray[np.float32], generation: int, key: GroupKey, timeout_s: float = 60.0
    ) -> Hits:
        """Answer `vectors` (n, d), for someone who waits `timeout_s`. Exhausted when the queue is full.

        Cancel it to give up.
        """
        if self._waiting_vectors + len(vectors) > self._limits.queued_vectors_per_shard:
            raise Exhausted(
                f"queued_vectors_per_shard: {self._waiting_vectors} vectors wait already, "
                f"{self._limits.queued_vectors_per_shard} may",
                QUEUE_FULL_RETRY_S,
            )
        loop = asyncio.get_running_loop()
        item = _Waiting(vectors, generation, key, loop.time() + timeout_s, loop.create_future())
        self._waiting.append(item)
        self._waiting_vectors += len(vectors)
        self._pump()
        return await item.answer

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
        """The oldest searches, of one generation, up to `batch_vectors` vectors; given-up ones are dropped."""
        batch: list[_Waiting] = []
        vectors = 0
        while self._waiting:
            item = self._waiting[0]
            full = batch and vectors + len(item.vectors) > self._limits.batch_vectors
            if full or (batch and item.generation != batch[0].generation):
                break
            self._waiting.popleft()
            self._waiting_vectors -= len(item.vectors)
            if not item.answer.done():
                batch.append(item)
                vectors += len(item.vectors)
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
    return ShardSearch(items[0].generation, vectors, tuple(groups), max(0.0, timeout_s))


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
