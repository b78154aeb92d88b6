from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from actors.replica_set import SUSPECT_S, ReplicaSet
from actors.shard_client import ShardClient
from cluster.errors import Invalid, Unavailable
from cluster.placement import ReplicaKey
from tests.fakes import ManualClock

A, B, C = (ReplicaKey("words", 0, number) for number in range(3))


class Replicas:
    """Replicas that answer with their own key, some of which fail; `asked` is who was asked, in order."""

    def __init__(self) -> None:
        self.failing: dict[ReplicaKey, Exception] = {}
        self.asked: list[ReplicaKey] = []
        self.gates: dict[ReplicaKey, asyncio.Event] = {}
        self.unknown: set[ReplicaKey] = set()

    def connect(self, key: ReplicaKey) -> ShardClient:
        if key in self.unknown:
            raise Unavailable(f"replica {key} is not known yet")
        return key  # type: ignore[return-value]  # the key stands for its client

    async def ask(self, client: ShardClient) -> ReplicaKey:
        key: ReplicaKey = client  # type: ignore[assignment]
        self.asked.append(key)
        if key in self.gates:
            await self.gates[key].wait()
        if key in self.failing:
            raise self.failing[key]
        return key


def with_replicas(scenario: Callable[[ReplicaSet, Replicas, ManualClock], Awaitable[None]], *keys: ReplicaKey) -> None:
    async def run() -> None:
        replicas, clock = Replicas(), ManualClock()
        chosen = ReplicaSet(replicas.connect, clock)
        chosen.update(keys)
        await scenario(chosen, replicas, clock)

    asyncio.run(run())


def test_call_without_replicas_is_unavailable() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        assert len(chosen) == 0
        with pytest.raises(Unavailable, match="no replica of the shard is ready"):
            await chosen.call(replicas.ask, 10.0)

    with_replicas(scenario)


def test_call_picks_the_least_busy_replica_and_the_lowest_key_among_equals() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {key: asyncio.Event() for key in (A, B, C)}
        calls = []
        for _ in range(5):
            calls.append(asyncio.ensure_future(chosen.call(replicas.ask, 10.0)))
            await asyncio.sleep(0)
        assert replicas.asked == [A, B, C, A, B]
        replicas.gates[C].set()
        assert await calls[2] == C
        calls.append(asyncio.ensure_future(chosen.call(replicas.ask, 10.0)))
        await asyncio.sleep(0)
        assert replicas.asked[-1] == C
        for gate in replicas.gates.values():
            gate.set()
        await asyncio.gather(*calls)
        assert await chosen.call(replicas.ask, 10.0) == A  # none is busy any more

    with_replicas(scenario, A, B, C)


def test_call_fails_over_to_the_next_replica() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.failing = {A: Unavailable("a is away")}
        assert await chosen.call(replicas.ask, 10.0) == B
        assert replicas.asked == [A, B]

    with_replicas(scenario, A, B)


def test_call_asks_each_replica_once_and_raises_the_last_failure() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.failing = {A: Unavailable("a is away"), B: Unavailable("b is away")}
        with pytest.raises(Unavailable, match="b is away"):
            await chosen.call(replicas.ask, 10.0)
        assert replicas.asked == [A, B]

    with_replicas(scenario, A, B)


def test_call_does_not_try_another_replica_after_an_error_that_is_the_callers() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.failing = {A: Invalid("wrong")}
        with pytest.raises(Invalid, match="wrong"):
            await chosen.call(replicas.ask, 10.0)
        assert replicas.asked == [A]

    with_replicas(scenario, A, B)


def test_suspect_replica_is_avoided_until_its_time_is_over() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.failing = {A: Unavailable("a is away")}
        await chosen.call(replicas.ask, 10.0)
        replicas.failing = {}
        clock.advance(SUSPECT_S - 0.01)
        assert await chosen.call(replicas.ask, 10.0) == B
        clock.advance(0.01)
        assert await chosen.call(replicas.ask, 10.0) == A

    with_replicas(scenario, A, B)


def test_suspect_replica_is_asked_where_no_other_is_left() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.failing = {A: Unavailable("a is away")}
        with pytest.raises(Unavailable):
            await chosen.call(replicas.ask, 10.0)
        replicas.failing = {}
        assert await chosen.call(replicas.ask, 10.0) == A

    with_replicas(scenario, A)


def test_update_keeps_what_is_known_of_those_that_stay() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        busy = asyncio.ensure_future(chosen.call(replicas.ask, 10.0))
        await asyncio.sleep(0)
        replicas.failing = {B: Unavailable("b is away")}
        with pytest.raises(Unavailable):
            await chosen.call(lambda client: replicas.ask(client) if client == B else _refuse(), 10.0)
        replicas.failing = {}
        chosen.update((A, B, C))
        assert await chosen.call(replicas.ask, 10.0) == C  # A is busy, B is suspect
        replicas.gates[A].set()
        assert await busy == A

    async def _refuse() -> ReplicaKey:
        raise Unavailable("not this one")

    with_replicas(scenario, A, B)


def test_call_to_a_replica_that_leaves_the_table_fails_over_at_once() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        call = asyncio.ensure_future(chosen.call(replicas.ask, 1_000.0))
        await asyncio.sleep(0)
        chosen.update((B,))
        async with asyncio.timeout(10):
            assert await call == B
        assert replicas.asked == [A, B]
        assert len(chosen) == 1
        assert await chosen.call(replicas.ask, 10.0) == B

    with_replicas(scenario, A)


def test_cancelled_call_does_not_count_as_busy() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        call = asyncio.ensure_future(chosen.call(replicas.ask, 10.0))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        replicas.gates[A].set()
        assert await chosen.call(replicas.ask, 10.0) == A

    with_replicas(scenario, A, B)


def test_replica_that_hangs_loses_its_slice_and_the_next_one_answers() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        assert await chosen.call(replicas.ask, 0.2) == B
        assert replicas.asked == [A, B]
        assert await chosen.call(replicas.ask, 0.2) == B  # A is suspect now
        assert replicas.asked == [A, B, B]

    with_replicas(scenario, A, B)


def test_only_replica_that_hangs_is_unavailable_once_the_time_is_over() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        with pytest.raises(Unavailable, match=r"words/0/0 did not answer within 0\.050 s"):
            await chosen.call(replicas.ask, 0.05)

    with_replicas(scenario, A)


def test_call_to_the_last_replica_is_unavailable_as_soon_as_that_leaves_the_table() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        call = asyncio.ensure_future(chosen.call(replicas.ask, 1_000.0))
        await asyncio.sleep(0)
        chosen.update(())
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="words/0/0 is not ready any more"):
                await call

    with_replicas(scenario, A)


def test_call_that_its_caller_cancels_while_its_replica_leaves_is_cancelled() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.gates = {A: asyncio.Event()}
        call = asyncio.ensure_future(chosen.call(replicas.ask, 1_000.0))
        await asyncio.sleep(0)
        chosen.update((B,))
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        assert replicas.asked == [A]

    with_replicas(scenario, A, B)


def test_replica_without_a_client_yet_is_passed_over_until_it_has_one() -> None:
    async def scenario(chosen: ReplicaSet, replicas: Replicas, clock: ManualClock) -> None:
        replicas.unknown = {A}
        chosen.update((A, B))
        assert await chosen.call(replicas.ask, 10.0) == B
        replicas.unknown = set()
        clock.advance(SUSPECT_S)
        assert await chosen.call(replicas.ask, 10.0) == A

    with_replicas(scenario)
