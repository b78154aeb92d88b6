"""The second phase of an import: gather one partition's pieces in hash order, refuse repeated ids, build a segment."""

from __future__ import annotations

import logging
import re
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.build_rates import SAMPLE_POINTS, measure_rates
from actors.faiss_index import use_threads
from actors.segment_builder import BuildOptions, Progress, build_segment, publish_segment
from cluster import paths
from cluster.arrow_rows import gather, vectors_view
from cluster.config import CollectionConfig
from cluster.errors import EaglerayError, Invalid
from cluster.garbage import GRACE_S
from cluster.index_costs import Rates
from cluster.index_policy import IndexPlan
from cluster.manifest import ManifestLog
from cluster.object_store import ObjectStore, open_store
from cluster.references import references_of_others
from cluster.segment import delete_segment, rows_per_batch, rows_schema, write_rows
from jobs.build_device import NO_TASK_GPUS, TaskGpus
from jobs.build_progress import shares_of
from jobs.import_source import Unit
from jobs.row_reader import SOURCE_ROW, SOURCE_ROW_GROUP, describe_place

GATHER_SHARE = 0.2  # of a segment's time, for the progress bar: reading pieces and writing rows
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentTask:
    """Everything a task needs to build one partition's segment.

    `units` are those with rows in it; `plan` is the choice for the import's mean segment, whose kind all of them take.
    `queries` are real ones to tune with, (n, d), where there are some.
    """

    data: str
    collection: str
    job_id: str
    partition: int
    units: tuple[Unit, ...]
    count: int
    config: CollectionConfig
    plan: IndexPlan
    rates: Rates
    attributes: dict[str, Any]
    id_column: str
    threads: int
    seed: int
    queries: NDArray[np.float32] | None = None
    gpus: TaskGpus = NO_TASK_GPUS


@dataclass
class _Pieces:
    """A partition's rows where they lie: record batches, and for every row its batch and its row there."""

    batches: list[Any] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)  # of each batch

    def order(self, id_column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(batch, row) of every row, ordered by (hash of id, id); Invalid where an id is repeated."""
        hashes = np.concatenate([batch.column("id_hash").to_numpy() for batch in self.batches])
        sizes = [batch.num_rows for batch in self.batches]
        which = np.repeat(np.arange(len(sizes)), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        order = np.argsort(hashes, kind="stable")
        which, rows = which[order], rows[order]
        same = np.flatnonzero(np.diff(hashes[order]) == 0)
        for start, stop in _runs(same):
            self._order_run(which, rows, start, stop, id_column)
        return which, rows

    def _order_run(
        self, which: NDArray[np.int64], rows: NDArray[np.int64], start: int, stop: int, id_column: str
    ) -> None:
        """Order rows of one hash by id, in place."""
        places = zip(which[start:stop].tolist(), rows[start:stop].tolist(), strict=True)
        run = sorted((self.batches[w].column("id")[r].as_py(), w, r) for w, r in places)
        for (a, *place), (b, *other) in pairwise(run):
            if a == b:
                raise Invalid.at(
                    id_column,
                    f"{self._place(*other)}: the id {b!r} is repeated; it is also in {self._place(*place)}",
                )
        which[start:stop] = [w for _, w, _ in run]
        rows[start:stop] = [r for _, _, r in run]

    def _place(self, batch: int, row: int) -> str:
        source = self.batches[batch]
        group, number = source.column(SOURCE_ROW_GROUP)[row].as_py(), source.column(SOURCE_ROW)[row].as_py()
        return describe_place(self.units[batch].file, group, number)


def _runs(same_as_next: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run, from the positions whose next neighbour is equal."""
    breaks = np.flatnonzero(np.diff(same_as_next) > 1)
    for part in np.split(same_as_next, breaks + 1):
        if len(part):
            yield int(part[0]), int(part[-1]) + 2


def is_segment_of(job_id: str, segment_id: str) -> bool:
    """Whether a job of that name built the segment."""
    return re.fullmatch(rf"{re.escape(job_id)}-\d{{6,}}-[0-9a-f]{{8}}", segment_id) is not None


def delete_segments_of(job_id: str, store: ObjectStore, log: ManifestLog, collection: str) -> None:
    """Delete what a job published, half or whole; never what a manifest of any collection names: an earlier job of
    that name built it. Where what others name cannot be read, or this fails, it stays as garbage: the job's outcome is
    what it was."""
    try:
        _delete_segments_of(job_id, store, log, collection)
    except EaglerayError as error:
        logger.warning("the segments of job %s are left behind: %s", job_id, error)


def _delete_segments_of(job_id: str, store: ObjectStore, log: ManifestLog, collection: str) -> None:
    found = {name for name in store.folders(paths.segments_prefix(collection)) if is_segment_of(job_id, name)}
    unnamed = found - log.named_segments() if found else found
    newest = log.newest() if unnamed else None
    others = references_of_others(store, newest, GRACE_S) if newest else None  # no version: none that was branched
    for name in unnamed:
        if others is None or not others.names_segment(collection, name):
            delete_segment(store, collection, name)


def measure_partition(task: SegmentTask) -> Iterator[dict[str, Any]]:
    """Yields {"rates": Rates}: how fast this node builds from the partition's vectors."""
    use_threads(task.threads)
    with tempfile.TemporaryDirectory(prefix="eagleray-build-") as name:
        pieces = _open_pieces(task, open_store(task.data), Path(name))
        parts, found = [], 0
        for batch in pieces.batches:
            parts.append(vectors_view(batch.column("vector").slice(0, SAMPLE_POINTS - found)))
            found += len(parts[-1])
            if found >= SAMPLE_POINTS:
                break
        yield {"rates": measure_rates(np.concatenate(parts), task.config.metric, task.threads)}


def build_partition(task: SegmentTask) -> Iterator[dict[str, Any]]:
    """Build and publish one segment. Yields {"share": 0..1}, and at last {"segment": SegmentRef fields}."""
    store = open_store(task.data)
    with tempfile.TemporaryDirectory(prefix="eagleray-build-") as name:
        folder = Path(name)
        yield from _write_rows(task, store, folder)
        segment_id = f"{task.job_id}-{task.partition:06d}-{uuid.uuid4().hex[:8]}"  # as `is_segment_of` reads it
        yield from _build(task, folder, segment_id)
        yield {"segment": asdict(publish_segment(store, task.collection, folder, segment_id))}


def _write_rows(task: SegmentTask, store: ObjectStore, folder: Path) -> Iterator[dict[str, Any]]:
    pieces = _open_pieces(task, store, folder)
    which, rows = pieces.order(task.id_column)
    schema = rows_schema(task.config, task.attributes)
    step = rows_per_batch(task.config)
    write_rows(
        folder / paths.ROWS,
        schema,
        (
            gather(pieces.batches, which[start : start + step], rows[start : start + step], schema.names)
            for start in range(0, task.count, step)
        ),
    )
    yield {"share": GATHER_SHARE}


def _open_pieces(task: SegmentTask, store: ObjectStore, folder: Path) -> _Pieces:
    pieces = _Pieces()
    for unit in task.units:
        key = paths.staging_piece(task.collection, task.job_id, task.partition, unit.number)
        local = store.local_path(key)
        if local is None:
            local = folder / f"piece-{unit.number}"
            store.download(key, local)
        reader = pa.ipc.open_file(pa.memory_map(str(local)))
        for number in range(reader.num_record_batches):
            pieces.batches.append(reader.get_batch(number))
            pieces.units.append(unit)
    return pieces


def _build(task: SegmentTask, folder: Path, segment_id: str) -> Iterator[dict[str, Any]]:
    def work(progress: Progress) -> None:
        with task.gpus.device() as device:
            facts = (task.plan, task.rates, task.queries, task.gpus.facts, device)
            options = BuildOptions(task.threads, task.seed, progress, *facts)
            build_segment(folder, segment_id, task.config, task.count, rows_per_batch(task.config), options)

    for share in shares_of(work):
        yield {"share": GATHER_SHARE + (1.0 - GATHER_SHARE) * share}
