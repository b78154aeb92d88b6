"""The tasks of a rebuild before its gate: look at what there is, build a range of it, catch up with writes."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.build_rates import SAMPLE_POINTS, measure_rates
from actors.entry_seal import DraftEntry, seal_entry
from actors.faiss_index import use_threads
from actors.point_sums import sum_of_points
from actors.scratch import private_folder
from actors.segment_builder import BuildOptions, Progress, build_segment, publish_segment
from actors.segment_loader import read_description
from actors.segment_rows import HashRange, LiveRows, SegmentPart, attribute_types, open_part, open_span
from actors.shard_place import ShardPlace
from actors.tuner import HELD_OUT_MAX, tuning_queries
from cluster import paths
from cluster.config import CollectionConfig
from cluster.errors import Conflict, NotFound
from cluster.gate import PointSum
from cluster.index_costs import Rates
from cluster.index_policy import IndexPlan
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore, open_store
from cluster.segment import Rows, rows_per_batch, rows_schema, write_rows
from jobs.build_device import NO_TASK_GPUS, TaskGpus
from jobs.build_progress import shares_of

READ_SHARE = 0.2  # of a partition's time, for the progress bar: reading the old rows and writing the new ones
CATCH_UP_ROUNDS = 10  # of one task: each seals what was written during the one before
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """Where a rebuild's rows are, where this process keeps files, and what of CPUs and GPUs it has."""

    data: str
    collection: str
    job_id: str
    cache_dir: str | None = None
    threads: int = 1
    gpus: TaskGpus = NO_TASK_GPUS

    @property
    def store(self) -> ObjectStore:
        return open_store(self.data)

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else private_folder("cache")


@contextmanager
def base_rows() -> Iterator[None]:
    """The rows of the generation that is rebuilt stay while it is served, and a while after: Conflict otherwise."""
    try:
        yield
    except NotFound as error:
        raise Conflict(
            f"a segment that is to be rebuilt is gone, for it was replaced long ago: run the job again ({error})"
        ) from error


# --- what there is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SurveyTask:
    """One segment of the generation that is rebuilt, of `entry`. Its attributes count as values of the types in
    `attributes` (None: as it has them)."""

    place: Place
    entry: ShardEntry
    ref: SegmentRef
    attributes: dict[str, Any] | None = None


@dataclass(frozen=True)
class Survey:
    """Its live points, the types of its attributes, and the bytes of its index."""

    points: PointSum
    attributes: dict[str, Any]
    index_bytes: int


def survey_segment(task: SurveyTask) -> Iterator[dict[str, Any]]:
    """Verify a segment's rows, read all. Yields {"survey": Survey}."""
    place = task.place
    with base_rows():
        part = open_part(place.store, place.collection, task.entry, task.ref, place.cache)
        description = read_description(place.store, place.collection, task.ref)
    points = sum_of_points(part.rows, part.live, task.attributes)
    yield {"survey": Survey(points, attribute_types(part.rows), int(description.spec["predicted_bytes"]))}


def to_survey_again(
    tasks: Sequence[SurveyTask], surveys: Mapping[int, Survey], types: dict[str, Any]
) -> dict[int, SurveyTask]:
    """By number, those of segments that have an attribute as another type: what is built has one type for all."""
    return {
        number: replace(task, attributes=types)
        for number, task in enumerate(tasks)
        if any(types[name] != dtype for name, dtype in surveys[number].attributes.items())
    }


# --- build --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeTask:
    """One of `partitions` equal ranges of hashes, which becomes a segment.

    `entries` are the old shards that hold some of them; `plan` is the choice for the mean segment, whose kind all take.
    `queries` are real ones to tune with, (n, d), where there are some. So many as `asked` are made for the gate.
    """

    place: Place
    partition: int
    partitions: int
    entries: tuple[ShardEntry, ...]
    config: CollectionConfig
    attributes: dict[str, Any]
    plan: IndexPlan
    rates: Rates
    seed: int
    queries: Vectors | None = None
    asked: int = 0

    @property
    def hashes(self) -> HashRange:
        return HashRange.of_slot(self.partition, self.partitions)


@dataclass(frozen=True, eq=False)
class BuiltRange:
    """The segment of a range, None where it has no points; queries for the gate (n, d): its last rows with noise."""

    partition: int
    segment: SegmentRef | None = None
    queries: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))


def measure_range(task: RangeTask) -> Iterator[dict[str, Any]]:
    """Yields {"rates": Rates}: how fast this node builds from the vectors at hand."""
    use_threads(task.place.threads)
    parts, found = [], 0
    for part in _parts(task):
        rows = part.live[: SAMPLE_POINTS - found]
        parts.append(part.rows.gather_vectors(rows))
        found += len(rows)
        if found >= SAMPLE_POINTS:
            break
    yield {"rates": measure_rates(np.concatenate(parts), task.config.metric, task.place.threads)}


def build_range(task: RangeTask) -> Iterator[dict[str, Any]]:
    """Build and publish one segment. Yields {"share": 0..1}, at last {"built": BuiltRange, "rows": n}.

    Memory: 40 bytes for each row of the range while they are ordered, one block of rows, then the index.
    """
    use_threads(task.place.threads)
    with tempfile.TemporaryDirectory(prefix="eagleray-build-") as name:
        folder = Path(name)
        segment_id = f"{task.place.job_id}-{task.partition:06d}-{uuid.uuid4().hex[:8]}"  # as `is_segment_of` reads it
        shares = shares_of(lambda progress: _build(task, folder, segment_id, progress))
        try:
            while True:
                yield {"share": next(shares)}
        except StopIteration as end:
            count: int = end.value
        if not count:
            yield {"built": BuiltRange(task.partition), "rows": 0}
            return
        queries = _queries(task, folder, count)
        ref = publish_segment(task.place.store, task.place.collection, folder, segment_id)
        yield {"built": BuiltRange(task.partition, ref, queries), "rows": count}


def _parts(task: RangeTask) -> Iterator[SegmentPart]:
    """The segments that hold rows of the range."""
    place = task.place
    store, cache_dir = place.store, place.cache
    for entry in task.entries:
        for ref in entry.segments:
            with base_rows():
                part = open_span(store, place.collection, entry, ref, cache_dir, task.hashes)
            if part is not None:
                yield part


def _build(task: RangeTask, folder: Path, segment_id: str, progress: Progress) -> int:
    """Returns the number of rows."""
    count = _write(task, folder, progress)
    if not count:
        return 0

    def told(share: float) -> None:
        progress(READ_SHARE + (1.0 - READ_SHARE) * share)

    gpus = task.place.gpus
    with gpus.device() as device:
        facts = (task.plan, task.rates, task.queries, gpus.facts, device)
        options = BuildOptions(task.place.threads, task.seed, told, *facts)
        build_segment(folder, segment_id, task.config, count, rows_per_batch(task.config), options)
    return count


def _write(task: RangeTask, folder: Path, progress: Progress) -> int:
    """Write `rows.arrow`. What orders the rows is let go when this returns."""
    live = LiveRows(list(_parts(task)))

    def told(blocks: Iterator[Any]) -> Iterator[Any]:
        done = 0
        for block in blocks:
            done += block.num_rows
            yield block
            del block  # else it would be there while the next one is made
            progress(READ_SHARE * done / live.count)

    if live.count:
        schema = rows_schema(task.config, task.attributes)
        write_rows(folder / paths.ROWS, schema, told(live.blocks(schema, rows_per_batch(task.config))))
    return live.count


def _queries(task: RangeTask, folder: Path, count: int) -> Vectors:
    """The last rows, which any index saw last, as the tuner makes queries of them."""
    config = task.config
    rows = Rows(folder / paths.ROWS, count, config.dimension, rows_per_batch(config))
    last = np.array(rows.vectors(max(0, count - task.asked), count))
    sample = rows.vectors(0, min(count, HELD_OUT_MAX))
    return tuning_queries(last, sample, config.metric, task.seed + 1 + task.partition)


# --- catch up -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CatchUpTask:
    """One new shard, which is not committed yet. `base` is the newest version of the generation that is served."""

    place: Place
    draft: DraftEntry
    base: Manifest
    config: CollectionConfig
    points_max: int


def catch_up(task: CatchUpTask) -> Iterator[dict[str, Any]]:
    """Seal what was written since, until little is left. Yields {"share"}, at last {"draft": DraftEntry, "ids": n}.

    `ids` are those that were sealed: 0 where little was left to begin with.
    """
    use_threads(task.place.threads)
    place, shard = task.place, task.draft.entry.shard
    name, draft, sealed = f"{place.job_id}-{shard:06d}", task.draft, 0
    # One for all rounds: the rows that it has opened are verified once.
    here = ShardPlace(place.store, place.collection, shard, place.cache, lambda: uuid.uuid4().hex, place.threads)
    for number in range(CATCH_UP_ROUNDS):
        before = draft

        def round_(progress: Progress, draft: DraftEntry = draft) -> tuple[DraftEntry, int]:
            at = replace(here, progress=progress)
            return seal_entry(at, draft, task.base, task.config, name, task.points_max)

        shares = shares_of(round_)
        try:
            while True:
                yield {"share": (number + next(shares)) / CATCH_UP_ROUNDS}
        except StopIteration as end:
            draft, ids = end.value
        if draft is before or not ids:
            break
        sealed += ids
    yield {"draft": draft, "ids": sealed}
