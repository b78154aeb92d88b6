"""Answers that must not depend on what else is in the batch, on ties, or on how many lists were tuned to be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.shard import Shard
from cluster.config import CollectionConfig, IndexConfig, Metric
from cluster.memory_store import MemoryStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.unit.actors.points import Points, commit, in_row_order

pytestmark = pytest.mark.usefixtures("one_target")

KINDS = ["flat", "ivf_flat", "hnsw", "ivf_sq8", "ivf_pq", "ivf_rabitq"]


def shard_of(config: CollectionConfig, vectors: Any, folder: Path, segments: int = 1) -> Shard:
    """A loaded shard whose point i has id i and the i-th vector."""
    store = MemoryStore()
    points = in_row_order(Points(pa.array(range(len(vectors)), pa.int64()), vectors.astype(np.float32)))
    commit(store, "words", config, points, segments)
    shard = Shard(store, "words", 0, folder)
    shard.load()
    return shard


def search(shard: Shard, queries: Any, k: int, *, exact: bool = False) -> Hits:
    group = SearchGroup(0, len(queries), k, SearchParams(exact=exact))
    request = ShardSearch(1, queries.astype(np.float32), (group,))
    hits = shard.search(request)[0]
    assert isinstance(hits, Hits)
    return hits


def test_flat_l2_far_from_the_origin_answers_a_batch_as_single_queries(tmp_path: Path) -> None:
    """|x|^2 + |q|^2 - 2xq would cancel here: recall 0 in a batch of 16, 1 alone."""
    random = np.random.default_rng(3)
    vectors = 1_000.0 + 0.1 * random.standard_normal((500, 64))
    shard = shard_of(CollectionConfig(64, "l2", index=IndexConfig("flat")), vectors, tmp_path)
    queries = vectors[:32] + 0.01 * random.standard_normal((32, 64))
    together = search(shard, queries, 5)
    alone = [search(shard, query[None, :], 5) for query in queries]
    assert together.ids.to_pylist() == [point for hits in alone for point in hits.ids.to_pylist()]
    assert together.ids.to_pylist()[::5] == list(range(32))


def test_flat_l2_of_one_dimension_tells_neighbours_apart_in_a_batch(tmp_path: Path) -> None:
    shard = shard_of(CollectionConfig(1, "l2"), np.arange(10_000)[:, None], tmp_path)
    hits = search(shard, np.full((16, 1), 5_000.2), 3)
    assert hits.ids.to_pylist() == [5_000, 5_001, 4_999] * 16
    np.testing.assert_allclose(hits.scores[:3], [0.04, 0.64, 1.44], rtol=1e-2)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_points_that_tie_at_the_last_hit_come_with_the_smallest_ids(kind: str, segments: int, tmp_path: Path) -> None:
    """20 equal points nearest to the query: the three with the smallest ids, whatever the order of rows."""
    random = np.random.default_rng(4)
    vectors = random.standard_normal((400, 8)) + 10.0
    vectors[100:120] = 0.0
    index = IndexConfig(kind)  # type: ignore[arg-type]
    shard = shard_of(CollectionConfig(8, "l2", index=index), vectors, tmp_path, segments)
    hits = search(shard, np.array([[0.1] * 8, [10.0] * 8]), 3)
    assert hits.counts.tolist() == [3, 3]
    assert hits.ids.to_pylist()[:3] == [100, 101, 102]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [999, 1_000, 1_500])
def test_k_of_about_all_points_gives_all_of_them(kind: str, k: int, tmp_path: Path) -> None:
    vectors = np.random.default_rng(5).standard_normal((1_000, 8))
    index = IndexConfig(kind)  # type: ignore[arg-type]
    shard = shard_of(CollectionConfig(8, "l2", index=index), vectors, tmp_path)
    hits = search(shard, vectors[:3], k)
    assert hits.counts.tolist() == [min(k, 1_000)] * 3
    assert len(set(hits.ids.to_pylist()[: min(k, 1_000)])) == min(k, 1_000)


def test_lists_too_short_for_k_and_ties_at_the_last_hit_still_give_k_hits(tmp_path: Path) -> None:
    """5 points near the query in a list of their own, 200 equal ones far away: all lists must be asked twice."""
    random = np.random.default_rng(6)
    vectors = np.concatenate([0.01 * random.standard_normal((5, 4)), np.full((200, 4), 50.0)])
    index = IndexConfig("ivf_flat")
    shard = shard_of(CollectionConfig(4, "l2", index=index), vectors, tmp_path)
    segment = shard.view(1).segments[0]
    assert segment.spec.params["nlist"] > 1
    hits = search(shard, np.zeros((1, 4)), 10)
    assert hits.ids.to_pylist()[5:] == [5, 6, 7, 8, 9]
    assert sorted(hits.ids.to_pylist()[:5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_what_else_is_in_the_batch(kind: str, metric: Metric, tmp_path: Path) -> None:
    """A product of matrices would round differently with the shape of the batch."""
    random = np.random.default_rng(7)
    vectors, queries = (random.standard_normal((count, 40)).astype(np.float32) for count in (1_200, 32))
    if metric == "cosine":
        vectors, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, queries))
    index = IndexConfig(kind)  # type: ignore[arg-type]
    shard = shard_of(CollectionConfig(40, metric, index=index), vectors, tmp_path)
    for exact in (False, True):
        together = search(shard, queries, 5, exact=exact)
        for size in (1, 3, 9):
            parts = [search(shard, queries[start : start + size], 5, exact=exact) for start in range(0, 32, size)]
            assert [point for part in parts for point in part.ids.to_pylist()] == together.ids.to_pylist()
            np.testing.assert_array_equal(np.concatenate([part.scores for part in parts]), together.scores)


def test_flat_l2_segment_takes_differences_whatever_was_loaded_after_it(tmp_path: Path) -> None:
    """FAISS's own bound on products of matrices is the process's: lists are found with it."""
    random = np.random.default_rng(8)
    vectors = 1_000.0 + 0.1 * random.standard_normal((500, 64))
    shard = shard_of(CollectionConfig(64, "l2", index=IndexConfig("flat")), vectors, tmp_path / "flat")
    shard_of(CollectionConfig(64, "l2", index=IndexConfig("ivf_flat")), vectors, tmp_path / "lists")
    queries = np.tile(vectors, (5, 1))  # 160,000 floats: more than FAISS's own bound
    assert search(shard, queries, 1).ids.to_pylist() == list(range(500)) * 5
