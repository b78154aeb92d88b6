"""Replicas of generations on GPUs: which are wanted and asked, and the switch to another share of one under writes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import ray_replica, ray_runtime
from actors.gpu_device import GpuDevice, GpuLost
from actors.replica_status import ReplicaStatus
from actors.serving_table import served_collection
from actors.shard_client import ServingTable
from actors.supervisor import RETIRE_AFTER_S, TABLE_REACHES_S
from actors.wanted_replicas import own_replicas, wanted_replicas
from actors.watched_replicas import LOST_GPU_PAUSE_S
from cluster import wal as wal_module
from cluster.config import CollectionConfig, IndexConfig, Settings
from cluster.errors import Unavailable
from cluster.manifest import Manifest, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import open_store
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.routing import Routing
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from tests.fakes import SETTINGS, LocalRuntime, ManualClock, Serving, serving, table_when
from tests.gpu_double import double_device
from tests.unit.actors.batches import CONFIG
from tests.unit.actors.points import commit, manifest_log, random_points
from tests.unit.actors.reshard_load import Load, load, until

Scenario = Callable[[Serving, Load, ManualClock, MemoryStore], Awaitable[None]]
TWO = replace(CONFIG, shards=2, replicas=2)
HALF = 0.5  # of a GPU


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.001)
    monkeypatch.setattr("actors.crossing.PERIOD_S", 0.01)


def version(number: int, share: float, shards: int = 1) -> Manifest:
    config = replace(TWO, shards=shards, replicas=1)
    entries = tuple(ShardEntry(shard) for shard in range(shards))
    return Manifest("words", number, config, Routing(shards), number, entries, "", "", num_gpus=share)


def keys(share: float, shards: int = 2, replicas: int = 2) -> set[ReplicaKey]:
    return {ReplicaKey("words", shard, number, share) for shard in range(shards) for number in range(replicas)}


# --- which are wanted ---------------------------------------------------------------------------------------------


def test_generation_with_another_share_is_wanted_of_other_replicas_beside_those_of_what_is_served() -> None:
    settings = Settings(data="memory://x", shard_cpus=2.0)
    cpu, half, quarter = (ReplicaKey("words", 0, 0, share) for share in (0.0, 0.5, 0.25))
    assert wanted_replicas(version(2, 0.5), version(1, 0.0), settings) == {
        cpu: WantedReplica(1, 1, 1, 2.0, 0.0, served=1, served_generation=1),
        half: WantedReplica(2, 2, 1, 2.0, 0.5),
    }
    assert wanted_replicas(version(3, 0.0), version(2, 0.5), settings) == {
        cpu: WantedReplica(3, 3, 1, 2.0, 0.0),
        half: WantedReplica(2, 2, 1, 2.0, 0.5, served=2, served_generation=2),
    }
    assert wanted_replicas(version(3, 0.25), version(2, 0.5), settings) == {
        quarter: WantedReplica(3, 3, 1, 2.0, 0.25),
        half: WantedReplica(2, 2, 1, 2.0, 0.5, served=2, served_generation=2),
    }
    assert wanted_replicas(version(3, 0.5), version(2, 0.5), settings) == {
        half: WantedReplica(3, 3, 1, 2.0, 0.5, served=2, served_generation=2)
    }


@pytest.mark.parametrize("before", [0.0, 0.25])
def test_fewer_shards_with_another_share_leave_the_old_ones_all_their_replicas(before: float) -> None:
    wanted = wanted_replicas(version(2, HALF, shards=1), version(1, before, shards=2), SETTINGS)
    assert wanted.keys() == keys(HALF, 1, 1) | keys(before, 2, 1)
    assert own_replicas(version(2, HALF, shards=1)) == [ReplicaKey("words", 0, 0, HALF)]


# --- who is asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_replicas_with_another_share_are_not_asked_but_may_lead(before: float) -> None:
    """They seal, so that they hold the new generation as well; and they are ended soon."""
    old, new = ReplicaKey("words", 0, 0, before), ReplicaKey("words", 0, 0, HALF)
    both = ReplicaStatus("ready", (1, 2), (1, 2), epoch=3)
    served = served_collection(version(2, HALF), {old: both, new: ReplicaStatus("ready", (2,), (2,))}, None)
    assert served.replicas == {0: (new,)}
    assert served.primaries == {0: old}


def test_replica_that_finds_no_gpu_goes_on_with_the_twin_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(share: float) -> GpuDevice:
        raise Unavailable(f"no GPU of which {share:g} could be had")

    monkeypatch.setattr(ray_replica.GpuDevice, "open", refuse)
    config = replace(CONFIG, index=IndexConfig("flat", device="gpu"))
    settings = Settings(data=str(tmp_path / "data"), cache_dir=str(tmp_path), shard_threads=1, observed_share=0.0)
    commit(open_store(settings.data), "words", config, random_points(config, 50))
    actor = ray_replica.ShardActor(settings, ReplicaKey("words", 0, 0, HALF), 1, HALF)
    try:
        status = asyncio.run(actor.status())
        assert (status.state, status.gpu) == ("ready", None)
        why = "this process has no GPU: no GPU of which 0.5 could be had"
        assert status.degraded.endswith(why)
        assert [segment["degraded"] for segment in status.segments] == [why]
        request = ShardSearch(1, np.zeros((1, 4), np.float32), (SearchGroup(0, 1, 3, SearchParams()),))
        (hits,) = asyncio.run(actor.search(request))
        assert isinstance(hits, Hits)
        assert (hits.counts.tolist(), hits.degraded) == ([3], "cpu")
    finally:
        actor._replica.close()


def test_replica_on_a_gpu_opens_its_share_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_replica.GpuDevice, "open", lambda share: double_device(share=share))
    config = replace(CONFIG, index=IndexConfig("flat", device="gpu"))
    settings = Settings(data=str(tmp_path / "data"), cache_dir=str(tmp_path), shard_threads=1, observed_share=0.0)
    commit(open_store(settings.data), "words", config, random_points(config, 50))
    actor = ray_replica.ShardActor(settings, ReplicaKey("words", 0, 0, HALF), 1, HALF)
    try:
        status = asyncio.run(actor.status())
        assert status.gpu is not None
        assert (status.gpu["share"], status.degraded) == (0.5, "")
        assert actor._device is not None
        actor._device.close()
    finally:
        actor._replica.close()


# --- the switch ---------------------------------------------------------------------------------------------------


def under_load(
    scenario: Scenario,
    tmp_path: Path,
    gpus: float = 2.0,
    open_gpu: Callable[[float], GpuDevice | None] = lambda share: None,
    config: CollectionConfig = TWO,
    kind: type[LocalRuntime] = LocalRuntime,
) -> LocalRuntime:
    """Two shards of two replicas, or as `config` says, each of half a GPU where it is on one."""
    store, clock = MemoryStore(), ManualClock()
    manifest_log(store, "words").create(config)
    runtime = kind(store, tmp_path, gpus=gpus, open_gpu=open_gpu)

    async def run() -> None:
        async with (
            asyncio.timeout(40),
            serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray,
            load(eagleray, monotonic=False) as made,
        ):
            await scenario(eagleray, made, clock, store)

    try:
        asyncio.run(run())
    finally:
        runtime.close()
    return runtime


class Refusing(LocalRuntime):
    """Has nobody on a GPU lead."""

    refuses = True

    async def lead(self, key: ReplicaKey) -> None:
        if self.refuses and key.device == "gpu":
            raise Unavailable("the test wants no primary on a GPU yet")
        await super().lead(key)


def next_generation(store: MemoryStore, share: float) -> Manifest:
    """All is in the logs: the same as before, to be loaded anew."""
    log = manifest_log(store, "words")
    base = log.newest_live()
    return log.commit_generation(base, base.config, tuple(map(ShardEntry, range(len(base.shards)))), num_gpus=share)


async def switched(eagleray: Serving, made: Load, manifest: Manifest) -> None:
    """Until it is served by all its replicas, and led by some of them."""
    await eagleray.directory.refresh("words")
    await made.until_served(manifest.generation)

    def is_so() -> bool:
        served = made.served()
        assert served is not None
        asked = {key for replicas in served.replicas.values() for key in replicas}
        return asked == set(own_replicas(manifest)) and set(served.primaries.values()) <= asked

    await until(is_so)
    await made.more()


def test_collection_goes_over_to_gpus_to_another_share_and_back_while_it_is_searched_and_written_to(
    tmp_path: Path,
) -> None:
    """Searches that fail end the test; so do writes that are not where they were acknowledged."""

    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        runtime, before = eagleray.runtime, 0.0
        assert set(runtime.existing()) == keys(before)
        for share in (0.5, 0.25, 0.0):
            manifest = await asyncio.to_thread(next_generation, store, share)
            await switched(eagleray, made, manifest)
            both = keys(share) | keys(before)
            assert set(runtime.existing()) == both, "the old replicas stay for queries that began there"
            clock.advance(RETIRE_AFTER_S)
            await until(lambda share=share: set(runtime.existing()) == keys(share))
            assert runtime.free_gpus == 3.0 - 4 * share
            await made.more()
            before = share

    runtime = under_load(scenario, tmp_path, gpus=3.0)
    assert {key.num_gpus for key in runtime.led} == {0.0, 0.25, 0.5}


class Devices:
    """Those that replicas opened, in order."""

    def __init__(self) -> None:
        self.opened: list[GpuDevice] = []

    def open(self, share: float) -> GpuDevice:
        self.opened.append(double_device(share=share))
        return self.opened[-1]


def lose_gpu(runtime: LocalRuntime, key: ReplicaKey) -> None:
    device: Any = runtime._processes[key].device
    device.library.lose()
    with pytest.raises(GpuLost):
        device.run(lambda resources: resources.syncDefaultStreamCurrentDevice())


async def until_table_reached(clock: ManualClock, condition: Callable[[], Any]) -> None:
    """On a clock that goes on while it is waited for."""
    async with asyncio.timeout(20):
        while not condition():
            clock.advance(TABLE_REACHES_S / 10)
            await asyncio.sleep(0.005)


def test_replica_that_lost_its_gpu_gets_another_process_while_a_second_one_answers(tmp_path: Path) -> None:
    """The primary, too; searches and writes go on."""
    devices = Devices()

    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        manifest = await asyncio.to_thread(next_generation, store, HALF)
        await switched(eagleray, made, manifest)
        served, runtime = made.served(), eagleray.runtime
        assert served is not None
        primary = served.primaries[0]
        lost = runtime.replica(primary)
        lose_gpu(runtime, primary)
        await until_table_reached(clock, lambda: len(devices.opened) == len(keys(HALF)) + 1)
        assert runtime.replica(primary) is not lost
        assert not any(key.replica == 2 for key in runtime.started), "none has to stand in"
        await made.more()
        await until(lambda: eagleray.supervisor.describe("words")["statuses"][primary].gpu is not None)
        lose_gpu(runtime, primary)
        again = runtime.replica(primary)
        clock.advance(TABLE_REACHES_S)
        await made.more()
        assert runtime.replica(primary) is again, "one process after the other would help nobody"
        clock.advance(LOST_GPU_PAUSE_S)
        await until_table_reached(clock, lambda: len(devices.opened) == len(keys(HALF)) + 2)

    under_load(scenario, tmp_path, open_gpu=devices.open)


class Unwilling(LocalRuntime):
    """Has none of these lead."""

    unwilling: frozenset[ReplicaKey] = frozenset()

    async def lead(self, key: ReplicaKey) -> None:
        if key in self.unwilling:
            raise Unavailable(f"the test wants {key} not to lead yet")
        await super().lead(key)


@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_that_all_lost_their_gpus_are_started_again_while_one_more_stands_in(
    tmp_path: Path, replicas: int
) -> None:
    """No search fails. While no GPU is free their twins answer, and the collection is served whole."""
    devices, more = Devices(), ReplicaKey("words", 0, replicas, HALF)
    own = [ReplicaKey("words", 0, number, HALF) for number in range(replicas)]

    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        runtime = eagleray.runtime
        assert isinstance(runtime, Unwilling)
        await switched(eagleray, made, await asyncio.to_thread(next_generation, store, HALF))
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: set(runtime.existing()) == keys(HALF, replicas=replicas))
        lost = [runtime.replica(key) for key in own]
        for key in own:
            lose_gpu(runtime, key)
        await until(lambda: eagleray.supervisor.describe("words")["statuses"].get(more, lost[0].status()).waits)
        clock.advance(LOST_GPU_PAUSE_S)
        await made.more()
        table = await table_when(eagleray.directory, lambda table: table.unready == {})
        assert (table.waiting, table.collections["words"].replicas[0]) == ({}, tuple(own))
        assert [runtime.replica(key) for key in own] == lost

        runtime.unwilling = frozenset(own)
        clock.advance(TABLE_REACHES_S)  # since the table that names only those that are going to be ended
        runtime.add_gpus(0.5)
        await table_when(eagleray.directory, lambda table: more in table.collections["words"].replicas[0])
        await asyncio.sleep(5 * SETTINGS.reconcile_period_s)
        assert [runtime.replica(key) for key in own] == lost, "coordinators may not know of the other one yet"
        await until_table_reached(clock, lambda: set(own) <= set(runtime.stopped))
        await until(lambda: len(devices.opened) == 3 * replicas + 1)
        await table_when(eagleray.directory, lambda table: set(own) < set(table.collections["words"].replicas[0]))
        await until(lambda: (served := made.served()) and served.primaries.get(0) == more)
        clock.advance(TABLE_REACHES_S)
        await asyncio.sleep(5 * SETTINGS.reconcile_period_s)
        assert more in runtime.existing(), "it leads, and nobody else can"
        await made.more()
        runtime.unwilling = frozenset()
        await until_table_reached(clock, lambda: more not in runtime.existing())
        await until(lambda: (served := made.served()) and served.primaries.get(0) in own)
        assert [key for key in runtime.stopped if key.device == "gpu"] == [*own, more]
        assert (set(runtime.existing()), runtime.free_gpus) == (keys(HALF, replicas=replicas), 0.5)
        await made.more()

    under_load(
        scenario, tmp_path, gpus=1.0 * replicas, open_gpu=devices.open, config=replace(TWO, replicas=replicas),
        kind=Unwilling,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["deleted", "switched"])
def test_replica_that_waits_to_stand_in_goes_with_what_it_stands_in_for(tmp_path: Path, how: str) -> None:
    store, clock, devices = MemoryStore(), ManualClock(), Devices()
    manifest_log(store, "words").create(replace(TWO, shards=1, replicas=1))
    next_generation(store, HALF)
    runtime = LocalRuntime(store, tmp_path, gpus=0.5, open_gpu=devices.open)
    key, more = ReplicaKey("words", 0, 0, HALF), ReplicaKey("words", 0, 1, HALF)

    async def run() -> None:
        async with asyncio.timeout(20), serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray:
            await table_when(eagleray.directory, lambda table: bool(table.collections))
            lose_gpu(runtime, key)
            await until(lambda: more in runtime.existing())
            if how == "deleted":
                manifest_log(store, "words").delete()
            else:
                next_generation(store, HALF)
            await eagleray.directory.refresh("words")
            await until(lambda: more not in runtime.existing())
            if how == "switched":
                await table_when(eagleray.directory, lambda table: table.collections["words"].generation == 3)
                await until(lambda: more in runtime.existing())  # for what is served now

    try:
        asyncio.run(run())
    finally:
        runtime.close()


def test_replica_without_a_twin_that_lost_its_gpu_is_started_again_at_once(tmp_path: Path) -> None:
    """The only one of its shard: it answers nothing anyway."""
    store, clock, devices, key = MemoryStore(), ManualClock(), Devices(), ReplicaKey("words", 0, 0, HALF)
    config = replace(CONFIG, shards=1, replicas=1, index=IndexConfig("flat", device="gpu", cpu_twin=False))
    commit(store, "words", config, random_points(config, 20))
    log = manifest_log(store, "words")
    log.commit_generation(log.newest_live(), config, log.newest_live().shards, num_gpus=HALF)
    runtime = LocalRuntime(store, tmp_path, gpus=2.0, open_gpu=devices.open)

    async def run() -> None:
        async with asyncio.timeout(20), serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray:
            await table_when(eagleray.directory, lambda table: bool(table.collections))
            lose_gpu(runtime, key)
            await until(lambda: len(devices.opened) == 2)
            await table_when(eagleray.directory, lambda table: table.collections["words"].replicas == {0: (key,)})
            lose_gpu(runtime, key)
            await asyncio.sleep(10 * SETTINGS.reconcile_period_s)
            assert len(devices.opened) == 2, "a GPU that each process loses has it started now and then"
            clock.advance(LOST_GPU_PAUSE_S)
            await until(lambda: len(devices.opened) == 3)
            assert set(runtime.started) == {key}

    try:
        asyncio.run(run())
    finally:
        runtime.close()


def test_primary_with_another_share_leads_until_one_that_stays_does(tmp_path: Path) -> None:
    store, clock = MemoryStore(), ManualClock()
    manifest_log(store, "words").create(TWO)
    runtime = Refusing(store, tmp_path, gpus=2.0)

    async def run() -> None:
        async with (
            asyncio.timeout(30),
            serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray,
            load(eagleray, monotonic=False) as made,
        ):
            manifest = await asyncio.to_thread(next_generation, store, HALF)
            await eagleray.directory.refresh("words")
            await made.until_served(manifest.generation)
            clock.advance(RETIRE_AFTER_S)
            await until(lambda: len(runtime.existing()) == 6)  # of the old ones those that lead
            served = made.served()
            assert served is not None
            assert set(served.primaries.values()) == set(runtime.existing()) - keys(HALF)
            await made.more()
            runtime.refuses = False
            clock.advance(60.0)  # over the pause after a call that failed
            await until(lambda: set(runtime.existing()) == keys(HALF))
            await made.more()

    try:
        asyncio.run(run())
    finally:
        runtime.close()


def test_device_and_number_of_shards_change_at_once(tmp_path: Path) -> None:
    def fewer_on_gpus(store: MemoryStore) -> Manifest:
        log = manifest_log(store, "words")
        base = log.newest_live()
        logs = LogSet(0, 2, tuple(LogPosition(shard, 0, 0) for shard in range(2)))
        entries = (behind_logs(ShardEntry(0), logs),)
        return log.commit_generation(base, replace(base.config, shards=1), entries, num_gpus=HALF)

    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        await switched(eagleray, made, await asyncio.to_thread(fewer_on_gpus, store))
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: set(eagleray.runtime.existing()) == keys(HALF, shards=1))
        await made.more()

    under_load(scenario, tmp_path)


def test_generation_on_gpus_waits_for_them_and_says_so_while_the_old_one_is_served(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        manifest = await asyncio.to_thread(next_generation, store, HALF)
        await eagleray.directory.refresh("words")
        starting = ReplicaKey("words", 0, 0, HALF)

        def why() -> str:
            status = eagleray.supervisor.describe("words")["statuses"][starting]
            assert status.state == "starting"
            return str(status.error)

        await until(lambda: why() == "it asks for 0.5 GPU, 0 of 0 are free")
        await made.more()
        served = made.served()
        assert served is not None
        assert served.generation == 1
        waiting = "replica words/0/0/gpu:0.5 is starting (it asks for 0.5 GPU, 0 of 0 are free)"
        await table_when(
            eagleray.directory, lambda table: waiting in table.waiting.get("words", "") and table.unready == {}
        )
        directory: Any = eagleray.directory
        with pytest.raises(Unavailable, match=r"generation 2 of 'words' is committed, .*it asks for 0\.5 GPU"):
            await ray_runtime._wait_until_served(directory, "words", 2, 0.1, lambda why: None)
        eagleray.runtime.kill(ReplicaKey("words", 1, 0))
        table = await table_when(eagleray.directory, lambda table: "words" in table.unready)
        assert table.unready == {"words": "replica words/1/0 is unreachable (replica words/1/0 is dead)"}
        eagleray.runtime.revive(ReplicaKey("words", 1, 0))
        await table_when(eagleray.directory, lambda table: table.unready == {})
        eagleray.runtime.add_gpus(1.0)  # for two of the four
        eagleray.runtime.add_gpus(1.0)
        await switched(eagleray, made, manifest)
        await table_when(eagleray.directory, lambda table: (table.waiting, table.unready) == ({}, {}))

    under_load(scenario, tmp_path, gpus=0.0)


def test_generation_that_never_was_served_gives_its_gpus_to_the_one_after_it(tmp_path: Path) -> None:
    """Nobody asks its replicas; kept until the next one is served, they would keep that from its GPUs for ever."""

    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        await asyncio.to_thread(next_generation, store, 0.75)
        await eagleray.directory.refresh("words")
        await until(lambda: eagleray.runtime.free_gpus < 0.75)  # for two of its four
        manifest = await asyncio.to_thread(next_generation, store, HALF)
        await eagleray.directory.refresh("words")
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: set(eagleray.runtime.existing()) == keys(0.0) | keys(HALF))
        eagleray.runtime.add_gpus(0.0)  # those that were given back
        await switched(eagleray, made, manifest)

    under_load(scenario, tmp_path, gpus=2.0)


@pytest.mark.parametrize("cpu_twin", [True, False])
def test_replica_on_cpus_that_restarts_while_gpus_are_waited_for_serves_again(tmp_path: Path, cpu_twin: bool) -> None:
    """It finds the generation for GPUs first, which may have no twin, and is told to load what is served."""
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    config = replace(CONFIG, index=IndexConfig("flat", device="cpu"))
    commit(store, "words", config, random_points(config, 20))
    built = replace(config, index=IndexConfig("flat", device="gpu", cpu_twin=cpu_twin))
    commit(store, "words", built, random_points(built, 20))
    log = manifest_log(store, "words")
    log.commit_generation(log.newest_live(), built, log.newest_live().shards, num_gpus=1.0)
    runtime = LocalRuntime(store, tmp_path)

    def serves(generation: int, table: ServingTable) -> bool:
        served = table.collections.get("words")
        return served is not None and served.generation == generation and served.primaries == {0: key}

    async def run() -> None:
        runtime.start(key, WantedReplica(1, 1, 1, 0.0))
        await runtime.load(key, 1)  # what an earlier supervisor served
        async with serving(store, tmp_path, runtime=runtime) as eagleray:
            await table_when(eagleray.directory, partial(serves, 1))
            runtime.kill(key)
            await table_when(eagleray.directory, lambda table: not table.collections["words"].primaries)
            runtime.revive(key)
            await table_when(eagleray.directory, partial(serves, 1))

    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        runtime.close()


def test_supervisor_that_takes_over_after_the_switch_hands_the_lead_over(tmp_path: Path) -> None:
    """It finds the replicas on both devices, and all of them hold what is served: those that seal do."""
    store = MemoryStore()
    manifest_log(store, "words").create(replace(TWO, replicas=1))
    runtime = Refusing(store, tmp_path, gpus=2.0)

    def led_by(share: float, generation: int) -> Callable[[ServingTable], bool]:
        def is_so(table: ServingTable) -> bool:
            served = table.collections.get("words")
            wanted = keys(share, replicas=1)
            return served is not None and (served.generation, set(served.primaries.values())) == (generation, wanted)

        return is_so

    async def run() -> None:
        async with serving(store, tmp_path, SETTINGS, ManualClock(), runtime) as eagleray:
            await table_when(eagleray.directory, led_by(0.0, 1))
            manifest = next_generation(store, HALF)
            await eagleray.directory.refresh("words")
            await table_when(eagleray.directory, led_by(0.0, 2))
            for key in keys(0.0, replicas=1):
                await runtime.load(key, manifest.version)
        runtime.refuses, clock = False, ManualClock()
        async with serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray:
            table = await table_when(eagleray.directory, led_by(HALF, 2))
            asked = {key for replicas in table.collections["words"].replicas.values() for key in replicas}
            assert asked == keys(HALF, replicas=1)
            clock.advance(RETIRE_AFTER_S)
            await until(lambda: set(runtime.existing()) == keys(HALF, replicas=1))

    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        runtime.close()


def test_job_that_waits_in_vain_for_what_it_committed_says_what_that_waits_for(tmp_path: Path) -> None:
    store = MemoryStore()
    manifest_log(store, "words").create(replace(TWO, index=IndexConfig(device="gpu", num_gpus=1.0, wait_for_gpu=True)))

    async def run() -> None:
        async with serving(store, tmp_path) as eagleray:
            waiting = "replica words/0/0/gpu:1 is starting (it asks for 1 GPU, 0 of 0 are free)"
            await table_when(eagleray.directory, lambda table: waiting in table.unready.get("words", ""))
            directory: Any = eagleray.directory
            told: list[str] = []
            with pytest.raises(Unavailable, match=r"generation 1 of 'words' is committed, .*it asks for 1 GPU"):
                await ray_runtime._wait_until_served(directory, "words", 1, 0.1, told.append)
            assert len(told) == 1, "the job says so meanwhile, and once"
            assert waiting in told[0]

    asyncio.run(asyncio.wait_for(run(), 20))
