from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from actors.replica_status import ReplicaStatus
from actors.watched_replicas import LOST_GPU_PAUSE_S, WatchedReplicas
from cluster.config import CollectionConfig
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey, WantedReplica
from tests.fakes import SETTINGS, LocalRuntime, ManualClock
from tests.unit.actors.points import manifest_log

KEY = ReplicaKey("words", 0, 0)
WANTED = WantedReplica(version=1, generation=1, shards=1, num_cpus=0.0)


def test_load_cancelled_before_it_began_does_not_block_later_ones(tmp_path: Path) -> None:
    """A replica is stopped in the round that planned its load, and started again under the same key."""
    store = MemoryStore()
    manifest_log(store, "words").create(CollectionConfig(2))

    async def run() -> None:
        runtime = LocalRuntime(store, tmp_path)
        watched = WatchedReplicas(runtime, SETTINGS, time.monotonic, asyncio.Event())
        watched.start(KEY, WANTED)
        watched.load(KEY, 1)
        watched.stop(KEY)
        watched.start(KEY, WANTED)
        await asyncio.sleep(0)
        watched.load(KEY, 1)
        async with asyncio.timeout(5.0):
            while not runtime.loaded:
                await asyncio.sleep(0)
        watched.close()

    asyncio.run(run())


class LosesGpus(LocalRuntime):
    """Each process says that its GPU is lost."""

    async def status(self, key: ReplicaKey) -> ReplicaStatus:
        return replace(await super().status(key), gpu={"lost": "CUDA error"})


def test_replicas_of_a_shard_that_are_ended_at_once_for_their_gpus_are_not_so_again_before_their_pause(
    tmp_path: Path,
) -> None:
    store, clock, keys = MemoryStore(), ManualClock(), [KEY, replace(KEY, replica=1), replace(KEY, replica=2)]
    manifest_log(store, "words").create(CollectionConfig(2))

    async def run() -> None:
        runtime, wake = LosesGpus(store, tmp_path), asyncio.Event()
        watched = WatchedReplicas(runtime, SETTINGS, clock, wake)

        async def lost() -> set[ReplicaKey]:
            async with asyncio.timeout(5.0):
                while any(watched.status(key).state == "starting" for key in keys):
                    await asyncio.sleep(0.001)
            return {key for key, replica in watched.observed().items() if replica.gpu_lost}

        for key in keys:
            watched.start(key, WANTED)
        assert await lost() == set(keys)
        for key in keys:
            watched.stop(key)
        for key in keys:
            watched.start(key, WANTED)
        assert await lost() == set()
        clock.advance(LOST_GPU_PAUSE_S)
        assert await lost() == set(keys)
        watched.close()
        runtime.close()

    asyncio.run(run())
