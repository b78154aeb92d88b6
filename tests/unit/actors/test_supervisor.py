from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import supervisor as supervisor_module
from actors.shard import ReplicaStatus
from actors.shard_client import ServingTable
from actors.supervisor import POINTS_PERIOD_S, RETIRE_AFTER_S, STORE_POLL_S, Supervisor
from actors.watched_replicas import CALL_RETRY_S, SILENT_TIMEOUTS_MAX
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Corrupt, EaglerayError, Fenced, NotFound, Unavailable
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.write import PointWrite, WriteOutcome
from tests.fakes import (
    SETTINGS,
    FaultyStore,
    LocalRuntime,
    LocalShardClient,
    ManualClock,
    Serving,
    serving,
    table_when,
)
from tests.unit.actors.points import commit, flipped, manifest_log, random_points

CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
DOUBLED = CollectionConfig(4, metric="l2", shards=2, replicas=2, index=IndexConfig(kind="flat"))


def keys_of(collection: str = "words", shards: int = 2, replicas: int = 1) -> list[ReplicaKey]:
    return [ReplicaKey(collection, shard, replica) for shard in range(shards) for replica in range(replicas)]


def fill(
    store: ObjectStore, collection: str = "words", config: CollectionConfig = CONFIG, count: int = 20, seed: int = 1
) -> None:
    commit(store, collection, config, random_points(config, count, seed))


def serves(generation: int, collection: str = "words") -> Callable[[ServingTable], bool]:
    """The generation is served by every replica that is wanted, and every shard has a primary."""

    def is_so(table: ServingTable) -> bool:
        served = table.collections.get(collection)
        return (
            served is not None
            and served.generation == generation
            and served.primaries.keys() == served.replicas.keys()
            and collection not in table.unready
        )

    return is_so


def replicas_in(table: ServingTable, collection: str = "words") -> list[ReplicaKey]:
    return [key for keys in table.collections[collection].replicas.values() for key in keys]


def with_serving(
    scenario: Callable[[Serving, ManualClock], Awaitable[None]],
    store: ObjectStore,
    tmp_path: Path,
    runtime: LocalRuntime | None = None,
) -> None:
    """A supervisor on a clock that stands still: it looks at the store once, and when it is told to."""

    async def run() -> None:
        clock = ManualClock()
        async with asyncio.timeout(20), serving(store, tmp_path, SETTINGS, clock, runtime) as eagleray:
            await scenario(eagleray, clock)

    asyncio.run(run())


async def rounds(supervisor: Supervisor, times: int = 3) -> None:
    """Let every replica be asked and rounds be made, for what must not happen."""
    for _ in range(times):
        supervisor.reconcile()
        await asyncio.sleep(2 * SETTINGS.reconcile_period_s)


def test_wanted_replicas_are_started_and_published_when_ready(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        assert eagleray.runtime.started == keys_of(replicas=2)
        served = table.collections["words"]
        assert (served.config, served.version, served.generation) == (DOUBLED, 1, 1)
        assert sum(served.shard_points.values()) == 20
        assert served.attributes == {"name": "large_string"}
        assert served.replicas == {0: tuple(keys_of(replicas=2)[:2]), 1: tuple(keys_of(replicas=2)[2:])}
        assert table.unready == {}

    with_serving(scenario, store, tmp_path)


def test_collection_that_is_not_served_yet_says_which_replicas_it_waits_for(tmp_path: Path) -> None:
    store = MemoryStore()

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        fill(store)
        await eagleray.directory.refresh("words")
        table = await eagleray.directory.next_table(None)
        assert table.collections == {}
        assert table.unready == {"words": "replica words/0/0 is starting; replica words/1/0 is starting"}
        await table_when(eagleray.directory, serves(1))

    with_serving(scenario, store, tmp_path)


def test_replica_that_is_gone_is_started_again(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 1, 0)
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.lose(key)
        await table_when(eagleray.directory, lambda _: eagleray.runtime.started == [*keys_of(), key])
        table = await table_when(eagleray.directory, serves(1))
        assert replicas_in(table) == keys_of()
        assert eagleray.runtime.stopped == []

    with_serving(scenario, store, tmp_path)


def test_dead_replica_is_left_to_its_restart_and_served_again_after_it(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 1)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.kill(key)
        table = await table_when(eagleray.directory, lambda table: "words" in table.unready)
        assert table.unready["words"] == "replica words/0/1 is unreachable (replica words/0/1 is dead)"
        assert replicas_in(table) == [k for k in keys_of(replicas=2) if k != key]
        await rounds(eagleray.supervisor)
        assert eagleray.runtime.started == keys_of(replicas=2)
        eagleray.runtime.revive(key)
        table = await table_when(eagleray.directory, serves(1))
        assert replicas_in(table) == keys_of(replicas=2)

    with_serving(scenario, store, tmp_path)


def test_hanging_replica_is_unreachable_until_it_answers(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.hang(key)
        table = await table_when(eagleray.directory, lambda table: "words" in table.unready)
        assert table.unready["words"] == "replica words/0/0 is unreachable (it does not answer)"
        assert replicas_in(table) == [ReplicaKey("words", 1, 0)]
        eagleray.runtime.revive(key)
        await table_when(eagleray.directory, serves(1))

    with_serving(scenario, store, tmp_path)


class GatedLoads(LocalRuntime):
    """Replicas whose loading of a further version waits for `gates[key]`."""

    def __init__(self, store: ObjectStore, cache_dir: Path) -> None:
        super().__init__(store, cache_dir)
        self.gates: dict[ReplicaKey, asyncio.Event] = {}

    async def load(self, key: ReplicaKey, version: int) -> None:
        if key in self.gates:
            await self.gates[key].wait()
        await super().load(key, version)


def test_new_generation_is_published_only_when_every_replica_holds_it(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store, config=DOUBLED)
    runtime = GatedLoads(store, tmp_path)
    late = ReplicaKey("words", 1, 1)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.gates[late] = asyncio.Event()
        fill(store, config=DOUBLED, count=30, seed=2)
        await eagleray.directory.refresh("words")
        while len(runtime.loaded) < 2:  # who leads the shard waits for the late one
            await asyncio.sleep(0.001)
        await rounds(eagleray.supervisor)
        assert {key.shard for key, _ in runtime.loaded} == {0}
        table = await eagleray.directory.next_table(None)
        assert serves(1)(table), "the old generation must be served meanwhile"
        assert sum(table.collections["words"].shard_points.values()) == 20
        assert replicas_in(table) == keys_of(replicas=2)
        runtime.gates[late].set()
        table = await table_when(eagleray.directory, serves(2))
        assert sum(table.collections["words"].shard_points.values()) == 30
        assert replicas_in(table) == keys_of(replicas=2)
        assert sorted(runtime.loaded) == [(key, 2) for key in keys_of(replicas=2)]

    with_serving(scenario, store, tmp_path, runtime)


def test_new_generation_does_not_wait_for_a_dead_replica_of_a_shard_that_has_another(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        await table_when(eagleray.directory, lambda table: "words" in table.unready)
        fill(store, config=DOUBLED, seed=2)
        await eagleray.directory.refresh("words")
        table = await table_when(eagleray.directory, lambda table: table.collections["words"].generation == 2)
        assert replicas_in(table) == keys_of(replicas=2)[1:]

    with_serving(scenario, store, tmp_path)


def test_new_generation_waits_for_a_dead_replica_that_is_its_shards_only_one(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.kill(ReplicaKey("words", 0, 0))
        await table_when(eagleray.directory, lambda table: "words" in table.unready)
        fill(store, seed=2)
        await eagleray.directory.refresh("words")
        while eagleray.runtime.loaded != [(ReplicaKey("words", 1, 0), 2)]:
            await asyncio.sleep(0.001)
        await rounds(eagleray.supervisor)
        assert (await eagleray.directory.next_table(None)).collections["words"].generation == 1
        eagleray.runtime.revive(ReplicaKey("words", 0, 0))
        await table_when(eagleray.directory, serves(2))

    with_serving(scenario, store, tmp_path)


def test_old_generation_is_retired_after_the_queries_that_may_use_it(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        fill(store, seed=2)
        await eagleray.directory.refresh("words")
        await table_when(eagleray.directory, serves(2))
        clock.advance(RETIRE_AFTER_S - 0.01)
        await rounds(eagleray.supervisor)
        assert (ReplicaKey("words", 0, 0), 2) not in eagleray.runtime.retired
        assert (await eagleray.runtime.status(ReplicaKey("words", 0, 0))).generations == (1, 2)
        clock.advance(0.01)
        await rounds(eagleray.supervisor)
        retired = {entry for entry in eagleray.runtime.retired if entry[1] == 2}
        assert retired == {(k, 2) for k in keys_of()}  # a status asked for earlier may have one told twice
        assert (await eagleray.runtime.status(ReplicaKey("words", 0, 0))).generations == (2,)
        assert serves(2)(await eagleray.directory.next_table(None))

    with_serving(scenario, store, tmp_path)


def test_deleted_collection_stops_its_replicas_and_no_others(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    fill(store, "birds")

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, lambda table: serves(1)(table) and serves(1, "birds")(table))
        manifest_log(store, "words").delete()
        await eagleray.directory.refresh("words")
        table = await eagleray.directory.next_table(None)
        assert set(table.collections) == {"birds"}
        assert table.unready == {}
        assert eagleray.runtime.stopped == keys_of()
        assert eagleray.runtime.existing() == keys_of("birds")
        with pytest.raises(NotFound, match="no collection 'words'"):
            eagleray.supervisor.describe("words")

    with_serving(scenario, store, tmp_path)


def test_collection_created_again_after_its_deletion_is_served(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        manifest_log(store, "words").delete()
        await eagleray.directory.refresh("words")
        fill(store, count=7, seed=2)
        await eagleray.directory.refresh("words")
        table = await table_when(eagleray.directory, serves(2))
        assert table.collections["words"].version == 3
        assert sum(table.collections["words"].shard_points.values()) == 7
        assert eagleray.runtime.started == keys_of() * 2

    with_serving(scenario, store, tmp_path)


def test_collection_whose_objects_vanished_is_stopped_at_the_next_poll(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        for info in list(store.objects(f"{paths.collections_prefix()}words/")):
            store.delete(info.key)
        clock.advance(STORE_POLL_S)
        table = await table_when(eagleray.directory, lambda table: "words" not in table.collections)
        assert table.unready == {}
        assert eagleray.runtime.existing() == []

    with_serving(scenario, store, tmp_path)


def test_corrupt_manifest_stops_only_its_own_collection(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    fill(store, "birds")
    key = paths.manifest("birds", 1)
    store.put(key, flipped(store.get(key), 40))

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        assert set(table.collections) == {"words"}
        assert set(table.unready) == {"birds"}
        assert table.unready["birds"].startswith(f"{key}: ")
        assert eagleray.runtime.started == keys_of()
        store.delete(key)
        clock.advance(STORE_POLL_S)
        await table_when(eagleray.directory, lambda table: table.unready == {})

    with_serving(scenario, store, tmp_path)


def test_corrupt_newer_manifest_leaves_the_served_generation_and_is_reported(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        store.put(paths.manifest("words", 2), b"{}")
        clock.advance(STORE_POLL_S)
        table = await table_when(eagleray.directory, lambda table: "words" in table.unready)
        assert table.unready["words"].startswith(f"{paths.manifest('words', 2)}: ")
        assert table.collections["words"].generation == 1
        assert replicas_in(table) == keys_of()
        assert eagleray.runtime.stopped == []

    with_serving(scenario, store, tmp_path)


def test_corrupt_segment_of_a_new_generation_keeps_the_old_one_and_is_tried_again_later(tmp_path: Path) -> None:
    store = MemoryStore()
    one = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))
    fill(store, config=one)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        fill(store, config=one, seed=2)
        (segment_id,) = manifest_log(store, "words").newest_live().segments
        key = paths.segment_file("words", segment_id, paths.INDEX)
        good = store.get(key)
        store.put(key, flipped(good, 99))
        await eagleray.directory.refresh("words")
        while not eagleray.runtime.loaded:
            await asyncio.sleep(0.001)
        clock.advance(CALL_RETRY_S - 0.01)
        await rounds(eagleray.supervisor)
        assert len(eagleray.runtime.loaded) == 1, "it must not load in a tight loop"
        assert (await eagleray.directory.next_table(None)).collections["words"].generation == 1
        store.put(key, good)
        clock.advance(CALL_RETRY_S)
        await table_when(eagleray.directory, serves(2))

    with_serving(scenario, store, tmp_path)


def test_replica_that_could_not_load_says_why_and_is_asked_to_load_again(tmp_path: Path) -> None:
    store = MemoryStore()
    one = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))
    fill(store, config=one)
    (segment_id,) = manifest_log(store, "words").newest_live().segments
    key = paths.segment_file("words", segment_id, paths.ROWS)
    good = store.get(key)
    store.put(key, flipped(good, 99))

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, lambda table: "failed" in table.unready.get("words", ""))
        assert f"replica words/0/0 is failed (Corrupt: {key}: " in table.unready["words"]
        assert table.collections == {}
        store.put(key, good)
        clock.advance(CALL_RETRY_S)
        await table_when(eagleray.directory, serves(1))

    with_serving(scenario, store, tmp_path)


def test_restarted_supervisor_finds_the_replicas_that_run(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime = LocalRuntime(store, tmp_path)

    async def run() -> None:
        async with asyncio.timeout(20):
            async with serving(store, tmp_path, runtime=runtime) as first:
                await table_when(first.directory, serves(1))
            async with serving(store, tmp_path, runtime=runtime) as second:
                table = await table_when(second.directory, serves(1))
        assert replicas_in(table) == keys_of()
        assert runtime.started == keys_of()
        assert runtime.stopped == []

    asyncio.run(run())


def test_restarted_supervisor_stops_replicas_of_a_collection_deleted_meanwhile(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime = LocalRuntime(store, tmp_path)
    for key in keys_of():
        runtime.start(key, WantedReplica(1, 1, 2, 0.0))
    manifest_log(store, "words").delete()

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, lambda table: table.collections == {})
        assert runtime.stopped == keys_of()
        assert runtime.existing() == []

    with_serving(scenario, store, tmp_path, runtime)


def test_restarted_supervisor_retires_what_its_predecessor_did_not(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime = LocalRuntime(store, tmp_path)

    async def before(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        fill(store, seed=2)
        await eagleray.directory.refresh("words")
        await table_when(eagleray.directory, serves(2))
        assert runtime.retired == []

    async def after(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(2))
        clock.advance(RETIRE_AFTER_S)
        await rounds(eagleray.supervisor)
        assert sorted(runtime.retired) == [(key, 2) for key in keys_of()]

    with_serving(before, store, tmp_path, runtime)
    with_serving(after, store, tmp_path, runtime)


def test_poll_finds_what_nobody_told_it(tmp_path: Path) -> None:
    store = MemoryStore()

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await rounds(eagleray.supervisor)
        fill(store)
        clock.advance(STORE_POLL_S - 0.01)
        await rounds(eagleray.supervisor)
        assert eagleray.runtime.started == []
        clock.advance(0.01)
        await table_when(eagleray.directory, serves(1))

    with_serving(scenario, store, tmp_path)


def test_absent_store_is_asked_again_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = MemoryStore()
    fill(inner)
    store = FaultyStore(inner, at=1, counted=frozenset({"folders"}))

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        assert replicas_in(table) == keys_of()

    with caplog.at_level(logging.WARNING):
        with_serving(scenario, store, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "reading manifests: folders collections/: the store failed, as it was told to at call 1"
    ]


def test_refresh_while_the_store_is_away_is_unavailable(tmp_path: Path) -> None:
    inner = MemoryStore()
    fill(inner)
    store = FaultyStore(inner)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        store.at = store.calls + 1
        with pytest.raises(Unavailable, match="the store failed"):
            await eagleray.directory.refresh("words")
        assert serves(1)(await eagleray.directory.next_table(None))

    with_serving(scenario, store, tmp_path)


def test_next_table_waits_for_a_change_and_gives_up_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        assert await eagleray.directory.next_table(None) == table
        assert await eagleray.directory.next_table("an older stamp") == table
        waiting = asyncio.ensure_future(eagleray.directory.next_table(table.stamp))
        await rounds(eagleray.supervisor)
        assert not waiting.done()
        manifest_log(store, "words").delete()
        await eagleray.directory.refresh("words")
        changed = await waiting
        assert changed.stamp != table.stamp
        assert changed.collections == {}
        monkeypatch.setattr(supervisor_module, "TABLE_WAIT_S", 0.01)
        assert await eagleray.directory.next_table(changed.stamp) == changed

    with_serving(scenario, store, tmp_path)


def test_describe_gives_manifest_generation_and_every_replicas_status(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        facts = await eagleray.directory.describe("words")
        assert facts["manifest"] == manifest_log(store, "words").newest()
        assert facts["serving_generation"] == 1
        assert list(facts["statuses"]) == keys_of()
        assert {status.state for status in facts["statuses"].values()} == {"ready"}
        assert sum(status.points for status in facts["statuses"].values()) == 20
        with pytest.raises(NotFound, match="no collection 'birds'"):
            await eagleray.directory.describe("birds")

    with_serving(scenario, store, tmp_path)


class PausingStore(FaultyStore):
    """A store that answers the next call of one method late: it has looked, and waits for `go_on` to say so."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.pause_at = ""
        self.looked, self.go_on = threading.Event(), threading.Event()

    def _call(self, method: str, *args: object) -> object:
        answer = super()._call(method, *args)
        if method == self.pause_at:
            self.pause_at = ""
            self.looked.set()
            assert self.go_on.wait(20)
        return answer


@pytest.mark.parametrize("method", ["folders", "objects", "get"])
def test_slow_poll_does_not_undo_what_a_refresh_saw_meanwhile(method: str, tmp_path: Path) -> None:
    store = PausingStore(MemoryStore())
    fill(store, "birds")

    async def scenario() -> None:
        runtime, clock = LocalRuntime(store, tmp_path), ManualClock()
        supervisor = Supervisor(store, runtime, SETTINGS, clock)
        await supervisor.poll()
        await supervisor.take_over()
        supervisor.reconcile()
        store.pause_at = method
        polling = asyncio.ensure_future(supervisor.poll())
        assert await asyncio.to_thread(store.looked.wait, 20)
        fill(store, "birds", seed=2)
        fill(store, "words")
        told = asyncio.gather(supervisor.refresh("birds"), supervisor.refresh("words"))
        await asyncio.wait({told}, timeout=0.2)
        store.go_on.set()
        await asyncio.gather(polling, told)
        assert supervisor.describe("birds")["manifest"].version == 2
        assert supervisor.describe("words")["manifest"].version == 1
        assert runtime.stopped == []
        supervisor.close()

    asyncio.run(scenario())


# --- what must not take away what is served


class Stubborn(GatedLoads):
    """Replicas whose `retire` waits for ever (`hanging`) or fails (`failing`), and which cannot be started (`full`)."""

    def __init__(self, store: ObjectStore, cache_dir: Path) -> None:
        super().__init__(store, cache_dir)
        self.hanging: set[ReplicaKey] = set()
        self.failing: set[ReplicaKey] = set()
        self.full: set[ReplicaKey] = set()
        self.asked_to_retire: list[ReplicaKey] = []

    def start(self, key: ReplicaKey, wanted: WantedReplica) -> None:
        if key in self.full:
            raise Unavailable(f"no place for {key}")
        super().start(key, wanted)

    async def retire(self, key: ReplicaKey, generation: int) -> None:
        self.asked_to_retire.append(key)
        if key in self.hanging:
            await asyncio.Event().wait()
        if key in self.failing:
            raise Unavailable(f"{key} does not retire")
        await super().retire(key, generation)


async def next_generation(eagleray: Serving, number: int) -> None:
    await asyncio.to_thread(fill, eagleray.runtime._store, count=20 + number, seed=number)
    await eagleray.directory.refresh("words")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_replica_that_never_retires_does_not_hold_up_the_rounds(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime, stuck = Stubborn(store, tmp_path), ReplicaKey("words", 0, 0)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        await next_generation(eagleray, 2)
        await table_when(eagleray.directory, serves(2))
        runtime.hanging = {stuck}
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: stuck in runtime.asked_to_retire)
        await next_generation(eagleray, 3)
        await table_when(eagleray.directory, serves(3))
        assert (ReplicaKey("words", 1, 0), 2) in runtime.retired

    with_serving(scenario, store, tmp_path, runtime)


def test_retire_that_failed_is_asked_for_again(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime, key = Stubborn(store, tmp_path), ReplicaKey("words", 0, 0)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        await next_generation(eagleray, 2)
        await table_when(eagleray.directory, serves(2))
        runtime.failing = {key}
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: key in runtime.asked_to_retire)
        runtime.failing = set()
        await rounds(eagleray.supervisor)
        assert runtime.asked_to_retire.count(key) == 1, "it must not ask in a tight loop"
        clock.advance(CALL_RETRY_S)
        await until(lambda: (key, 2) in runtime.retired)
        assert (await runtime.status(key)).generations == (2,)

    with_serving(scenario, store, tmp_path, runtime)


def test_replica_that_was_away_when_the_others_retired_does_so_when_it_is_back(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 1)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.hang(key)
        await table_when(eagleray.directory, lambda table: "words" in table.unready)
        fill(store, config=DOUBLED, seed=2)
        await eagleray.directory.refresh("words")
        await table_when(eagleray.directory, lambda table: table.collections["words"].generation == 2)
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: len(eagleray.runtime.retired) == 3)
        eagleray.runtime.revive(key)
        await until(lambda: (key, 2) in eagleray.runtime.retired)
        assert (await eagleray.runtime.status(key)).generations == (2,), (
            "it drops nothing before it holds what is served"
        )
        await table_when(eagleray.directory, serves(2))

    with_serving(scenario, store, tmp_path)


def test_no_table_before_the_storage_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "TABLE_WAIT_S", 0.05)
    inner = MemoryStore()
    fill(inner)
    store = FaultyStore(inner, at=1, fault="die")

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        with pytest.raises(Unavailable, match=r"no serving table yet: folders collections/: the store failed"):
            await eagleray.directory.next_table(None)
        with pytest.raises(Unavailable, match="does not know the collections yet"):
            await eagleray.directory.describe("words")
        with pytest.raises(Unavailable, match="the store failed"):
            await eagleray.directory.refresh("words")
        store._dead = False
        await table_when(eagleray.directory, lambda table: "words" in table.collections or "words" in table.unready)

    with_serving(scenario, store, tmp_path)


def test_refresh_before_the_first_read_of_all_stops_nothing(tmp_path: Path) -> None:
    inner = MemoryStore()
    fill(inner)
    fill(inner, "birds")
    runtime = LocalRuntime(inner, tmp_path)
    for key in (*keys_of(), *keys_of("birds")):
        runtime.start(key, WantedReplica(1, 1, 2, 0.0))
    store = PausingStore(inner)
    store.pause_at = "folders"

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await eagleray.directory.refresh("words")
        assert runtime.stopped == []
        store.go_on.set()
        await table_when(eagleray.directory, lambda table: serves(1)(table) and serves(1, "birds")(table))
        assert runtime.stopped == []

    with_serving(scenario, store, tmp_path, runtime)


def test_first_table_of_a_restarted_supervisor_is_whole(tmp_path: Path) -> None:
    store, slow = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store, config=DOUBLED)
    runtime = LocalRuntime(store, tmp_path)

    async def run() -> None:
        async with asyncio.timeout(20):
            async with serving(store, tmp_path, runtime=runtime) as first:
                before = await table_when(first.directory, serves(1))
            async with serving(store, tmp_path, runtime=runtime) as second:
                table = await second.directory.next_table(before.stamp)
                assert (table.collections, table.unready) == (before.collections, {})
            runtime.hang(slow)
            async with serving(store, tmp_path, runtime=runtime) as third:
                table = await third.directory.next_table(before.stamp)
                assert replicas_in(table) == [key for key in keys_of(replicas=2) if key != slow]
                assert table.unready == {"words": "replica words/0/0 is starting"}

    asyncio.run(run())


def test_replica_that_restarts_during_a_switch_loads_what_is_served(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime = GatedLoads(store, tmp_path)
    restarting, late = keys_of()

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.gates = {late: asyncio.Event()}
        await next_generation(eagleray, 2)
        await until(lambda: (restarting, 2) in runtime.loaded)
        runtime.gates[restarting] = asyncio.Event()
        runtime.kill(restarting)
        await table_when(eagleray.directory, lambda table: "is dead" in table.unready.get("words", ""))
        runtime.revive(restarting)
        lacking = {"words": "no ready replica of shard 0 holds generation 1"}
        table = await table_when(eagleray.directory, lambda table: table.unready == lacking)
        assert table.collections["words"].replicas == {0: (), 1: (late,)}
        runtime.gates[restarting].set()
        table = await table_when(eagleray.directory, serves(1))
        assert replicas_in(table) == keys_of()
        clock.advance(RETIRE_AFTER_S)
        await rounds(eagleray.supervisor)
        assert serves(1)(await eagleray.directory.next_table(None)), "what is served must not be retired"
        runtime.gates[late].set()
        assert replicas_in(await table_when(eagleray.directory, serves(2))) == keys_of()

    with_serving(scenario, store, tmp_path, runtime)


def test_supervisor_that_restarts_during_a_switch_serves_what_was_served(tmp_path: Path) -> None:
    store, late = MemoryStore(), ReplicaKey("words", 1, 0)
    fill(store)
    runtime = GatedLoads(store, tmp_path)

    async def before(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.gates[late] = asyncio.Event()
        await next_generation(eagleray, 2)
        await until(lambda: (keys_of()[0], 2) in runtime.loaded)

    async def after(eagleray: Serving, clock: ManualClock) -> None:
        table = await eagleray.directory.next_table(None)
        served = table.collections["words"]
        assert (served.version, served.generation, sum(served.shard_points.values())) == (1, 1, 20)
        assert (replicas_in(table), served.attributes, table.unready) == (keys_of(), {"name": "large_string"}, {})
        runtime.gates[late].set()
        await table_when(eagleray.directory, serves(2))

    with_serving(before, store, tmp_path, runtime)
    runtime.gates[late] = asyncio.Event()
    with_serving(after, store, tmp_path, runtime)


def test_restarted_supervisor_does_not_serve_a_collection_deleted_before_its_name_was_used_again(
    tmp_path: Path,
) -> None:
    store = MemoryStore()
    fill(store)
    runtime = GatedLoads(store, tmp_path)
    for key in keys_of():
        runtime.start(key, WantedReplica(1, 1, 2, 0.0))
    manifest_log(store, "words").delete()
    fill(store, count=7, seed=2)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        runtime.gates = {key: asyncio.Event() for key in keys_of()}
        table = await eagleray.directory.next_table(None)
        assert (table.collections, table.unready) == ({}, {"words": "its replicas are loading"})
        for gate in runtime.gates.values():
            gate.set()
        await table_when(eagleray.directory, serves(2))

    with_serving(scenario, store, tmp_path, runtime)


def test_corrupt_manifest_at_the_start_stops_no_replicas_and_is_told(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime = LocalRuntime(store, tmp_path)
    for key in keys_of():
        runtime.start(key, WantedReplica(1, 1, 2, 0.0))
    store.put(paths.manifest("words", 2), b"{}")

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await eagleray.directory.next_table(None)
        assert set(table.unready) == {"words"}
        assert runtime.stopped == []
        with pytest.raises(Corrupt, match=paths.manifest("words", 2)):
            await eagleray.directory.describe("words")
        store.delete(paths.manifest("words", 2))
        clock.advance(STORE_POLL_S)
        await table_when(eagleray.directory, serves(1))

    with_serving(scenario, store, tmp_path, runtime)


def test_rounds_go_on_while_the_storage_does_not_answer(tmp_path: Path) -> None:
    store, key = PausingStore(MemoryStore()), ReplicaKey("words", 0, 0)
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        store.pause_at = "folders"
        clock.advance(STORE_POLL_S)
        await until(store.looked.is_set)
        try:
            eagleray.runtime.kill(key)
            await table_when(eagleray.directory, lambda table: "is dead" in table.unready.get("words", ""))
            eagleray.runtime.lose(key)
            await until(lambda: eagleray.runtime.started == [*keys_of(), key])
        finally:
            store.go_on.set()

    with_serving(scenario, store, tmp_path)


def test_attributes_stay_known_while_no_replica_answers(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        for key in keys_of():
            eagleray.runtime.kill(key)
        table = await table_when(
            eagleray.directory, lambda table: not any(table.collections["words"].replicas.values())
        )
        assert table.collections["words"].attributes == {"name": "large_string"}

    with_serving(scenario, store, tmp_path)


def test_replica_that_hangs_for_long_is_replaced(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 1, 0)
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        started = asyncio.get_running_loop().time()
        eagleray.runtime.hang(key)
        await table_when(eagleray.directory, lambda table: "it does not answer" in table.unready.get("words", ""))
        table = await table_when(eagleray.directory, serves(1))
        patience_s = SILENT_TIMEOUTS_MAX * SETTINGS.replica_timeout_s
        assert asyncio.get_running_loop().time() - started >= patience_s - 0.01
        assert eagleray.runtime.stopped == [key]
        assert eagleray.runtime.started == [*keys_of(), key]
        assert replicas_in(table) == keys_of()

    with_serving(scenario, store, tmp_path)


def test_replica_that_is_starting_is_waited_for(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 1, 0)
    fill(store)
    runtime = LocalRuntime(store, tmp_path)
    runtime.start(key, WantedReplica(1, 1, 2, 0.0))
    runtime.hang(key)  # as if Ray had no place for it: it never said anything
    fast = replace(SETTINGS, replica_timeout_s=0.01)

    async def run() -> None:
        async with asyncio.timeout(20), serving(store, tmp_path, fast, ManualClock(), runtime) as eagleray:
            await table_when(eagleray.directory, lambda table: "words" in table.unready)
            await asyncio.sleep(3 * SILENT_TIMEOUTS_MAX * fast.replica_timeout_s)
            assert runtime.stopped == []
            runtime.revive(key)
            await table_when(eagleray.directory, serves(1))

    asyncio.run(run())


def test_replica_that_cannot_be_started_does_not_keep_others_from_being_served(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    fill(store, "birds")
    runtime = Stubborn(store, tmp_path)
    runtime.full = {ReplicaKey("birds", 0, 0)}

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        assert "birds" in table.unready
        runtime.full = set()
        await table_when(eagleray.directory, serves(1, "birds"))

    with_serving(scenario, store, tmp_path, runtime)


@pytest.mark.parametrize("error", [EaglerayError("a bug"), RuntimeError("another")], ids=["ours", "another"])
def test_watcher_survives_any_error_of_a_status(error: Exception, tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    key = ReplicaKey("words", 0, 0)

    class Odd(LocalRuntime):
        odd = False

        async def status(self, asked: ReplicaKey) -> ReplicaStatus:
            if self.odd and asked == key:
                raise error
            return await super().status(asked)

    runtime = Odd(store, tmp_path)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.odd = True
        await table_when(eagleray.directory, lambda table: str(error) in table.unready.get("words", ""))
        runtime.odd = False
        await table_when(eagleray.directory, serves(1))

    with_serving(scenario, store, tmp_path, runtime)


def test_shard_that_the_new_generation_no_longer_has_is_kept_while_queries_go_on_there(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)
    runtime, late = GatedLoads(store, tmp_path), ReplicaKey("words", 0, 0)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.gates[late] = asyncio.Event()
        fill(store, config=replace(CONFIG, shards=1), seed=2)
        await eagleray.directory.refresh("words")
        await rounds(eagleray.supervisor)
        assert replicas_in(await eagleray.directory.next_table(None)) == keys_of()
        runtime.gates[late].set()
        assert replicas_in(await table_when(eagleray.directory, serves(2))) == keys_of(shards=1)
        clock.advance(RETIRE_AFTER_S - 0.01)
        await rounds(eagleray.supervisor)
        assert runtime.stopped == []
        clock.advance(0.01)
        await until(lambda: runtime.stopped == [ReplicaKey("words", 1, 0)])

    with_serving(scenario, store, tmp_path, runtime)


# --- who leads


def primaries_in(table: ServingTable, collection: str = "words") -> dict[int, ReplicaKey]:
    return table.collections[collection].primaries


def led_by(*replicas: int) -> Callable[[ServingTable], bool]:
    """Shard 0, 1, ... of the doubled collection is led by this replica of it."""
    expected = {shard: ReplicaKey("words", shard, replica) for shard, replica in enumerate(replicas)}
    return lambda table: primaries_in(table) == expected


def upsert(*numbers: int) -> PointWrite:
    """Points of these ids; point i lies at (i, i, i, i)."""
    vectors = np.repeat(np.array(numbers, np.float32)[:, None], 4, axis=1)
    return PointWrite(pa.record_batch([pa.array(numbers), vectors_array(vectors)], names=["id", "vector"]))


async def found(client: LocalShardClient, number: int, min_lsn: int = 0) -> Any:
    """The id that lies nearest to a point, as one replica has it."""
    group = SearchGroup(0, 1, 1, SearchParams())
    (hits,) = await client.search(ShardSearch(1, np.full((1, 4), number, np.float32), (group,), 5.0, min_lsn))
    assert isinstance(hits, Hits), hits
    return hits.ids.to_pylist()[0]


def test_every_shard_gets_one_primary_and_keeps_it(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        assert led_by(0, 0)(table)
        clock.advance(100.0)
        await rounds(eagleray.supervisor, 5)
        assert eagleray.runtime.led == [ReplicaKey("words", 0, 0), ReplicaKey("words", 1, 0)]
        epochs = [(await eagleray.runtime.status(key)).epoch for key in keys_of(replicas=2)]
        assert epochs == [1, 0, 1, 0]

    with_serving(scenario, store, tmp_path)


def test_restarted_supervisor_leaves_the_primaries_as_they_are(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store, config=DOUBLED)
    runtime = LocalRuntime(store, tmp_path)

    async def before(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.lose(ReplicaKey("words", 0, 0))
        await table_when(eagleray.directory, lambda table: led_by(1, 0)(table) and serves(1)(table))

    async def after(eagleray: Serving, clock: ManualClock) -> None:
        assert led_by(1, 0)(await eagleray.directory.next_table(None))
        await rounds(eagleray.supervisor)
        assert len(runtime.led) == 3

    with_serving(before, store, tmp_path, runtime)
    with_serving(after, store, tmp_path, runtime)


def test_primary_that_restarts_soon_leads_again(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 1, 0)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        for epoch in (2, 3):
            eagleray.runtime.kill(key)
            table = await table_when(eagleray.directory, lambda table: "words" in table.unready)
            assert primaries_in(table) == {0: ReplicaKey("words", 0, 0)}
            await rounds(eagleray.supervisor)
            eagleray.runtime.revive(key)
            assert led_by(0, 0)(await table_when(eagleray.directory, serves(1)))
            assert (await eagleray.runtime.status(key)).epoch == epoch
        assert eagleray.runtime.led == [ReplicaKey("words", 0, 0), key, key, key]

    with_serving(scenario, store, tmp_path)


def test_primary_that_stays_away_is_replaced_after_its_time_and_does_not_lead_when_it_is_back(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.kill(key)
        await table_when(eagleray.directory, lambda table: "words" in table.unready)
        clock.advance(SETTINGS.replica_timeout_s - 0.01)
        await rounds(eagleray.supervisor)
        assert len(eagleray.runtime.led) == 2
        clock.advance(0.02)
        await table_when(eagleray.directory, led_by(1, 0))
        eagleray.runtime.revive(key)
        assert led_by(1, 0)(await table_when(eagleray.directory, serves(1)))
        await rounds(eagleray.supervisor)
        assert eagleray.runtime.led == [key, ReplicaKey("words", 1, 0), ReplicaKey("words", 0, 1)]

    with_serving(scenario, store, tmp_path)


def test_primary_whose_process_is_gone_is_replaced_at_once(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        eagleray.runtime.lose(key)
        await table_when(eagleray.directory, led_by(1, 0))
        await table_when(eagleray.directory, serves(1))
        await rounds(eagleray.supervisor)
        assert eagleray.runtime.led[2:] == [ReplicaKey("words", 0, 1)]

    with_serving(scenario, store, tmp_path)


def test_primary_that_was_paused_is_fenced_and_the_table_names_only_the_other(tmp_path: Path) -> None:
    store, old, new = MemoryStore(), ReplicaKey("words", 0, 0), ReplicaKey("words", 0, 1)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        client = eagleray.runtime.client(old)
        (first,) = await client.write([upsert(1_000)])
        assert isinstance(first, WriteOutcome)
        eagleray.runtime.hang(old)
        late = asyncio.ensure_future(client.write([upsert(2_000)]))
        await table_when(eagleray.directory, lambda table: "words" in table.unready)
        clock.advance(SETTINGS.replica_timeout_s)
        await table_when(eagleray.directory, led_by(1, 0))
        (second,) = await eagleray.runtime.client(new).write([upsert(3_000)])
        assert isinstance(second, WriteOutcome)
        eagleray.runtime.revive(old)
        (outcome,) = await late
        assert isinstance(outcome, Fenced)
        assert led_by(1, 0)(await table_when(eagleray.directory, serves(1)))
        while (await eagleray.runtime.status(old)).epoch:
            await asyncio.sleep(0.001)
        assert [await found(client, number, second.lsn) for number in (1_000, 2_000, 3_000)] == [1_000, 1_000, 3_000]
        assert eagleray.runtime.led[2:] == [new]

    with_serving(scenario, store, tmp_path)


class Unwilling(LocalRuntime):
    """Replicas of which some cannot lead."""

    unwilling: frozenset[ReplicaKey] = frozenset()

    async def lead(self, key: ReplicaKey) -> None:
        if key in self.unwilling:
            self.led.append(key)
            raise Unavailable(f"{key} cannot lead")
        await super().lead(key)


def test_replica_that_cannot_lead_is_passed_over_and_asked_again_later(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store, config=replace(DOUBLED, shards=1))
    runtime = Unwilling(store, tmp_path)
    runtime.unwilling = frozenset(keys_of(shards=1, replicas=2))

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await until(lambda: len(runtime.led) == 2)
        await rounds(eagleray.supervisor, 5)
        assert sorted(runtime.led) == keys_of(shards=1, replicas=2), "it must not ask in a tight loop"
        runtime.unwilling = frozenset({key})
        clock.advance(CALL_RETRY_S)
        table = await table_when(eagleray.directory, serves(1))
        assert primaries_in(table) == {0: ReplicaKey("words", 0, 1)}

    with_serving(scenario, store, tmp_path, runtime)


def test_written_points_are_found_on_every_replica_and_after_every_death(tmp_path: Path) -> None:
    store, one = MemoryStore(), replace(DOUBLED, shards=1)
    fill(store, config=one)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        runtime, written, lsn = eagleray.runtime, [], 0
        for number in range(1_000, 1_012):
            table = await table_when(eagleray.directory, serves(1))
            primary = primaries_in(table)[0]
            runtime.drop_pushes = number % 2 == 0
            (outcome,) = await runtime.client(primary).write([upsert(number)])
            assert isinstance(outcome, WriteOutcome)
            written.append(number)
            assert outcome.lsn > lsn
            lsn = outcome.lsn
            for key in keys_of(shards=1, replicas=2):
                assert await found(runtime.client(key), number, lsn) == number
            if number % 4 == 3:
                runtime.kill(primary)
                await table_when(eagleray.directory, lambda table: "words" in table.unready)
                runtime.revive(primary)
            elif number % 4 == 1:
                runtime.lose(primary)
                await until(lambda: len(runtime.started) == 2 + len(written) // 4 + 1)
        for key in keys_of(shards=1, replicas=2):
            assert [await found(runtime.client(key), number, lsn) for number in written] == written

    with_serving(scenario, store, tmp_path)


# --- versions of one generation


def seal(store: ObjectStore, collection: str = "words") -> Manifest:
    """A further version of the newest generation, as a seal commits it (of nothing)."""
    log = manifest_log(store, collection)
    parent = log.newest_live()
    return log.commit_shards(parent, {0: parent.shards[0]})


def test_version_of_the_same_generation_is_loaded_by_all_and_served_at_once(tmp_path: Path) -> None:
    store, late = MemoryStore(), ReplicaKey("words", 1, 1)
    fill(store, config=DOUBLED)
    runtime = GatedLoads(store, tmp_path)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.gates[late] = asyncio.Event()
        seal(store)
        await eagleray.directory.refresh("words")
        table = await eagleray.directory.next_table(None)
        assert (table.collections["words"].version, table.collections["words"].generation) == (2, 1)
        assert (replicas_in(table), table.unready) == (keys_of(replicas=2), {})
        for _ in range(3):
            seal(store)
        await eagleray.directory.refresh("words")
        runtime.gates[late].set()
        await until(lambda: all(5 in eagleray.supervisor._replicas.status(key).versions for key in keys_of(replicas=2)))
        clock.advance(RETIRE_AFTER_S)
        await rounds(eagleray.supervisor)
        assert serves(1)(await eagleray.directory.next_table(None))
        assert runtime.retired == []
        assert all(
            sorted(set(v)) == v for key in keys_of(replicas=2) for v in [[v for k, v in runtime.loaded if k == key]]
        )

    with_serving(scenario, store, tmp_path, runtime)


def test_version_that_one_replica_has_loaded_by_itself_is_found_through_it(tmp_path: Path) -> None:
    store, first = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store, config=DOUBLED)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        seal(store)
        seal(store)
        await eagleray.runtime.replica(first).load(None)
        await table_when(eagleray.directory, lambda table: table.collections["words"].version == 3)
        await until(lambda: len(eagleray.runtime.loaded) == 3)
        await rounds(eagleray.supervisor)
        assert sorted(eagleray.runtime.loaded) == [(key, 3) for key in keys_of(replicas=2) if key != first]

    with_serving(scenario, store, tmp_path)


def test_unknown_version_that_cannot_be_read_is_not_read_in_a_loop(tmp_path: Path) -> None:
    inner = MemoryStore()
    fill(inner)
    store = FaultyStore(inner, counted=frozenset({"objects"}))

    async def run() -> None:
        runtime = LocalRuntime(inner, tmp_path)
        async with asyncio.timeout(20), serving(store, tmp_path, SETTINGS, ManualClock(), runtime) as eagleray:
            await table_when(eagleray.directory, serves(1))
            seal(inner)
            store.at = store.calls + 1
            await runtime.replica(ReplicaKey("words", 0, 0)).load(None)
            await until(lambda: store.calls == store.at)
            await rounds(eagleray.supervisor, 5)
            assert store.calls == store.at
            assert eagleray.supervisor.describe("words")["manifest"].version == 1
            await eagleray.supervisor.poll()
            await table_when(eagleray.directory, lambda table: table.collections["words"].version == 2)
        runtime.close()

    asyncio.run(run())


def test_seals_during_a_switch_do_not_hold_it_up(tmp_path: Path) -> None:
    store, late = MemoryStore(), ReplicaKey("words", 1, 1)
    fill(store, config=DOUBLED)
    runtime = GatedLoads(store, tmp_path)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        runtime.gates[late] = asyncio.Event()
        fill(store, config=DOUBLED, count=30, seed=2)
        await eagleray.directory.refresh("words")
        await until(lambda: len(runtime.loaded) == 2)
        seal(store)
        await eagleray.directory.refresh("words")
        await until(lambda: len(runtime.loaded) == 4)
        assert serves(1)(await eagleray.directory.next_table(None))
        await runtime.replica(late).load(2)  # it has the generation, though not its newest version
        table = await table_when(eagleray.directory, serves(2))
        assert table.collections["words"].version == 3
        runtime.gates[late].set()
        await until(lambda: (late, 3) in runtime.loaded)

    with_serving(scenario, store, tmp_path, runtime)


def test_supervisor_that_restarts_during_a_switch_serves_the_generation_that_was_sealed_meanwhile(
    tmp_path: Path,
) -> None:
    store, late = MemoryStore(), ReplicaKey("words", 1, 0)
    fill(store)
    runtime = GatedLoads(store, tmp_path)

    async def before(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        for _ in range(3):
            seal(store)
        await runtime.replica(ReplicaKey("words", 0, 0)).load(None)
        runtime.gates = {key: asyncio.Event() for key in keys_of()}
        fill(store, count=30, seed=2)
        await runtime.replica(ReplicaKey("words", 0, 0)).load(None)

    async def after(eagleray: Serving, clock: ManualClock) -> None:
        runtime.gates = {late: asyncio.Event()}
        served = (await eagleray.directory.next_table(None)).collections["words"]
        assert served.generation == 1
        assert all(served.replicas.values())
        runtime.gates[late].set()
        await table_when(eagleray.directory, serves(2))

    with_serving(before, store, tmp_path, runtime)
    with_serving(after, store, tmp_path, runtime)


# --- what writes change


def test_points_follow_the_writes_without_a_table_for_each(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    fill(store, config=replace(CONFIG, shards=1))

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        table = await table_when(eagleray.directory, serves(1))
        for number in range(1_000, 1_010):
            await eagleray.runtime.client(key).write([upsert(number)])
        await rounds(eagleray.supervisor)
        assert await eagleray.directory.next_table(None) == table
        clock.advance(POINTS_PERIOD_S)
        later = await table_when(eagleray.directory, lambda table: table.collections["words"].shard_points == {0: 30})
        assert replace(later.collections["words"], shard_points={0: 20}) == table.collections["words"]

    with_serving(scenario, store, tmp_path)


def test_attributes_are_those_of_the_manifest_and_of_what_replicas_hold(tmp_path: Path) -> None:
    store = MemoryStore()
    fill(store)

    async def scenario(eagleray: Serving, clock: ManualClock) -> None:
        await table_when(eagleray.directory, serves(1))
        manifest_log(store, "words").declare_attributes({"year": "int64"})
        await eagleray.directory.refresh("words")
        served = (await eagleray.directory.next_table(None)).collections["words"]
        assert served.attributes == {"name": "large_string", "year": "int64"}

    with_serving(scenario, store, tmp_path)
