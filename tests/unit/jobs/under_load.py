"""Jobs on a collection that is searched, fetched and written to without a rest, all in this process.

async def scenario(load: Load) -> None:
    await load.run_job("rebuild", load.rebuild(shards=3))

run_under_load(scenario, tmp_path)

A job is a function of its own store and of a listener to its status; it runs in a thread.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.coordinator import Coordinator
from actors.gpu_device import GpuDevice
from actors.replica_status import ReplicaStatus
from actors.shard_client import ServingTable
from actors.supervisor import Supervisor
from cluster.arrow_rows import vectors_array
from cluster.cluster_gpus import ClusterGpus
from cluster.config import Limits, Settings, Upkeep
from cluster.errors import EaglerayError, Unavailable
from cluster.manifest import Manifest, ManifestLog
from cluster.object_store import ObjectStore, open_store
from cluster.placement import ReplicaKey
from cluster.query import Hits, Query, SearchParams, ShardSearch
from cluster.write import PointWrite
from jobs.build_plan import TaskRunner, Workers
from jobs.compact import CompactOptions, Compactor
from jobs.import_source import Columns
from jobs.rebuild import Rebuilder, RebuildOptions
from jobs.report import JobReporter, JobStatus
from jobs.rollback import RollbackJob, RollbackOptions
from tests.acknowledged import Acknowledged, Writing
from tests.fakes import FaultyStore, LocalDirectory, LocalRuntime, LocalShardClient, run_tasks_here
from tests.unit.jobs.imports import new_data_url, run_import, table_of, write

COLLECTION = "loaded"
K, DIMENSION = 10, 16
SEARCHERS, WRITERS, FETCHERS = 2, 2, 1
IDS_PER_WRITE = 6
DELETED_SHARE = 0.25  # of the writes
PATIENT_MS = 20_000
EVERY_S = 0.015  # a client's pause
JOB_TIMEOUT_S = 60.0
RECALL_ERROR = 0.3  # three standard deviations of the recall of one query, with room
SETTINGS = Settings(
    data="memory://under-load",
    shard_cpus=0.0,
    reconcile_period_s=0.01,
    replica_timeout_s=2.0,
    upkeep=Upkeep(seal_points=300, segments_max=4),
)
Listener = Callable[[JobStatus], None]
Job = Callable[[ObjectStore, Listener], Any]  # runs one job to its end


@dataclass(frozen=True)
class Shape:
    """Of a test's collection and load."""

    points: int = 500
    replicas: int = 1
    shards: int = 1
    index: dict[str, Any] = field(default_factory=lambda: {"kind": "hnsw"})
    target_recall: float = 0.95
    seed: int = 0
    gpus: float = 0.0  # of the cluster, each opened as a double


class _Unobserved:
    def batch(self, collection: str, shard: int, vectors: int) -> None:
        """Nobody counts."""


class _WatchedDirectory(LocalDirectory):
    """Of whichever supervisor runs, if one does. Keeps which shards answered a query under which generation."""

    def __init__(self, supervisor: Supervisor, runtime: LocalRuntime) -> None:
        super().__init__(supervisor, runtime)
        self.answered: defaultdict[bytes, set[tuple[int, int]]] = defaultdict(set)
        self._replaced = asyncio.Event()

    def use(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._replaced.set()
        self._replaced = asyncio.Event()

    async def next_table(self, known_stamp: str | None) -> ServingTable:
        """A call to a supervisor that died fails, when another one is there."""
        replaced = asyncio.ensure_future(self._replaced.wait())
        table = asyncio.ensure_future(super().next_table(known_stamp))
        await asyncio.wait({table, replaced}, return_when=asyncio.FIRST_COMPLETED)
        replaced.cancel()
        if table.done():
            return table.result()
        table.cancel()
        raise Unavailable("the supervisor died")

    def client(self, key: ReplicaKey) -> LocalShardClient:
        return _WatchedClient(self._runtime, key, self.answered)


class _WatchedClient(LocalShardClient):
    def __init__(
        self, runtime: LocalRuntime, key: ReplicaKey, answered: defaultdict[bytes, set[tuple[int, int]]]
    ) -> None:
        super().__init__(runtime, key)
        self._shard = key.shard
        self._answered = answered

    async def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        outcomes = await super().search(request)
        for group, outcome in zip(request.groups, outcomes, strict=True):
            if isinstance(outcome, Hits):
                for vector in request.vectors[group.start : group.stop]:
                    self._answered[vector.tobytes()].add((request.generation, self._shard))
        return outcomes


class Load:
    """The clients, what they saw, and the Eagleray that they use."""

    def __init__(self, data: str, folder: Path, shape: Shape) -> None:
        self.data = data
        self.store = open_store(data)
        self.folder = folder
        self.shape = shape
        pool = np.random.default_rng(shape.seed).standard_normal((shape.points, DIMENSION)).astype(np.float32)
        self.points = Acknowledged(pool, shape.points, 4 * shape.points, shape.seed)
        how: dict[str, Any] = {"tick_s": 0.02, "gpus": shape.gpus, "open_gpu": _open_double}
        self.runtime = LocalRuntime(self.store, folder / "cache", SETTINGS, **how)
        self.failed_searches: list[str] = []
        self.failed_writes: list[str] = []
        self.wrong: list[str] = []
        self.recalls: defaultdict[str, list[float]] = defaultdict(list)
        self.answers: list[tuple[int, frozenset[int]]] = []  # generation, shards that answered under it
        self.phase = "before"
        self.searches = self.fetches = 0
        self._stopping = False
        self._supervisor: Supervisor | None = None
        self._rounds: asyncio.Task[None] | None = None

    # --- the Eagleray ---------------------------------------------------------------------------------------------

    @property
    def log(self) -> ManifestLog:
        return ManifestLog(self.store, COLLECTION, _nonce)

    def import_points(self) -> Manifest:
        """The points that are there from the beginning."""
        ids = list(range(self.shape.points))
        vectors = np.array([self.points.vector(i, 0) for i in ids])
        table = table_of(pa.array(ids), vectors, version=pa.array([0] * len(ids)))
        source = write(self.folder / "points.parquet", table, row_group_size=500)
        index = {"target_recall": self.shape.target_recall} | self.shape.index
        create = {"metric": "l2", "shards": self.shape.shards, "replicas": self.shape.replicas, "index": index}
        columns = Columns(attributes="all")
        return run_import(self.data, source, create=create, columns=columns, collection=COLLECTION)

    def start_supervisor(self) -> None:
        """The first one, or another once that was ended."""
        self._supervisor_store = FaultyStore(self.store, fault="die")
        self._supervisor = Supervisor(self._supervisor_store, self.runtime, SETTINGS)
        self._rounds = asyncio.create_task(self._supervisor.run())
        if hasattr(self, "directory"):
            self.directory.use(self._supervisor)
        else:
            self.directory = _WatchedDirectory(self._supervisor, self.runtime)
            self.coordinator = Coordinator(self.directory, Limits(), _Unobserved())

    async def end_supervisor(self) -> None:
        assert self._supervisor is not None
        assert self._rounds is not None
        self._rounds.cancel()
        self._supervisor.close()
        await asyncio.wait({self._rounds})

    async def kill_supervisor(self, calls: int, dead_s: float) -> None:
        """At that call to the storage, counted from now, or after `dead_s`; then another one starts."""
        self._supervisor_store.at = self._supervisor_store.calls + calls
        await asyncio.sleep(dead_s)
        await self.end_supervisor()
        self.start_supervisor()

    async def served(self, generation: int) -> None:
        """Wait until the coordinator serves that generation, with a primary of each shard."""
        try:
            await self.directory.refresh(COLLECTION)
        except EaglerayError as error:  # a job would log that: the supervisor looks by itself now and then
            print(f"the supervisor could not be told of generation {generation}: {error}")

        def is_served() -> bool:
            table = self.coordinator.table
            served = table.collections.get(COLLECTION) if table else None
            complete = served is not None and len(served.primaries) == served.routing.shards
            return complete and served is not None and served.generation >= generation

        await until(is_served, f"generation {generation} is served")

    # --- jobs -----------------------------------------------------------------------------------------------------

    def statuses(self) -> dict[ReplicaKey, ReplicaStatus]:
        assert self._supervisor is not None
        told: dict[ReplicaKey, ReplicaStatus] = self._supervisor.describe(COLLECTION)["statuses"]
        return told

    def rebuild(self, run_tasks: TaskRunner = run_tasks_here, **options: Any) -> Job:
        def run(store: ObjectStore, listener: Listener) -> Any:
            job_id = f"rebuild-{_nonce()}"
            log = ManifestLog(store, COLLECTION, _nonce)
            reporter = JobReporter(store, JobStatus(job_id, "rebuild", COLLECTION), listener)
            given = RebuildOptions(COLLECTION, **options)
            workers = Workers(run_tasks, 1, gpus=lambda: ClusterGpus(self.shape.gpus, self.runtime.free_gpus))
            place = (workers, str(self.folder / "jobs"))
            rebuilder = Rebuilder(self.data, store, log, given, *place, statuses=self.statuses)
            return rebuilder.run(job_id, reporter)

        return run

    def rollback(self, generation: int | None = None) -> Job:
        def run(store: ObjectStore, listener: Listener) -> Any:
            job_id = f"rollback-{_nonce()}"
            log = ManifestLog(store, COLLECTION, _nonce)
            reporter = JobReporter(store, JobStatus(job_id, "rollback", COLLECTION), listener)
            options, workers = RollbackOptions(COLLECTION, generation), Workers(run_tasks_here, 1)
            return RollbackJob(self.data, store, log, options, workers, str(self.folder / "jobs")).run(job_id, reporter)

        return run

    def compact(self) -> Job:
        def run(store: ObjectStore, listener: Listener) -> Any:
            log = ManifestLog(store, COLLECTION, _nonce)
            reporter = JobReporter(store, JobStatus("compact-1", "compact", COLLECTION), listener)
            options, workers = CompactOptions(COLLECTION), Workers(run_tasks_here, 1)
            return Compactor(self.data, store, log, options, workers, str(self.folder / "jobs")).run(reporter)

        return run

    async def run_job(
        self, phase: str, job: Job, store: ObjectStore | None = None, listener: Listener | None = None
    ) -> Any:
        """Run a job in a thread, the clients' answers counted under `phase`, and wait until its result is served.

        The listener is told of that as a phase "serve".
        """
        self.phase = phase
        listener = listener or (lambda status: None)
        async with asyncio.timeout(JOB_TIMEOUT_S):
            outcome = await asyncio.to_thread(job, store or self.store, listener)
            listener(JobStatus("", "", COLLECTION, phase="serve"))
            await self.served(self.log.newest_live().generation)
        return outcome

    # --- clients --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[None]:
        """Search, fetch and write until the block ends; every write that was begun is acknowledged then."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._following())
            await self.served(self.log.newest_live().generation)
            for number in range(SEARCHERS):
                group.create_task(self._search_on(np.random.default_rng([self.shape.seed, 1, number]), bool(number)))
            for number in range(FETCHERS):
                group.create_task(self._fetch_on(np.random.default_rng([self.shape.seed, 2, number])))
            for number in range(WRITERS):
                group.create_task(self._write_on(np.random.default_rng([self.shape.seed, 3, number]), number))
            try:
                yield
                await asyncio.sleep(20 * EVERY_S)
            finally:
                self._stopping = True

    async def _following(self) -> None:
        follow = asyncio.create_task(self.coordinator.follow())
        while not self._stopping:
            await asyncio.sleep(EVERY_S)
        follow.cancel()
        await asyncio.wait({follow})

    async def _search_on(self, random: np.random.Generator, tells_lsn: bool) -> None:
        while not self._stopping:
            await self._search(random, tells_lsn)
            await asyncio.sleep(EVERY_S)

    async def _search(self, random: np.random.Generator, tells_lsn: bool) -> None:
        query = self.points.query(random)
        min_lsn = self.points.known_lsn() if tells_lsn or self.shape.replicas > 1 else {}
        since, truth, phase = time.monotonic(), self.points.nearest(query, K), self.phase
        self.searches += 1
        try:
            result = await self.coordinator.search(COLLECTION, Query(query, K, timeout_ms=PATIENT_MS, min_lsn=min_lsn))
        except EaglerayError as error:
            self.failed_searches.append(f"{phase}: {error}")
            return
        ids, scores = result.hits.ids.to_pylist(), result.hits.scores.tolist()
        wrong = self.points.wrong_hits(query, ids, scores, K, since)
        if wrong:
            self.wrong.append(f"{phase}, generation {result.generation}: {wrong}")
        self.recalls[phase].append(self.points.recall(query, ids, scores, truth, since))
        answered = self.directory.answered.pop(query.tobytes(), set())
        shards = frozenset(shard for generation, shard in answered if generation == result.generation)
        self.answers.append((result.generation, shards))

    async def _fetch_on(self, random: np.random.Generator) -> None:
        while not self._stopping:
            ids = random.choice(self.points.every_id(), size=8, replace=False).tolist()
            await self.check_points(ids)
            await asyncio.sleep(EVERY_S)

    async def check_points(self, ids: Sequence[int]) -> None:
        """Fetch them; whatever is not as it was written is told in `wrong`."""
        since, phase, min_lsn = time.monotonic(), self.phase, self.points.known_lsn()
        self.fetches += 1
        try:
            fetched = await self.coordinator.fetch(
                COLLECTION, pa.array(ids), ["id", "vector", "version"], PATIENT_MS / 1e3, min_lsn
            )
        except EaglerayError as error:
            self.failed_searches.append(f"{phase}, fetch: {error}")
            return
        rows = fetched.table.to_pylist() if fetched.table is not None else []
        if [i for i, found in zip(ids, fetched.found, strict=True) if found] != [row["id"] for row in rows]:
            self.wrong.append(f"{phase}: fetched {[row['id'] for row in rows]} of {ids}, found {fetched.found}")
        found = {row["id"]: row for row in rows}
        for point_id in ids:
            row = found.get(point_id, {"vector": None, "version": None})
            wrong = self.points.wrong_point(point_id, row["vector"], row["version"], since)
            if wrong:
                self.wrong.append(f"{phase}, fetch: {wrong}")

    async def _write_on(self, random: np.random.Generator, number: int) -> None:
        """Ids that have this remainder of the number of writers."""
        while not self._stopping:
            mine = random.choice(self.shape.points * 3 // (2 * WRITERS), size=IDS_PER_WRITE, replace=False)
            ids = (mine * WRITERS + number).tolist()
            await self._write(self.points.begin(ids, deletes=random.random() < DELETED_SHARE))
            await asyncio.sleep(EVERY_S)

    async def _write(self, writing: Writing) -> None:
        """Until it is acknowledged: sending the same again is safe."""
        write = PointWrite(deletes=pa.array(writing.ids))
        if not writing.deletes:
            versions = [state.version for state in writing.states.values()]
            columns = [pa.array(writing.ids), vectors_array(self.points.vectors_of(writing)), pa.array(versions)]
            write = PointWrite(pa.record_batch(columns, names=["id", "vector", "version"]))
        while True:
            try:
                result = await self.coordinator.write(COLLECTION, write, PATIENT_MS / 1e3)
            except EaglerayError as error:
                self.failed_writes.append(f"{self.phase}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.02)
            else:
                self.points.acknowledge(writing, dict(result.lsn))
                return

    # --- what must be true -----------------------------------------------------------------------------------------

    async def check_everything(self) -> None:
        """Every point is there as it was last acknowledged, and no other; every answer was of one generation."""
        self.phase = "afterwards"
        ids = self.points.every_id()
        for start in range(0, len(ids), 500):
            await self.check_points(ids[start : start + 500])
        live = self.points.live_ids().tolist()
        query = Query(np.zeros((1, DIMENSION), np.float32), len(live) + 50, SearchParams(exact=True), PATIENT_MS)
        found = await self.coordinator.search(COLLECTION, query)
        assert sorted(found.hits.ids.to_pylist()) == live
        self._check_generations()

    def _check_generations(self) -> None:
        shards: dict[int, int] = {}
        for version in self.log.versions():
            manifest = self.log.read(version)
            shards[manifest.generation] = len(manifest.shards)
        for generation, answered in self.answers:
            if answered != frozenset(range(shards[generation])):
                self.wrong.append(f"shards {sorted(answered)} of {shards[generation]} answered under {generation}")

    def assert_all_right(self, failures: bool = False) -> None:
        """`failures`: searches may have failed."""
        seen = sorted({generation for generation, _ in self.answers})
        print(
            f"{self.searches} searches, {self.fetches} fetches, {self.points.writes} writes, generations {seen}; "
            f"{len(self.failed_searches)} searches and {len(self.failed_writes)} writes failed; recall@{K} "
            + ", ".join(f"{phase} {np.mean(values):.3f} of {len(values)}" for phase, values in self.recalls.items())
        )
        assert self.wrong == []
        assert failures or self.failed_searches == []
        for phase, values in self.recalls.items():  # of two or three queries one may well be under the target
            assert np.mean(values) >= self.shape.target_recall - 0.02 - RECALL_ERROR / np.sqrt(len(values)), phase


def run_under_load(
    scenario: Callable[[Load], Awaitable[None]], folder: Path, shape: Shape = Shape(), failures: bool = False
) -> Load:
    """Run a scenario while clients work; then check everything."""

    async def run() -> Load:
        load = Load(new_data_url(), folder, shape)
        load.import_points()
        load.start_supervisor()
        try:
            async with load.clients():
                await scenario(load)
                await load.served(load.log.newest_live().generation)
            follow = asyncio.create_task(load.coordinator.follow())
            await load.check_everything()
            follow.cancel()
        finally:
            await load.end_supervisor()
            load.runtime.close()
        load.assert_all_right(failures)
        return load

    return asyncio.run(asyncio.wait_for(run(), 4 * JOB_TIMEOUT_S))


def _open_double(share: float) -> GpuDevice:
    from tests.gpu_double import double_device  # only where there are GPUs

    return double_device(share=share)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(EVERY_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


def _nonce() -> str:
    return uuid.uuid4().hex
