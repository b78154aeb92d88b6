"""A replica that follows or leads: who waits for what, and who must not. No supervisor: the test says who leads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import replica as replica_module
from actors.replica import PUSHED_MAX, Replica
from actors.shard import Shard
from actors.shard_view import ShardView
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Limits, Settings
from cluster.errors import EaglerayError, Exhausted, Fenced, Unavailable
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.wal import Wal
from cluster.write import PointWrite, WriteOutcome
from tests.fakes import FaultyStore, LocalRuntime
from tests.unit.actors.points import commit, flipped, manifest_log, random_points

CONFIG = CollectionConfig(4, metric="l2", replicas=2, index=IndexConfig(kind="flat"))
ONE, OTHER = ReplicaKey("words", 0, 0), ReplicaKey("words", 0, 1)
WANTED = WantedReplica(version=1, generation=1, shards=1, num_cpus=0.0)


def upsert(*numbers: int) -> PointWrite:
    """Points of these ids; point i lies at (i, i, i, i)."""
    vectors = np.repeat(np.array(numbers, np.float32)[:, None], 4, axis=1)
    return PointWrite(pa.record_batch([pa.array(numbers), vectors_array(vectors)], names=["id", "vector"]))


def asked_for(number: int, min_lsn: int = 0, timeout_s: float = 5.0, generation: int = 1) -> ShardSearch:
    vector = np.full((1, 4), number, np.float32)
    return ShardSearch(generation, vector, (SearchGroup(0, 1, 1, SearchParams()),), timeout_s, min_lsn)


async def nearest(replica: Replica, number: int, min_lsn: int = 0) -> Any:
    (hits,) = await replica.search(asked_for(number, min_lsn))
    assert isinstance(hits, Hits), hits
    return hits.ids.to_pylist()[0]


async def written(replica: Replica, *numbers: int) -> int:
    """Write each point by itself, all at once; the highest LSN of their records."""
    outcomes = await replica.write([upsert(number) for number in numbers])
    assert all(isinstance(outcome, WriteOutcome) for outcome in outcomes), outcomes
    return max(outcome.lsn for outcome in outcomes if isinstance(outcome, WriteOutcome))


def with_replicas(
    scenario: Callable[[LocalRuntime], Awaitable[None]],
    tmp_path: Path,
    store: ObjectStore | None = None,
    keys: Iterable[ReplicaKey] = (ONE, OTHER),
    tick_s: float | None = None,
    settings: Settings | None = None,
) -> None:
    """Replicas of a shard of ten points, the first of which leads."""
    store = store or MemoryStore()
    if not manifest_log(store, "words").newest():
        commit(store, "words", CONFIG, random_points(CONFIG, 10, seed=1))
    options = {} if settings is None else {"settings": settings}
    runtime = LocalRuntime(store, tmp_path, tick_s=tick_s, **options)
    for key in keys:
        runtime.start(key, WANTED)

    async def run() -> None:
        async with asyncio.timeout(20):
            await runtime.lead(ONE)
            await scenario(runtime)

    try:
        asyncio.run(run())
    finally:
        runtime.close()


# --- following ----------------------------------------------------------------------------------------------------


def test_pushed_record_is_applied_without_a_read_of_the_wal(tmp_path: Path) -> None:
    store = FaultyStore(MemoryStore(), counted=frozenset({"get"}))

    async def scenario(runtime: LocalRuntime) -> None:
        first, second = runtime.replica(ONE), runtime.replica(OTHER)
        await asyncio.wrap_future(second.catch_up())  # the claim was not pushed
        reads = store.calls
        lsn = await written(first, 100)
        while second.status().lsn < lsn:
            await asyncio.sleep(0.001)
        assert store.calls == reads
        assert await nearest(second, 100) == 100

    with_replicas(scenario, tmp_path, store)


def test_search_with_a_min_lsn_reads_what_was_not_pushed(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        runtime.drop_pushes = True
        lsn = await written(runtime.replica(ONE), 100)
        assert await nearest(runtime.replica(OTHER), 100, lsn) == 100
        lsn = await written(runtime.replica(ONE), 200)
        found = (await runtime.replica(OTHER).fetch(1, pa.array([100, 200]), [], lsn)).found
        assert found.tolist() == [True, True]

    with_replicas(scenario, tmp_path)


def test_search_that_waits_goes_on_as_soon_as_the_record_comes(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        lsn = await written(runtime.replica(ONE), 100)
        waiting = [asyncio.ensure_future(nearest(runtime.replica(OTHER), 200, lsn + 1)) for _ in range(50)]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in waiting)
        assert await nearest(runtime.replica(OTHER), 100, lsn) == 100, "those that wait must not hold up others"
        await written(runtime.replica(ONE), 200)
        assert await asyncio.gather(*waiting) == [200] * 50

    with_replicas(scenario, tmp_path)


def test_search_for_an_lsn_that_does_not_come_names_both(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        lsn = await written(runtime.replica(ONE), 100)
        for key in (ONE, OTHER):
            started = time.monotonic()
            with pytest.raises(Unavailable, match=f"{key} has applied LSN {lsn}, not yet LSN {lsn + 5}"):
                await runtime.replica(key).search(asked_for(100, lsn + 5, timeout_s=0.1))
            assert 0.1 <= time.monotonic() - started < 5.0
            started = time.monotonic()
            with pytest.raises(Unavailable, match=f"not yet LSN {lsn + 5}"):
                await runtime.replica(key).fetch(1, pa.array([100]), [], lsn + 5, timeout_s=0.1)
            assert 0.1 <= time.monotonic() - started < 5.0, "as its caller does, not as long as any may"

    with_replicas(scenario, tmp_path)


def test_followers_read_the_wal_by_themselves(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        runtime.drop_pushes = True
        lsn = await written(runtime.replica(ONE), 100)
        while runtime.replica(OTHER).status().lsn < lsn:
            await asyncio.sleep(0.001)

    with_replicas(scenario, tmp_path, tick_s=0.005)


def test_pushes_beyond_the_bound_are_left_to_the_wal(tmp_path: Path) -> None:
    inner = MemoryStore()
    stalling = FaultyStore(inner, fault="stall", counted=frozenset({"get"}))

    async def scenario(runtime: LocalRuntime) -> None:
        first, shard = runtime.replica(ONE), Shard(stalling, "words", 0, tmp_path)
        follower = Replica(OTHER, lambda: shard, runtime._settings, 1)
        stalling.at = stalling.calls + 1
        follower.catch_up()
        assert await asyncio.to_thread(stalling.stalled.wait, 20)
        lsn = await written(first, *range(100, 110))
        record = inner.get(paths.wal_record("words", 0, lsn))
        taken = [follower.receive(record) for _ in range(PUSHED_MAX + 5)]
        assert [one is None for one in taken] == [False] * PUSHED_MAX + [True] * 5
        assert follower.status().lsn < lsn, "the status waits for nobody"
        stalling.go_on.set()
        assert await nearest(follower, 105, lsn) == 105
        await asyncio.gather(*(asyncio.wrap_future(one) for one in taken if one is not None))
        assert follower.receive(record) is not None
        follower.close()

    with_replicas(scenario, tmp_path, inner, keys=[ONE])


def test_corrupt_record_is_told_by_who_follows_and_nothing_behind_it_is_applied(tmp_path: Path) -> None:
    store = MemoryStore()

    async def scenario(runtime: LocalRuntime) -> None:
        runtime.drop_pushes = True
        follower = runtime.replica(OTHER)
        lsn = await written(runtime.replica(ONE), 100)
        await written(runtime.replica(ONE), 200)
        key = paths.wal_record("words", 0, lsn)
        good = store.get(key)
        store.put(key, flipped(good, 99))
        await asyncio.wrap_future(follower.catch_up())  # or the search may end before the record was read
        with pytest.raises(Unavailable, match=f"not yet LSN {lsn + 1} .Corrupt: {key}: "):
            await follower.search(asked_for(200, lsn + 1, timeout_s=0.1))
        assert follower.status().error.startswith(f"Corrupt: {key}: ")
        assert (follower.status().state, follower.status().lsn) == ("ready", lsn - 1)
        store.put(key, good)
        assert await nearest(follower, 200, lsn + 1) == 200
        while follower.status().error:  # told by the thread that reads, after the search has its answer
            await asyncio.sleep(0.001)

    with_replicas(scenario, tmp_path, store)


# --- leading ------------------------------------------------------------------------------------------------------


def test_write_to_a_replica_that_does_not_lead_is_fenced(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        outcomes = await runtime.replica(OTHER).write([upsert(100), upsert(101)])
        assert [str(outcome) for outcome in outcomes] == ["replica words/0/1 is not the primary of shard 0"] * 2
        assert all(isinstance(outcome, Fenced) for outcome in outcomes)
        assert await runtime.replica(OTHER).write([]) == ()
        assert Wal(runtime._store, "words", 0, 0).end(0, 0) == (1, 1), "the first one's claim alone"

    with_replicas(scenario, tmp_path)


def test_each_write_of_a_call_has_its_own_outcome(tmp_path: Path) -> None:
    settings = Settings(data="memory://small", limits=Limits(queued_write_bytes_per_shard=1))

    async def scenario(runtime: LocalRuntime) -> None:
        outcomes = await runtime.replica(ONE).write([upsert(100), upsert(*range(200, 300)), upsert(300)])
        assert isinstance(outcomes[0], WriteOutcome)
        refused = [outcome for outcome in outcomes if not isinstance(outcome, WriteOutcome)]
        assert refused
        assert all(isinstance(outcome, Exhausted) for outcome in refused)
        for outcome, number in zip(outcomes, (100, 250, 300), strict=True):
            found = (await runtime.replica(ONE).fetch(1, pa.array([number]), [])).found
            assert found.tolist() == [isinstance(outcome, WriteOutcome)]

    with_replicas(scenario, tmp_path, settings=settings)


def test_lead_of_one_that_leads_changes_nothing(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        await asyncio.gather(*(runtime.lead(ONE) for _ in range(3)))
        assert runtime.replica(ONE).status().epoch == 1
        await written(runtime.replica(ONE), 100)

    with_replicas(scenario, tmp_path)


def test_primary_that_was_taken_over_says_so_and_follows(tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        first, second = runtime.replica(ONE), runtime.replica(OTHER)
        await written(first, 100)
        await runtime.lead(OTHER)
        assert second.status().epoch == 2
        (outcome,) = await first.write([upsert(200)])
        assert isinstance(outcome, Fenced)
        while first.status().epoch:
            await asyncio.sleep(0.001)
        (outcome,) = await first.write([upsert(200)])
        assert "words/0/0 is not the primary of shard 0: " in str(outcome)
        lsn = await written(second, 300)
        assert [await nearest(first, number, lsn) for number in (100, 300)] == [100, 300]
        await runtime.lead(ONE)
        assert first.status().epoch == 3
        lsn = await written(first, 400)
        assert await nearest(second, 400, lsn) == 400

    with_replicas(scenario, tmp_path)


def test_writer_that_gives_up_does_not_disturb_the_others(tmp_path: Path) -> None:
    stalling = FaultyStore(MemoryStore(), fault="stall", counted=frozenset({"put_if_absent"}))

    async def scenario(runtime: LocalRuntime) -> None:
        replica = runtime.replica(ONE)
        stalling.at = stalling.calls + 1
        impatient = asyncio.ensure_future(replica.write([upsert(100)]))
        assert await asyncio.to_thread(stalling.stalled.wait, 20)
        patient = asyncio.ensure_future(replica.write([upsert(200)]))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.sleep(0.01)
        stalling.go_on.set()
        (outcome,) = await patient
        assert isinstance(outcome, WriteOutcome)
        assert impatient.cancelled()
        assert [await nearest(replica, number) for number in (100, 200)] == [100, 200]

    with_replicas(scenario, tmp_path, stalling)


def test_status_and_searches_wait_neither_for_writes_nor_for_a_store_that_stalls(tmp_path: Path) -> None:
    stalling = FaultyStore(MemoryStore(), fault="stall", counted=frozenset({"put_if_absent"}))

    async def scenario(runtime: LocalRuntime) -> None:
        replica = runtime.replica(ONE)
        before = await written(replica, 100)
        stalling.at = stalling.calls + 1
        write = asyncio.ensure_future(replica.write([upsert(200)]))
        assert await asyncio.to_thread(stalling.stalled.wait, 20)
        assert (replica.status().lsn, replica.status().epoch) == (before, 1)
        assert await nearest(replica, 200) == 100, "it is not durable yet"
        assert not write.done()
        stalling.go_on.set()
        await write
        assert await nearest(replica, 200) == 200

    with_replicas(scenario, tmp_path, stalling)


# --- dying --------------------------------------------------------------------------------------------------------


def test_writes_in_flight_when_the_process_dies_are_unavailable_and_acknowledged_ones_are_kept(
    tmp_path: Path,
) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        client, acknowledged, doubtful = runtime.client(ONE), set(), set()

        async def write_on(first: int) -> None:
            for number in range(first, first + 1_000):
                try:
                    (outcome,) = await client.write([upsert(number)])
                except Unavailable:
                    doubtful.add(number)
                    return
                (acknowledged if isinstance(outcome, WriteOutcome) else doubtful).add(number)

        for life in range(3):
            writers = [asyncio.ensure_future(write_on(10_000 * life + 1_000 * n)) for n in range(4)]
            before = len(acknowledged)
            while len(acknowledged) < before + 50:
                await asyncio.sleep(0)
            runtime.kill(ONE)
            await asyncio.gather(*writers)
            runtime.revive(ONE)
            assert runtime.replica(ONE).status().epoch == 0, "it does not lead until it is told to"
            await runtime.lead(ONE)
        numbers = sorted(acknowledged | doubtful)
        found = (await client.fetch(1, pa.array(numbers), [])).found
        kept = {number for number, there in zip(numbers, found.tolist(), strict=True) if there}
        assert acknowledged <= kept
        lsn = runtime.replica(ONE).status().lsn
        others = await runtime.client(OTHER).fetch(1, pa.array(numbers), [], lsn)
        assert others.found.tolist() == found.tolist()
        assert others.lsn >= lsn

    with_replicas(scenario, tmp_path)


@pytest.mark.parametrize(("at_once_s", "here"), [(0.0, [False, False]), (60.0, [False, True])])
def test_only_a_search_that_is_known_to_be_short_is_done_where_it_is_asked_for(
    at_once_s: float, here: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "AT_ONCE_S", at_once_s)
    threads: list[int] = []
    search = ShardView.search

    def told(self: ShardView, request: ShardSearch) -> Any:
        threads.append(threading.get_ident())
        return search(self, request)

    monkeypatch.setattr(ShardView, "search", told)

    async def scenario(runtime: LocalRuntime) -> None:
        for number in (1, 2):
            await nearest(runtime.replica(ONE), number)
        assert [thread == threading.get_ident() for thread in threads] == here

    with_replicas(scenario, tmp_path)


def test_queries_are_sampled_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "AT_ONCE_S", 60.0)
    offered: list[int] = []

    async def scenario(runtime: LocalRuntime) -> None:
        replica = runtime.replica(ONE)

        def offer(*_: Any) -> None:
            assert replica._observing.locked(), "RecallObserver.offer is for one thread at a time"
            offered.append(threading.get_ident())

        monkeypatch.setattr(replica._observer, "offer", offer)
        for number in (1, 2):
            await nearest(replica, number)
        assert len(set(offered)) == 2

    with_replicas(scenario, tmp_path)


def test_replica_that_could_not_load_says_why_and_loads_later(tmp_path: Path) -> None:
    store = FaultyStore(MemoryStore(), counted=frozenset({"objects"}))
    commit(store, "words", CONFIG, random_points(CONFIG, 10, seed=1))
    store.at = store.calls + 1
    replica = Replica(ONE, lambda: Shard(store, "words", 0, tmp_path), Settings(data="memory://x"), 1)

    async def scenario() -> None:
        assert (replica.status().state, replica.status().error[:12]) == ("failed", "Unavailable:")
        for call in (replica.lead(), replica.search(asked_for(1))):
            with pytest.raises(EaglerayError):
                await call
        assert [type(outcome) for outcome in await replica.write([upsert(1)])] == [Fenced]
        replica.tick()
        assert Wal(store, "words", 0, 0).end(0, 0) == (0, 0), "it must not claim what it has not read"
        await replica.load(1)
        assert (replica.status().state, replica.status().error) == ("ready", "")
        await replica.lead()
        await written(replica, 100)
        assert await nearest(replica, 100) == 100

    asyncio.run(scenario())
    replica.close()


def test_closed_replica_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "TICK_S", 0.01)
    before = set(threading.enumerate())
    store = MemoryStore()
    commit(store, "words", CONFIG, random_points(CONFIG, 10, seed=1))
    replica = Replica(ONE, lambda: Shard(store, "words", 0, tmp_path), Settings(data="memory://x"), 1)
    replica.keep_ticking(0.01)

    async def scenario() -> None:
        await replica.lead()
        await written(replica, 100)
        assert await nearest(replica, 100) == 100

    asyncio.run(scenario())
    replica.close()
    deadline = time.monotonic() + 20.0
    while left := {thread.name for thread in threading.enumerate() if thread not in before}:
        assert time.monotonic() < deadline, left
        time.sleep(0.005)
