"""What an index says of itself must be so, and odd requests must get whole answers: found by review, kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.segment_loader import LoadedSegment
from cluster.config import CollectionConfig, IndexConfig
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from tests.unit.actors.points import Points, build, in_row_order, load, random_vectors, true_rows_of

pytestmark = pytest.mark.usefixtures("one_target")

DIMENSION = 16


def segment_of(folder: Path, vectors: Any, **index: Any) -> tuple[LoadedSegment, Points]:
    config = CollectionConfig(vectors.shape[1], "l2", index=IndexConfig(**index))
    points = in_row_order(Points(pa.array(np.arange(len(vectors))), vectors.astype(np.float32)))
    return load(folder, config, build(folder, "s1", config, points)), points


def recall(segment: LoadedSegment, points: Points, queries: Any, params: SearchParams) -> float:
    found, _ = segment.search(queries, 10, params)
    truth, _ = true_rows_of(points, queries, 10, "l2")
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def test_index_without_knobs_and_without_rerank_says_what_it_reaches(tmp_path: Path) -> None:
    vectors = random_vectors(CollectionConfig(DIMENSION, "l2"), 2_000, seed=1)
    segment, points = segment_of(tmp_path, vectors, kind="factory", factory="SQ4", rerank_store="none")
    point = segment.operating_point
    queries = random_vectors(CollectionConfig(DIMENSION, "l2"), 200, seed=2)
    assert not point.met
    assert point.recall == pytest.approx(recall(segment, points, queries, SearchParams()), abs=0.05)
    assert point.recall < 0.9


def test_named_graph_takes_codes_that_its_vectors_survive(tmp_path: Path) -> None:
    """float16 has steps of 0.5 at 1,000: recall was .019."""
    random = np.random.default_rng(3)
    vectors = 1_000.0 + 0.1 * random.standard_normal((2_000, DIMENSION))
    segment, points = segment_of(tmp_path, vectors, kind="hnsw")
    queries = (1_000.0 + 0.1 * random.standard_normal((100, DIMENSION))).astype(np.float32)
    assert segment.spec.kind == "hnsw"
    assert segment.spec.codes != "float16"
    assert recall(segment, points, queries, SearchParams()) >= 0.95


@pytest.mark.parametrize("given", [{"rerank": 8.0}, {"nprobe": 64}])
def test_raw_knob_replaces_only_that_of_the_operating_point(given: dict[str, Any], tmp_path: Path) -> None:
    vectors = random_vectors(CollectionConfig(DIMENSION, "l2"), 3_000, seed=4)
    segment, points = segment_of(tmp_path, vectors, kind="ivf_pq")
    queries = random_vectors(CollectionConfig(DIMENSION, "l2"), 100, seed=5)
    tuned = segment.operating_point.params
    merged = recall(segment, points, queries, SearchParams(**given))
    assert merged == recall(segment, points, queries, SearchParams(**(tuned | given)))
    assert merged >= 0.5


def test_exact_index_reaches_every_target(tmp_path: Path) -> None:
    vectors = random_vectors(CollectionConfig(DIMENSION, "l2"), 300, seed=6)
    segment, points = segment_of(tmp_path, vectors, kind="flat")
    assert recall(segment, points, points.vectors[:20], SearchParams(target_recall=0.9999)) == 1.0


@pytest.mark.parametrize("k", [200, 500, 1_000])
@pytest.mark.parametrize("kind", ["hnsw", "ivf_flat", "factory"])
def test_filter_that_keeps_the_near_and_the_far_gives_all_hits_asked_for(
    kind: str, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3,000 points the 100 nearest and the 1,000 farthest are kept: what is near says little about k of them."""
    monkeypatch.setattr("actors.segment_searcher.SCAN_FLOATS_MAX", 0)
    vectors = random_vectors(CollectionConfig(DIMENSION, "l2"), 3_000, seed=7)
    options = {"factory": "HNSW16,SQ8"} if kind == "factory" else {}
    segment, points = segment_of(tmp_path, vectors, kind=kind, **options)
    query = np.zeros((1, DIMENSION), np.float32)
    order = true_rows_of(points, query, 3_000, "l2")[0][0]
    mask = np.zeros(3_000, dtype=bool)
    mask[order[:100]] = mask[order[2_000:]] = True
    found, _ = segment.search(query, k, SearchParams(), RowSelection.of(mask))
    hits = found[0][found[0] >= 0][:k]
    assert len(hits) == k
    assert mask[hits].all()
    wanted = [row for row in order.tolist() if mask[row]][:k]
    assert len(set(hits.tolist()) & set(wanted)) / k >= 0.9
