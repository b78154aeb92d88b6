"""When a primary's shard is sealed and merged, in one process; what a seal does is tested elsewhere."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pytest

from actors.replica_upkeep import RETRY_FIRST_S, ReplicaUpkeep, Work
from actors.shard import Shard
from cluster.config import Settings, Upkeep
from cluster.errors import Conflict, Fenced
from cluster.manifest import ManifestLog
from cluster.memory_store import MemoryStore
from cluster.upkeep import Merge, Seal
from cluster.wal import WalRecord
from tests.fakes import LocalRuntime, ManualClock
from tests.unit.actors.points import commit, manifest_log, random_points
from tests.unit.actors.test_replica import CONFIG, ONE, OTHER, nearest, upsert, with_replicas, written

POLICY = Upkeep(seal_points=5, segments_max=2)
SETTINGS = Settings(data="memory://upkeep", upkeep=POLICY)


async def until_told(runtime: LocalRuntime, text: str) -> None:
    while text not in runtime.replica(ONE).status().upkeep:
        await asyncio.sleep(0.001)


def test_tail_is_sealed_and_small_segments_merged_while_points_are_written(tmp_path: Path) -> None:
    store = MemoryStore()

    async def scenario(runtime: LocalRuntime) -> None:
        primary, follower = runtime.replica(ONE), runtime.replica(OTHER)
        numbers = list(range(1_000, 1_040))
        for number in numbers:
            lsn = await written(primary, number)
        while (status := primary.status()).tail_points >= POLICY.seal_points or len(status.segments) > 2:
            await asyncio.sleep(0.005)
        assert (status.points, status.lsn) == (50, lsn)
        entry = manifest_log(store, "words").newest_live().shards[0]
        assert entry.applied_lsn > lsn - 10
        await follower.load(None)
        for replica in (primary, follower):
            assert [await nearest(replica, number, lsn) for number in numbers] == numbers
        assert follower.status().points == 50

    with_replicas(scenario, tmp_path, store, tick_s=0.005, settings=SETTINGS)


def test_replica_that_does_not_lead_begins_nothing(tmp_path: Path) -> None:
    store = MemoryStore()

    async def scenario(runtime: LocalRuntime) -> None:
        lsn = await written(runtime.replica(ONE), *range(1_000, 1_010))
        assert await nearest(runtime.replica(OTHER), 1_005, lsn) == 1_005
        await runtime.lead(OTHER)
        (outcome,) = await runtime.replica(ONE).write([upsert(1)])
        assert isinstance(outcome, Fenced)
        while runtime.replica(ONE).status().epoch:
            await asyncio.sleep(0.001)
        for _ in range(3):
            runtime.replica(ONE).tick()
        assert manifest_log(store, "words").newest_live().version == 1
        runtime.replica(OTHER).tick()
        while runtime.replica(OTHER).status().tail_points:
            await asyncio.sleep(0.001)
        assert manifest_log(store, "words").newest_live().version == 2

    with_replicas(scenario, tmp_path, store, settings=SETTINGS)


class HeldWork:
    """Runs nothing: each piece of work waits until the test says how it ended."""

    def __init__(self) -> None:
        self.begun: list[Work] = []
        self.ends: list[Future[int | None]] = []
        self.loaded: list[int | None] = []
        self.changed = threading.Condition()

    def run(self, work: Work) -> int | None:
        end: Future[int | None] = Future()
        with self.changed:
            self.begun.append(work)
            self.ends.append(end)
            self.changed.notify()
        return end.result(20.0)

    def load(self, version: int | None) -> Future[None]:
        self.loaded.append(version)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, 20.0)


def begun(tmp_path: Path, policy: Upkeep, segments: int = 1) -> tuple[ReplicaUpkeep, HeldWork, Shard, ManualClock]:
    store = MemoryStore()
    commit(store, "words", CONFIG, random_points(CONFIG, 40, seed=1), segments=segments)
    shard = Shard(store, "words", 0, tmp_path)
    shard.load()
    work, clock = HeldWork(), ManualClock()
    read = ManifestLog(store, "words", lambda: "nonce").read
    return ReplicaUpkeep("words/0/0", policy, read, work.run, work.load, clock), work, shard, clock


def write_points(shard: Shard, count: int) -> None:
    """As another primary's record, found in the WAL."""
    lsn = shard.applied_lsn + 1
    batch = upsert(*range(1_000 * lsn, 1_000 * lsn + count)).upserts
    shard.wal.append(WalRecord(lsn, 1, "write", f"{lsn:032x}", batch, pa.array([], pa.int64())))
    shard.catch_up()


def settle(upkeep: ReplicaUpkeep) -> None:
    """Until nothing is under way."""
    for kind in upkeep._kinds.values():
        if kind.running is not None:
            kind.running.result(20.0)


def test_one_seal_and_one_merge_at_a_time(tmp_path: Path) -> None:
    upkeep, work, shard, _ = begun(tmp_path, POLICY, segments=4)
    upkeep.look(shard)
    work.wait(1)
    assert [type(one) for one in work.begun] == [Merge]
    write_points(shard, 10)
    for _ in range(3):
        upkeep.look(shard)
    work.wait(2)
    assert [type(one) for one in work.begun] == [Merge, Seal]
    assert "sealing the tail (the tail has 10 points" in upkeep.told()
    assert "merging 4 segments" in upkeep.told()
    for end, version in zip(work.ends, (7, 8), strict=True):
        end.set_result(version)
    settle(upkeep)
    assert (sorted(work.loaded), upkeep.told()) == ([7, 8], "")  # type: ignore[type-var]
    upkeep.look(shard)  # the fake did nothing: both are wanted still
    work.wait(4)
    for end in work.ends[2:]:
        end.set_result(9)
    upkeep.close()


@pytest.mark.parametrize("error", [Conflict("another was faster"), RuntimeError("a bug")])
def test_failure_is_told_and_tried_again_after_a_pause_that_grows(error: Exception, tmp_path: Path) -> None:
    upkeep, work, shard, clock = begun(tmp_path, POLICY)
    write_points(shard, 10)
    pause_s = RETRY_FIRST_S
    for tries in (1, 2, 3):
        upkeep.look(shard)
        work.wait(tries)
        work.ends[-1].set_exception(error)
        settle(upkeep)
        assert f"failed: {error if isinstance(error, Conflict) else repr(error)}" in upkeep.told()
        clock.advance(pause_s - 0.01)
        upkeep.look(shard)
        assert len(work.begun) == tries
        clock.advance(0.01)
        pause_s *= 2.0
    upkeep.look(shard)
    work.wait(4)
    work.ends[-1].set_result(2)
    settle(upkeep)
    assert (upkeep.told(), work.loaded) == ("", [2])
    upkeep.close()


def test_nothing_to_do_loads_the_newest_version_and_pauses(tmp_path: Path) -> None:
    upkeep, work, shard, clock = begun(tmp_path, POLICY)
    write_points(shard, 10)
    upkeep.look(shard)
    work.wait(1)
    work.ends[0].set_result(None)
    settle(upkeep)
    upkeep.look(shard)
    assert (len(work.begun), work.loaded, upkeep.told()) == (1, [None], "")
    clock.advance(RETRY_FIRST_S)
    upkeep.look(shard)
    work.wait(2)
    work.ends[1].set_result(2)
    upkeep.close()


def test_shard_that_needs_nothing_is_left_alone(tmp_path: Path) -> None:
    upkeep, work, shard, _ = begun(tmp_path, POLICY)
    write_points(shard, POLICY.seal_points - 1)
    upkeep.look(shard)
    assert (work.begun, upkeep.told()) == ([], "")
    upkeep.close()


def test_shard_that_holds_nothing_is_left_alone(tmp_path: Path) -> None:
    upkeep, work, _, _ = begun(tmp_path, POLICY)
    upkeep.look(Shard(MemoryStore(), "words", 0, tmp_path))
    assert (work.begun, upkeep.told()) == ([], "")
    upkeep.close()


def test_what_failed_under_another_generation_is_no_reason_to_wait(tmp_path: Path) -> None:
    """Such as a seal while the newest generation, which this shard could not load yet, was on its way."""
    upkeep, work, shard, _ = begun(tmp_path, Upkeep(seal_points=5))
    write_points(shard, 6)
    upkeep.look(shard)
    work.wait(1)
    work.ends[0].set_exception(Conflict("it can be sealed once that is served"))
    while "failed" not in upkeep.told():
        time.sleep(0.001)
    upkeep.look(shard)
    assert len(work.begun) == 1
    log = manifest_log(shard._store, "words")
    base = log.newest_live()
    log.commit_generation(base, base.config, base.shards)
    shard.load()
    upkeep.look(shard)
    work.wait(2)
    work.ends[1].set_result(None)
    upkeep.close()
