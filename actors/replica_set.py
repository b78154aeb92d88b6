"""The replicas of one shard as a coordinator sees them: pick the least busy, avoid the suspect, fail over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from actors.shard_client import ShardClient
from cluster.errors import Unavailable
from cluster.placement import ReplicaKey

SUSPECT_S = 1.0  # how long a replica that failed is asked only when no other is left
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Replica:
    """`calls` are the time slices of the calls in flight to it."""

    key: ReplicaKey
    calls: set[asyncio.Timeout] = field(default_factory=set)
    suspect_until: float = 0.0


class ReplicaSet:
    """Ready replicas of one shard, by key; `update` replaces them when the serving table changes."""

    def __init__(self, connect: Callable[[ReplicaKey], ShardClient], clock: Callable[[], float]) -> None:
        self._connect = connect
        self._clock = clock
        self._replicas: dict[ReplicaKey, _Replica] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    def update(self, keys: tuple[ReplicaKey, ...]) -> None:
        """Replace the replicas. Calls in flight to one that left fail over at once: it may hang."""
        before = self._replicas
        self._replicas = {key: before.get(key) or _Replica(key) for key in keys}
        for key in before.keys() - self._replicas.keys():
            for call in before[key].calls:
                if not call.expired():
                    call.reschedule(asyncio.get_running_loop().time())

    async def call(self, ask: Callable[[ShardClient], Awaitable[T]], timeout_s: float) -> T:
        """Ask the best replica, then the others, each once; Unavailable when none answers within `timeout_s`.

        While another is left a replica has half of the time that remains; then the next one is asked.
        """
        deadline = self._clock() + timeout_s
        tried: set[ReplicaKey] = set()
        failure = Unavailable("no replica of the shard is ready")
        while left := self._left(tried):
            replica = left[0] if len(left) == 1 else min(left, key=self._rank)
            slice_s = (deadline - self._clock()) / (2.0 if len(left) > 1 else 1.0)
            try:
                return await self._ask(replica, ask, slice_s)
            except Unavailable as error:
                failure = error
            tried.add(replica.key)
            replica.suspect_until = self._clock() + SUSPECT_S
        raise failure

    async def _ask(self, replica: _Replica, ask: Callable[[ShardClient], Awaitable[T]], slice_s: float) -> T:
        """Connect and ask. A replica that cannot be connected to (yet) is one that failed, not an invalid table."""
        key = replica.key
        try:
            async with asyncio.timeout(slice_s) as call:
                replica.calls.add(call)
                try:
                    return await ask(self._connect(key))
                finally:
                    replica.calls.discard(call)
        except TimeoutError:
            if self._replicas.get(key) is not replica:
                raise Unavailable(f"replica {key} is not ready any more") from None
            raise Unavailable(f"replica {key} did not answer within {slice_s:.3f} s") from None

    def _left(self, tried: set[ReplicaKey]) -> list[_Replica]:
        return [replica for key, replica in self._replicas.items() if not tried or key not in tried]

    def _rank(self, replica: _Replica) -> tuple[bool, int, ReplicaKey]:
        """The best one is least: not suspect, then the least busy."""
        return replica.suspect_until > self._clock(), len(replica.calls), replica.key
