"""Random collections for the tests of actors: points, indexes and segments built from them, brute force over them."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.faiss_index import FaissIndex, build_index, load_index
from actors.segment_builder import BuildOptions, build_segment, publish_segment
from actors.segment_loader import LoadedSegment
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Metric, VectorDtype
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.index_policy import choose
from cluster.index_spec import IndexSpec
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from cluster.query import Hits, Query
from cluster.routing import Routing
from cluster.segment import Rows, SegmentDescription, rows_schema, write_rows

Vectors = NDArray[np.float32]
ONE_THREAD = BuildOptions(threads=1, seed=7)
METRICS: tuple[Metric, ...] = ("cosine", "l2", "ip")
FACTORIES = ("HNSW16,SQ8", "IVF32,PQ4x4fsr", "OPQ4_8,IVF32,PQ4x4", "IVF32,Flat,RFlat")
INDEXES: dict[str, IndexConfig] = {  # every kind with every way of keeping vectors
    "flat": IndexConfig("flat"),
    "hnsw float32": IndexConfig("hnsw", codes="float32"),
    "hnsw float16": IndexConfig("hnsw", codes="float16"),
    "hnsw sq8": IndexConfig("hnsw", codes="sq8"),
    "ivf_flat float32": IndexConfig("ivf_flat", codes="float32"),
    "ivf_flat float16": IndexConfig("ivf_flat", codes="float16"),
    "ivf_flat sq8": IndexConfig("ivf_flat", codes="sq8"),
    "ivf_sq8": IndexConfig("ivf_sq8"),
    "ivf_pq rows": IndexConfig("ivf_pq", rerank_store="rows"),
    "ivf_pq 8 bits": IndexConfig("ivf_pq", pq_bits=8, rerank_store="rows"),
    "ivf_pq padded": IndexConfig("ivf_pq", pq_m=5, rerank_store="rows"),
    "ivf_pq sq8": IndexConfig("ivf_pq", rerank_store="sq8"),
    "ivf_pq float16": IndexConfig("ivf_pq", rerank_store="float16"),
    "ivf_pq float32": IndexConfig("ivf_pq", rerank_store="float32"),
    "ivf_rabitq rows": IndexConfig("ivf_rabitq", rerank_store="rows"),
    "ivf_rabitq sq8": IndexConfig("ivf_rabitq", rerank_store="sq8"),
    "ivf_rabitq float16": IndexConfig("ivf_rabitq", rerank_store="float16"),
    **{factory: IndexConfig("factory", factory=factory) for factory in FACTORIES},
}


@dataclass(frozen=True)
class Points:
    """Points as they are stored: ids (Arrow), vectors in the stored dtype, and one attribute `name`."""

    ids: Any
    vectors: NDArray[Any]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> Points:
        return Points(self.ids.take(pa.array(rows)), self.vectors[rows])

    @property
    def names(self) -> list[str]:
        return [name_of(value) for value in self.ids.to_pylist()]


def name_of(point_id: int | str) -> str:
    """The attribute of a point, so that a test can tell whose it is."""
    return f"name of {point_id}"


def random_vectors(config: CollectionConfig, count: int, seed: int) -> Vectors:
    """Gaussian vectors (count, dimension) float32; unit length under cosine."""
    vectors = np.random.default_rng(seed).normal(size=(count, config.dimension)).astype(np.float32)
    if config.metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def random_points(config: CollectionConfig, count: int, seed: int = 0) -> Points:
    numbers = np.random.default_rng(seed + 1).choice(10 * count + 1, size=count, replace=False) - 3
    values = numbers.tolist() if config.id_type == "int64" else [f"id-{number}" for number in numbers]
    vectors = random_vectors(config, count, seed).astype(config.vector_dtype)
    return Points(pa.array(values, ID_ARROW_TYPE[config.id_type]), vectors)


def in_row_order(points: Points) -> Points:
    """Ordered by (hash of id, id), as a segment stores them."""
    hashes = hash_ids(points.ids).tolist()
    order = sorted(range(len(points)), key=lambda row: (hashes[row], points.ids[row].as_py()))
    return points.take(np.array(order, dtype=np.int64))


def points_of_shard(points: Points, shards: int, shard: int) -> Points:
    return points.take(np.flatnonzero(Routing(shards).shards_of_ids(points.ids) == shard))


def spec_of(
    index: IndexConfig, count: int, dimension: int, metric: Metric = "l2", dtype: VectorDtype = "float32"
) -> IndexSpec:
    return choose(count, CollectionConfig(dimension, metric, index=index, vector_dtype=dtype))


def built_index(spec: IndexSpec, metric: Metric, vectors: Vectors, seed: int = 3) -> FaissIndex:
    """An index of all vectors, added in two parts."""
    sample = vectors[: spec.training_points(len(vectors))]
    index = build_index(spec, vectors.shape[1], metric, sample, seed)
    half = len(vectors) // 2
    index.add(vectors[:half])
    index.add(vectors[half:])
    return index


def wide_open(index: FaissIndex) -> dict[str, float]:
    """Search parameters that visit every point, with 30 candidates for each hit."""
    values = {"nprobe": float(index.lists), "ef_search": float(index.count), "rerank": 30.0}
    return {name: values[name] for name in index.knobs}


def write_points(folder: Path, config: CollectionConfig, points: Points, per_batch: int = 64) -> Rows:
    """Write `rows.arrow` of points in row order."""
    schema = rows_schema(config, {"name": pa.large_string()})
    arrays = [points.ids, vectors_array(points.vectors), pa.array(hash_ids(points.ids)), pa.array(points.names)]
    columns = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
    whole = pa.record_batch(columns, schema=schema)
    batches = [pa.concat_batches([whole.slice(at, per_batch)]) for at in range(0, len(points), per_batch)]
    write_rows(folder / paths.ROWS, schema, iter(batches))
    return Rows(folder / paths.ROWS, len(points), config.dimension, per_batch)


def build(
    folder: Path,
    segment_id: str,
    config: CollectionConfig,
    points: Points,
    per_batch: int = 64,
    options: BuildOptions = ONE_THREAD,
) -> SegmentDescription:
    """Write `rows.arrow` of points in row order and build their segment."""
    write_points(folder, config, points, per_batch)
    return build_segment(folder, segment_id, config, len(points), per_batch, options)


def publish(store: ObjectStore, collection: str, config: CollectionConfig, points: Points) -> SegmentRef:
    """Build a segment of points (in row order) and put it into the store."""
    with tempfile.TemporaryDirectory() as name:
        segment_id = f"segment-{uuid.uuid4().hex}"
        build(Path(name), segment_id, config, points)
        return publish_segment(store, collection, Path(name), segment_id)


def load(folder: Path, config: CollectionConfig, description: SegmentDescription) -> LoadedSegment:
    """The segment that was built in a folder, as a replica has it."""
    spec = IndexSpec.from_dict(description.spec)
    rows = Rows(folder / paths.ROWS, description.count, config.dimension, description.rows_per_batch)
    path = folder / paths.INDEX
    index = load_index(path, spec, config.dimension, config.metric, description.count, paths.INDEX)
    return LoadedSegment(description, rows, index, config.metric)


def manifest_log(store: ObjectStore, collection: str) -> ManifestLog:
    return ManifestLog(store, collection, lambda: uuid.uuid4().hex)


def commit(
    store: ObjectStore, collection: str, config: CollectionConfig, points: Points, segments: int = 1
) -> Manifest:
    """Make `points` the next generation of a collection, each shard cut into up to `segments` segments."""
    entries = []
    for shard in range(config.shards):
        mine = in_row_order(points_of_shard(points, config.shards, shard))
        pieces = [rows for rows in np.array_split(np.arange(len(mine)), segments) if len(rows)]
        refs = tuple(publish(store, collection, config, mine.take(rows)) for rows in pieces)
        entries.append(ShardEntry(shard, refs))
    log = manifest_log(store, collection)
    return log.commit_generation(log.newest(), config, tuple(entries))


def all_scores(points: Points, queries: Vectors, metric: Metric) -> NDArray[np.float64]:
    """The metric's own value of every (query, point), in float64."""
    stored, asked = points.vectors.astype(np.float64), queries.astype(np.float64)
    return _squared_distances(asked, stored) if metric == "l2" else asked @ stored.T


def _squared_distances(asked: NDArray[np.float64], stored: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.square(asked[:, None, :] - stored[None, :, :]).sum(axis=2)


def brute_force(points: Points, queries: Vectors, k: int, metric: Metric) -> list[list[int | str]]:
    """Per query the ids of the best k points, best first, ties by id; cosine by distance of the stored vectors."""
    ids, stored = points.ids.to_pylist(), points.vectors.astype(np.float64)
    asked = queries.astype(np.float64)
    costs = -(asked @ stored.T) if metric == "ip" else _squared_distances(asked, stored)
    return [[point_id for _, point_id in sorted(zip(line, ids, strict=True))[:k]] for line in costs.tolist()]


def true_rows_of(
    points: Points, queries: Vectors, k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(rows, scores), both (queries, k), of the best k points in float64; cosine by distance of the stored vectors."""
    scores = all_scores(points, queries, metric)
    stored = points.vectors.astype(np.float64)
    if metric == "cosine":  # as the index has it, for vectors that rounding has made a little longer or shorter
        scores = 1.0 - _squared_distances(queries.astype(np.float64), stored) / 2.0
    rows = np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


def ids_per_query(hits: Hits) -> list[list[int | str]]:
    """The hits' ids, one list per query."""
    ids, bounds = hits.ids.to_pylist(), np.concatenate([[0], np.cumsum(hits.counts)])
    return [ids[start:stop] for start, stop in pairwise(bounds.tolist())]


def assert_scores_are_true(hits: Hits, points: Points, queries: Vectors, metric: Metric, tolerance: float) -> None:
    """Every hit's score is the metric's own value of its query and its stored vector."""
    row_of = {point_id: row for row, point_id in enumerate(points.ids.to_pylist())}
    scores = all_scores(points, queries, metric)
    query = np.repeat(np.arange(len(queries)), hits.counts)
    expected = [scores[q, row_of[point_id]] for q, point_id in zip(query, hits.ids.to_pylist(), strict=True)]
    np.testing.assert_allclose(hits.scores, expected, atol=tolerance, rtol=tolerance)


def query(vectors: Vectors, **options: Any) -> Query:
    return Query(vectors, **({"timeout_ms": 20_000.0} | options))


def flipped(data: bytes, position: int) -> bytes:
    """The same bytes but for one bit."""
    position %= len(data)
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def keys(store: ObjectStore, prefix: str) -> list[str]:
    return [info.key for info in store.objects(prefix)]


def flatten(lists: Iterable[list[Any]]) -> list[Any]:
    return [value for values in lists for value in values]
