from __future__ import annotations

import asyncio
import time
from pathlib import Path

from actors.watched_replicas import WatchedReplicas
from cluster.config import CollectionConfig
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey, WantedReplica
from tests.fakes import SETTINGS, LocalRuntime
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
