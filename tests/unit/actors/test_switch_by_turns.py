"""The switch to another generation by one replica of each shard at a time, while writes and searches go on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.supervisor import RETIRE_AFTER_S
from actors.watched_replicas import CALL_RETRY_S
from cluster import wal as wal_module
from cluster.errors import Fenced, Unavailable
from cluster.manifest import Manifest, ShardEntry
from cluster.manifest_format import Switch
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from tests.fakes import SETTINGS, LocalRuntime, ManualClock, Serving, serving
from tests.unit.actors.batches import CONFIG, upsert
from tests.unit.actors.points import manifest_log
from tests.unit.actors.reshard_load import Load, load, until

Scenario = Callable[[Serving, Load, ManualClock, MemoryStore], Awaitable[None]]
KEYS = [ReplicaKey("words", shard, number) for shard in range(2) for number in range(2)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.001)
    monkeypatch.setattr("actors.crossing.PERIOD_S", 0.01)


class Watching(LocalRuntime):
    """Keeps the most generations that any replica had in its memory after each call, and who was without any."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.most = 0
        self.empty: list[set[ReplicaKey]] = []
        self.refuses_lead = False

    async def lead(self, key: ReplicaKey) -> None:
        if self.refuses_lead:
            raise Unavailable("the test wants no other primary")
        await super().lead(key)

    async def load(self, key: ReplicaKey, version: int) -> None:
        await super().load(key, version)
        self.look()

    async def retire(self, key: ReplicaKey, generation: int) -> None:
        await super().retire(key, generation)
        self.look()

    def look(self) -> None:
        statuses = {key: self.replica(key).status() for key in self.existing()}
        self.most = max(self.most, *(len({*s.generations, *s.crossing}) for s in statuses.values()))
        self.empty.append({key for key, status in statuses.items() if not status.generations})


def under_load(scenario: Scenario, tmp_path: Path, runtime: type[LocalRuntime] = Watching) -> LocalRuntime:
    """Two shards of two replicas."""
    store, clock = MemoryStore(), ManualClock()
    manifest_log(store, "words").create(replace(CONFIG, shards=2, replicas=2))
    mine = runtime(store, tmp_path, SETTINGS)

    async def run() -> None:
        async with (
            asyncio.timeout(40),
            serving(store, tmp_path, SETTINGS, clock, mine) as eagleray,
            load(eagleray, monotonic=False) as made,
        ):
            await scenario(eagleray, made, clock, store)

    try:
        asyncio.run(run())
    finally:
        mine.close()
    return mine


def next_generation(store: MemoryStore, switch: Switch) -> Manifest:
    """All is in the logs: the same as before, to be loaded anew."""
    log = manifest_log(store, "words")
    base = log.newest_live()
    return log.commit_generation(base, base.config, tuple(ShardEntry(shard) for shard in range(2)), switch=switch)


def other_shards(store: MemoryStore, shards: int, switch: Switch) -> Manifest:
    """All is in the logs of the first set."""
    log = manifest_log(store, "words")
    base = log.newest_live()
    logs = LogSet(0, 2, tuple(LogPosition(shard, 0, 0) for shard in range(2)))
    entries = tuple(behind_logs(ShardEntry(shard), logs) for shard in range(shards))
    return log.commit_generation(base, replace(base.config, shards=shards), entries, switch=switch)


def held(runtime: LocalRuntime) -> set[tuple[int, ...]]:
    return {runtime.replica(key).status().generations for key in KEYS}


def test_replicas_without_room_for_two_generations_go_over_one_at_a_time(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        runtime = eagleray.runtime
        assert isinstance(runtime, Watching)
        leading = {key.shard: key for key in runtime.led}
        generation = (await asyncio.to_thread(next_generation, store, "one_at_a_time")).generation
        await eagleray.directory.refresh("words")
        served = await made.until_served(generation)
        assert {shard: len(keys) for shard, keys in served.replicas.items()} == {0: 1, 1: 1}
        assert not {key for keys in served.replicas.values() for key in keys} & set(leading.values())
        await made.more()
        await until(lambda: all(made.served().primaries[s] != leading[s] for s in range(2)))  # type: ignore[union-attr]
        await made.more()
        assert held(runtime) == {(1,), (2,)}
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: held(runtime) == {(2,)})
        await until(lambda: all(len(keys) == 2 for keys in made.served().replicas.values()))  # type: ignore[union-attr]
        assert runtime.most == 1
        for empty in runtime.empty:
            assert len({key.shard for key in empty}) == len(empty), "a shard that nobody answers for"

    under_load(scenario, tmp_path)


def test_replicas_with_room_load_a_generation_one_after_the_other(tmp_path: Path) -> None:
    under_way: set[ReplicaKey] = set()
    together: list[set[ReplicaKey]] = []

    class Slow(Watching):
        async def load(self, key: ReplicaKey, version: int) -> None:
            under_way.add(key)
            together.append(set(under_way))
            await asyncio.sleep(0.05)
            await super().load(key, version)
            under_way.discard(key)

    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        generation = (await asyncio.to_thread(next_generation, store, "beside")).generation
        await eagleray.directory.refresh("words")
        served = await made.until_served(generation)
        assert {shard: len(keys) for shard, keys in served.replicas.items()} == {0: 2, 1: 2}

    runtime = under_load(scenario, tmp_path, Slow)
    assert {key for keys in together for key in keys} == set(KEYS)
    for keys in together:
        assert len({key.shard for key in keys}) == len(keys), "two replicas of a shard at the same time"
    assert isinstance(runtime, Watching)
    assert runtime.most == 2


def test_primary_keeps_what_it_applies_writes_to_until_another_one_leads(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        runtime = eagleray.runtime
        assert isinstance(runtime, Watching)
        runtime.refuses_lead = True
        generation = (await asyncio.to_thread(next_generation, store, "one_at_a_time")).generation
        await eagleray.directory.refresh("words")
        await made.until_served(generation)
        clock.advance(RETIRE_AFTER_S)
        await asyncio.sleep(0.1)  # some rounds
        await made.more()
        assert held(runtime) == {(1,), (2,)}
        runtime.refuses_lead = False
        clock.advance(CALL_RETRY_S)
        await until(lambda: held(runtime) == {(2,)})

    under_load(scenario, tmp_path)


def test_primary_that_is_left_with_nothing_leads_no_more(tmp_path: Path) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    manifest_log(store, "words").create(CONFIG)
    runtime = LocalRuntime(store, tmp_path)

    async def run() -> None:
        runtime.start(key, WantedReplica(1, 1, 1, 0.0))
        replica = runtime.replica(key)
        await replica.lead()
        await replica.retire(1)
        assert replica.status().epoch == 1
        await replica.retire(2)
        assert (replica.status().epoch, replica.status().generations) == (0, ())
        (outcome,) = await replica.write([upsert(1)], 5.0)
        assert isinstance(outcome, Fenced), outcome

    try:
        asyncio.run(run())
    finally:
        runtime.close()


def test_shards_change_without_room_for_two_generations(tmp_path: Path) -> None:
    async def scenario(eagleray: Serving, made: Load, clock: ManualClock, store: MemoryStore) -> None:
        runtime = eagleray.runtime
        assert isinstance(runtime, Watching)
        generation = (await asyncio.to_thread(other_shards, store, 3, "one_at_a_time")).generation
        await eagleray.directory.refresh("words")
        served = await made.until_served(generation)
        assert {shard: len(keys) > 0 for shard, keys in served.replicas.items()} == dict.fromkeys(range(3), True)
        await made.more()
        clock.advance(RETIRE_AFTER_S)
        await until(lambda: held(runtime) == {(2,)})
        await until(lambda: all(len(keys) == 2 for keys in made.served().replicas.values()))  # type: ignore[union-attr]
        assert runtime.most == 1

    under_load(scenario, tmp_path)
