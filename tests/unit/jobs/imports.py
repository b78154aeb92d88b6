"""Importing in this process: write Parquet files, run the import, read back what was stored."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.replica_status import Statuses
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.cluster_gpus import ClusterGpus
from cluster.config import Metric
from cluster.manifest import Manifest, ManifestLog, SegmentRef
from cluster.object_store import ObjectStore, open_store
from cluster.segment import Rows, SegmentDescription
from jobs.build_plan import TaskRunner, Workers
from jobs.import_source import Columns
from jobs.importer import DEFAULT_MEMORY_BYTES, Importer, ImportOptions
from jobs.report import JobReporter, JobStatus
from tests.fakes import ManualClock, run_tasks_here

JOB = "import-1"


def new_data_url() -> str:
    """The URL of a store in memory that no other test has."""
    return f"memory://{uuid.uuid4().hex}"


def table_of(ids: Any, vectors: NDArray[Any], **attributes: Any) -> Any:
    """A table with FixedSizeList vectors of the array's own dtype."""
    return pa.table({"id": ids, "vector": vectors_array(vectors), **attributes})


def random_table(count: int, dimension: int = 4, *, id_type: str = "int64", seed: int = 0, first: int = 0) -> Any:
    """`count` points with the ids first, first + 1, ... in random order, and attributes of three types."""
    random = np.random.default_rng(seed)
    numbers = (random.permutation(count) + first).tolist()
    ids = numbers if id_type == "int64" else [f"id-{number}" for number in numbers]
    return table_of(
        pa.array(ids, pa.int64() if id_type == "int64" else pa.string()),
        random.normal(size=(count, dimension)).astype(np.float32) * np.float32(2.0),
        word=pa.array([f"word {number}" if number % 7 else None for number in numbers], pa.string()),
        pos=pa.array([("noun", "verb")[number % 2] for number in numbers]).dictionary_encode(),
        rank=pa.array([number % 100 for number in numbers], pa.int16()),
    )


def write(path: Path, table: Any, row_group_size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def log_of(store: ObjectStore, collection: str = "words") -> ManifestLog:
    return ManifestLog(store, collection, lambda: uuid.uuid4().hex)


def run_import(
    data: str,
    source: Path | str,
    *,
    store: ObjectStore | None = None,
    columns: Columns | None = None,
    create: dict[str, Any] | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    run_tasks: TaskRunner = run_tasks_here,
    listener: Callable[[JobStatus], None] = lambda status: None,
    collection: str = "words",
    job_id: str = JOB,
    gpus: Callable[[], ClusterGpus] = ClusterGpus,
    statuses: Callable[[], Statuses] = dict,
) -> Manifest:
    """One import; `store` is what the importer itself uses, where it is not the one that `data` opens."""
    store = store or open_store(data)
    options = ImportOptions(collection, str(source), columns or Columns(), create or {}, memory_bytes)
    # On a clock that stands still only the changes of phase are written: the same puts in every run.
    reporter = JobReporter(store, JobStatus(job_id, "import", collection), listener, ManualClock())
    workers = Workers(run_tasks, 2, gpus=gpus)
    importer = Importer(data, store, log_of(store, collection), options, workers, statuses)
    return importer.run(job_id, reporter)


@dataclass
class Stored:
    """Everything a manifest names, read back."""

    ids: list[Any] = field(default_factory=list)  # in row order, shard after shard
    vectors: list[NDArray[Any]] = field(default_factory=list)
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    schema: Any = None
    rows_files: list[bytes] = field(default_factory=list)
    shard_of: dict[Any, int] = field(default_factory=dict)

    def by_id(self) -> dict[Any, tuple[list[float], dict[str, Any]]]:
        """id -> (vector, attributes)."""
        names = list(self.attributes)
        rows = zip(*(self.attributes[name] for name in names), strict=True) if names else [()] * len(self.ids)
        return {
            point_id: (vector.tolist(), dict(zip(names, row, strict=True)))
            for point_id, vector, row in zip(self.ids, self.vectors, rows, strict=True)
        }


def stored(store: ObjectStore, manifest: Manifest) -> Stored:
    """Read every segment of a manifest."""
    found = Stored()
    for entry in manifest.shards:
        for ref in entry.segments:
            before = len(found.ids)
            _read_segment(store, manifest, ref, found)
            found.shard_of |= dict.fromkeys(found.ids[before:], entry.shard)
    return found


def _read_segment(store: ObjectStore, manifest: Manifest, ref: SegmentRef, found: Stored) -> None:
    key = paths.segment_file(manifest.collection, ref.segment_id, paths.DESCRIPTION)
    description = SegmentDescription.decode(store.get(key), key)
    data = store.get(paths.segment_file(manifest.collection, ref.segment_id, paths.ROWS))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / paths.ROWS
        path.write_bytes(data)
        rows = Rows(path, ref.count, manifest.config.dimension, description.rows_per_batch)
        table = pa.Table.from_batches([rows.take(np.arange(ref.count), rows.schema.names)])
    found.ids += table["id"].to_pylist()
    found.vectors += list(np.array(table["vector"].to_pylist(), manifest.config.vector_dtype))
    for column in table.column_names[3:]:
        found.attributes.setdefault(column, []).extend(table[column].to_pylist())
    found.schema = table.schema
    found.rows_files.append(data)


def expected(table: Any, metric: Metric, dtype: str) -> dict[Any, tuple[list[float], dict[str, Any]]]:
    """What `Stored.by_id` must be after importing all columns of a table."""
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    if metric == "cosine":
        lengths = np.sqrt(np.square(vectors.astype(np.float64)).sum(axis=1, keepdims=True))
        vectors = (vectors / lengths).astype(np.float32)
    names = [name for name in table.column_names if name not in ("id", "vector")]
    rows = zip(*(table[name].to_pylist() for name in names), strict=True) if names else [()] * len(table)
    return {
        point_id: (vector, dict(zip(names, row, strict=True)))
        for point_id, vector, row in zip(table["id"].to_pylist(), vectors.astype(dtype).tolist(), rows, strict=True)
    }


def assert_left_alone(store: ObjectStore, collection: str = "words", newest: Manifest | None = None) -> None:
    """The newest manifest is still `newest`, and no staged piece is left."""
    assert log_of(store, collection).newest() == newest
    assert [info.key for info in store.objects(paths.staging_prefix(collection))] == []
