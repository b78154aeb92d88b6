"""Compacting in this process: write to a collection shard by shard, run the compaction, compare what is served."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import id_array
from cluster.object_store import ObjectStore, open_store
from jobs.build_plan import TaskRunner, Workers
from jobs.compact import CompactOptions, Compactor
from jobs.report import JobReporter, JobStatus
from tests.fakes import ManualClock, run_tasks_here
from tests.unit.actors.written import COLLECTION, Written
from tests.unit.jobs.imports import log_of

CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
ONE_SHARD = replace(CONFIG, shards=1)
JOB = "compact-1"
SEALED_GONE = 5  # deleted rows that the manifest names after `churn`, and those that the seal of its tail adds
TAIL_GONE = 3


def new_nonce() -> str:
    return uuid.uuid4().hex


def new_shards(data: str, folder: Path, config: CollectionConfig = CONFIG) -> list[Written]:
    """A new collection, by shard; its files are cached under `folder`."""
    shards = [Written(open_store(data), config, folder, shard) for shard in range(config.shards)]
    shards[0].create()
    return shards


def churned(data: str, folder: Path, config: CollectionConfig = CONFIG) -> list[Written]:
    """A new collection with three segments in each shard, deleted rows in two of them, and a tail."""
    shards = new_shards(data, folder, config)
    for written in shards:
        churn(written, 1_000 * written.shard)
    return shards


def churn(written: Written, first: int) -> None:
    """Ids from `first` on."""
    written.claim()
    written.write(list(range(first, first + 20)))
    seal(written)
    written.write([first, first + 1, *range(first + 20, first + 30)], deletes=[first + 2])
    seal(written)
    written.write([first + 20, *range(first + 30, first + 36)], deletes=[first + 3, 999_999])
    seal(written)
    written.write([first + 4, first + 36], deletes=[first + 30])
    written.write([first + 37, first + 21])


def seal(written: Written) -> None:
    seal_tail(written.store, COLLECTION, written.shard, written.cache_dir, new_nonce)


def merge_all(written: Written) -> None:
    place = (written.store, COLLECTION, written.shard, written.segments, written.cache_dir)
    merge_segments(*place, new_nonce)


def run_compact(
    data: str,
    folder: Path,
    store: ObjectStore | None = None,
    listener: Callable[[JobStatus], None] = lambda status: None,
    run_tasks: TaskRunner = run_tasks_here,
    collection: str = COLLECTION,
    **options: Any,
) -> dict[str, Any]:
    """One compaction; `store` is what the job itself uses, where it is not the one that `data` opens."""
    store = store or open_store(data)
    workers = Workers(run_tasks, 2)
    log = log_of(store, collection)
    compactor = Compactor(
        data, store, log, CompactOptions(collection, **options), workers, str(folder), clock=ManualClock()
    )
    return compactor.run(JobReporter(store, JobStatus(JOB, "compact", collection), listener, ManualClock()))


def assert_served_as_written(written: Written) -> None:
    """The store holds exactly the live points, and a replica that loads it has them, and none that was deleted."""
    assert written.held() == written.live
    replica = Shard(written.store, COLLECTION, written.shard, written.cache_dir)
    view = replica.load()
    assert (view.points, replica.applied_lsn) == (len(written.live), written.lsn)
    first = 1_000 * written.shard
    gone = [point_id for point_id in range(first, first + 40) if point_id not in written.live]
    ids = id_array([*written.live, *gone], written.config.id_type)
    found, table = replica.fetch(view.generation, ids, ["id", "vector"])
    assert found.tolist() == [True] * len(written.live) + [False] * len(gone)
    held = table.to_pylist() if table is not None else []
    assert [row["vector"] for row in held] == [vector for vector, _ in written.live.values()]


def assert_compacted(written: Written) -> None:
    """One segment with exactly the live points, no deleted rows, no tail."""
    entry = written.newest.shards[written.shard]
    assert [ref.count for ref in entry.segments] == [len(written.live)]
    assert (entry.tombstones, entry.applied_lsn, entry.epoch) == ((), written.lsn, written.epoch)
    assert_served_as_written(written)
