"""Random collections for the tests of actors: points, segments built from them, and brute force over them."""

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

from actors.segment_builder import BuildOptions, build_segment, publish_segment
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, Metric
from cluster.ids import ID_ARROW_TYPE, hash_ids
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from cluster.query import Hits, Query
from cluster.routing import Routing
from cluster.segment import rows_schema, write_rows

Vectors = NDArray[np.float32]


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


def build(folder: Path, segment_id: str, config: CollectionConfig, points: Points, per_batch: int = 64) -> Any:
    """Write `rows.arrow` of points in row order and build their segment; its description."""
    schema = rows_schema(config, {"name": pa.large_string()})
    arrays = [points.ids, vectors_array(points.vectors), pa.array(hash_ids(points.ids)), pa.array(points.names)]
    columns = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
    whole = pa.record_batch(columns, schema=schema)
    batches = [pa.concat_batches([whole.slice(at, per_batch)]) for at in range(0, len(points), per_batch)]
    write_rows(folder / paths.ROWS, schema, iter(batches))
    return build_segment(folder, segment_id, config, len(points), per_batch, BuildOptions(threads=1, seed=7))


def publish(store: ObjectStore, collection: str, config: CollectionConfig, points: Points) -> SegmentRef:
    """Build a segment of points (in row order) and put it into the store."""
    with tempfile.TemporaryDirectory() as name:
        segment_id = f"segment-{uuid.uuid4().hex}"
        build(Path(name), segment_id, config, points)
        return publish_segment(store, collection, Path(name), segment_id)


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
