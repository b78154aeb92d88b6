"""A generation that waits for GPUs: what a supervisor that takes over finds to be served until then, and its bounds."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from actors.primary import Primary
from cluster.config import IndexConfig, Upkeep
from cluster.entry_log import end_logs
from cluster.errors import Exhausted
from cluster.manifest import ShardEntry
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey, WantedReplica
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from tests.fakes import LocalRuntime, serving, table_when
from tests.unit.actors.batches import CONFIG, LIMITS, WAIT_S, created, upsert
from tests.unit.actors.points import manifest_log

WORDS = replace(CONFIG, shards=1, replicas=1)
HALF = 0.5  # of a GPU


def for_gpus(store: MemoryStore, share: float = HALF) -> None:
    """All is in the logs: the same as before, to be loaded anew."""
    log = manifest_log(store, "words")
    base = log.newest_live()
    log.commit_generation(base, base.config, (ShardEntry(0),), num_gpus=share)


@pytest.mark.parametrize(
    ("served", "second", "waits"),
    [
        (0.0, HALF, HALF),
        (1.0, HALF, HALF),
        (1.0, 0.25, HALF),  # no replicas of the second are there: it never was served
        (1.0, 0.0, HALF),
    ],
)
def test_supervisor_that_finds_no_holder_of_what_was_served_while_gpus_are_waited_for_serves_it_again(
    tmp_path: Path, served: float, second: float, waits: float
) -> None:
    """A node that went away and came back: the old replica holds what waits for a GPU, and nothing else."""
    store, key = MemoryStore(), ReplicaKey("words", 0, 0, served)
    manifest_log(store, "words").create(
        replace(WORDS, index=IndexConfig(device="gpu" if served else "auto", num_gpus=served or None))
    )
    for share in (second, waits):  # of the second nothing was served yet when the third was made
        for_gpus(store, share)
    runtime = LocalRuntime(store, tmp_path, gpus=served)

    async def run() -> None:
        runtime.start(key, WantedReplica(1, 1, 1, 0.0, served))
        assert runtime.replica(key).status().generations == (3,)
        async with serving(store, tmp_path, runtime=runtime) as eagleray:
            table = await table_when(eagleray.directory, lambda table: bool(table.collections))
            assert table.collections["words"].generation == 1
            await table_when(eagleray.directory, lambda table: table.collections["words"].replicas == {0: (key,)})
            await table_when(eagleray.directory, lambda table: table.collections["words"].primaries == {0: key})
            assert runtime.replica(key).status().generations == (1, 3)

    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        runtime.close()


@pytest.mark.parametrize("why", ["its replicas are gone", "it was deleted", "its logs ended"])
def test_supervisor_serves_nothing_old_where_another_share_is_not_just_waited_for(tmp_path: Path, why: str) -> None:
    store, key = MemoryStore(), ReplicaKey("words", 0, 0)
    log = manifest_log(store, "words")
    log.create(WORDS)
    if why == "it was deleted":
        log.delete()
        log.create(replace(WORDS, index=IndexConfig(device="gpu", num_gpus=1.0)))
    elif why == "its logs ended":
        base, logs = log.newest_live(), LogSet(0, 1, (LogPosition(0, 0, 0),))
        entries = tuple(behind_logs(ShardEntry(shard), logs) for shard in range(2))
        log.commit_generation(base, replace(base.config, shards=2), entries, num_gpus=HALF)
        end_logs(store, "words", (logs,), lambda: uuid.uuid4().hex)
    else:
        for_gpus(store)
    runtime = LocalRuntime(store, tmp_path)

    async def run() -> None:
        if why != "its replicas are gone":
            runtime.start(key, WantedReplica(1, 1, 1, 0.0))
        async with serving(store, tmp_path, runtime=runtime) as eagleray:
            waits = "it asks for 0.5 GPU" if why != "it was deleted" else "it asks for 1 GPU"
            table = await table_when(eagleray.directory, lambda table: waits in table.unready.get("words", ""))
            assert table.collections == {}

    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        runtime.close()


def test_nothing_of_a_deleted_collection_is_served_while_its_successor_waits(tmp_path: Path) -> None:
    """Deleted and created again between two looks at it: the supervisor never sees that there was none."""
    store = MemoryStore()
    manifest_log(store, "words").create(WORDS)

    async def run() -> None:
        async with serving(store, tmp_path) as eagleray:
            await table_when(eagleray.directory, lambda table: bool(table.collections))
            log = manifest_log(store, "words")
            log.delete()
            log.create(replace(WORDS, index=IndexConfig(device="gpu", wait_for_gpu=True)))
            await eagleray.directory.refresh("words")
            table = await table_when(eagleray.directory, lambda table: not table.collections)
            assert "replica words/0/0/gpu:0.125 is starting" in table.unready["words"]
            eagleray.runtime.add_gpus(1.0)
            table = await table_when(eagleray.directory, lambda table: bool(table.collections))
            assert table.collections["words"].generation == 2

    asyncio.run(asyncio.wait_for(run(), 30))


def test_tail_of_what_is_served_is_bounded_while_the_next_generation_waits(tmp_path: Path) -> None:
    """The primary seals into the one that waits; what it serves until then gets all records, and is sealed no more."""
    store = MemoryStore()
    shard, log = created(store, tmp_path), manifest_log(store, "words")
    primary = Primary.claim(shard, LIMITS, Upkeep(seal_bytes=4 * 24, tail_bytes_max=4 * 24))
    try:
        assert primary.write(upsert(1, 2, 3)).result(WAIT_S).lsn == 2
        base = log.newest_live()
        log.commit_generation(base, base.config, (ShardEntry(0, (), 2, 1),), num_gpus=HALF)
        shard.load()
        assert primary.write(upsert(4, 5)).result(WAIT_S).lsn == 3
        newest = shard.newest()
        assert newest is not None
        assert newest.view.tail_points == 2
        with pytest.raises(Exhausted, match=r"tail_bytes_max: 120 bytes .* a newer one is to be served"):
            primary.write(upsert(6))
        shard.retire(2)
        assert primary.write(upsert(6)).result(WAIT_S).lsn == 4
    finally:
        primary.stop()
