"""Import: Parquet rows become a collection's next generation, all or nothing.

Phases: partition (read, check, split by hash of id; `row_reader`), build (one segment per partition;
`segment_task`), commit (one manifest). A crash or a bad row before the commit leaves only garbage, and the old
manifest served. Memory is bounded: a task holds one batch, or one segment of at most `memory_bytes`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol, TypeVar

from cluster import index_spec, paths
from cluster.config import CollectionConfig, IndexConfig, check_collection_name
from cluster.errors import Conflict, EaglerayError, Invalid
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from jobs.import_source import Columns, Source, find_source
from jobs.report import JobReporter
from jobs.row_reader import UnitTask, partition_unit
from jobs.segment_task import SegmentTask, build_partition

STALE_STAGING_S = 24 * 3600.0  # of a killed import: deleted by the next one
PARTITION_SHARE = 0.3  # of the whole, for the progress bar
DEFAULT_MEMORY_BYTES = 4 * 1024**3
T = TypeVar("T")
logger = logging.getLogger(__name__)


class TaskRunner(Protocol):
    """Runs generator functions on items, some at a time (`ray_jobs.run_tasks`)."""

    def __call__(
        self, function: Callable[[T], Iterator[Any]], items: Sequence[T], num_cpus: float, in_flight: int
    ) -> Iterator[tuple[int, Any]]: ...


@dataclass(frozen=True)
class ImportOptions:
    """What to import, how to map columns, and the config of the collection if it does not exist yet.

    `create` holds `CollectionConfig` fields; dimension and id type come from the file where they are not given.
    `memory_bytes` bounds the index of one build task: a shard that needs more gets several segments.
    """

    collection: str
    source: str
    columns: Columns = field(default_factory=Columns)
    create: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    seed: int = 0


@dataclass(frozen=True)
class Workers:
    """How much may run at once: CPUs of the cluster, and how tasks are run."""

    run_tasks: TaskRunner
    cpus: int


@dataclass(frozen=True)
class ImportPlan:
    """Checked before any row is read."""

    parent: Manifest | None
    config: CollectionConfig
    source: Source
    partitions: int  # shards x segments per shard


class Importer:
    """One run of one import."""

    def __init__(
        self, data: str, store: ObjectStore, log: ManifestLog, options: ImportOptions, workers: Workers
    ) -> None:
        check_collection_name(options.collection)
        self._data = data
        self._store = store
        self._log = log
        self._options = options
        self._workers = workers

    def run(self, job_id: str, reporter: JobReporter) -> Manifest:
        """Import everything and commit; returns the committed manifest. Nothing is committed when this raises."""
        reporter.phase("scan")
        plan = self._plan()
        self._delete_staging(older_than_s=STALE_STAGING_S)
        try:
            pieces = self._partition(plan, job_id, reporter)
            refs = self._build(plan, job_id, pieces, reporter)
            reporter.phase("commit")
            return self._log.commit_generation(plan.parent, plan.config, _shard_entries(plan, refs))
        finally:
            self._clean_up(job_id)

    def _plan(self) -> ImportPlan:
        options = self._options
        parent = self._log.newest()
        source = find_source(options.source, options.columns)
        if parent is not None and parent.state == "live":
            config = parent.config
            _check_fits(config, source, options)
        else:
            config = new_config(options, source)
        index_spec.choose(ceil(source.rows / config.shards), config)  # refuses now what no shard could build
        return ImportPlan(parent, config, source, config.shards * self._segments_per_shard(config, source.rows))

    def _segments_per_shard(self, config: CollectionConfig, rows: int) -> int:
        per_shard = ceil(rows / config.shards)
        needed = index_spec.choose(per_shard, config).predicted_bytes * index_spec.MEMORY_MARGIN
        return max(1, ceil(needed / self._options.memory_bytes))

    def _partition(self, plan: ImportPlan, job_id: str, reporter: JobReporter) -> dict[int, dict[int, int]]:
        """partition -> unit number -> rows."""
        reporter.phase("partition")
        options, source = self._options, plan.source
        tasks = [
            UnitTask(
                self._data,
                options.collection,
                job_id,
                options.source,
                unit,
                options.columns,
                source.attributes,
                plan.config,
                plan.partitions,
            )
            for unit in source.units
            if unit.rows
        ]
        pieces: dict[int, dict[int, int]] = {}
        done = 0
        for number, event in self._workers.run_tasks(partition_unit, tasks, 1, self._workers.cpus):
            done += event.get("rows", 0)
            for partition, rows in event.get("pieces", {}).items():
                pieces.setdefault(partition, {})[tasks[number].unit.number] = rows
            reporter.progress(PARTITION_SHARE * min(1.0, done / max(1, source.rows)), done)
        return pieces

    def _build(
        self, plan: ImportPlan, job_id: str, pieces: dict[int, dict[int, int]], reporter: JobReporter
    ) -> dict[int, SegmentRef]:
        """partition -> its published segment."""
        reporter.phase("build")
        at_once = max(1, min(self._workers.cpus, len(pieces)))
        threads = max(1, self._workers.cpus // at_once)
        tasks = [self._segment_task(plan, job_id, p, pieces[p], threads) for p in sorted(pieces)]
        shares = [0.0] * len(tasks)
        refs: dict[int, SegmentRef] = {}
        for number, event in self._workers.run_tasks(build_partition, tasks, threads, at_once):
            shares[number] = event.get("share", 1.0)
            if "segment" in event:
                refs[tasks[number].partition] = SegmentRef(**event["segment"])
            rows = sum(share * task.count for share, task in zip(shares, tasks, strict=True))
            whole = PARTITION_SHARE + (1.0 - PARTITION_SHARE) * rows / plan.source.rows
            reporter.progress(min(0.99, whole), int(rows))
        return refs

    def _segment_task(
        self, plan: ImportPlan, job_id: str, partition: int, units: dict[int, int], threads: int
    ) -> SegmentTask:
        by_number = {unit.number: unit for unit in plan.source.units}
        return SegmentTask(
            data=self._data,
            collection=self._options.collection,
            job_id=job_id,
            partition=partition,
            units=tuple(by_number[number] for number in sorted(units)),
            count=sum(units.values()),
            config=plan.config,
            attributes=plan.source.attributes,
            id_column=self._options.columns.id,
            threads=threads,
            seed=self._options.seed,
        )

    def _clean_up(self, job_id: str) -> None:
        """Delete the job's own pieces. Where that fails the outcome stays what it was; a later import deletes them."""
        try:
            self._delete_staging(job_id)
        except EaglerayError as error:
            logger.warning("the staging of job %s is left behind: %s", job_id, error)

    def _delete_staging(self, job_id: str = "", older_than_s: float = 0.0) -> None:
        """Delete one job's pieces, or all that are older than that."""
        newest = time.time() - older_than_s
        for info in list(self._store.objects(paths.staging_prefix(self._options.collection, job_id))):
            if not older_than_s or info.modified_s < newest:
                self._store.delete(info.key)


def _shard_entries(plan: ImportPlan, refs: dict[int, SegmentRef]) -> tuple[ShardEntry, ...]:
    """Partitions of a shard are consecutive; one without rows has no segment."""
    each = plan.partitions // plan.config.shards
    return tuple(
        ShardEntry(shard, tuple(refs[p] for p in range(shard * each, (shard + 1) * each) if p in refs))
        for shard in range(plan.config.shards)
    )


def new_config(options: ImportOptions, source: Source) -> CollectionConfig:
    """The config of a collection that the import creates."""
    given = dict(options.create)
    if source.dimension is not None:
        given.setdefault("dimension", source.dimension)
    given.setdefault("id_type", source.id_type)
    config = CollectionConfig.from_dict(given)
    _check_fits(config, source, options)
    return config


def _check_fits(config: CollectionConfig, source: Source, options: ImportOptions) -> None:
    if source.dimension not in (None, config.dimension):
        raise Invalid.at(
            "vector_column",
            f"{options.columns.vector!r} has dimension {source.dimension}, the collection {config.dimension}",
        )
    if source.id_type != config.id_type:
        raise Invalid.at(
            "id_column", f"{options.columns.id!r} has {source.id_type} ids, the collection {config.id_type}"
        )
    wanted = {name: value for name, value in options.create.items() if name != "index"}
    different = [name for name, value in wanted.items() if getattr(config, name, value) != value]
    index = options.create.get("index", {})
    if isinstance(index, dict):
        known = {name: value for name, value in index.items() if name in IndexConfig.__dataclass_fields__}
        different += [f"index.{name}" for name, value in known.items() if getattr(config.index, name) != value]
    if different:
        raise Conflict(f"collection {options.collection!r} exists with another {', '.join(different)}")
