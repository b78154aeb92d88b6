"""Writes over all shards: split by the routing that is served, sent to each shard's batcher, answered as one.

Where a collection is served with another number of shards before a part was applied, that part is split again, by the
new routing, and sent on. What was applied stays: the new shards read the old ones' logs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from actors.shard_client import ServedCollection
from actors.write_batcher import MadeFor, Rerouted, WriteBatcher, check_write_bytes, set_within
from actors.write_parts import joined_result, joined_write, split_write
from cluster.config import Limits
from cluster.errors import EaglerayError, Unavailable
from cluster.write import PointWrite, WriteOutcome, WriteResult

LARGE_WRITE_BYTES = 1024 * 1024
GATHER_S = 0.05  # parts that a new routing gives back come at about the same time, and are split again as one
Part = tuple[int, PointWrite]  # and its shard
Calls = dict[asyncio.Task[WriteOutcome], Part]


class WriteRouter:
    """`served` gives a collection as it is served now (`Coordinator.served`), `batcher` the queue of a shard, None
    where the table has no such shard. `next_table` gives the event that is set when another table comes."""

    def __init__(
        self,
        served: Callable[[str], ServedCollection],
        batcher: Callable[[str, int], WriteBatcher | None],
        next_table: Callable[[], asyncio.Event],
        limits: Limits,
    ) -> None:
        self._served = served
        self._batcher = batcher
        self._next_table = next_table
        self._limits = limits

    async def write(self, collection: str, write: PointWrite, timeout_s: float) -> WriteResult:
        """Have a write acknowledged by every shard it falls to.

        Raises what kept a shard from it where nothing was applied anywhere, or that is not known (Unavailable). Where
        some shards did and others did not, Unavailable names both: sending the same again is safe.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        served = self._served(collection)
        made_for = MadeFor.of(served)
        under_way = self._begin(collection, await self._parts(served, write), made_for, timeout_s)
        outcomes: list[tuple[int, WriteOutcome | BaseException]] = []
        try:
            while under_way:
                given_back: list[Part] = []
                for call in await _ended(under_way):
                    shard, part = under_way.pop(call)
                    outcome = _outcome(call)
                    if isinstance(outcome, Rerouted):
                        given_back.append((shard, part))
                    else:
                        outcomes.append((shard, outcome))
                if given_back:
                    try:
                        under_way |= await self._begin_again(collection, given_back, made_for, deadline)
                    except EaglerayError as error:
                        outcomes += [(shard, error) for shard, _ in given_back]
        finally:
            for call in under_way:
                _give_up(call)
        return joined_result(outcomes)

    async def check_size(self, collection: str, write: PointWrite) -> None:
        """Exhausted where `write` would refuse it for its size, whatever else waits."""
        served = self._served(collection)
        if write.size_bytes > self._limits.queued_write_bytes_per_shard:
            await self._parts(served, write)

    async def _parts(self, served: ServedCollection, write: PointWrite) -> dict[int, PointWrite]:
        """What falls to each shard. Exhausted where one can never take its part: then none is sent any."""
        if served.routing.shards > 1 and write.size_bytes > LARGE_WRITE_BYTES:  # beside the event loop
            parts = await asyncio.to_thread(split_write, write, served.routing)
        else:
            parts = split_write(write, served.routing)
        for part in parts.values():
            check_write_bytes(part.size_bytes, self._limits.queued_write_bytes_per_shard)
        return parts

    def _begin(self, collection: str, parts: Mapping[int, PointWrite], made_for: MadeFor, timeout_s: float) -> Calls:
        return {
            asyncio.ensure_future(self._send(collection, shard, part, made_for, timeout_s)): (shard, part)
            for shard, part in parts.items()
        }

    async def _begin_again(self, collection: str, given_back: list[Part], made_for: MadeFor, deadline: float) -> Calls:
        """Split parts by the routing that is served now, and send them. Raises what keeps all of them from that."""
        served = await self._seen(collection, deadline)
        now = MadeFor.of(served)
        if not made_for.same_collection(now):
            made_for.check(collection, now)
        parts = await self._parts(served, joined_write([part for _, part in given_back]))
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0.0:
            raise Unavailable("the time was over when it was to be sent to the shards that there are now; not applied")
        return self._begin(collection, parts, now, left_s)

    async def _seen(self, collection: str, deadline: float) -> ServedCollection:
        """The collection, as soon as it is in a table; Unavailable where it is not until the deadline."""
        while True:
            next_table = self._next_table()
            try:
                return self._served(collection)
            except Unavailable:
                if not await set_within(next_table, deadline - asyncio.get_running_loop().time()):
                    raise

    async def _send(
        self, collection: str, shard: int, part: PointWrite, made_for: MadeFor, timeout_s: float
    ) -> WriteOutcome:
        """Have one shard acknowledge its part; Rerouted where the collection has other shards now."""
        batcher = self._batcher(collection, shard)
        if batcher is None:  # it was there when the write was split
            made_for.check(collection, MadeFor.of(self._served(collection)))
            raise Unavailable("the shard is not served; nothing was applied there")
        return await batcher.write(part, made_for, timeout_s)


async def _ended(under_way: Calls) -> list[asyncio.Task[WriteOutcome]]:
    """Calls that ended, in their order: all of them, or some as soon as one has failed.

    Where it was given back, others that are at about the same time come with it; one whose primary hangs does not hold
    them up.
    """
    done, others = await asyncio.wait(under_way, return_when=asyncio.FIRST_EXCEPTION)
    if others and any(isinstance(_outcome(call), Rerouted) for call in done):
        await asyncio.wait(others, timeout=GATHER_S)
    return [call for call in under_way if call.done()]


def _outcome(call: asyncio.Task[WriteOutcome]) -> WriteOutcome | BaseException:
    if call.cancelled():
        return asyncio.CancelledError()
    return call.exception() or call.result()


def _give_up(call: asyncio.Task[WriteOutcome]) -> None:
    """Cancel what is under way. An error that nobody looked at is no reason for a message in the log."""
    if not call.cancel() and not call.cancelled():
        call.exception()
