"""Export: the live points of one version become Parquet files, which an import reads back.

One Ray task per segment writes one file, in row groups of bounded size: in memory are one row group and the ids of
deleted rows. The files appear all together, or (object storage) are deleted again where the job fails.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.row_order import conformed
from actors.scratch import private_folder
from actors.segment_loader import read_description
from actors.segment_rows import attribute_types, open_part, open_rows
from cluster.attributes import arrow_type
from cluster.config import CollectionConfig, check_collection_name
from cluster.errors import Corrupt, EaglerayError
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore, open_store
from cluster.segment import SegmentDescription, rows_schema
from jobs.build_plan import Workers
from jobs.export_target import ExportTarget
from jobs.report import JobReporter

ROW_GROUP_BYTES = 32 * 1024 * 1024  # of rows as Arrow has them
SEAL_SHARE = 0.2  # of the whole, for the progress bar
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """`target` is a folder or an object-storage URL without files. Without a snapshot it is the points of now."""

    collection: str
    target: str
    snapshot: str | None = None


@dataclass(frozen=True)
class PartTask:
    """Everything a task needs to write one file: the live rows of `ref`, a segment of `entry`; None: no rows."""

    data: str
    collection: str
    target: ExportTarget
    name: str
    schema: Any
    entry: ShardEntry
    ref: SegmentRef | None
    cache_dir: str | None
    row_group_bytes: int = ROW_GROUP_BYTES


class Exporter:
    """One run of one export. `version_of` finds what to export, and may seal it first."""

    def __init__(
        self,
        data: str,
        store: ObjectStore,
        options: ExportOptions,
        workers: Workers,
        version_of: Callable[[JobReporter], Manifest],
        cache_dir: str | None = None,
    ) -> None:
        check_collection_name(options.collection)
        self._data = data
        self._store = store
        self._options = options
        self._workers = workers
        self._version_of = version_of
        self._cache_dir = cache_dir

    def run(self, job_id: str, reporter: JobReporter) -> dict[str, Any]:
        """Export; returns the report. When this raises the target has no files of it."""
        target = ExportTarget(self._options.target, job_id)
        target.check_empty()
        manifest = self._version_of(reporter)
        reporter.phase("export")
        tasks = self._tasks(manifest, target)
        target.begin()
        try:
            rows, sizes = self._write(tasks, manifest, reporter)
            if rows != manifest.points:
                raise Corrupt(f"version {manifest.version} says {manifest.points} points, its segments hold {rows}")
            target.finish(sizes)
        except BaseException:  # stopped, too: SystemExit
            self._discard(target, [task.name for task in tasks])
            raise
        return {
            "points": rows,
            "files": len(sizes),
            "bytes": sum(sizes.values()),
            "target": self._options.target,
            "version": manifest.version,
            "generation": manifest.generation,
            "config": manifest.config.to_dict(),
        }

    def _tasks(self, manifest: Manifest, target: ExportTarget) -> list[PartTask]:
        collection = self._options.collection
        schema = export_schema(self._store, manifest, self._cache)
        place = (self._data, collection, target)
        tasks = []
        for entry in manifest.shards:
            for number, ref in enumerate(entry.segments):
                name = f"part-{entry.shard:04d}-{number:04d}.parquet"
                tasks.append(PartTask(*place, name, schema, entry, ref, self._cache_dir))
        nothing = PartTask(*place, "part-0000-0000.parquet", schema, manifest.shards[0], None, self._cache_dir)
        return tasks or [nothing]

    def _write(self, tasks: list[PartTask], manifest: Manifest, reporter: JobReporter) -> tuple[int, dict[str, int]]:
        """(rows, bytes of each file)."""
        done, sizes = 0, {}
        for number, event in self._workers.run_tasks(write_part, tasks, 1, self._workers.cpus):
            done += event.get("rows", 0)
            if "bytes" in event:
                sizes[tasks[number].name] = event["bytes"]
            share = SEAL_SHARE + (1.0 - SEAL_SHARE) * done / max(1, manifest.points)
            reporter.progress(min(0.99, share), done)
        return done, sizes

    @property
    def _cache(self) -> Path:
        return Path(self._cache_dir) if self._cache_dir else private_folder("cache")

    def _discard(self, target: ExportTarget, names: list[str]) -> None:
        try:
            target.discard(names)
        except EaglerayError as error:
            logger.warning("%s", error)


def export_schema(store: ObjectStore, manifest: Manifest, cache_dir: Path) -> Any:
    """Columns of every file: id, vector, and the attributes of all segments, of the type that is declared, if it is."""
    types: dict[str, Any] = {}
    for ref in manifest.segments.values():
        described = read_description(store, manifest.collection, ref).attributes
        if any(arrow_type(text) is None for text in described.values()):  # nested: its text is no type to be read
            types = attribute_types(open_rows(store, manifest.collection, ref, cache_dir)) | types
        else:
            types = {name: arrow_type(text) for name, text in described.items()} | types
    declared = {name: dtype for name, text in manifest.attributes.items() if (dtype := arrow_type(text)) is not None}
    return without_hash(manifest.config, types | declared)


def without_hash(config: CollectionConfig, attributes: dict[str, Any]) -> Any:
    return pa.schema([field for field in rows_schema(config, attributes) if field.name != "id_hash"])


def write_part(task: PartTask) -> Iterator[dict[str, Any]]:
    """Write one file. Yields {"rows": n} for each row group, and at last {"bytes": n}, its size."""
    with tempfile.TemporaryDirectory(prefix="eagleray-export-") as folder:
        path = Path(folder) / task.name
        attributes = [name for name in task.schema.names if name not in ("id", "vector")]
        with pq.ParquetWriter(path, task.schema, use_dictionary=attributes) as writer:
            for group in _row_groups(task):
                writer.write_batch(group)
                yield {"rows": group.num_rows}
        task.target.put(path, task.name)
        yield {"bytes": path.stat().st_size}


def _row_groups(task: PartTask) -> Iterator[Any]:
    """The live rows in the order of the segment, as record batches of about as many bytes as a row group may have."""
    if task.ref is None:
        return
    store = open_store(task.data)
    cache_dir = Path(task.cache_dir) if task.cache_dir else private_folder("cache")
    part = open_part(store, task.collection, task.entry, task.ref, cache_dir)
    if part.rows.count != task.ref.count:
        raise Corrupt(f"{task.ref.segment_id}: {part.rows.count} rows, the manifest says {task.ref.count}")
    step = rows_at_once(read_description(store, task.collection, task.ref), task.row_group_bytes)
    here = [name for name in task.schema.names if name in part.rows.schema.names]
    live = part.live
    for start in range(0, len(live), step):
        yield conformed(part.rows.take(live[start : start + step], here), task.schema)
        part.rows.forget_pages()


def rows_at_once(description: SegmentDescription, most_bytes: int) -> int:
    """Rows of a segment that take about so many bytes; at least one."""
    each = description.files["rows.arrow"].size_bytes / max(1, description.count)
    return max(1, int(most_bytes // max(1.0, each)))
