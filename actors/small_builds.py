"""The index of a segment that is one of several of a shard: as the config asks, as far as so many points allow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from actors.segment_builder import BuildOptions, Progress, build_segment
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Invalid
from cluster.gpu_memory import GpuFacts
from cluster.object_store import ObjectStore
from cluster.recent_queries import read_queries

SEED = 0
logger = logging.getLogger(__name__)


def build_beside_others(
    store: ObjectStore,
    collection: str,
    config: CollectionConfig,
    folder: Path,
    segment_id: str,
    count: int,
    others: int,
    per_batch: int,
    threads: int,
    progress: Progress,
) -> None:
    """Index the `count` rows in `folder`, tuned on recent queries; the shard's other segments have `others` points.

    An import may be refused for its bounds; here the points are acknowledged, and must not stay in the tail for ever.
    So a bound that cannot be kept is given up, with a warning, and at last a scan does for any number of points.

    `config` is that of the generation's device (`Manifest.built_for`). For GPUs it gets an index that they search and
    that a CPU builds: no GPU is taken from who searches.
    """
    queries = read_queries(store, collection, config, SEED)
    gpu = GpuFacts(builds=False) if config.index.device == "gpu" else None
    options = BuildOptions(threads, SEED, progress, queries=queries, gpu=gpu)
    refused = ""
    for index, bounds in _acceptable(config.index, count, others):
        if refused:
            logger.warning("segment %s of %r is built %s: %s", segment_id, collection, bounds, refused)
        try:
            build_segment(folder, segment_id, replace(config, index=index), count, per_batch, options)
        except Invalid as error:
            refused = str(error)
        else:
            return
    raise Invalid.at("index", refused)


def _acceptable(index: IndexConfig, count: int, others: int) -> Iterator[tuple[IndexConfig, str]]:
    """What to try, in order. The config's memory is the whole shard's: a segment has its share by points."""
    if index.memory_bytes is not None:
        share = max(1, index.memory_bytes * count // max(1, count + others))
        yield replace(index, memory_bytes=share), "with its share of memory_bytes"
    yield index, "with the memory_bytes of the whole shard"
    unbounded = replace(index, memory_bytes=None, build_seconds=None)
    yield unbounded, "without bounds on memory and time"
    yield replace(unbounded, nlist=None), "with as many lists as its points allow"
    yield IndexConfig("flat"), "as a scan"
