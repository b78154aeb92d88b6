"""Builds a segment from its written rows: choose, train, tune on held-out rows, add the rest, describe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.faiss_index import (
    FaissIndex,
    blocks_until,
    build_index,
    exact_search,
    library_facts,
    training_points,
    use_threads,
)
from actors.tuner import TUNING_K, held_out_count, tune, tuning_queries
from cluster import index_spec, paths
from cluster.config import CollectionConfig
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
from cluster.topk import recall_at_k

SELF_TEST_ROWS = 32
Progress = Callable[[float], None]


@dataclass(frozen=True)
class BuildOptions:
    """How to build: FAISS threads, the seed of every random choice, and a callback told the share done, 0 to 1.

    `mean` is the index of the mean segment of an import; all its segments take that kind (None: as this one's count
    has it).
    """

    threads: int = 1
    seed: int = 0
    progress: Progress = lambda share: None
    mean: IndexSpec | None = None


def build_segment(
    folder: Path, segment_id: str, config: CollectionConfig, count: int, per_batch: int, options: BuildOptions
) -> SegmentDescription:
    """Index the `count` rows of `folder/rows.arrow`; writes `index.faiss` and `segment.json` beside them."""
    started = time.perf_counter()
    use_threads(options.threads)
    rows = Rows(folder / paths.ROWS, count, config.dimension, per_batch)
    spec = _spec(count, config, options.mean)
    index, points = _build_tuned(rows, spec, config, options)
    self_test = _self_test(index, rows, config, points[0])
    index.save(folder / paths.INDEX)
    description = SegmentDescription(
        segment_id=segment_id,
        count=count,
        dimension=config.dimension,
        metric=config.metric,
        id_type=config.id_type,
        vector_dtype=config.vector_dtype,
        rows_per_batch=per_batch,
        attributes={field.name: str(field.type) for field in rows.schema if field.name not in ROW_COLUMNS},
        spec=spec.to_dict(),
        operating_points=points,
        self_test=self_test,
        files={name: checksum_file(folder / name) for name in (paths.ROWS, paths.INDEX)},
        built=_build_facts(started, options),
    )
    (folder / paths.DESCRIPTION).write_bytes(description.encode())
    return description


def _build_facts(started: float, options: BuildOptions) -> dict[str, Any]:
    seconds = round(time.perf_counter() - started, 3)
    return library_facts() | {"seconds": seconds, "threads": options.threads, "seed": options.seed}


def _spec(count: int, config: CollectionConfig, mean: IndexSpec | None) -> IndexSpec:
    """The kind of the mean segment, with parameters for this one's own count.

    Hashing gives segments slightly different counts: choosing by them could mix kinds, or find the last too large.
    """
    if mean is None:
        return index_spec.choose(count, config)
    index = replace(config.index, kind=mean.kind, memory_bytes=None)
    spec = index_spec.choose(count, replace(config, index=index))
    return replace(spec, reason=f"for the mean shard: {mean.reason}")


def _build_tuned(
    rows: Rows, spec: IndexSpec, config: CollectionConfig, options: BuildOptions
) -> tuple[FaissIndex, tuple[OperatingPoint, ...]]:
    """Rows are in hash order, so that the first ones are a random training sample and the last ones a random test."""
    sample = rows.vectors(0, training_points(spec, rows.count))
    index = build_index(spec, config.dimension, config.metric, sample, options.seed)
    known = rows.count if spec.search_param is None else rows.count - held_out_count(rows.count)
    for first, vectors in blocks_until(rows.blocks(), known):
        index.add(vectors)
        options.progress((first + len(vectors)) / rows.count * 0.8)
    points = _tune(index, spec, rows, known, config)
    options.progress(0.95)
    if known < rows.count:
        index.add(rows.vectors(known, rows.count))
    return index, points


def _tune(
    index: FaissIndex, spec: IndexSpec, rows: Rows, known: int, config: CollectionConfig
) -> tuple[OperatingPoint, ...]:
    held_out = rows.vectors(known, rows.count)
    if len(held_out) == 0:  # exact, or too few rows to keep any out: ask the rows themselves
        held_out = rows.vectors(max(0, rows.count - 10), rows.count)
    queries = tuning_queries(held_out, config.metric)
    truth = np.empty((0, TUNING_K), dtype=np.int64)
    if spec.search_param is not None:
        truth, _ = exact_search(queries, blocks_until(rows.blocks(), known), TUNING_K, config.metric)
    return tune(index, spec, queries, truth, config.index.target_recall)


def _self_test(index: FaissIndex, rows: Rows, config: CollectionConfig, point: OperatingPoint) -> SelfTest:
    """Record the exact neighbours of the last rows, and the recall the finished index has on them."""
    first = max(0, rows.count - SELF_TEST_ROWS)
    queries = rows.vectors(first, rows.count)
    truth, _ = exact_search(queries, rows.blocks(), TUNING_K, config.metric)
    found, _ = index.search(queries, TUNING_K, point.params)
    recall = float(recall_at_k(found, truth).mean())
    neighbours = tuple(tuple(row for row in line if row >= 0) for line in truth.tolist())
    return SelfTest(tuple(range(first, rows.count)), neighbours, recall)


def publish_segment(store: ObjectStore, collection: str, folder: Path, segment_id: str) -> SegmentRef:
    """Upload a built segment, its description last, and return how a manifest names it."""
    for name in (paths.ROWS, paths.INDEX):
        store.upload(folder / name, paths.segment_file(collection, segment_id, name))
    description = (folder / paths.DESCRIPTION).read_bytes()
    store.put(paths.segment_file(collection, segment_id, paths.DESCRIPTION), description)
    count = SegmentDescription.decode(description, segment_id).count
    return SegmentRef(segment_id, count, checksum_bytes(description))
