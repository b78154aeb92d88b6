"""The gate's measurements: every segment of a new generation is loaded, self-tested and asked, as a replica would.

One task per segment, so that no more than one index is in a task's memory: its best hits, approximate and exact, are
merged over the whole generation as a coordinator merges those of shards. `cluster.gate` decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.faiss_index import use_threads
from actors.gpu_device import GpuDevice
from actors.point_sums import sum_of_points
from actors.segment_builder import REAL_QUERIES_MIN as TUNED_ON_MIN
from actors.segment_loader import LoadedSegment, load_segment
from actors.segment_rows import RowNumbers, deleted_rows
from actors.shard_view import ShardView
from cluster.config import CollectionConfig
from cluster.errors import Corrupt, EaglerayError
from cluster.gate import (
    GATE_K,
    GateFacts,
    MeasuredLatency,
    MeasuredRecall,
    PointSum,
)
from cluster.manifest import SegmentRef, ShardEntry
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.row_selection import RowSelection
from cluster.topk import join_queries, merge_hits, recall_at_k, split_hits
from jobs.build_plan import BuildPlan, Builds, Workers
from jobs.rebuild_task import Place, Vectors, base_rows

GATE_QUERIES = 500  # rows with noise, over all segments; as many recent ones at most
GATE_QUERIES_MIN = 100  # of a generation whose exact truth takes long
EXACT_QUERIES = 32  # of an index that is exact: for its latency
TRUTH_FLOATS = 30_000_000_000  # queries x points x dimension that are compared for the truth: some 10 s of a core
AT_ONCE = 64  # queries of one search
LATENCY_QUERIES = 32
LATENCY_REPEATS = 3  # of which the best counts: what else the machine does only adds
LATENCY_TRIES = 3  # of all that, while it would be refused: others may just have been busy
LATENCY_QUERIES_MIN, LATENCY_S = 5, 2.0  # of each repeat: more queries only while they take no longer
AS_TUNED, EXACTLY = SearchParams(), SearchParams(exact=True)


def gate_queries(plan: BuildPlan) -> int:
    """How many queries of a kind a new generation is asked: work for the truth that is bounded, as far as it can be."""
    if plan.spec.is_exact:
        return EXACT_QUERIES
    affordable = TRUTH_FLOATS // (plan.rows * plan.config.dimension)
    return max(GATE_QUERIES_MIN, min(GATE_QUERIES, affordable))


@dataclass(frozen=True, eq=False)
class SegmentTask:
    """One segment of a new generation, `deleted` rows of it, and queries (n, d) to ask it.

    `summed`: whether its points, deleted ones too, are to be compared with the old ones.
    """

    place: Place
    ref: SegmentRef
    deleted: RowNumbers
    config: CollectionConfig
    queries: Vectors
    summed: bool


@dataclass(frozen=True, eq=False)
class SegmentLook:
    """What a segment answered, None without queries; `damaged` says why it cannot be served ("": it can)."""

    damaged: str = ""
    points: PointSum = field(default_factory=PointSum)
    exact: bool = True
    found: Hits | None = None
    truth: Hits | None = None


def look_at_segment(task: SegmentTask) -> Iterator[dict[str, object]]:
    """Load and ask one segment. Yields {"share": 0..1}, at last {"look": SegmentLook}."""
    use_threads(task.place.threads)
    with task.place.gpus.device() as device:
        yield from _look(task, device)


def _look(task: SegmentTask, device: GpuDevice | None) -> Iterator[dict[str, object]]:
    """What is served on GPUs is asked on this one, exact indexes as well; without any its twin is asked."""
    place, config = task.place, task.config
    try:
        segment = load_segment(place.store, place.collection, task.ref, config.metric, place.cache, device)
    except Corrupt as error:
        yield {"look": SegmentLook(str(error))}
        return
    rows, count = segment.rows, task.ref.count
    points = sum_of_points(rows, np.arange(count)) if task.summed else PointSum()
    exact = segment.spec.is_exact and segment.spec.device == "cpu"
    view, parts = _view(config, segment, task.deleted), []
    for start in range(0, len(task.queries), AT_ONCE):
        queries = task.queries[start : start + AT_ONCE]
        truth = _hits(view, queries, EXACTLY)
        parts.append((truth if exact else _hits(view, queries, AS_TUNED), truth))
        rows.forget_pages()
        yield {"share": (start + len(queries)) / len(task.queries)}
    answers = [join_queries(hits) for hits in zip(*parts, strict=True)] if parts else [None, None]
    yield {"look": SegmentLook("", points, exact, *answers)}


def _view(config: CollectionConfig, segment: LoadedSegment, deleted: RowNumbers) -> ShardView:
    selections = {}
    if len(deleted):
        count = segment.description.count
        selections[segment.description.segment_id] = RowSelection.everything(count).without(deleted)
    return ShardView(0, 0, config, (segment,), selections)


def _hits(view: ShardView, queries: Vectors, params: SearchParams) -> Hits:
    (outcome,) = view.search(ShardSearch(0, queries, (SearchGroup(0, len(queries), GATE_K, params),)))
    if isinstance(outcome, EaglerayError):
        raise outcome
    return outcome


# --- latency ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardSegments:
    """A shard's segments, and their deleted rows by segment."""

    config: CollectionConfig
    segments: tuple[SegmentRef, ...]
    deleted: dict[str, RowNumbers]

    @property
    def points(self) -> int:
        return sum(ref.count for ref in self.segments) - sum(map(len, self.deleted.values()))


@dataclass(frozen=True, eq=False)
class LatencyTask:
    """The largest shard of each generation, and queries (n, d)."""

    place: Place
    old: ShardEntry
    old_config: CollectionConfig
    new: ShardSegments
    queries: Vectors


def measure_latency(task: LatencyTask) -> Iterator[dict[str, object]]:
    """Both shards in one process, one segment in memory at a time. Yields {"old_ms": float, "new_ms": float}.

    Nothing where the GPU that it asked for cannot be used, or this share of it does not hold an index: the twins' times
    would say nothing.
    """
    place = task.place
    use_threads(place.threads)
    with base_rows():
        deleted = {
            ref.segment_id: deleted_rows(place.store, place.collection, task.old, ref) for ref in task.old.segments
        }
    with place.gpus.device() as device:
        if place.gpus.share and device is None:
            return
        with base_rows():
            old = ShardSegments(task.old_config, task.old.segments, deleted)
            old_ms = _shard_ms(place, old, task.queries, device)
        new_ms = None if old_ms is None else _shard_ms(place, task.new, task.queries, device)
        if old_ms is not None and new_ms is not None:
            yield {"old_ms": old_ms, "new_ms": new_ms}


def _shard_ms(place: Place, shard: ShardSegments, queries: Vectors, device: GpuDevice | None) -> float | None:
    """Median milliseconds of one query: a shard asks its segments one after the other. None where a twin answers."""
    total = 0.0
    for ref in shard.segments:
        segment = load_segment(place.store, place.collection, ref, shard.config.metric, place.cache, device)
        if device is not None and segment.twin is not None and segment.twin.gpu is None:
            return None
        view = _view(shard.config, segment, shard.deleted.get(ref.segment_id, np.empty(0, np.int64)))
        total += min(_median_ms(view, queries) for _ in range(LATENCY_REPEATS))
    return total


def _median_ms(view: ShardView, queries: Vectors) -> float:
    times: list[float] = []
    for query in queries:
        if len(times) >= LATENCY_QUERIES_MIN and sum(times) > LATENCY_S:
            break
        started = perf_counter()
        _hits(view, query[None, :], AS_TUNED)
        times.append(perf_counter() - started)
    return 1e3 * float(np.median(times))


# --- the generation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Candidate:
    """A generation that wants to be served. `built` are the segments made of `old`'s live points, also those whose
    points were all written again; other segments of `shards` hold what was written since. `same`: as the one that is
    served, in index, target and number of shards.

    `made` are queries made of rows, `real` those of clients, both (n, d), of which up to `asked` are asked;
    `tuned_on_real`: the operating points were proven with these.
    """

    config: CollectionConfig
    shards: tuple[ShardSegments, ...]
    built: tuple[SegmentRef, ...]
    old: PointSum
    same: bool
    made: Vectors
    real: Vectors | None
    asked: int

    @property
    def tuned_on_real(self) -> bool:
        return self.real is not None and len(self.real) >= TUNED_ON_MIN


def measure_gate(
    place: Place,
    candidate: Candidate,
    old_shards: Sequence[ShardEntry],
    old_config: CollectionConfig,
    workers: Workers,
    builds: Builds,
) -> Iterator[float | GateFacts]:
    """Yields the share done, 0 to 1, and at last the facts. Without `old_shards` there is no latency to compare."""
    sets = _query_sets(candidate)
    queries = np.concatenate([np.empty((0, candidate.config.dimension), np.float32), *(asked for _, asked, _ in sets)])
    tasks = _segment_tasks(place, candidate, queries)
    seen = _Seen(candidate.config)
    shares = [0.0] * len(tasks)
    for number, event in workers.build(look_at_segment, tasks, builds):
        shares[number] = event.get("share", 1.0)
        if "look" in event:
            seen.add(event["look"])
        yield 0.9 * sum(shares) / len(shares)
    latency = None
    if not seen.damaged and len(queries):
        task = _latency_task(place, candidate, old_shards, old_config, queries)
        latency = _least_latency(task, candidate.same, workers, builds) if task else None
    recalls = () if seen.damaged else tuple(seen.recalls(sets))
    target = candidate.config.index.target_recall
    yield GateFacts(target, seen.exact, candidate.old, seen.points, recalls, latency, tuple(seen.damaged))


def _segment_tasks(place: Place, candidate: Candidate, queries: Vectors) -> list[SegmentTask]:
    built = {ref.segment_id: ref for ref in candidate.built}
    tasks = []
    for shard in candidate.shards:
        for ref in shard.segments:
            deleted = shard.deleted.get(ref.segment_id, np.empty(0, np.int64))
            summed = built.pop(ref.segment_id, None) is not None
            tasks.append(SegmentTask(place, ref, deleted, candidate.config, queries, summed))
    nothing = queries[:0]
    gone = [SegmentTask(place, ref, np.empty(0, np.int64), candidate.config, nothing, True) for ref in built.values()]
    return tasks + gone


def _least_latency(task: LatencyTask, binding: bool, workers: Workers, builds: Builds) -> MeasuredLatency | None:
    """Of as many tries as it takes to be within its bound, at most `LATENCY_TRIES`; None where none measured it."""
    least = unmeasured = MeasuredLatency(float("inf"), float("inf"), binding)
    for _ in range(LATENCY_TRIES):
        for _, event in workers.build(measure_latency, [task], builds):
            least = MeasuredLatency(min(least.old_ms, event["old_ms"]), min(least.new_ms, event["new_ms"]), binding)
        if not binding or least.new_ms <= least.bound_ms:
            break
    return None if least == unmeasured else least


class _Seen:
    """What the segments answered, merged as it comes."""

    def __init__(self, config: CollectionConfig) -> None:
        self._metric = config.metric
        self._found: Hits | None = None
        self._truth: Hits | None = None
        self.points = PointSum()
        self.exact = True
        self.damaged: list[str] = []

    def add(self, look: SegmentLook) -> None:
        if look.damaged:
            self.damaged.append(look.damaged)
            return
        self.points += look.points
        self.exact &= look.exact
        self._found = self._merged(self._found, look.found)
        self._truth = self._merged(self._truth, look.truth)

    def _merged(self, one: Hits | None, other: Hits | None) -> Hits | None:
        parts = [hits for hits in (one, other) if hits is not None]
        return merge_hits(parts, GATE_K, self._metric) if parts else None

    def recalls(self, sets: Sequence[tuple[str, Vectors, bool]]) -> Iterator[MeasuredRecall]:
        """Of every set of queries, in the order in which they were asked."""
        if self._found is None or self._truth is None:
            return
        sizes = [len(asked) for _, asked, _ in sets]
        answers = zip(sets, split_hits(self._found, sizes), split_hits(self._truth, sizes), strict=True)
        for (name, asked, binding), found, truth in answers:
            recalls = recall_at_k(*_numbered(found, truth))
            deviation = float(recalls.std(ddof=1)) if len(recalls) > 1 else 0.0
            yield MeasuredRecall(name, len(asked), float(recalls.mean()), deviation, binding)


def _query_sets(candidate: Candidate) -> list[tuple[str, Vectors, bool]]:
    """(what they are, queries, whether their recall decides).

    What the operating points were proven with decides: rows with noise may be harder than what clients really ask.
    """
    sets = [("rows with noise", candidate.made[: candidate.asked], not candidate.tuned_on_real)]
    if candidate.real is not None:
        asked = candidate.real[: candidate.asked]
        sets.append(("recent queries", asked, candidate.tuned_on_real))
    return [each for each in sets if len(each[1])]


def _latency_task(
    place: Place,
    candidate: Candidate,
    old_shards: Sequence[ShardEntry],
    old_config: CollectionConfig,
    queries: Vectors,
) -> LatencyTask | None:
    """None where one of the generations has no points, or the old one is not to be loaded."""
    old = max(old_shards, key=lambda entry: entry.points, default=ShardEntry(0))
    new = max(candidate.shards, key=lambda shard: shard.points)
    if not old.points or not new.points:
        return None
    step = max(1, len(queries) // LATENCY_QUERIES)
    return LatencyTask(place, old, old_config, new, queries[::step][:LATENCY_QUERIES])


def _numbered(found: Hits, truth: Hits) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both answers as numbers that stand for ids, (queries, k), -1 where there is none."""
    both = pa.chunked_array([found.ids, truth.ids]).combine_chunks()
    numbers = both.dictionary_encode().indices.to_numpy().astype(np.int64)
    return _table(found.counts, numbers[: len(found.ids)]), _table(truth.counts, numbers[len(found.ids) :])


def _table(counts: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    table = np.full((len(counts), GATE_K), -1, dtype=np.int64)
    table[np.arange(GATE_K) < counts[:, None]] = numbers
    return table
