"""What is asked of Ray for collections on GPUs. Ray counts GPUs that nobody has: processes find none, and go on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors import ray_jobs, ray_runtime
from actors.shard_client import ServingTable
from actors.supervisor import Supervisor
from cluster.config import CollectionConfig, IndexConfig, Settings
from cluster.errors import Unavailable
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import open_store
from cluster.placement import ReplicaKey, WantedReplica
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from jobs.build_plan import Workers
from jobs.importer import Importer, ImportOptions
from jobs.rebuild import Rebuilder, RebuildOptions
from jobs.rebuild_task import build_range
from jobs.report import JobReporter, JobStatus
from tests.fakes import run_tasks_here
from tests.unit.jobs.imports import random_table, write

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("one_cluster")]
COLLECTION, NAMESPACE = "shared", "gpus"
ON_CPU, ON_GPU = ReplicaKey(COLLECTION, 0, 0), ReplicaKey(COLLECTION, 0, 0, 1.0)
HALF, QUARTER = ReplicaKey(COLLECTION, 0, 0, 0.5), ReplicaKey(COLLECTION, 0, 0, 0.25)


def gpus_of_task(_: int) -> Iterator[tuple[float, int]]:
    resources = ray.get_runtime_context().get_assigned_resources()
    yield resources.get("GPU", 0.0), len(ray.get_gpu_ids())


def nothing(_: int) -> Iterator[int]:
    yield 0


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Ray's counts of what is free follow a moment later."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not within the time that it may take"
        time.sleep(0.05)


def free_gpus() -> float:
    return float(ray.available_resources().get("GPU", 0.0))


def test_gpus_of_a_cluster_are_counted_and_their_memory_is_not_known_without_a_driver() -> None:
    until(lambda: free_gpus() == 2.0)
    gpus = ray_jobs.cluster_gpus()
    assert (gpus.total, gpus.free, gpus.memory_bytes, gpus.name) == (2.0, 2.0, None, "")


def test_tasks_get_the_share_of_a_gpu_that_they_ask_for() -> None:
    ((_, told),) = ray_jobs.run_tasks(gpus_of_task, [0], num_cpus=1, in_flight=1, num_gpus=0.5)
    assert told == (0.5, 1)


def test_tasks_that_wait_for_gpus_say_so_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "WAIT_TOLD_S", 0.2)
    monkeypatch.setattr(ray_jobs, "WAIT_MAX_S", 0.7)
    told: list[str] = []
    with pytest.raises(Unavailable, match="given up waiting for a node with 1 free CPUs and 3 free GPUs"):
        list(ray_jobs.run_tasks(nothing, [0], num_cpus=1, in_flight=1, num_gpus=3, waiting=told.append))
    assert "2 GPUs are free in the whole cluster" in told[0]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    yield Settings(data=str(tmp_path / "data"), namespace=NAMESPACE, shard_cpus=0.0, reconcile_period_s=0.05)
    ray_runtime.stop_actors(NAMESPACE)


class Jobs:
    """Jobs on one collection. Builds for GPUs are tasks in Ray, the rest is done here: processes take their time.

    `asked` are the GPUs that each function's tasks asked for.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._data, self._folder = settings.data, folder
        self.store = open_store(settings.data)
        self.log = ManifestLog(self.store, COLLECTION, lambda: uuid.uuid4().hex)
        self.asked: dict[str, float] = {}

    def import_points(self, **index: Any) -> Manifest:
        source = write(self._folder / "points.parquet", random_table(60), row_group_size=100)
        options = ImportOptions(COLLECTION, str(source), create={"metric": "l2", "index": index})
        return Importer(self._data, self.store, self.log, options, self._workers()).run("import", self._reporter())

    def rebuild(self, **index: Any) -> Manifest:
        job_id = f"rebuild-{uuid.uuid4().hex}"
        place = (RebuildOptions(COLLECTION, index), self._workers(), str(self._folder / "jobs"))
        return Rebuilder(self._data, self.store, self.log, *place).run(job_id, self._reporter())[0]

    def _reporter(self) -> JobReporter:
        return JobReporter(self.store, JobStatus("job", "import", COLLECTION))

    def _workers(self) -> Workers:
        def run_tasks(function: Any, items: Any, num_cpus: float, in_flight: int, num_gpus: float = 0.0) -> Any:
            self.asked[function.__name__] = num_gpus
            run = ray_jobs.run_tasks if function is build_range else run_tasks_here
            return run(function, items, num_cpus, in_flight, num_gpus)

        return Workers(run_tasks, 2, gpus=ray_jobs.cluster_gpus)


async def table_when(supervisor: Supervisor, wanted: Callable[[ServingTable], bool]) -> ServingTable:
    stamp = None
    async with asyncio.timeout(30.0):
        while True:
            table = await supervisor.next_table(stamp)
            if wanted(table):
                return table
            stamp = table.stamp


def served_by(key: ReplicaKey, table: ServingTable) -> bool:
    served = table.collections.get(COLLECTION)
    return served is not None and served.replicas == {0: (key,)} and served.primaries == {0: key}


def test_collection_goes_over_to_gpus_that_turn_out_not_to_be_there(settings: Settings, tmp_path: Path) -> None:
    """A build task and a replica get their share; neither finds a GPU: CPUs build, and the twin answers, degraded.

    With another share another replica takes over.
    """
    jobs, runtime = Jobs(settings, tmp_path), ray_runtime.RayRuntime(settings)
    assert jobs.import_points(device="cpu").device == "cpu"

    async def scenario() -> None:
        supervisor = Supervisor(jobs.store, runtime, settings)
        rounds = asyncio.create_task(supervisor.run())
        try:
            await table_when(supervisor, partial(served_by, ON_CPU))
            manifest = await asyncio.to_thread(jobs.rebuild, device="gpu", num_gpus=0.5)
            assert manifest.num_gpus == 0.5
            assert jobs.asked["build_range"] == jobs.asked["look_at_segment"] == 0.5
            await supervisor.refresh(COLLECTION)
            await table_when(supervisor, partial(served_by, HALF))
            await asyncio.to_thread(until, lambda: free_gpus() == 1.5)
            status = await runtime.status(HALF)
            assert status.gpu is None
            assert "GPU" in status.degraded
            vectors, group = np.zeros((1, 4), np.float32), SearchGroup(0, 1, 3, SearchParams())
            client = ray_runtime.ActorShardClient(runtime.handles[HALF], HALF)
            (hits,) = await client.search(ShardSearch(manifest.generation, vectors, (group,)))
            assert isinstance(hits, Hits)
            assert (hits.counts.tolist(), hits.degraded) == ([3], "cpu")

            await asyncio.to_thread(jobs.rebuild, num_gpus=0.25)
            await supervisor.refresh(COLLECTION)
            await table_when(supervisor, partial(served_by, QUARTER))
            named = ray_runtime.RayRuntime(settings).existing()
            assert {HALF, QUARTER} <= set(named), "the old one stays a while, for queries that began there"
        finally:
            rounds.cancel()
            supervisor.close()
            await asyncio.wait({rounds})

    asyncio.run(scenario())


def test_replica_waits_for_gpus_and_says_for_how_many(settings: Settings) -> None:
    store = open_store(settings.data)
    log = ManifestLog(store, COLLECTION, lambda: uuid.uuid4().hex)
    log.create(CollectionConfig(2, index=IndexConfig(device="gpu", num_gpus=1.0)))
    first, second = ON_GPU, ReplicaKey(COLLECTION, 0, 1, 1.0)
    runtime = ray_runtime.RayRuntime(settings)

    async def wait_and_start() -> None:
        runtime.start(first, WantedReplica(1, 1, 1, 0.0, 1.0))
        await runtime.status(first)
        await asyncio.to_thread(until, lambda: free_gpus() == 1.0)
        assert await runtime.waits_for(first) == "", "it has its place"
        runtime.start(second, WantedReplica(1, 1, 1, 0.0, 2.0))
        asked = asyncio.ensure_future(runtime.status(second))
        assert await runtime.waits_for(second) == (
            "Ray has no place for it yet: it asks for 2 GPU, 1 of the cluster's 2 are free"
        )
        assert not (await asyncio.wait({asked}, timeout=0.3))[0]
        runtime.stop(first)
        assert (await asked).state == "ready"
        await asyncio.to_thread(until, lambda: free_gpus() == 0.0)

    asyncio.run(asyncio.wait_for(wait_and_start(), 60.0))
