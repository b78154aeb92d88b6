"""Continuous batching of the writes for one shard: while calls to its primary are in flight, writes gather.

The next free slot of the window takes all of them in one call, where they share WAL records; each is acknowledged by
itself. Sent again is only what was certainly not applied: what a replica refused that is not the primary any more. What
was split by a routing that is no more is given back, to be split again (`write_router`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.shard_client import ServedCollection, ShardClient
from cluster.config import IdType, Limits, Metric, VectorDtype
from cluster.errors import Conflict, EaglerayError, Exhausted, Fenced, Unavailable
from cluster.routing import Routing
from cluster.write import PointWrite, WriteOutcome

CALLS_IN_FLIGHT = 2  # one is applied while the next one travels; what gathers meanwhile shares the one after
SAME_PRIMARY_PAUSE_S = 0.05  # before a primary that refused is asked again under the same serving table
QUEUE_FULL_RETRY_S = 0.5
MAYBE = "the write may have been applied, or may be yet"
Outcomes = Sequence[WriteOutcome | EaglerayError]


@dataclass(frozen=True)
class MadeFor:
    """What a request was checked by, and a write split by: it fits no collection in which any of this is different.

    Where only the routing is, the collection is the same, and a write is split again.
    """

    routing: Routing
    dimension: int
    metric: Metric
    id_type: IdType
    vector_dtype: VectorDtype

    @classmethod
    def of(cls, served: ServedCollection) -> MadeFor:
        config = served.config
        return cls(served.routing, config.dimension, config.metric, config.id_type, config.vector_dtype)

    def same_collection(self, other: MadeFor) -> bool:
        """Whether no more than the routing differs."""
        return replace(self, routing=other.routing) == other

    def check(self, collection: str, now: MadeFor) -> None:
        """Conflict where the write does not fit the collection any more, Rerouted where it has to be split again."""
        if not self.same_collection(now):
            raise Conflict(f"collection {collection!r} was replaced meanwhile; nothing was applied there")
        if self != now:
            raise Rerouted(f"collection {collection!r} has {now.routing.shards} shards now; nothing was applied there")


class Rerouted(Conflict):
    """The points of a collection are routed in another way than a write was split by; nothing was applied."""


Connect = Callable[[MadeFor], ShardClient]


@dataclass(eq=False)
class _Waiting:
    """A write that somebody waits for. `sent`: it may be applied; otherwise `refusal` says why it is not."""

    write: PointWrite
    size_bytes: int
    made_for: MadeFor
    deadline: float
    outcome: asyncio.Future[WriteOutcome]
    queued: bool = True
    sent: bool = False
    refusal: str = "it waited for earlier writes"


def check_write_bytes(size_bytes: int, bound: int) -> None:
    """Exhausted where a write is larger than all that may wait for a shard."""
    if size_bytes > bound:
        raise Exhausted(f"queued_write_bytes_per_shard: the write has {size_bytes} bytes, at most {bound} may wait")


class WriteBatcher:
    """Gathers the writes for one shard.

    `connect` gives a client of the primary: Unavailable or Fenced where none is known yet, any other error where the
    collection is gone, or is not what the writes were made for any more (`MadeFor.check`). `next_table` gives the
    event that is set when another serving table comes; `acknowledged` is told the LSN of every write.
    """

    def __init__(
        self,
        connect: Connect,
        limits: Limits,
        next_table: Callable[[], asyncio.Event],
        acknowledged: Callable[[int], None],
    ) -> None:
        self._connect = connect
        self._limits = limits
        self._next_table = next_table
        self._acknowledged = acknowledged
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._calls: set[asyncio.Task[None]] = set()  # all of them
        self._window: set[asyncio.Task[None]] = set()  # those that take a slot

    async def write(self, write: PointWrite, made_for: MadeFor, timeout_s: float) -> WriteOutcome:
        """Acknowledged when it returns. Exhausted, Conflict, Rerouted: not applied; Unavailable says whether it may be.

        Cancel it to give up; what was sent already may be applied.
        """
        loop = asyncio.get_running_loop()
        item = _Waiting(write, write.size_bytes, made_for, loop.time() + timeout_s, loop.create_future())
        self._check_room(item.size_bytes)
        self._waiting.append(item)
        self._waiting_bytes += item.size_bytes
        self._pump()
        try:
            async with asyncio.timeout_at(item.deadline):
                return await item.outcome
        except TimeoutError:
            raise _too_late(item, timeout_s) from None
        finally:
            self._forget(item)

    def primary_changed(self) -> None:
        """Calls to the old primary, which may hang, hold up nobody any more."""
        self._window.clear()
        self._pump()

    def _check_room(self, size_bytes: int) -> None:
        bound = self._limits.queued_write_bytes_per_shard
        check_write_bytes(size_bytes, bound)
        if self._waiting_bytes + size_bytes > bound:
            raise Exhausted(
                f"queued_write_bytes_per_shard: writes of {self._waiting_bytes} bytes wait already, {bound} may",
                QUEUE_FULL_RETRY_S,
            )

    def _forget(self, item: _Waiting) -> None:
        """Give back the room of a write whose client gave up before its turn."""
        if item.queued:
            self._waiting.remove(item)
            self._waiting_bytes -= item.size_bytes

    def _pump(self) -> None:
        while self._waiting and len(self._window) < CALLS_IN_FLIGHT:
            call = asyncio.get_running_loop().create_task(self._call(self._take()))
            self._calls.add(call)
            self._window.add(call)
            call.add_done_callback(self._call_done)

    def _call_done(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._window.discard(call)
        self._pump()

    def _take(self) -> list[_Waiting]:
        """The oldest writes, made for the same, up to `wal_object_bytes` or one that is larger."""
        batch: list[_Waiting] = []
        size = 0
        while self._waiting:
            item = self._waiting[0]
            if batch and (size + item.size_bytes > self._limits.wal_object_bytes or item.made_for != batch[0].made_for):
                break
            self._waiting.popleft()
            self._waiting_bytes -= item.size_bytes
            item.queued = False
            batch.append(item)
            size += item.size_bytes
        return batch

    async def _call(self, batch: list[_Waiting]) -> None:
        """Have writes applied; those that were refused go again, without those whose clients gave up meanwhile."""
        try:
            while batch := [item for item in batch if not item.outcome.done()]:
                next_table = self._next_table()
                batch = await self._attempt(batch)
                if batch:
                    await set_within(next_table, SAME_PRIMARY_PAUSE_S)
        except asyncio.CancelledError:
            for item in batch:
                item.outcome.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # raised to the writes, which must not wait for ever
            for item in batch:
                _settle(item, error)

    async def _attempt(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Send the writes once, and return those that were not applied for want of a primary."""
        try:
            client = self._connect(batch[0].made_for)
        except (Fenced, Unavailable) as error:
            for item in batch:
                item.refusal = str(error)
            return batch
        for item in batch:
            item.sent = True
        refused = []
        for item, outcome in zip(batch, await _outcomes(client, batch), strict=True):
            if isinstance(outcome, Fenced):
                item.sent, item.refusal = False, str(outcome)
                refused.append(item)
                continue
            if isinstance(outcome, WriteOutcome):
                self._acknowledged(outcome.lsn)
            _settle(item, outcome)
        return refused


async def _outcomes(client: ShardClient, batch: list[_Waiting]) -> Outcomes:
    """What a call says of each write; after the last deadline nobody waits for it any more."""
    deadline = max(item.deadline for item in batch)
    left_s = max(0.0, deadline - asyncio.get_running_loop().time())
    try:
        async with asyncio.timeout_at(deadline):
            return await client.write([item.write for item in batch], left_s)
    except TimeoutError:
        return [Unavailable(f"the primary did not answer in time: {MAYBE}")] * len(batch)
    except EaglerayError as error:
        return [error] * len(batch)


def _settle(item: _Waiting, outcome: Any) -> None:
    if item.outcome.done():  # its client gave up
        return
    if isinstance(outcome, Exception):
        item.outcome.set_exception(outcome)
    else:
        item.outcome.set_result(outcome)


async def set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event; False where it is not set in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    return event.is_set()


def _too_late(item: _Waiting, timeout_s: float) -> Unavailable:
    if item.sent:
        return Unavailable(f"no answer within {round(timeout_s, 3):g} s: {MAYBE}")
    return Unavailable(f"nothing was applied within {round(timeout_s, 3):g} s: {item.refusal}")
