"""Rebuilding in this process: a collection of any number of shards under writes, and what the store says of it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.replica_status import Statuses
from actors.segment_rows import deleted_rows, open_rows
from actors.segment_upkeep import seal_tail
from cluster.arrow_rows import vectors_array
from cluster.cluster_gpus import ClusterGpus
from cluster.config import CollectionConfig, IndexConfig
from cluster.entry_log import EntryLog
from cluster.ids import id_array
from cluster.manifest import Manifest
from cluster.object_store import ObjectStore, open_store
from cluster.routing import Routing
from cluster.wal import Wal, WalRecord
from jobs.build_plan import TaskRunner, Workers
from jobs.rebuild import Rebuilder, RebuildOptions
from jobs.report import JobReporter, JobStatus
from tests.fakes import ManualClock, run_tasks_here
from tests.unit.jobs.imports import log_of, new_data_url

CONFIG = CollectionConfig(4, metric="l2", index=IndexConfig(kind="flat"))
JOB = "rebuild-1"
ATTRIBUTES = {"name": pa.large_string(), "rank": pa.int64(), "seen": pa.timestamp("ms"), "good": pa.bool_()}
Point = tuple[tuple[float, ...], dict[str, Any]]  # vector, attributes that are not null


@dataclass
class Collection:
    """A collection that is written to as its primaries would; `live` are its points by id."""

    config: CollectionConfig
    folder: Path
    data: str = field(default_factory=new_data_url)
    live: dict[Any, Point] = field(default_factory=dict)
    writes: int = 0

    def __post_init__(self) -> None:
        log_of(self.store).create(self.config)
        log_of(self.store).declare_attributes({name: str(dtype) for name, dtype in ATTRIBUTES.items()})

    @property
    def store(self) -> ObjectStore:
        return open_store(self.data)

    @property
    def newest(self) -> Manifest:
        return log_of(self.store).newest_live()

    def id_of(self, number: int) -> int | str:
        return number if self.config.id_type == "int64" else f"id-{number}"

    def write(self, upserts: range | list[int], deletes: range | list[int] = (), **more: Any) -> None:  # type: ignore[assignment]
        """One write, split by the routing of the newest manifest's set of logs; other vectors each time."""
        self.writes += 1
        ids = id_array([self.id_of(number) for number in upserts], self.config.id_type)
        gone = id_array([self.id_of(number) for number in deletes], self.config.id_type)
        batch = self._batch(ids, list(upserts), more)
        for row in batch.to_pylist():
            self.live[row["id"]] = point_of(row)
        for point_id in gone.to_pylist():
            self.live.pop(point_id, None)
        manifest = self.newest
        for shard in range(len(manifest.shards)):
            mine, lost = (np.flatnonzero(manifest.routing.shards_of_ids(each) == shard) for each in (ids, gone))
            if len(mine) or len(lost):
                self._append(manifest, shard, batch.take(pa.array(mine)), gone.take(pa.array(lost)))

    def _batch(self, ids: Any, numbers: list[int], more: dict[str, Any]) -> Any:
        random = np.random.default_rng(self.writes)
        vectors = random.normal(size=(len(ids), self.config.dimension)).astype(self.config.vector_dtype)
        values = {
            "name": [f"{number} of {self.writes}" if number % 5 else None for number in numbers],
            "rank": [number if number % 3 else None for number in numbers],
            "seen": [1_700_000_000_000 + number for number in numbers],
            "good": [number % 2 == 0 for number in numbers],
        }
        columns = {name: pa.array(values[name], dtype) for name, dtype in ATTRIBUTES.items()}
        return pa.record_batch({"id": ids, "vector": vectors_array(vectors), **columns, **more})

    def _append(self, manifest: Manifest, shard: int, upserts: Any, deletes: Any) -> None:
        wal = Wal(self.store, "words", shard, manifest.log_set)
        lsn, epoch = wal.end(*self._start(manifest, shard))
        nonce = uuid.uuid4().hex
        wal.append(WalRecord(lsn + 1, max(1, epoch), "write", nonce, upserts or None, deletes or None))

    def _start(self, manifest: Manifest, shard: int) -> tuple[int, int]:
        """Where the shard's own log is known to have been; of one that is behind after the others were read."""
        log = EntryLog.of(self.store, manifest, shard)
        for _ in log.records():
            pass
        assert log.crossed, "writes go to the logs of the generation before"
        return log.lsn, log.epoch

    def seal(self) -> None:
        for shard in range(len(self.newest.shards)):
            seal_tail(self.store, "words", shard, self.folder, lambda: uuid.uuid4().hex)

    def held(self, manifest: Manifest | None = None) -> dict[Any, Point]:
        """What a manifest's segments, tombstones and the logs say is live. Each point once, in its shard."""
        manifest = manifest or self.newest
        found: dict[Any, Point] = {}
        for number, point_id, point in self._points(manifest):
            assert point_id not in found, f"{point_id} is live twice"
            ids = id_array([point_id], self.config.id_type)
            assert Routing(len(manifest.shards)).shards_of_ids(ids).tolist() == [number]
            found[point_id] = point
        return found

    def _points(self, manifest: Manifest) -> Iterator[tuple[int, Any, Point]]:
        for entry in manifest.shards:
            mine: dict[Any, Point] = {}
            for ref in entry.segments:
                rows = open_rows(self.store, "words", ref, self.folder)
                gone = set(deleted_rows(self.store, "words", entry, ref).tolist())
                table = rows.take(np.arange(ref.count), rows.schema.names).to_pylist()
                for number, row in enumerate(table):
                    if number not in gone:
                        assert row["id"] not in mine, f"{row['id']} is live twice in shard {entry.shard}"
                        mine[row["id"]] = point_of(row)
            assert len(mine) == entry.points
            for record in EntryLog.of(self.store, manifest, entry.shard).records():
                for point_id in record.deletes.to_pylist() if record.deletes is not None else ():
                    mine.pop(point_id, None)
                for row in record.upserts.to_pylist() if record.upserts is not None else ():
                    mine[row["id"]] = point_of(row)
            yield from ((entry.shard, point_id, point) for point_id, point in mine.items())


def point_of(row: dict[str, Any]) -> Point:
    attributes = {k: v for k, v in row.items() if k not in ("id", "vector", "id_hash") and v is not None}
    return tuple(float(number) for number in row["vector"]), attributes


def run_rebuild(
    collection: Collection,
    *,
    store: ObjectStore | None = None,
    listener: Callable[[JobStatus], None] = lambda status: None,
    run_tasks: TaskRunner = run_tasks_here,
    job_id: str = JOB,
    statuses: Callable[[], Statuses] = dict,
    gpus: Callable[[], ClusterGpus] = ClusterGpus,
    **options: Any,
) -> dict[str, Any]:
    """One rebuild; `store` is what the job itself uses, where it is not the one that the collection's data opens."""
    store = store or collection.store
    reporter = JobReporter(store, JobStatus(job_id, "rebuild", "words"), listener, ManualClock())
    wanted = RebuildOptions("words", **options)
    place = (wanted, Workers(run_tasks, 2, gpus=gpus), str(collection.folder), ManualClock(), statuses)
    job = Rebuilder(collection.data, store, log_of(store), *place)
    manifest, report = job.run(job_id, reporter)
    assert manifest == collection.newest
    return report


def at_each_phase(work: Callable[[str], None]) -> Callable[[JobStatus], None]:
    """A listener that does something whenever the job begins a phase."""
    last = ""

    def listener(status: JobStatus) -> None:
        nonlocal last
        if status.phase != last:
            last = status.phase
            if last != "starting":
                work(last)

    return listener
