"""Queries over a switch of generations: which one they ask, and when they ask again under a newer one.

A query asks one generation, of all shards. Where that fails, and the table names a newer one by then, it asks that
one, from the beginning: an answer never mixes two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from actors.shard_client import ServedCollection
from actors.write_batcher import MadeFor, set_within
from cluster.errors import Exhausted, NotFound, Unavailable

WAITING_MAX = 64  # queries that may wait for a table that has what they ask for: it may never come
RETRY_S = 0.1
T = TypeVar("T")
Once = Callable[[ServedCollection, float], Coroutine[Any, Any, T]]  # ask one generation, for so many seconds


class GenerationSwitch:
    """`served` gives a collection as it is served now, `next_table` the event that is set when another table comes.

    `table_changed` must be called when one has come.
    """

    def __init__(self, served: Callable[[str], ServedCollection], next_table: Callable[[], asyncio.Event]) -> None:
        self._served = served
        self._next_table = next_table
        self._waiting = 0
        self._asking: dict[asyncio.Task[Any], tuple[str, ServedCollection]] = {}  # those that may wait for an LSN
        self._replaced: set[asyncio.Task[Any]] = set()  # of these, whose generation is not the newest any more

    async def ask(self, collection: str, once: Once[T], timeout_s: float, min_lsn: Mapping[int, int]) -> T:
        """What `once` answers. It raises Unavailable where it has no answer; so does this where none is left to ask.

        `min_lsn` is by shard. One that the routing lacks is satisfied where the logs of what is served begin behind
        that LSN; else the table that has it is waited for.
        """
        loop = asyncio.get_running_loop()
        deadline, left_s = loop.time() + timeout_s, timeout_s
        served = self._served(collection)
        while True:
            if min_lsn and _lacking(served, min_lsn):
                served = await self._with_shards(collection, served, min_lsn, deadline)
                left_s = deadline - loop.time()
            try:
                asked = once(served, left_s)
                return await (self._unless_replaced(collection, served, asked) if min_lsn else asked)
            except Unavailable:
                newer, left_s = self._newer(collection, served), deadline - loop.time()
                if newer is None or left_s <= 0.0:
                    raise
                served = newer

    def table_changed(self) -> None:
        """Have what may wait for an LSN ask again, where another generation is served: the LSN may be in that one."""
        for call, (collection, served) in self._asking.items():
            if self._newer(collection, served) is not None and call not in self._replaced:
                self._replaced.add(call)
                call.cancel()

    def _newer(self, collection: str, served: ServedCollection) -> ServedCollection | None:
        """A newer generation of the same collection, where the table names one."""
        try:
            now = self._served(collection)
        except (NotFound, Unavailable):
            return None
        same = MadeFor.of(now).same_collection(MadeFor.of(served))
        return now if same and now.generation > served.generation else None

    async def _unless_replaced(self, collection: str, served: ServedCollection, asked: Coroutine[Any, Any, T]) -> T:
        """Await an answer; Unavailable where `table_changed` finds that it is of no use to wait for it any more."""
        call = asyncio.ensure_future(asked)
        self._asking[call] = collection, served
        try:
            return await call
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if call not in self._replaced or (me is not None and me.cancelling()):
                raise
            raise Unavailable(f"generation {served.generation} of {collection!r} was replaced") from None
        finally:
            del self._asking[call]
            self._replaced.discard(call)

    async def _with_shards(
        self, collection: str, served: ServedCollection, min_lsn: Mapping[int, int], deadline: float
    ) -> ServedCollection:
        """The collection as soon as it has the shards that `min_lsn` names, or logs that begin behind these LSNs."""
        now = served
        while lacking := _lacking(now, min_lsn):
            if self._waiting >= WAITING_MAX:
                raise Exhausted(f"{self._waiting} requests wait already; {lacking}", RETRY_S)
            next_table = self._next_table()
            self._waiting += 1
            try:
                came = await set_within(next_table, deadline - asyncio.get_running_loop().time())
            finally:
                self._waiting -= 1
            if not came:
                raise Unavailable(f"{lacking}; no table that has it came in time")
            now = self._served(collection)
            if not MadeFor.of(now).same_collection(MadeFor.of(served)):
                raise Unavailable(f"collection {collection!r} was replaced by another one meanwhile")
        return now


def _lacking(served: ServedCollection, min_lsn: Mapping[int, int]) -> str:
    """Which LSN of a shard that is not served may not be in what is; "" where there is none."""
    for shard, lsn in min_lsn.items():
        if shard not in served.shard_points and lsn > served.log_start:
            return (
                f"shard {shard}: asked for LSN {lsn}, but generation {served.generation} has shards 0 to "
                f"{served.routing.shards - 1}, whose logs begin behind LSN {served.log_start}"
            )
    return ""
