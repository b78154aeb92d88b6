"""Recall floors: what the tuner promises must hold for queries that the index has never seen, built and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.faiss_index import use_threads
from actors.segment_builder import publish_segment
from actors.segment_loader import LoadedSegment, load_segment
from actors.shard import Shard
from cluster.arrow_rows import vectors_view
from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import ID_ARROW_TYPE
from cluster.memory_store import MemoryStore
from cluster.object_store import open_store
from cluster.query import SearchParams
from cluster.topk import recall_at_k
from cluster.vectors import as_searched
from tests.unit.actors.points import Points, build, in_row_order, load
from tests.unit.jobs.imports import new_data_url, run_import

pytestmark = pytest.mark.recall

FLOOR = 0.95
K = 10
COUNT, DIMENSION, CLUSTERS, QUERIES = 8_000, 64, 130, 500
SPREAD = 1.0  # of a cluster; the centres have it too
SEED = 20261122
WORDS = Path(__file__).parents[2] / "examples" / "words" / "wordnet-minilm-384-5k.parquet"
Vectors = NDArray[np.float32]


@pytest.fixture(autouse=True)
def one_faiss_thread() -> None:
    use_threads(1)


def clustered(count: int, seed: int) -> Vectors:
    """Gaussian clusters, always of the same centres, that overlap: recall must be worked for."""
    centres = np.random.default_rng(SEED).normal(size=(CLUSTERS, DIMENSION))
    random = np.random.default_rng(seed)
    spread = random.normal(size=(count, DIMENSION)) * SPREAD
    return (centres[random.integers(CLUSTERS, size=count)] + spread).astype(np.float32)


def recall_of(found: NDArray[np.int64], queries: Vectors, segment: LoadedSegment) -> float:
    truth, _ = exact_search(queries, segment.rows.blocks(), K, segment.metric)
    return float(recall_at_k(found, truth).mean())


@pytest.mark.usefixtures("one_target")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["hnsw", "ivf_flat"])
def test_recall_of_unseen_queries_reaches_the_target_after_build_and_after_load(
    kind: Any, dtype: Any, tmp_path: Path
) -> None:
    config = CollectionConfig(DIMENSION, "l2", vector_dtype=dtype, index=IndexConfig(kind=kind, target_recall=FLOOR))
    ids = pa.array(np.arange(COUNT), ID_ARROW_TYPE["int64"])
    points = in_row_order(Points(ids, clustered(COUNT, SEED + 1).astype(dtype)))
    queries = clustered(QUERIES, SEED + 2)
    description = build(tmp_path, "s1", config, points, per_batch=4_096)
    point = description.operating_points[0]
    assert point.met, point
    found, scores = load(tmp_path, config, description).search(queries, K, SearchParams())

    store = MemoryStore()
    ref = publish_segment(store, "clusters", tmp_path, "s1")
    segment = load_segment(store, "clusters", ref, "l2", tmp_path / "cache")
    recall = recall_of(found, queries, segment)
    print(f"{kind} {dtype}: recall@{K} {recall:.4f} at {point.params}, tuned {point.recall:.4f}, seed {SEED}")
    assert recall >= FLOOR
    found_after, scores_after = segment.search(queries, K, SearchParams())
    np.testing.assert_array_equal(found_after, found)
    np.testing.assert_array_equal(scores_after, scores)


@pytest.mark.usefixtures("one_target")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_recall_of_unseen_words_reaches_the_target_after_import(dtype: str, tmp_path: Path) -> None:
    table = pq.read_table(WORDS)
    held_out = np.zeros(len(table), dtype=bool)
    held_out[np.random.default_rng(SEED).choice(len(table), size=300, replace=False)] = True
    pq.write_table(table.filter(pa.array(~held_out)), tmp_path / "words.parquet")
    rows = table.filter(pa.array(held_out))["vector"].combine_chunks()
    queries = as_searched(vectors_view(rows).astype(np.float32), "cosine")

    data = new_data_url()
    create = {"vector_dtype": dtype, "index": {"kind": "hnsw", "target_recall": FLOOR}}
    manifest = run_import(data, tmp_path / "words.parquet", create=create)
    assert manifest.points == 4_700
    (segment,) = Shard(open_store(data), "words", 0, tmp_path / "cache").load().segments
    assert segment.spec.kind == "hnsw"
    assert segment.operating_point.met, segment.operating_point
    found, _ = segment.search(queries, K, SearchParams())
    recall = recall_of(found, queries, segment)
    print(f"words {dtype}: recall@{K} {recall:.4f} at {segment.operating_point.params}, seed {SEED}")
    assert recall >= FLOOR
