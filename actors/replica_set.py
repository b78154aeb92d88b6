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
        self._calls: dict[ReplicaKey, set[asyncio.Timeout]] = {}  # the time slices of the calls in flight
        self._suspect_until: dict[ReplicaKey, float] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def update(self, keys: tuple[ReplicaKey, ...]) -> None:
        """Replace the replicas. Calls in flight to one that left fail over at once: it may hang."""
        left = [self._calls[key] for key in self._calls.keys() - set(keys)]
        self._calls = {key: self._calls.get(key, set()) for key in keys}
        self._suspect_until = {key: until for key, until in self._suspect_until.items() if key in self._calls}
        for calls in left:
            for call in calls:
                if not call.expired():
                    call.reschedule(asyncio.get_running_loop().time())

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
                return await self._ask(key, ask, slice_s)
            except Unavailable as error:
                failure = error
            self._suspect_until[key] = self._clock() + SUSPECT_S
        raise failure

    async def _ask(self, key: ReplicaKey, ask: Callable[[ShardClient], Awaitable[T]], slice_s: float) -> T:
        """Connect and ask. A replica that cannot be connected to (yet) is one that failed, not an invalid table."""
        calls = self._calls[key]
        try:
            async with asyncio.timeout(slice_s) as call:
                calls.add(call)
                try:
                    return await ask(self._connect(key))
                finally:
                    calls.discard(call)
        except TimeoutError:
            if self._calls.get(key) is not calls:
                raise Unavailable(f"replica {key} is not ready any more") from None
            raise Unavailable(f"replica {key} did not answer within {slice_s:.3f} s") from None

    def _pick(self, tried: set[ReplicaKey]) -> ReplicaKey | None:
        now = self._clock()
        left = [key for key in self._calls if key not in tried]
        return min(
            left,
            key=lambda key: (self._suspect_until.get(key, 0.0) > now, len(self._calls[key]), key),
            default=None,
        )
