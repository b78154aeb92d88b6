"""Segments for GPUs in the tests of actors: built, loaded and searched on the stand-in for FAISS's GPU part."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import Any

from actors.gpu_device import GpuDevice
from actors.segment_builder import BuildOptions, publish_segment
from cluster.config import CollectionConfig, IndexConfig
from cluster.gpu_memory import PROCESS_BYTES, gpu_need
from cluster.index_spec import IndexSpec
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from tests.gpu_double import GpuDouble
from tests.unit.actors.points import Points, build, in_row_order, manifest_log, random_points

COUNT, DIMENSION = 1_000, 8  # of fewer points a GPU gets no other index than an exact one
KINDS: dict[str, dict[str, Any]] = {
    "flat": {"kind": "flat"},
    "flat float16": {"kind": "flat", "codes": "float16"},
    "ivf_flat": {"kind": "ivf_flat", "nlist": 16},
    "ivf_pq": {"kind": "ivf_pq", "nlist": 16},
    "cagra": {"kind": "cagra", "graph_degree": 16},
    "cagra float16": {"kind": "cagra", "graph_degree": 16, "codes": "float16"},
}


def gpu_config(kind: str = "flat", metric: Any = "l2", **index: Any) -> CollectionConfig:
    options = KINDS.get(kind, {"kind": kind}) | index
    return CollectionConfig(DIMENSION, metric, index=IndexConfig(**({"device": "gpu"} | options)))


def gpu_points(config: CollectionConfig, seed: int = 0, count: int = COUNT) -> Points:
    return in_row_order(random_points(config, count, seed))


def double_of(device: GpuDevice) -> GpuDouble:
    library = device.library
    assert isinstance(library, GpuDouble)
    return library


def published(
    store: ObjectStore, config: CollectionConfig, points: Points, device: GpuDevice | None, **options: Any
) -> SegmentRef:
    """Build a segment on a device, or without one, and put it into the store."""
    with tempfile.TemporaryDirectory() as name:
        segment_id = f"segment-{uuid.uuid4().hex}"
        build(Path(name), segment_id, config, points, options=BuildOptions(1, 7, device=device, **options))
        return publish_segment(store, "words", Path(name), segment_id)


def committed(store: ObjectStore, config: CollectionConfig, *refs: SegmentRef) -> Manifest:
    """The next generation of one shard, for GPUs."""
    log = manifest_log(store, "words")
    return log.commit_generation(log.newest(), config, (ShardEntry(0, refs),), num_gpus=config.index.num_gpus or 1.0)


def memory_for(config: CollectionConfig, spec: IndexSpec, segments: int = 1, count: int = COUNT) -> int:
    """Bytes of a device that takes so many such segments, and not one more."""
    need = gpu_need(spec, count, config.dimension)
    return PROCESS_BYTES + (segments - 1) * need.index + need.load
