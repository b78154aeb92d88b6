"""Another log set as replicas, supervisor and serving table see it, each by itself; the whole is in `test_reshard`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actors import primary as primary_module
from actors.known_manifests import KnownManifests
from actors.log_ends import LogEnds
from actors.replica_status import ReplicaStatus
from actors.serving_table import served_collection
from actors.wanted_replicas import wanted_replicas
from cluster import paths
from cluster import wal as wal_module
from cluster.entry_log import start_after
from cluster.errors import Fenced, Unavailable
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.write import WriteOutcome
from tests.fakes import SETTINGS, FaultyStore, LocalRuntime
from tests.unit.actors.batches import CONFIG, upsert
from tests.unit.actors.points import manifest_log
from tests.unit.actors.reshard_load import until
from tests.unit.actors.resharding import end, new_nonce, records, replayed
from tests.unit.actors.test_replica import asked_for

ONE = ReplicaKey("words", 0, 0)
WANTED = WantedReplica(version=1, generation=1, shards=1, num_cpus=0.0)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.0)
    monkeypatch.setattr("actors.crossing.PERIOD_S", 0.005)
    monkeypatch.setattr("actors.log_ends.RETRY_S", 0.001)


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    manifest_log(store, "words").create(CONFIG)
    return store


def with_replica(
    scenario: Callable[[LocalRuntime], Awaitable[None]], store: FaultyStore | MemoryStore, tmp_path: Path
) -> None:
    """The only replica of a collection of one shard, which leads."""
    runtime = LocalRuntime(store, tmp_path)
    runtime.start(ONE, WANTED)

    async def run() -> None:
        async with asyncio.timeout(20):
            await runtime.lead(ONE)
            await scenario(runtime)

    try:
        asyncio.run(run())
    finally:
        runtime.close()


# --- a replica --------------------------------------------------------------------------------------------------------


def test_replica_goes_over_by_itself_and_its_old_generation_reaches_no_lsn_of_the_new_log(
    store: MemoryStore, tmp_path: Path
) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        replica = runtime.replica(ONE)
        (written,) = await replica.write([upsert(1)])
        assert isinstance(written, WriteOutcome)
        manifest = replayed(store, 3)
        await replica.load(None)
        assert list(replica.status().crossing) == [2]
        start = end(store, manifest)
        await until(lambda: replica.status().generations == (1, 2))
        assert (replica.status().epoch, replica.status().log_start, replica.status().error) == (0, start, "")
        (refused,) = await replica.write([upsert(2)])
        assert isinstance(refused, Fenced)
        await replica.lead()
        claim = records(store, 1, 0, start)[-1]
        assert (replica.status().epoch, replica.status().lsn) == (claim.epoch, claim.lsn)
        await replica.search(asked_for(1, written.lsn, 0.0))
        await replica.search(asked_for(1, claim.lsn, 0.0, generation=2))
        with pytest.raises(Unavailable, match=f"has applied LSN {start}, not yet LSN {claim.lsn}"):
            await replica.search(asked_for(1, claim.lsn, 0.01))

    with_replica(scenario, store, tmp_path)


def test_replica_that_is_to_lead_an_ended_log_says_so_and_is_not_refused(store: MemoryStore, tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        replica = runtime.replica(ONE)
        end(store, replayed(store, 3))
        (refused,) = await replica.write([upsert(1)])
        assert isinstance(refused, Fenced)
        await until(lambda: replica.status().epoch == 0)
        before = len(records(store, 0, 0))
        await replica.lead()
        status = replica.status()
        assert (status.epoch, status.log_ended, len(records(store, 0, 0))) == (0, True, before)
        assert "is not the primary" in str((await replica.write([upsert(1)]))[0])

    with_replica(scenario, store, tmp_path)


def test_idle_primary_finds_the_end_of_its_log(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primary_module, "IDLE_CHECK_S", 0.005)

    async def scenario(runtime: LocalRuntime) -> None:
        replica = runtime.replica(ONE)
        lsn = replica.status().lsn
        # the end where the next record would be: this primary's own claim was the last record
        end_record = wal_module.Wal(store, "words", 0, 0).finish(0, 0, new_nonce)
        assert end_record.lsn == lsn + 1
        await until(lambda: replica.status().epoch == 0)
        (refused,) = await replica.write([upsert(1)])
        assert f"the log of shard 0 ended at LSN {end_record.lsn}" in str(refused)

    with_replica(scenario, store, tmp_path)


def test_replica_tells_why_a_crossing_fails_and_goes_on_when_it_can(store: MemoryStore, tmp_path: Path) -> None:
    async def scenario(runtime: LocalRuntime) -> None:
        (written,) = await runtime.replica(ONE).write([upsert(1)])
        assert isinstance(written, WriteOutcome)
        replayed(store, 3)
        second = ReplicaKey("words", 1, 0)
        runtime.start(second, WANTED)
        replica = runtime.replica(second)
        await until(lambda: replica.status().crossing == {2: 0})
        key = paths.wal_record("words", 0, written.lsn + 1)
        store.put(key, b"no record")
        await until(lambda: "crossing to another log set" in replica.status().error)
        assert (replica.status().state, replica.status().versions, replica.status().crossing) == ("failed", (), {})
        store.delete(key)
        await until(lambda: list(replica.status().crossing) == [2] and not replica.status().error)
        assert replica.status().versions == (2,)

    with_replica(scenario, store, tmp_path)


# --- who ends the logs ------------------------------------------------------------------------------------------------


def ends_with(store: FaultyStore | MemoryStore, scenario: Callable[[LogEnds], Awaitable[None]]) -> None:
    async def run() -> None:
        wake = asyncio.Event()
        ends = LogEnds(store, KnownManifests(store, new_nonce), new_nonce, wake)
        async with asyncio.timeout(20):
            await scenario(ends)
        assert wake.is_set()
        ends.close()

    asyncio.run(run())


def test_ending_the_logs_is_tried_until_it_succeeds(store: MemoryStore) -> None:
    manifest = replayed(store, 3)
    faulty = FaultyStore(store, at=1)

    async def scenario(ends: LogEnds) -> None:
        for at in range(1, 20):
            faulty.at = faulty.calls + at
            ends.begin(manifest)
            await until(lambda: not ends._tasks)
        assert ends.ended(manifest)

    ends_with(faulty, scenario)
    assert start_after(store, "words", manifest.behind) is not None
    assert [record.kind for record in records(store, 0, 0)] == ["claim", "end"]


def test_logs_behind_a_generation_that_was_taken_back_are_not_ended(store: MemoryStore) -> None:
    manifest = replayed(store, 3)
    replayed(store, 1)

    async def scenario(ends: LogEnds) -> None:
        ends.begin(manifest)
        await until(lambda: not ends._tasks)
        assert not ends.ended(manifest)

    ends_with(store, scenario)
    assert records(store, 0, 0) == []


def test_generation_whose_logs_are_written_to_is_an_earlier_one_until_these_have_ended(store: MemoryStore) -> None:
    known = KnownManifests(store, new_nonce)
    first = manifest_log(store, "words").newest_live()

    def in_use() -> int | None:
        found = asyncio.run(known.in_use(manifest_log(store, "words").newest_live()))
        return found.generation if found else None

    assert in_use() is None
    replayed(store, 3)
    back = replayed(store, 1)
    assert in_use() == first.generation, "the one between them was never switched to"
    end(store, back)
    assert in_use() is None


# --- who is wanted, and who serves ------------------------------------------------------------------------------------


def test_replicas_are_wanted_for_the_versions_that_have_their_shard(store: MemoryStore) -> None:
    one = manifest_log(store, "words").newest_live()
    three = replayed(store, 3)
    grown, shrunk = wanted_replicas(three, one, SETTINGS), wanted_replicas(one, three, SETTINGS)
    keys = [ReplicaKey("words", shard, 0) for shard in range(3)]
    assert list(grown) == list(shrunk) == keys
    assert [(grown[key].version, grown[key].served) for key in keys] == [(2, 1), (2, None), (2, None)]
    assert [(shrunk[key].version, shrunk[key].served) for key in keys] == [(1, 2), (2, 2), (2, 2)]
    assert [(shrunk[key].generation, shrunk[key].shards) for key in keys] == [(1, 1), (2, 3), (2, 3)]
    assert list(wanted_replicas(one, None, SETTINGS)) == keys[:1]


def test_table_names_primaries_of_the_log_set_that_is_served(store: MemoryStore) -> None:
    one = manifest_log(store, "words").newest_live()
    three = replayed(store, 3)
    old = ReplicaStatus("ready", (1, 2), (1,), lsn=5, epoch=3)
    new = replace(old, generations=(1, 2), lsn=9, epoch=5, log_set=1, log_start=8)
    zero, other = ReplicaKey("words", 0, 0), ReplicaKey("words", 0, 1)
    assert served_collection(one, {zero: old, other: replace(new, epoch=0)}, None).primaries == {0: zero}
    assert served_collection(one, {zero: new}, None).primaries == {}
    assert served_collection(one, {zero: replace(old, log_ended=True)}, None).primaries == {}
    table = served_collection(three, {zero: old, other: new}, None)
    assert (table.primaries, table.log_start) == ({0: other}, 8)
    away = {zero: old, other: ReplicaStatus("unreachable")}
    assert served_collection(three, away, table).log_start == 8, "which stays known"
    assert served_collection(one, {zero: old, other: new}, None).log_start == 0
