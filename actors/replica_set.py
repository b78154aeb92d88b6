"""The replicas of one shard as a coordinator sees them: pick the least busy, avoid the suspect, fail over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from actors.shard_client import ShardClient
from cluster.errors import Unavailable
from cluster.placement import ReplicaKey

SUSPECT_S = 1.0  # how long a replica that failed is asked only when no other is left
T = TypeVar("T")


class ReplicaSet:
    """Ready replicas of one shard, by key; `update` replaces them when the serving table changes."""

    def __init__(self, connect: Callable[[ReplicaKey], ShardClient], clock: Callable[[], float]) -> None:
        self._connect = connect
        self._clock = clock
        self._clients: dict[ReplicaKey, ShardClient] = {}
        self._in_flight: dict[ReplicaKey, int] = {}
        self._suspect_until: dict[ReplicaKey, float] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def update(self, keys: tuple[ReplicaKey, ...]) -> None:
        self._clients = {key: self._connect(key) for key in keys}
        self._in_flight = {key: self._in_flight.get(key, 0) for key in keys}
        self._suspect_until = {key: until for key, until in self._suspect_until.items() if key in self._clients}

    async def call(self, ask: Callable[[ShardClient], Awaitable[T]], timeout_s: float) -> T:
        """Ask the best replica, then the others, each once; Unavailable when none answers within `timeout_s`.

        While another is left a replica has half of the time that remains; then the next one is asked.
        """
        deadline = self._clock() + timeout_s
        tried: set[ReplicaKey] = set()
        failure = Unavailable("no replica of the shard is ready")
        while (key := self._pick(tried)) is not None:
            tried.add(key)
            slice_s = (deadline - self._clock()) / (2.0 if self._pick(tried) else 1.0)
            try:
                async with asyncio.timeout(slice_s):
                    return await self._ask(key, ask)
            except TimeoutError:
                failure = Unavailable(f"replica {key} did not answer within {slice_s:.3f} s")
            except Unavailable as error:
                failure = error
            self._suspect_until[key] = self._clock() + SUSPECT_S
        raise failure

    async def _ask(self, key: ReplicaKey, ask: Callable[[ShardClient], Awaitable[T]]) -> T:
        self._in_flight[key] = self._in_flight.get(key, 0) + 1
        try:
            return await ask(self._clients[key])
        finally:
            if key in self._in_flight:
                self._in_flight[key] -= 1

    def _pick(self, tried: set[ReplicaKey]) -> ReplicaKey | None:
        now = self._clock()
        left = [key for key in self._clients if key not in tried]
        return min(
            left,
            key=lambda key: (self._suspect_until.get(key, 0.0) > now, self._in_flight.get(key, 0), key),
            default=None,
        )
