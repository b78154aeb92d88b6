"""Import: Parquet rows become a collection's next generation, all or nothing.

Phases: partition (read, check, split by hash of id; `row_reader`), build (one segment per partition;
`segment_task`), commit (one manifest). A crash or a bad row before the commit leaves only garbage, and the old
manifest served. Writes that were acknowledged before the import began are replaced by it, later ones stay on top: its
plan fixes every shard's place in the WAL. Memory is bounded: a task holds one batch, or builds one segment, and the
builds of a node together take at most `memory_bytes` for their indexes (`build_plan`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.faiss_index import check_factory
from actors.replica_status import Statuses
from cluster import paths
from cluster.attributes import types_after_import
from cluster.config import CollectionConfig, check_collection_name
from cluster.errors import Conflict, EaglerayError, FieldError, Invalid
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from cluster.recent_queries import read_queries
from jobs.build_device import TaskGpus
from jobs.build_plan import BuildGpus, BuildPlan, Workers, build_gpus, held_gpus, plan_build, with_rates
from jobs.import_source import Columns, Source, find_source
from jobs.report import JobReporter
from jobs.row_reader import UnitTask, partition_unit, read_bytes
from jobs.segment_task import SegmentTask, build_partition, delete_segments_of, measure_partition

STALE_STAGING_S = 24 * 3600.0  # of a killed import: deleted by the next one
PARTITION_SHARE = 0.3  # of the whole, for the progress bar
DEFAULT_MEMORY_BYTES = 4 * 1024**3
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportOptions:
    """What to import, how to map columns, and the config of the collection if it does not exist yet.

    `create` holds `CollectionConfig` fields; dimension and id type come from the file where they are not given.
    `memory_bytes` bounds the indexes being built at one time on one node, their training samples with them: a shard
    that needs more by itself gets several segments.
    """

    collection: str
    source: str
    columns: Columns = field(default_factory=Columns)
    create: dict[str, Any] = field(default_factory=dict)
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    seed: int = 0


@dataclass(frozen=True)
class ImportPlan:
    """Checked before any row is read. `wal_ends` are then the ends of the shards' logs: the import replaces them."""

    parent: Manifest | None
    source: Source
    build: BuildPlan
    wal_ends: tuple[ShardEntry, ...]

    @property
    def config(self) -> CollectionConfig:
        return self.build.config


class Importer:
    """One run of one import."""

    def __init__(
        self,
        data: str,
        store: ObjectStore,
        log: ManifestLog,
        options: ImportOptions,
        workers: Workers,
        statuses: Callable[[], Statuses] = dict,
    ) -> None:
        """`statuses` are those of the collection's replicas, as far as any are known: for the GPUs that they have."""
        check_collection_name(options.collection)
        self._data = data
        self._store = store
        self._log = log
        self._options = options
        self._workers = workers
        self._statuses = statuses

    def run(self, job_id: str, reporter: JobReporter) -> Manifest:
        """Import everything and commit; returns the committed manifest.

        When this raises nothing is committed, unless it is Unavailable from the commit: then nobody knows.
        """
        reporter.phase("scan")
        plan = self._plan()
        self._delete_staging(older_than_s=STALE_STAGING_S)
        try:
            refs = self._build_all(plan, job_id, reporter)
        except BaseException:  # cancelled, too: SystemExit
            self._delete_segments(job_id)
            raise
        return self._commit(plan, refs, job_id, reporter)  # the last: who is stopped after it has committed

    def _build_all(self, plan: ImportPlan, job_id: str, reporter: JobReporter) -> dict[int, SegmentRef]:
        """The segments; nothing is left of staging, however it ends."""
        try:
            pieces = self._partition(plan, job_id, reporter)
            plan = self._measured(plan, job_id, pieces, reporter)
            return self._build(plan, job_id, pieces, reporter)
        finally:
            self._clean_up_staging(job_id)

    def _commit(self, plan: ImportPlan, refs: dict[int, SegmentRef], job_id: str, reporter: JobReporter) -> Manifest:
        reporter.phase("commit")
        try:
            return self._log.commit_generation(
                plan.parent,
                plan.config,
                _shard_entries(plan, refs),
                plan.source.attributes,
                num_gpus=plan.build.num_gpus,
            )
        except Conflict:  # only this says for sure that the manifest was not written
            self._delete_segments(job_id)
            raise

    def _plan(self) -> ImportPlan:
        options = self._options
        parent = self._log.newest()
        source = find_source(options.source, options.columns)
        if parent is not None and parent.state == "live":
            config = existing_config(parent.config, options)
            types_after_import(parent.attributes, source.attributes)  # refuses now what the commit would
        else:
            config = new_config(options, source)
        _check_fits(config, source, options)
        gpus = self._gpus(parent, config, source.rows)
        build = plan_build(source.rows, config, options.memory_bytes, self._workers, gpus)
        wal_ends = self._log.wal_ends(parent, config.shards)
        return ImportPlan(parent, source, build, wal_ends)

    def _gpus(self, parent: Manifest | None, config: CollectionConfig, rows: int) -> BuildGpus | None:
        """GPUs as they are now. The replicas that are there may take up what is built; some, too, where the newest
        version is for CPUs and the one before it is served yet."""
        if parent is None or parent.state == "deleted":
            return build_gpus(config, self._workers.gpus, rows)
        had = parent.num_gpus if parent.points else 0.0  # of an empty one nothing was chosen for an index
        return build_gpus(config, self._workers.gpus, rows, held_gpus(self._statuses()), had)

    def _measured(
        self, plan: ImportPlan, job_id: str, pieces: dict[int, dict[int, int]], reporter: JobReporter
    ) -> ImportPlan:
        """The plan with rates measured on a sample of the rows, where the build is long enough to be worth it."""
        if plan.build.worth_measuring:
            reporter.phase("measure")
            task = self._segment_task(plan, job_id, min(pieces), pieces[min(pieces)])
            for _, event in self._workers.run_tasks(measure_partition, [task], plan.build.builds.num_cpus, 1):
                build = with_rates(plan.build, event["rates"], self._options.memory_bytes, self._workers)
                plan = replace(plan, build=build)
        reporter.plan(plan.build.to_dict())
        return plan

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
                plan.build.partitions,
                read_bytes(options.memory_bytes),
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
        queries = self._recent_queries(plan)
        tasks = [replace(self._segment_task(plan, job_id, p, pieces[p]), queries=queries) for p in sorted(pieces)]
        shares = [0.0] * len(tasks)
        refs: dict[int, SegmentRef] = {}
        for number, event in self._workers.build(build_partition, tasks, plan.build.builds):
            shares[number] = event.get("share", 1.0)
            if "segment" in event:
                refs[tasks[number].partition] = SegmentRef(**event["segment"])
            rows = sum(share * task.count for share, task in zip(shares, tasks, strict=True))
            whole = PARTITION_SHARE + (1.0 - PARTITION_SHARE) * rows / plan.source.rows
            reporter.progress(min(0.99, whole), int(rows))
        return refs

    def _recent_queries(self, plan: ImportPlan) -> NDArray[np.float32] | None:
        """Real queries to tune on, where the collection exists and was asked some."""
        if plan.parent is None or plan.parent.state == "deleted":
            return None
        return read_queries(self._store, self._options.collection, plan.config, self._options.seed)

    def _segment_task(self, plan: ImportPlan, job_id: str, partition: int, units: dict[int, int]) -> SegmentTask:
        by_number = {unit.number: unit for unit in plan.source.units}
        return SegmentTask(
            data=self._data,
            collection=self._options.collection,
            job_id=job_id,
            partition=partition,
            units=tuple(by_number[number] for number in sorted(units)),
            count=sum(units.values()),
            config=plan.config,
            plan=plan.build.index,
            rates=plan.build.rates,
            attributes=plan.source.attributes,
            id_column=self._options.columns.id,
            threads=plan.build.builds.threads,
            seed=self._options.seed,
            gpus=TaskGpus.of(plan.build),
        )

    def _clean_up_staging(self, job_id: str) -> None:
        """Delete the job's own pieces. Where that fails the outcome stays what it was, and they stay as garbage."""
        try:
            self._delete_staging(job_id)
        except EaglerayError as error:
            logger.warning("the staging of job %s is left behind: %s", job_id, error)

    def _delete_segments(self, job_id: str) -> None:
        delete_segments_of(job_id, self._store, self._log, self._options.collection)

    def _delete_staging(self, job_id: str = "", older_than_s: float = 0.0) -> None:
        """Delete one job's pieces, or all that are older than that."""
        newest = time.time() - older_than_s
        for info in list(self._store.objects(paths.staging_prefix(self._options.collection, job_id))):
            if not older_than_s or info.modified_s < newest:
                self._store.delete(info.key)


def _shard_entries(plan: ImportPlan, refs: dict[int, SegmentRef]) -> tuple[ShardEntry, ...]:
    """Partitions of a shard are consecutive; one without rows has no segment."""
    each = plan.build.partitions // plan.config.shards
    return tuple(
        replace(end, segments=tuple(refs[p] for p in range(end.shard * each, (end.shard + 1) * each) if p in refs))
        for end in plan.wal_ends
    )


def new_config(options: ImportOptions, source: Source) -> CollectionConfig:
    """The config of a collection that the import creates."""
    given = dict(options.create)
    if source.dimension is not None:
        given.setdefault("dimension", source.dimension)
    given.setdefault("id_type", source.id_type)
    return _parse_create(given)


def existing_config(config: CollectionConfig, options: ImportOptions) -> CollectionConfig:
    """The config of the collection that exists; Invalid or Conflict where `create` asks for something else."""
    create, index = options.create, options.create.get("index", {})
    if isinstance(index, dict):
        create = {**create, "index": asdict(config.index) | index}
    wanted = _parse_create(config.to_dict() | create)
    different = [name for name in options.create if name != "index" and getattr(wanted, name) != getattr(config, name)]
    different += [f"index.{name}" for name in index if getattr(wanted.index, name) != getattr(config.index, name)]
    if different:
        raise Conflict(f"collection {options.collection!r} exists with another {', '.join(different)}")
    return config


def _parse_create(fields: dict[str, Any]) -> CollectionConfig:
    """Invalid names the field as the command line does: `create.shards`."""
    try:
        return CollectionConfig.from_dict(fields)
    except Invalid as error:
        errors = tuple(FieldError(f"create.{each.field}", each.message) for each in error.errors)
        raise Invalid("; ".join(f"{each.field}: {each.message}" for each in errors), errors) from error


def _check_fits(config: CollectionConfig, source: Source, options: ImportOptions) -> None:
    """Invalid where the file is not of the collection's shape, or its index cannot be made."""
    if config.index.factory is not None:
        check_factory(config.index.factory, config.dimension, config.metric)
    if source.dimension not in (None, config.dimension):
        raise Invalid.at(
            "vector_column",
            f"{options.columns.vector!r} has dimension {source.dimension}, the collection {config.dimension}",
        )
    if source.id_type != config.id_type:
        raise Invalid.at(
            "id_column", f"{options.columns.id!r} has {source.id_type} ids, the collection {config.id_type}"
        )
