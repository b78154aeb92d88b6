"""A replica that stands in for those that lost their GPUs: supervisors and generations change, and who knows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.gpu_device import GpuDevice, GpuLost
from actors.named_replicas import NamedReplicas
from actors.replica_status import ReplicaStatus
from actors.shard_client import ServedCollection, ServingTable
from actors.supervisor import TABLE_REACHES_S
from actors.watched_replicas import LOST_GPU_PAUSE_S
from cluster.config import CollectionConfig, IndexConfig, Settings, Upkeep
from cluster.manifest import ShardEntry
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.routing import Routing
from tests.fakes import SETTINGS, LocalRuntime, ManualClock, Serving, serving, table_when
from tests.gpu_double import double_device
from tests.unit.actors.batches import CONFIG, upsert
from tests.unit.actors.points import commit, manifest_log, random_points
from tests.unit.actors.reshard_load import until

HALF = 0.5  # of a GPU
WORDS = replace(CONFIG, shards=1, replicas=1)
OWN, MORE = ReplicaKey("words", 0, 0, HALF), ReplicaKey("words", 0, 1, HALF)
WANTED = WantedReplica(2, 2, 1, 0.0, HALF)
Scenario = Callable[[Serving, ManualClock, MemoryStore], Awaitable[None]]


def next_generation(store: MemoryStore, share: float = HALF) -> int:
    """All is in the logs: the same as before, to be loaded anew."""
    log = manifest_log(store, "words")
    base = log.newest_live()
    return log.commit_generation(base, base.config, (ShardEntry(0),), num_gpus=share).generation


def lose_gpu(runtime: LocalRuntime, key: ReplicaKey) -> None:
    device: Any = runtime._processes[key].device
    device.library.lose()
    with pytest.raises(GpuLost):
        device.run(lambda resources: resources.syncDefaultStreamCurrentDevice())


def found(
    scenario: Scenario,
    tmp_path: Path,
    *running: ReplicaKey,
    gpus: float = HALF,
    settings: Settings = SETTINGS,
    config: CollectionConfig = WORDS,
    hangs: ReplicaKey | None = None,
) -> LocalRuntime:
    """A supervisor that finds replicas of generation 2, started in this order, of which one may hang."""
    store, clock = MemoryStore(), ManualClock()
    manifest_log(store, "words").create(config)
    next_generation(store)
    runtime = LocalRuntime(store, tmp_path, settings, gpus=gpus, open_gpu=lambda share: double_device(share=share))

    async def run() -> None:
        for key in running:
            runtime.start(key, WANTED)
        if hangs is not None:
            runtime.hang(hangs)
        async with asyncio.timeout(20), serving(store, tmp_path, settings, clock, runtime) as eagleray:
            await scenario(eagleray, clock, store)

    try:
        asyncio.run(run())
    finally:
        runtime.close()
    return runtime


def test_new_supervisor_ends_no_replica_that_stands_in_alone_before_it_answered(tmp_path: Path) -> None:
    """Nobody knows what is served until then, and coordinators go on to ask it."""

    async def scenario(eagleray: Serving, clock: ManualClock, store: MemoryStore) -> None:
        table = await table_when(eagleray.directory, lambda table: "words" in table.unready)
        assert table.collections == {}
        await asyncio.sleep(5 * SETTINGS.reconcile_period_s)
        assert MORE in eagleray.runtime.existing()
        eagleray.runtime.revive(MORE)
        await table_when(eagleray.directory, lambda table: bool(table.collections))

    assert found(scenario, tmp_path, MORE, OWN, hangs=MORE).stopped == []


def test_replica_that_alone_answers_has_the_only_gpu_and_takes_its_shard_to_the_next_generation(tmp_path: Path) -> None:
    """Its shard's own waits for that GPU: were the next generation only for that, it would wait for ever."""

    async def scenario(eagleray: Serving, clock: ManualClock, store: MemoryStore) -> None:
        await table_when(eagleray.directory, lambda table: bool(table.collections))
        generation = next_generation(store)
        await eagleray.directory.refresh("words")
        table = await table_when(eagleray.directory, lambda table: table.collections["words"].generation == generation)
        assert table.collections["words"].replicas == {0: (MORE,)}

    assert found(scenario, tmp_path, MORE, OWN).stopped == []


@pytest.mark.parametrize("gpus", [HALF, 2 * HALF])
def test_replica_that_stands_in_takes_no_gpu_that_a_generation_with_another_share_waits_for(
    tmp_path: Path, gpus: float
) -> None:
    """It goes, whether it waits for a GPU or has one; and none is started again."""

    async def scenario(eagleray: Serving, clock: ManualClock, store: MemoryStore) -> None:
        runtime = eagleray.runtime
        await table_when(eagleray.directory, lambda table: bool(table.collections))
        lose_gpu(runtime, OWN)
        await until(lambda: MORE in runtime.existing())
        generation = next_generation(store, 1.0)
        await eagleray.directory.refresh("words")
        async with asyncio.timeout(10):
            while MORE in runtime.existing():
                clock.advance(TABLE_REACHES_S / 10)
                await asyncio.sleep(0.005)
        await asyncio.sleep(5 * SETTINGS.reconcile_period_s)
        assert MORE not in runtime.existing()
        assert OWN in runtime.existing(), "its twin answers"
        assert runtime.free_gpus == gpus - HALF
        runtime.add_gpus(1.0)
        await table_when(eagleray.directory, lambda table: table.collections["words"].generation == generation)

    found(scenario, tmp_path, OWN, gpus=gpus)


def test_primary_that_stands_in_is_known_as_such_to_those_who_ask_why_nothing_is_sealed(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, clock: ManualClock, store: MemoryStore) -> None:
        clock.advance(60.0)  # nobody waits any more for the one that may have led
        await table_when(
            eagleray.directory,
            lambda table: bool(table.collections) and table.collections["words"].primaries == {0: MORE},
        )
        await eagleray.runtime.client(MORE).write([upsert(1, 2, 3)])
        await until(lambda: bool(eagleray.supervisor.describe("words")["idle_upkeep"]))
        (why,) = eagleray.supervisor.describe("words")["idle_upkeep"].values()
        assert why.startswith("not begun yet"), "and not that no replica leads the shard"

    found(scenario, tmp_path, MORE, OWN, settings=replace(SETTINGS, upkeep=Upkeep(seal_points=2)))


def test_tables_that_follow_each_other_without_end_do_not_put_off_the_end_of_a_lost_replica(tmp_path: Path) -> None:
    """Each has coordinators know of the replica that answers in its place, which they do since the first of them."""

    async def scenario(eagleray: Serving, clock: ManualClock, store: MemoryStore) -> None:
        await table_when(
            eagleray.directory,
            lambda table: "words" in table.collections and table.collections["words"].replicas[0] == (OWN, MORE),
        )
        lost = eagleray.runtime.replica(OWN)
        lose_gpu(eagleray.runtime, OWN)
        for number in range(5):
            name = f"other{number}"
            manifest_log(store, name).create(WORDS)
            await eagleray.directory.refresh(name)
            await table_when(eagleray.directory, lambda table, name=name: name in table.collections)
            clock.advance(TABLE_REACHES_S / 2)
        await until(lambda: eagleray.runtime._processes[OWN].replica not in (lost, None))

    found(scenario, tmp_path, OWN, MORE, gpus=1.0, config=replace(WORDS, replicas=2))


def test_replica_is_known_since_the_first_table_of_those_that_named_it_without_a_break() -> None:
    clock = ManualClock()
    named = NamedReplicas(clock)
    table = ServingTable("", {"words": _served(OWN)})
    named.publish(table)
    clock.advance(2.0)
    named.publish(ServingTable("", {"words": _served(OWN, MORE)}))
    clock.advance(1.0)
    assert [named.longest_s(keys) for keys in ([], [OWN], [MORE], [OWN, MORE])] == [0.0, 3.0, 1.0, 3.0]
    named.publish(ServingTable("", {"words": _served(MORE)}))
    named.publish(table)
    assert named.longest_s([OWN, MORE]) == 0.0


def _served(*replicas: ReplicaKey) -> ServedCollection:
    return ServedCollection(WORDS, Routing(1), 1, 1, {0: 0}, {}, {0: replicas})


def test_replica_has_a_twin_that_answers_while_one_of_its_generations_has(tmp_path: Path) -> None:
    """Of two the other may be served: it is not ended as one that answers nothing."""
    store = MemoryStore()
    for cpu_twin in (True, False):
        index = IndexConfig("flat", device="gpu", cpu_twin=cpu_twin)
        commit(store, "words", replace(WORDS, index=index), random_points(WORDS, 20))
    runtime = LocalRuntime(store, tmp_path, gpus=1.0, open_gpu=lambda share: double_device(share=share))

    async def run() -> None:
        runtime.start(OWN, WANTED)
        assert not (await runtime.status(OWN)).has_twin
        await runtime.load(OWN, 1)
        status = await runtime.status(OWN)
        assert (status.generations, status.has_twin) == ((1, 2), True)
        await runtime.retire(OWN, 2)
        assert not (await runtime.status(OWN)).has_twin

    try:
        asyncio.run(run())
    finally:
        runtime.close()


def test_replica_without_a_twin_that_found_no_gpu_is_started_again_now_and_then(tmp_path: Path) -> None:
    """The GPU may be there again; its process would not look."""
    store, clock, opened = MemoryStore(), ManualClock(), list[GpuDevice | None]()
    config = replace(WORDS, index=IndexConfig("flat", device="gpu", cpu_twin=False))
    commit(store, "words", config, random_points(WORDS, 20))
    log = manifest_log(store, "words")
    log.commit_generation(log.newest_live(), config, log.newest_live().shards, num_gpus=HALF)

    def open_gpu(share: float) -> GpuDevice | None:
        opened.append(double_device(share=share) if len(opened) == 2 else None)
        return opened[-1]

    runtime = LocalRuntime(store, tmp_path, gpus=HALF, open_gpu=open_gpu)

    async def run() -> None:
        async with asyncio.timeout(20), serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray:
            await until(lambda: len(opened) == 2)
            failed = "replica words/0/0/gpu:0.5 is failed"
            await table_when(eagleray.directory, lambda table: failed in table.unready.get("words", ""))
            await asyncio.sleep(5 * SETTINGS.reconcile_period_s)
            assert len(opened) == 2
            clock.advance(LOST_GPU_PAUSE_S)
            await table_when(eagleray.directory, lambda table: table.unready == {})
            assert [device is None for device in opened] == [True, True, False]

    try:
        asyncio.run(run())
    finally:
        runtime.close()


def test_replica_that_is_one_too_many_stays_where_the_other_went_away_since_the_last_table(tmp_path: Path) -> None:
    store, clock = MemoryStore(), ManualClock()
    log = manifest_log(store, "words")
    log.create(replace(WORDS, replicas=2))
    other, too_many = (ReplicaKey("words", 0, number) for number in range(2))

    async def run() -> None:
        async with asyncio.timeout(20), serving(store, tmp_path, SETTINGS, clock) as eagleray:
            both = (other, too_many)
            await table_when(
                eagleray.directory,
                lambda table: bool(table.collections) and table.collections["words"].replicas == {0: both},
            )
            clock.advance(TABLE_REACHES_S)
            base = log.newest_live()
            manifest = log.commit_generation(base, WORDS, (ShardEntry(0),))
            supervisor = eagleray.supervisor
            supervisor._replicas._set_status(other, ReplicaStatus("unreachable"))
            supervisor._known.newest["words"] = manifest
            supervisor.reconcile()
            assert too_many in eagleray.runtime.existing()
            while too_many in eagleray.runtime.existing():  # the other one answers again
                clock.advance(TABLE_REACHES_S / 10)
                await asyncio.sleep(0.005)

    asyncio.run(run())
