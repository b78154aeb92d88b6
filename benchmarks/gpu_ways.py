"""Ways to ask one index: FAISS's own search, then with more and more of Eagleray around it. Each is timed alike.

A way searches parts of one size, one after the other or some at a time, and tells vectors per second. What Ray and HTTP
take part in is in `benchmarks.gpu_served`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from actors.faiss_index import use_threads
from actors.replica import Replica
from actors.rerank import rerank
from benchmarks.gpu_collection import Made, raw_index
from benchmarks.gpu_sets import K, cores
from cluster.config import Settings
from cluster.errors import EaglerayError
from cluster.query import Hits

CALLS_MIN = 3  # of one timing, however long they take
PARTS_MAX = 64


class Way(Protocol):
    """`name` as the table has it; `rate` is vectors per second over parts of one size, `ids` what is found, (n, K)."""

    name: str

    def rate(self, parts: Sequence[Any], seconds: float) -> float: ...

    def ids(self, queries: Any) -> Any: ...


def parts_of(queries: Any, batch: int) -> list[Any]:
    """Disjoint parts of `batch` queries, at most `PARTS_MAX`."""
    starts = range(0, max(1, len(queries) - batch + 1), batch)
    return [np.ascontiguousarray(queries[start : start + batch]) for start in starts][:PARTS_MAX]


def timed(ask: Callable[[Any], object], parts: Sequence[Any], seconds: float) -> float:
    """Vectors per second of calls one after the other, for at least `seconds` and `CALLS_MIN` calls."""
    started, asked = time.perf_counter(), 0
    for calls, part in enumerate(itertools.cycle(parts), start=1):
        ask(part)
        asked += len(part)
        took = time.perf_counter() - started
        if took >= seconds and calls >= CALLS_MIN:
            return asked / took
    raise ValueError("no parts to ask")


async def timed_calls(
    ask: Callable[[Any], Awaitable[object]], parts: Sequence[Any], seconds: float, in_flight: int
) -> float:
    """As `timed`, with `in_flight` calls at a time."""
    started, asked, sent, around = time.perf_counter(), 0, 0, itertools.cycle(parts)

    async def keep_asking() -> None:
        nonlocal asked, sent
        while sent < CALLS_MIN * in_flight or time.perf_counter() - started < seconds:
            part = next(around)
            sent += 1
            await ask(part)
            asked += len(part)

    await asyncio.gather(*(keep_asking() for _ in range(in_flight)))
    return asked / (time.perf_counter() - started)


def hits_of(outcomes: Sequence[Hits | EaglerayError]) -> Any:
    """The ids of one group's hits, (n, K); raises where it failed."""
    (outcome,) = outcomes
    if isinstance(outcome, EaglerayError):
        raise outcome
    return outcome.ids.to_numpy().reshape(-1, K)


# --- in this process ------------------------------------------------------------------------------------------------


class RawWay:
    """FAISS's own search of the very index object, in the thread that owns it: no hop, no exact scores."""

    name = "raw"

    def __init__(self, made: Made) -> None:
        self._made = made
        self._raw = raw_index(made.segment)

    def rate(self, parts: Sequence[Any], seconds: float) -> float:
        raw = self._raw
        return float(raw.use(lambda index: timed(lambda part: raw.search(index, part), parts, seconds)))

    def rows(self, queries: Any) -> Any:
        return self._raw.use(lambda index: self._raw.search(index, queries))

    def ids(self, queries: Any) -> Any:
        return self._made.ids[self.rows(queries)[:, :K]]


class ScoredWay(RawWay):
    """FAISS's own search, and the exact scores of what it found from the memory-mapped rows."""

    name = "raw + scores"

    def _ask(self, queries: Any) -> Any:
        segment = self._made.segment
        return rerank(segment.rows, queries, self.rows(queries), segment.metric, cores())[0]

    def rate(self, parts: Sequence[Any], seconds: float) -> float:
        use_threads(cores())
        return timed(self._ask, parts, seconds)

    def ids(self, queries: Any) -> Any:
        return self._made.ids[self._ask(queries)[:, :K]]


class ShardWay:
    """A search of the shard's view, as a replica makes it."""

    name = "shard"

    def __init__(self, made: Made) -> None:
        self._made = made

    def rate(self, parts: Sequence[Any], seconds: float) -> float:
        use_threads(cores())
        return timed(lambda part: self._made.view.search(self._made.request(part)), parts, seconds)

    def ids(self, queries: Any) -> Any:
        return hits_of(self._made.view.search(self._made.request(queries)))


class ReplicaWay:
    """Searches of a `Replica` in this process, from an event loop: the thread that searches is another one."""

    def __init__(self, made: Made, replica: Replica, in_flight: int) -> None:
        self.name = f"replica x{in_flight}"
        self._made, self._replica, self._in_flight = made, replica, in_flight

    def rate(self, parts: Sequence[Any], seconds: float) -> float:
        async def ask(part: Any) -> None:
            await self._replica.search(self._made.request(part))

        return asyncio.run(timed_calls(ask, parts, seconds, self._in_flight))

    def ids(self, queries: Any) -> Any:
        return hits_of(asyncio.run(self._replica.search(self._made.request(queries))))


@contextmanager
def replica_of(made: Made, device: Any) -> Iterator[Replica]:
    """A replica over the shard that is loaded already."""
    settings = Settings(data=str(made.data), observed_share=0.0)
    replica = Replica(made.key, lambda: made.shard, settings, cores(), device=device)
    try:
        yield replica
    finally:
        replica.close()
