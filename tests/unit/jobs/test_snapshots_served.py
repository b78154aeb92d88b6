"""Snapshots, restores, branches and rollbacks of collections that are served and written to, in this process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest

from actors.coordinator import Coordinator
from actors.shard import Shard
from cluster.config import Limits
from cluster.deletion import delete_files
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import open_store
from cluster.rollback import roll_back
from cluster.write import PointWrite
from jobs.build_plan import Workers
from jobs.report import JobReporter, JobStatus
from jobs.sealing import Sealer
from jobs.snapshots import (
    BranchOptions,
    RestoreOptions,
    SnapshotOptions,
    branch,
    named_version,
    restore,
    take_snapshot,
)
from tests.fakes import ManualClock, run_tasks_here, serving
from tests.unit.jobs.histories import CONFIG, Contents, batch_of, new_nonce
from tests.unit.jobs.imports import new_data_url

EVERYTHING = pa.array(range(60), pa.int64())
TIMEOUT_S = 20.0


class Unobserved:
    def batch(self, collection: str, shard: int, vectors: int) -> None:
        """Nobody counts."""


class Served:
    """Collections that are served, and the jobs on them."""

    def __init__(self, data: str, folder: Path, coordinator: Coordinator, directory: Any) -> None:
        self.store = open_store(data)
        self._data = data
        self._folder = folder
        self._coordinator = coordinator
        self._directory = directory

    def log(self, collection: str = "words") -> ManifestLog:
        return ManifestLog(self.store, collection, new_nonce)

    async def until_served(self, manifest: Manifest) -> None:
        await self._directory.refresh(manifest.collection)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                table = self._coordinator.table
                served = table.collections.get(manifest.collection) if table else None
                complete = served is not None and len(served.primaries) == served.routing.shards
                if complete and served is not None and served.generation >= manifest.generation:
                    return
                await asyncio.sleep(0.005)

    async def write(
        self, number: float, upserts: Iterable[int] = (), deletes: Iterable[int] = (), collection: str = "words"
    ) -> None:
        if ids := list(upserts):
            await self._coordinator.write(collection, PointWrite(upserts=batch_of(ids, number)), TIMEOUT_S)
        if gone := list(deletes):
            write = PointWrite(deletes=pa.array(gone, pa.int64()))
            await self._coordinator.write(collection, write, TIMEOUT_S)

    async def held(self, collection: str = "words") -> Contents:
        answer = await self._coordinator.fetch(collection, EVERYTHING, ["id", "vector"], TIMEOUT_S)
        rows = answer.table.to_pylist() if answer.table is not None else []
        return {row["id"]: row["vector"][0] for row in rows}

    async def sealed(self) -> Manifest:
        reporter = JobReporter(self.store, JobStatus("j", "snapshot", "words"), clock=ManualClock())
        return await asyncio.to_thread(self._sealer().sealed, "words", reporter)

    async def take(self, name: str) -> None:
        reporter = JobReporter(self.store, JobStatus("j", "snapshot", "words"), clock=ManualClock())
        await asyncio.to_thread(take_snapshot, self.store, self._sealer(), SnapshotOptions("words", name), reporter)

    async def restore(self, name: str) -> None:
        await self.until_served(await asyncio.to_thread(restore, self.store, self.log(), RestoreOptions("words", name)))

    async def roll_back(self) -> None:
        await self.until_served(await asyncio.to_thread(roll_back, self.store, self.log()))

    async def branch(self, into: str, name: str | None) -> None:
        version = named_version(self.store, self.log(), "words", name) if name else await self.sealed()
        options = BranchOptions("words", into, name)
        call = functools.partial(branch, self.store, self.log(), self.log(into), version, options)
        await self.until_served(await asyncio.to_thread(call))

    def _sealer(self) -> Sealer:
        return Sealer(self._data, self.log(), Workers(run_tasks_here, 2), str(self._folder / "jobs"))


def run_served(scenario: Callable[[Served], Awaitable[None]], folder: Path) -> None:
    """With the collection `words`, of two shards, created and served."""

    async def run() -> None:
        data = new_data_url()
        store = open_store(data)
        created, _ = ManifestLog(store, "words", new_nonce).create(CONFIG)
        async with asyncio.timeout(60), serving(store, folder / "cache") as eagleray:
            coordinator = Coordinator(eagleray.directory, Limits(), Unobserved())
            following = asyncio.create_task(coordinator.follow())
            served = Served(data, folder, coordinator, eagleray.directory)
            try:
                await served.until_served(created)
                await scenario(served)
            finally:
                following.cancel()

    asyncio.run(run())


def test_restore_and_rollback_of_what_is_served(tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        await served.write(1.0, range(20), [3])
        then = await served.held()
        await served.take("then")
        await served.write(2.0, [0, 1, 30], [4, 5])
        now = await served.held()
        await served.restore("then")
        assert await served.held() == then
        await served.write(3.0, [1, 31], [6])
        expected = then | {1: 3.0, 31: 3.0}
        del expected[6]
        assert await served.held() == expected
        await served.roll_back()
        expected = now | {1: 3.0, 31: 3.0}
        del expected[6]
        assert await served.held() == expected
        await served.take("later")
        await served.restore("then")
        await served.restore("later")
        assert await served.held() == expected

    run_served(scenario, tmp_path)


@pytest.mark.parametrize("name", ["then", None])
def test_branch_is_served_and_written_to_beside_its_origin_and_outlives_it(name: str | None, tmp_path: Path) -> None:
    async def scenario(served: Served) -> None:
        await served.write(1.0, range(20), [3])
        await served.take("then")
        if name is None:
            await served.write(2.0, [40], [7])
        then = await served.held()
        await served.branch("other", name)
        assert await served.held("other") == then
        await served.write(3.0, [0, 50], [1], "other")
        await served.write(4.0, [2, 51], [8])
        one, other = await served.held(), await served.held("other")
        assert one == {key: value for key, value in then.items() if key != 8} | {2: 4.0, 51: 4.0}
        assert other == {key: value for key, value in then.items() if key != 1} | {0: 3.0, 50: 3.0}
        delete_files(served.store, served.log(), served.log().delete())
        assert await served.held("other") == other
        version = served.log("other").newest_live()
        fresh = await asyncio.to_thread(_loaded, served, version)
        assert fresh == other

    run_served(scenario, tmp_path)


def _loaded(served: Served, version: Manifest) -> Contents:
    """What a replica that starts now, without any cached file, has of it."""
    found: Contents = {}
    with TemporaryDirectory() as folder:
        for entry in version.shards:
            shard = Shard(served.store, version.collection, entry.shard, Path(folder))
            view = shard.load()
            _, table = shard.fetch(view.generation, EVERYTHING, ["id", "vector"])
            found |= {row["id"]: row["vector"][0] for row in table.to_pylist()}
    return found
