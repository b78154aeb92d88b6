"""Builds a segment from its written rows: choose, train, tune on held-out rows, add the rest, describe."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.code_check import CHECKED_ROWS, codes_fit
from actors.exact_search import blocks_until, exact_search
from actors.faiss_index import build_index, library_facts, use_threads
from actors.gpu_device import GpuDevice, GpuLost, GpuMemoryFull
from actors.gpu_index import build_on_gpu
from actors.segment_searcher import SegmentSearcher
from actors.self_test import GpuWrong, problem_on_gpu, recall_of
from actors.tuner import (
    HELD_OUT_MAX,
    TUNING_K,
    Knobs,
    TuningSet,
    held_out_count,
    tune,
    tune_near_and_far,
    tune_with_twin,
    tuning_queries,
)
from cluster import index_costs, paths
from cluster.config import Codes, CollectionConfig, Metric
from cluster.errors import Unavailable
from cluster.free_memory import give_back_memory
from cluster.gpu_memory import GpuFacts
from cluster.index_costs import REFERENCE, Rates
from cluster.index_policy import IndexPlan, like, plan_index, stronger, with_codes, with_store
from cluster.index_spec import IndexSpec
from cluster.manifest import SegmentRef
from cluster.object_store import ObjectStore
from cluster.segment import (
    ROW_COLUMNS,
    OperatingPoint,
    Rows,
    SegmentDescription,
    SelfTest,
    checksum_bytes,
    checksum_file,
)
from cluster.topk import smaller_is_better

REAL_QUERIES_MIN = 500  # fewer say less about the next ones than rows with noise do
SELF_TEST_ROWS = 32
SPREAD_ROWS, LAST_ROWS = 48, 16  # of the self-test of an index for GPUs: all over the segment, and at its end
ROUGH_EF_SEARCH = 64  # orders queries by their distance from the rows well enough
GPU_FAILURES = (GpuMemoryFull, GpuLost, GpuWrong)  # of a build there; another one may do
Progress = Callable[[float], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How to build: FAISS threads, the seed of every random choice, and a callback told the share done, 0 to 1.

    `plan` is the choice for the mean segment of an import; all its segments take that kind (None: as this one's count
    has it). `rates` are what its times were predicted with. `queries` (n, d) are real ones to tune with. `gpu` is what
    is known of the GPUs that will serve it, where there is no plan; `device` is one to build on.
    """

    threads: int = 1
    seed: int = 0
    progress: Progress = lambda share: None
    plan: IndexPlan | None = None
    rates: Rates = REFERENCE
    queries: NDArray[np.float32] | None = None
    gpu: GpuFacts | None = None
    device: GpuDevice | None = None


def build_segment(
    folder: Path, segment_id: str, config: CollectionConfig, count: int, per_batch: int, options: BuildOptions
) -> SegmentDescription:
    """Index the `count` rows of `folder/rows.arrow`; writes `index.faiss` and `segment.json` beside them.

    Invalid where nothing meets the bounds. Unavailable where the GPU fails to and `gpu_full` forbids to step down.
    """
    use_threads(options.threads)
    rows = Rows(folder / paths.ROWS, count, config.dimension, per_batch)
    plan = options.plan or plan_index(count, config, options.rates, options.gpu)
    spec = _spec(rows, config, plan, options)
    built = _build_or_step_down(rows, spec, config, options, folder / paths.INDEX)
    give_back_memory()  # this process may build another one
    files = {name: checksum_file(folder / name) for name in (paths.ROWS, paths.INDEX)}
    description = SegmentDescription(
        segment_id=segment_id,
        count=count,
        dimension=config.dimension,
        metric=config.metric,
        id_type=config.id_type,
        vector_dtype=config.vector_dtype,
        rows_per_batch=per_batch,
        attributes={field.name: str(field.type) for field in rows.schema if field.name not in ROW_COLUMNS},
        spec=built.spec.to_dict(),
        operating_points=built.points,
        self_test=built.self_test,
        files=files,
        built=_build_facts(built, options),
        considered=tuple(candidate.to_dict() for candidate in plan.considered),
        cpu_twin=built.cpu_twin,
    )
    (folder / paths.DESCRIPTION).write_bytes(description.encode())
    return description


@dataclass(frozen=True)
class _Built:
    """A finished index that was saved, what it was tuned to, and what it took."""

    spec: IndexSpec
    points: tuple[OperatingPoint, ...]
    self_test: SelfTest
    predicted_s: float | None
    build_s: float  # train and add
    tune_s: float
    tuned_on: str
    cpu_twin: dict[str, Any] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)


def _build_facts(built: _Built, options: BuildOptions) -> dict[str, Any]:
    predicted = {} if built.predicted_s is None else {"predicted_seconds": round(built.predicted_s, 3)}
    return (
        library_facts()
        | predicted
        | {
            "rates_measured": options.rates.measured,
            "seconds": round(built.build_s, 3),
            "tuning_seconds": round(built.tune_s, 3),
            "tuned_on": built.tuned_on,
            "threads": options.threads,
            "seed": options.seed,
        }
        | built.gpu
    )


def _spec(rows: Rows, config: CollectionConfig, plan: IndexPlan, options: BuildOptions) -> IndexSpec:
    """The planned kind with parameters for this segment's own count, and codes that its vectors survive.

    Hashing gives segments slightly different counts: choosing by them could mix kinds, or find the last too large.
    """
    spec = like(plan.spec, rows.count, config)
    if options.plan is not None:
        spec = replace(spec, reason=f"for the mean shard: {spec.reason}")
    if config.index.kind != "auto" and (spec.kind not in ("hnsw", "cagra") or config.index.codes is not None):
        return spec  # what was asked for by name
    sample = rows.vectors(0, min(rows.count, CHECKED_ROWS))
    lossy_store = spec.rerank_store
    if lossy_store in ("float16", "sq8") and not codes_fit(sample, lossy_store, config.metric):
        spec = with_store(spec, "rows", rows.count, config, f"{lossy_store} would lose neighbours of these vectors")
    if (spec.kind == "hnsw" or spec.device == "gpu") and not codes_fit(sample, spec.codes, config.metric):
        eight = spec.kind == "hnsw" and spec.codes == "float16" and codes_fit(sample, "sq8", config.metric)
        codes: Codes = "sq8" if eight else "float32"
        why = f"{spec.codes} would lose neighbours of these vectors"
        spec = with_codes(spec, codes, rows.count, config, why, options.gpu)
    return spec


def _build_or_step_down(
    rows: Rows, spec: IndexSpec, config: CollectionConfig, options: BuildOptions, path: Path
) -> _Built:
    """As planned. On the CPU where the GPU has no room for it after all, is lost or wrong; what only a GPU builds is
    then another kind.
    """
    try:
        return _build_best(rows, spec, config, options, path)
    except GPU_FAILURES as error:
        failed = f"{options.device.name if options.device else 'the GPU'} failed to build {spec.kind}: {error}"
    if config.index.gpu_full == "refuse":
        raise Unavailable(f"{failed}; with gpu_full step_down another index would be built")
    logger.warning("%s: the CPU builds", failed)
    if spec.kind == "cagra":
        spec = plan_index(rows.count, config, options.rates, replace(options.gpu or GpuFacts(), builds=False)).spec
    spec = replace(spec, reason=f"{spec.reason}; {failed}")
    return _build_best(rows, spec, config, replace(options, device=None), path)


def _build_best(rows: Rows, spec: IndexSpec, config: CollectionConfig, options: BuildOptions, path: Path) -> _Built:
    """Build, tune and save; where the target is missed and something stronger fits, that as well: the better one stays.

    One index at a time is in memory. A GPU that fails to build the stronger one has built the other: that stays.
    """
    best = _build_tuned(rows, spec, config, options, path)
    spent_s = best.build_s
    while not best.points[0].met and (better := stronger(best.spec, rows.count, config, options.gpu)) is not None:
        seconds = index_costs.build_seconds(better, rows.count, config.dimension, options.rates)
        longer_s = spent_s + (2.0 * best.build_s if seconds is None else seconds)  # a stronger one is twice the work
        if config.index.build_seconds is not None and longer_s > config.index.build_seconds:
            break
        aside = path.with_suffix(".again")
        try:
            again = _build_tuned(rows, better, config, options, aside)
        except GPU_FAILURES as error:
            logger.warning("a stronger %s is not built: %s", better.kind, error)
            break
        spent_s += again.build_s
        if not again.points[0].met and again.points[0].recall <= best.points[0].recall:
            aside.unlink()
            break
        os.replace(aside, path)
        best = again
    return replace(best, build_s=spent_s)


def _build_tuned(rows: Rows, spec: IndexSpec, config: CollectionConfig, options: BuildOptions, path: Path) -> _Built:
    """Rows are in hash order, so that the first ones are a random training sample and the last ones a random test."""
    if spec.device == "gpu" and options.device is not None:
        return _build_on_gpu(options.device, rows, spec, config, options, path)
    clock = time.perf_counter
    started = clock()
    sample = rows.vectors(0, spec.training_points(rows.count))
    index = build_index(spec, config.dimension, config.metric, sample, options.seed)
    knobs = Knobs(spec.tuned_knobs if spec.kind != "factory" else index.knobs, rows.count, index.lists)
    index.reserve(rows.count)
    known = rows.count if spec.is_exact else rows.count - held_out_count(rows.count)
    for first, vectors in blocks_until(rows.blocks(), known):
        index.add(vectors)
        options.progress((first + len(vectors)) / rows.count * 0.8)
    searcher = SegmentSearcher(index, spec, rows, config.metric)
    added = clock()
    truth = _Truth(rows, known, config.metric, not spec.is_exact)
    points, tuned_on = _tuned(searcher, knobs, truth, config.index.target_recall, options)
    tuned = clock()
    options.progress(0.95)
    if known < rows.count:
        index.add(rows.vectors(known, rows.count))
    build_s = added - started + clock() - tuned
    self_test = _self_test(searcher, spec, config, points[0])
    index.save(path)
    return _Built(spec, points, self_test, _predicted_s(spec, rows, options), build_s, tuned - added, tuned_on)


def _build_on_gpu(
    device: GpuDevice, rows: Rows, spec: IndexSpec, config: CollectionConfig, options: BuildOptions, path: Path
) -> _Built:
    """The index has all rows before it is tuned: what a CPU can read is made of it once.

    GpuMemoryFull, GpuLost; GpuWrong where FAISS refuses something, or what is found or scored is not as the rows say.
    """
    try:
        return _built_there(device, rows, spec, config, options, path)
    except RuntimeError as error:  # the CPU may build it all the same
        raise GpuWrong(f"FAISS refuses it: {error}") from None


def _built_there(
    device: GpuDevice, rows: Rows, spec: IndexSpec, config: CollectionConfig, options: BuildOptions, path: Path
) -> _Built:
    clock, metric = time.perf_counter, config.metric
    started = clock()
    cpu, gpu = build_on_gpu(
        device, spec, rows.dimension, metric, rows, options.seed, lambda share: options.progress(0.8 * share)
    )
    try:
        added = clock()
        searcher, twin = SegmentSearcher(gpu, spec, rows, metric), SegmentSearcher(cpu, spec, rows, metric)
        truth = _Truth(rows, rows.count, metric, not spec.is_exact)
        asked, tuned_on = _asked_on_gpu(truth, options)
        knobs = Knobs(spec.tuned_knobs, rows.count, gpu.lists)
        points, twins = tune_with_twin(searcher, twin, knobs, asked, config.index.target_recall)
        tuned = clock()
        options.progress(0.95)
        self_test = _self_test(searcher, spec, config, points[0])
        if problem := problem_on_gpu(searcher, cpu, spec, config.metric, self_test, points[0].params):
            raise GpuWrong(f"its self-test failed: {problem}")
        found = recall_of(twin, self_test, points[0].params) if twins else self_test.recall
        cpu.save(path)
        facts = {
            "gpu": device.name,
            "gpu_predicted_bytes": gpu.predicted_bytes,
            "gpu_measured_bytes": gpu.measured_bytes,
        }
    finally:
        gpu.close()
    told = {"recall": found, "operating_points": [asdict(point) for point in twins]} if twins else {}
    return _Built(spec, points, self_test, None, added - started, tuned - added, tuned_on, told, facts)


def _asked_on_gpu(truth: _Truth, options: BuildOptions) -> tuple[TuningSet, str]:
    """(what an index is tuned with that has seen all rows, in words): real queries, or the last rows with noise."""
    rows, real = truth.rows, options.queries
    if real is not None and len(real) >= REAL_QUERIES_MIN:
        return truth.of(real[-HELD_OUT_MAX:]), f"{min(len(real), HELD_OUT_MAX)} recent queries"
    last = rows.vectors(rows.count - max(held_out_count(rows.count), min(10, rows.count)), rows.count)
    noisy = tuning_queries(last, rows.vectors(0, min(rows.count, HELD_OUT_MAX)), truth.metric, options.seed)
    return truth.of(noisy), f"{len(noisy)} rows with noise"


def _predicted_s(spec: IndexSpec, rows: Rows, options: BuildOptions) -> float | None:
    """Rates that were not measured here are those of other threads than this build's. None for a GPU's index."""
    seconds = index_costs.build_seconds(spec, rows.count, rows.dimension, options.rates)
    if seconds is None:
        return None
    return seconds if options.rates.measured else seconds * options.rates.threads / options.threads


def _tuned(
    searcher: SegmentSearcher, knobs: Knobs, truth: _Truth, target_recall: float, options: BuildOptions
) -> tuple[tuple[OperatingPoint, ...], str]:
    """(operating points, what they were proven with): real queries where there are enough, else rows held out.

    Whether a query is near is not told under an inner product, which grows with the query's length.
    """
    rows, metric, real = truth.rows, truth.metric, options.queries
    if real is not None and len(real) >= REAL_QUERIES_MIN:
        asked = real[-HELD_OUT_MAX:]
        return tune(searcher, knobs, truth.of(asked), target_recall), f"{len(asked)} recent queries"
    held_out = rows.vectors(truth.known, rows.count)
    if len(held_out) == 0:  # exact, or too few rows to keep any out: ask the rows themselves
        held_out = rows.vectors(max(0, rows.count - 10), rows.count)
    noisy = tuning_queries(held_out, rows.vectors(0, min(rows.count, HELD_OUT_MAX)), metric, options.seed)
    if knobs.names != ("ef_search",) or metric == "ip":
        return tune(searcher, knobs, truth.of(noisy), target_recall), f"{len(noisy)} rows with noise"
    far = _farther_half(searcher, noisy, metric)
    points = tune_near_and_far(searcher, knobs, truth.of(held_out), truth.of(far), metric, target_recall)
    return points, f"{len(held_out)} rows and {len(far)} rows with noise"


def _farther_half(searcher: SegmentSearcher, queries: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Those that are farther from the rows, about: by what a search finds."""
    _, scores = searcher.search(queries, TUNING_K, {"ef_search": ROUGH_EF_SEARCH})
    order = np.argsort(scores[:, -1] if smaller_is_better(metric) else -scores[:, -1], kind="stable")
    return queries[np.sort(order[len(order) // 2 :])]


@dataclass(frozen=True)
class _Truth:
    """Exact answers from the first `known` rows; none for an exact index."""

    rows: Rows
    known: int
    metric: Metric
    needed: bool

    def of(self, queries: NDArray[np.float32]) -> TuningSet:
        if not self.needed:
            return TuningSet(queries, np.empty((0, TUNING_K), np.int64), np.empty((0, TUNING_K), np.float32))
        blocks = blocks_until(self.rows.blocks(), self.known)
        return TuningSet(queries, *exact_search(queries, blocks, TUNING_K, self.metric))


def _self_test(searcher: SegmentSearcher, spec: IndexSpec, config: CollectionConfig, point: OperatingPoint) -> SelfTest:
    """Record the exact neighbours of some rows, and the recall the finished index has on them.

    They are the last ones; of an index for GPUs, which may be wrong from some row on, they lie all over the segment.
    """
    rows = searcher.rows
    asked = np.arange(max(0, rows.count - (LAST_ROWS if spec.device == "gpu" else SELF_TEST_ROWS)), rows.count)
    if spec.device == "gpu":
        asked = np.union1d(np.linspace(0, rows.count - 1, SPREAD_ROWS).astype(np.int64), asked)
    truth, _ = exact_search(rows.gather_vectors(asked), rows.blocks(), TUNING_K, config.metric)
    neighbours = tuple(tuple(row for row in line if row >= 0) for line in truth.tolist())
    test = SelfTest(tuple(asked.tolist()), neighbours)
    return replace(test, recall=recall_of(searcher, test, point.params))


def publish_segment(store: ObjectStore, collection: str, folder: Path, segment_id: str) -> SegmentRef:
    """Upload a built segment, its description last, and return how a manifest names it."""
    for name in (paths.ROWS, paths.INDEX):
        store.upload(folder / name, paths.segment_file(collection, segment_id, name))
    description = (folder / paths.DESCRIPTION).read_bytes()
    store.put(paths.segment_file(collection, segment_id, paths.DESCRIPTION), description)
    count = SegmentDescription.decode(description, segment_id).count
    return SegmentRef(segment_id, count, checksum_bytes(description))
