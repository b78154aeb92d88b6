"""The switch to a generation with another number of shards while writes and searches go on, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from actors import coordinator as coordinator_module
from actors.log_ends import LogEnds
from actors.shard import Shard
from actors.supervisor import RETIRE_AFTER_S
from actors.watched_replicas import CALL_RETRY_S
from cluster import paths
from cluster import wal as wal_module
from cluster.config import CollectionConfig, Upkeep
from cluster.errors import Conflict, Corrupt, Fenced, Unavailable
from cluster.manifest import Manifest
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaKey
from cluster.wal import Wal
from tests.fakes import SETTINGS, LocalRuntime, ManualClock, Serving, serving
from tests.unit.actors.batches import CONFIG, upsert
from tests.unit.actors.points import flipped, manifest_log
from tests.unit.actors.reshard_load import Load, following, load, until
from tests.unit.actors.resharding import new_nonce, records, replayed, split

DOUBLED, THREE = replace(CONFIG, replicas=2), replace(CONFIG, shards=3)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.001)
    monkeypatch.setattr("actors.crossing.PERIOD_S", 0.01)
    monkeypatch.setattr("actors.log_ends.RETRY_S", 0.01)
    monkeypatch.setattr(coordinator_module, "FOLLOW_RETRY_S", 0.01)


@dataclass
class Switch:
    """A served collection under load. Its supervisor's clock stands still: what waits for a pause waits for ever."""

    store: ObjectStore
    folder: Path
    runtime: LocalRuntime
    clock: ManualClock = field(default_factory=ManualClock)
    eagleray: Serving = field(init=False)
    load: Load = field(init=False)
    _supervisor: AsyncExitStack = field(init=False)

    async def commit(self, shards: int) -> Manifest:
        manifest = await asyncio.to_thread(replayed, self.store, shards)
        await self.eagleray.directory.refresh("words")
        return manifest

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[Serving]:
        """By one supervisor after the other (`restart_supervisor`)."""
        async with AsyncExitStack() as self._supervisor:
            yield await self._another()
            await self._supervisor.aclose()

    async def _another(self) -> Serving:
        one = serving(self.store, self.folder, SETTINGS, self.clock, self.runtime)
        self.eagleray = await self._supervisor.enter_async_context(one)
        return self.eagleray

    async def restart_supervisor(self) -> None:
        await self._supervisor.aclose()
        self.load.relay.move_to(await self._another())

    async def serves_in_the_end(self, generation: int) -> None:
        """The clock moves on, for a call that failed, maybe only now, is not repeated at once."""
        while (served := self.load.served()) is None or served.generation != generation:
            self.clock.advance(CALL_RETRY_S)
            await asyncio.sleep(0.02)
        await self.load.until_served(generation)

    def statuses(self, generation: int) -> tuple[int, int]:
        """How many replicas hold the generation, and how many are near."""
        told = [self.runtime.replica(key).status() for key in self.runtime.existing()]
        return sum(generation in one.generations for one in told), sum(generation in one.crossing for one in told)


Scenario = Callable[[Switch], Awaitable[None]]


def under_load(
    scenario: Scenario, tmp_path: Path, config: CollectionConfig = CONFIG, runtime: LocalRuntime | None = None
) -> None:
    """In the end what was acknowledged is there, and once more when every process is started afresh."""
    store = MemoryStore() if runtime is None else runtime._store
    manifest_log(store, "words").create(config)

    async def run() -> None:
        async with asyncio.timeout(40):
            switch = Switch(store, tmp_path, runtime or LocalRuntime(store, tmp_path))
            async with switch.supervised() as eagleray, load(eagleray, config.replicas == 1) as switch.load:
                await scenario(switch)
            switch.runtime.close()
            afresh = serving(store, tmp_path / "again", SETTINGS, switch.clock)
            async with afresh as eagleray, following(eagleray) as again:
                again.acknowledged = switch.load.acknowledged
                await again.check()

    asyncio.run(run())


def key(shard: int, replica: int = 0) -> ReplicaKey:
    return ReplicaKey("words", shard, replica)


# --- nothing fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, DOUBLED])
def test_reshard_1_3_2_under_writes_and_searches_loses_nothing(config: CollectionConfig, tmp_path: Path) -> None:
    async def scenario(switch: Switch) -> None:
        made, runtime = switch.load, switch.runtime
        generation = (await asyncio.to_thread(split, switch.store, 3)).generation
        await switch.eagleray.directory.refresh("words")
        served = await made.until_served(generation)
        assert set(served.replicas) == {0, 1, 2}
        assert served.log_start > 0
        await made.more()
        served = await made.until_served((await switch.commit(2)).generation)
        assert set(served.replicas) == {0, 1}
        assert runtime.stopped == [], "queries may go on at the third shard"
        await made.more()
        switch.clock.advance(RETIRE_AFTER_S)
        await until(lambda: len(runtime.stopped) == config.replicas)
        assert {stopped.shard for stopped in runtime.stopped} == {2}
        await until(lambda: runtime.replica(key(0)).status().generations == (3,))
        assert made.longest_s < 2.0, "of the writes that waited for the switch"

    under_load(scenario, tmp_path, config)


def test_shards_are_sealed_and_merged_before_and_after_the_switch_and_not_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.replica_upkeep.RETRY_FIRST_S", 0.01)  # after a conflict
    store = MemoryStore()
    settings = replace(SETTINGS, upkeep=Upkeep(seal_points=3, segments_max=2))
    runtime = LocalRuntime(store, tmp_path, settings, tick_s=0.01)

    def sealed(manifest: Manifest) -> bool:
        return not manifest.crossing and all(entry.segments for entry in manifest.shards)

    async def scenario(switch: Switch) -> None:
        log = manifest_log(store, "words")
        for shards in (3, 2):
            await until(lambda: sealed(log.newest_live()))
            with monkeypatch.context() as held:
                held.setattr(LogEnds, "begin", lambda *_: None)
                manifest = await asyncio.to_thread(_split_between_seals, store, shards)
                await switch.eagleray.directory.refresh("words")
                await until(lambda: switch.statuses(manifest.generation)[1] == shards)  # noqa: B023
                await switch.load.more(10)
                assert log.newest_live() == manifest
            await switch.load.until_served(manifest.generation)
        await until(lambda: sealed(log.newest_live()))
        assert all(not runtime.replica(one).status().error for one in runtime.existing() if one.shard < 2)

    under_load(scenario, tmp_path, CONFIG, runtime)


def _split_between_seals(store: ObjectStore, shards: int) -> Manifest:
    while True:
        try:
            return split(store, shards)
        except (Conflict, Corrupt):  # a seal was committed meanwhile
            continue


def test_generation_that_is_taken_back_before_the_switch_is_never_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(switch: Switch) -> None:
        with monkeypatch.context() as held:
            held.setattr(LogEnds, "begin", lambda self, manifest: None)
            await switch.commit(3)
            await until(lambda: switch.statuses(2) == (0, 3))
            await switch.load.more()
            await switch.commit(1)
            await until(lambda: switch.statuses(3) == (0, 1))
            served = switch.load.served()
            assert served is not None
            assert served.generation == 1
        served = await switch.load.until_served(3)
        assert set(served.replicas) == {0}
        switch.clock.advance(RETIRE_AFTER_S)
        await until(lambda: {stopped.shard for stopped in switch.runtime.stopped} == {1, 2})
        kinds = [record.kind for record in records(switch.store, 1, 0, records(switch.store, 0, 0)[-1].lsn)]
        assert kinds == ["claim", "end"], "the log that nobody wrote to has ended, too"

    under_load(scenario, tmp_path)


@pytest.mark.parametrize("shard", [0, 1])
def test_logs_do_not_end_while_a_shard_cannot_load_the_new_generation(shard: int, tmp_path: Path) -> None:
    async def scenario(switch: Switch) -> None:
        manifest = await asyncio.to_thread(split, switch.store, 3)
        (ref,) = manifest.shards[shard].segments
        name = paths.segment_file("words", ref.segment_id, paths.INDEX)
        data = switch.store.get(name)
        switch.store.put(name, flipped(data, len(data) // 2))
        await switch.eagleray.directory.refresh("words")
        await until(lambda: switch.statuses(2) == (0, 2))
        await switch.load.more(10)
        served = switch.load.served()
        assert served is not None
        assert (served.generation, switch.statuses(2)) == (1, (0, 2))
        assert all(record.kind != "end" for record in records(switch.store, 0, 0))
        switch.store.put(name, data)
        await switch.serves_in_the_end(2)

    under_load(scenario, tmp_path)


# --- something fails at each step -------------------------------------------------------------------------------------


class Held:
    """The switch from 3 shards to 2 stands still at a step, until `go_on`."""

    def __init__(self, step: str, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.step = step
        if step == "crossing":
            patch.setattr(LogEnds, "begin", lambda *_: None)
        elif step == "between ends":
            patch.setattr(LogEnds, "_end_all", _end_first)
        else:
            arrive = Shard.arrive
            late = (0,) if step == "some arrived" else (0, 1)
            patch.setattr(Shard, "arrive", lambda shard: None if shard.number in late else arrive(shard))

    def reached(self, switch: Switch) -> bool:
        last = [record.kind for shard in range(3) for record in records(switch.store, 0, shard)[-1:]]
        held, near = switch.statuses(2)
        if self.step == "crossing":
            return near >= 2
        if self.step == "between ends":
            return last.count("end") == 1
        return last.count("end") == 3 and (held > 0) == (self.step == "some arrived")

    def go_on(self) -> None:
        self._patch.undo()


async def _end_first(self: LogEnds, manifest: Manifest) -> None:
    """Only the log of shard 0."""
    await asyncio.to_thread(Wal(self._store, "words", 0, 0).finish, 0, 0, new_nonce)
    raise Unavailable("held here")


STEPS = ["crossing", "between ends", "ended", "some arrived"]
DEATHS = [
    *[("shard 0", step) for step in STEPS],
    ("shard 2", "crossing"),
    ("shard 2", "ended"),
    ("supervisor", "between ends"),
    ("supervisor", "ended"),
    ("all", "crossing"),
    ("all", "between ends"),
]


@pytest.mark.parametrize(("victim", "step"), DEATHS)
def test_whatever_dies_at_a_step_of_the_switch_it_comes_to_its_end(
    victim: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(switch: Switch) -> None:
        with monkeypatch.context() as patch:
            held, switch.load.faults = Held(step, patch), True
            await switch.commit(2)
            await until(lambda: held.reached(switch))
            if victim != "supervisor":
                killed = switch.runtime.existing() if victim == "all" else [key(int(victim[-1]))]
                for one in killed:
                    switch.runtime.kill(one)
                await asyncio.sleep(0.05)
                for one in killed:
                    switch.runtime.revive(one)
            if victim in ("supervisor", "all"):
                await switch.restart_supervisor()
            # queries go on in the generation that is served, also where its log has ended
            await switch.load.more(writes=3 if step == "crossing" else 0)
            held.go_on()
            await switch.serves_in_the_end(2)

    under_load(scenario, tmp_path, THREE)


@pytest.mark.parametrize("step", ["crossing", "some arrived"])
def test_primary_that_was_paused_over_the_switch_acknowledges_nothing_more(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.watched_replicas.SILENT_TIMEOUTS_MAX", 1_000)  # it is not ended meanwhile

    async def scenario(switch: Switch) -> None:
        served = await switch.load.until_served(1)
        old = served.primaries[0]
        zombie, epoch = switch.runtime.replica(old), switch.runtime.replica(old).status().epoch
        switch.runtime.hang(old)
        pending = asyncio.ensure_future(zombie.write([upsert(5_000)], 5.0))
        await until(lambda: switch.eagleray.supervisor.describe("words")["statuses"][old].state == "unreachable")
        with monkeypatch.context() as patch:
            held = Held(step, patch)
            switch.clock.advance(SETTINGS.replica_timeout_s)
            await switch.commit(2)
            await until(lambda: held.reached(switch))
            assert (zombie.status().epoch, zombie.status().log_set) == (epoch, 0), "it believes that it leads"
            held.go_on()
        await switch.load.until_served(2)
        switch.runtime.revive(old)
        (outcome,) = await pending
        assert isinstance(outcome, Fenced), outcome
        assert 5_000 not in await switch.load.found()
        await until(lambda: zombie.status().generations[-1] == 2)

    under_load(scenario, tmp_path, replace(THREE, replicas=2))
