"""Recall under a filter: as the share of rows that may be found falls, whatever it has to do with the query.

Filters keep rows at random, or whole clusters: then a query's neighbours are all kept, or all left out, which is the
hardest for graphs and lists. Effort by the share of the whole selection found .61 of the neighbours there at 50%.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import actors.segment_searcher
import actors.tuner
from actors.exact_search import exact_search
from actors.faiss_index import use_threads
from actors.segment_loader import LoadedSegment
from cluster.config import CollectionConfig, IndexConfig
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.topk import recall_at_k
from tests.unit.actors.points import Points, build, in_row_order, load

pytestmark = pytest.mark.recall

FLOOR = 0.95
K = 10
COUNT, DIMENSION, CLUSTERS, QUERIES = 6_000, 64, 150, 400
SEED = 20261201
SHARES = (0.5, 0.1, 0.01)
Filter = Literal["random", "clusters", "clusters of the queries", "other clusters"]
Vectors = NDArray[np.float32]

KINDS: dict[str, IndexConfig] = {  # every one that the policy may choose, but for stores alike
    "hnsw float16": IndexConfig("hnsw", codes="float16"),
    "hnsw sq8": IndexConfig("hnsw", codes="sq8"),
    "ivf_pq float16": IndexConfig("ivf_pq", rerank_store="float16"),
    "ivf_pq rows, small": IndexConfig("ivf_pq", pq_m=DIMENSION // 8, rerank_store="rows"),
    "ivf_rabitq sq8": IndexConfig("ivf_rabitq", rerank_store="sq8"),
}


@dataclass(frozen=True)
class Clustered:
    """Rows of a segment and unseen queries, each with the number of its cluster."""

    ids: Any
    vectors: Vectors
    clusters: NDArray[np.int64]
    queries: Vectors
    query_clusters: NDArray[np.int64]


@cache
def clustered() -> Clustered:
    """Gaussian clusters as wide as their centres are apart, in the order of a segment's rows."""
    random = np.random.default_rng(SEED)
    centres = random.normal(size=(CLUSTERS, DIMENSION))
    labels = random.integers(CLUSTERS, size=COUNT + QUERIES)
    vectors = (centres[labels] + random.normal(size=(len(labels), DIMENSION))).astype(np.float32)
    ordered = in_row_order(Points(pa.array(np.arange(COUNT)), vectors[:COUNT]))
    return Clustered(ordered.ids, ordered.vectors, labels[ordered.ids.to_numpy()], vectors[COUNT:], labels[COUNT:])


@pytest.fixture(scope="module", params=KINDS)
def segment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedSegment:
    use_threads(1)
    folder = tmp_path_factory.mktemp("segment")
    config = CollectionConfig(DIMENSION, "l2", index=KINDS[request.param])
    points = Points(clustered().ids, clustered().vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors.tuner, "STANDARD_TARGETS", ())  # searched with its own target only
        description = build(folder, request.param, config, points, per_batch=4_096)
    assert description.operating_points[0].met
    return load(folder, config, description)


@pytest.fixture(autouse=True)
def one_faiss_thread() -> None:
    use_threads(1)


@pytest.fixture
def no_scans_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a segment too large to scan: the index is asked, however few rows are kept."""
    monkeypatch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)


def filtered(how: Filter, share: float) -> tuple[RowSelection, Vectors]:
    """A selection of about `share` of the rows, and the queries to ask of it."""
    data, random = clustered(), np.random.default_rng(SEED)
    if how == "random":
        return RowSelection.of(random.random(COUNT) < share), data.queries
    kept = random.permutation(CLUSTERS)[: round(CLUSTERS * share)]
    selection, inside = RowSelection.of(np.isin(data.clusters, kept)), np.isin(data.query_clusters, kept)
    if how == "clusters of the queries":
        return selection, data.queries[inside]
    return selection, data.queries[~inside] if how == "other clusters" else data.queries


def recall_of(segment: LoadedSegment, how: Filter, share: float) -> float:
    """Recall@10 of the tuned search against brute force over the kept rows; fails on a row outside of them."""
    selection, queries = filtered(how, share)
    found = segment.search(queries, K, SearchParams(), selection)[0][:, :K]
    assert found.shape == (len(queries), K)
    assert (found >= 0).all()
    kept = selection.rows()
    assert np.isin(found, kept).all()
    truth, _ = exact_search(queries, [(0, segment.rows.gather_vectors(kept))], K, "l2")
    recall = float(recall_at_k(found, kept[truth]).mean())
    point = segment.operating_point.params
    print(f"{segment.description.segment_id}, {how} {share:g}: recall@{K} {recall:.4f} at {point}, seed {SEED}")
    return recall


@pytest.mark.usefixtures("no_scans_of_all")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("how", get_args(Filter))
def test_recall_of_the_kept_rows_reaches_the_target(segment: LoadedSegment, how: Filter, share: float) -> None:
    assert recall_of(segment, how, share) >= FLOOR


@pytest.mark.parametrize("how", get_args(Filter))
def test_few_kept_rows_are_found_exactly(segment: LoadedSegment, how: Filter) -> None:
    assert recall_of(segment, how, 0.1) == 1.0


@pytest.mark.usefixtures("no_scans_of_all")
def test_rows_of_the_selection_only_are_found_by_raw_knobs(segment: LoadedSegment) -> None:
    selection, queries = filtered("clusters", 0.5)
    params = segment.operating_point.params
    knobs = {name: int(value) for name, value in params.items() if not name.startswith("far_")}
    found, _ = segment.search(queries, K, SearchParams(**knobs), selection)
    assert np.isin(found[found >= 0], selection.rows()).all()
