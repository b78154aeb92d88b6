"""Observed recall agrees with offline recall within its interval, and tells when an index gets worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from actors.faiss_index import use_threads
from actors.recall_observer import QUEUE_QUERIES, WINDOW_QUERIES, RecallObserver
from actors.segment_loader import LoadedSegment
from actors.shard import Shard, ShardView
from cluster.config import CollectionConfig, IndexConfig
from cluster.ids import ID_ARROW_TYPE
from cluster.memory_store import MemoryStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from tests.unit.actors.points import Points, commit, ids_per_query

pytestmark = pytest.mark.recall

TARGET, K = 0.95, 10
COUNT, DIMENSION, CLUSTERS, QUERIES, BATCH = 6_000, 32, 60, 400, 50
EF_SEARCH_TOO_LOW = 2
SEED = 20261123
Vectors = NDArray[np.float32]


@pytest.fixture(autouse=True)
def one_faiss_thread() -> None:
    use_threads(1)


def clustered(count: int, seed: int) -> Vectors:
    """Gaussian clusters, always of the same centres, that overlap."""
    centres = np.random.default_rng(SEED).normal(size=(CLUSTERS, DIMENSION))
    random = np.random.default_rng(seed)
    return (centres[random.integers(CLUSTERS, size=count)] + random.normal(size=(count, DIMENSION))).astype(np.float32)


class Served:
    """A view of a shard whose every answer is offered to an observer that samples all queries."""

    def __init__(self, view: ShardView) -> None:
        self._view = view
        self.observer = RecallObserver(share=1.0, duty=1.0)

    def answers(self, queries: Vectors) -> list[list[Any]]:
        """Ids of each query's hits, asked in batches as live queries are; all are evaluated."""
        ids: list[list[Any]] = []
        for start in range(0, len(queries), BATCH):
            batch = queries[start : start + BATCH]
            request = ShardSearch(self._view.generation, batch, (SearchGroup(0, len(batch), K, SearchParams()),))
            outcomes = self._view.search(request)
            self.observer.offer(request, outcomes, self._view.search)
            (hits,) = outcomes
            assert isinstance(hits, Hits), hits
            ids += ids_per_query(hits)
            self.observer.drain()
        return ids

    @property
    def observed(self) -> dict[str, Any]:
        facts = self.observer.observed(self._view.generation)
        assert facts is not None
        return facts


def offline_recall(points: Points, queries: Vectors, answers: list[list[Any]]) -> float:
    """Mean recall@K by numpy alone, in float64."""
    stored, ids = points.vectors.astype(np.float64), points.ids.to_numpy()
    recalls = []
    squares = np.square(stored).sum(axis=1)
    for query, answered in zip(queries.astype(np.float64), answers, strict=True):  # |x - q|^2 less |q|^2
        best = ids[np.argpartition(squares - 2.0 * (stored @ query), K)[:K]]
        recalls.append(len(set(best.tolist()) & set(answered)) / K)
    return float(np.mean(recalls))


def degraded(segment: LoadedSegment) -> LoadedSegment:
    """The same segment, searched with far too small an `ef_search`."""
    points = segment.description.operating_points
    worse = tuple(replace(point, params={"ef_search": EF_SEARCH_TOO_LOW}) for point in points)
    description = replace(segment.description, operating_points=worse)
    return LoadedSegment(description, segment.rows, segment.searcher.index, segment.metric)


def test_observed_recall_is_the_offline_recall_and_drops_when_the_index_gets_worse(tmp_path: Path) -> None:
    assert BATCH <= QUEUE_QUERIES
    assert 2 * QUERIES <= WINDOW_QUERIES
    config = CollectionConfig(DIMENSION, "l2", index=IndexConfig(kind="hnsw", target_recall=TARGET))
    points = Points(pa.array(np.arange(COUNT), ID_ARROW_TYPE["int64"]), clustered(COUNT, SEED + 1))
    store = MemoryStore()
    commit(store, "clusters", config, points, segments=2)
    view = Shard(store, "clusters", 0, tmp_path).load()
    served = Served(view)

    queries, others = clustered(QUERIES, SEED + 2), clustered(QUERIES, SEED + 3)
    offline = offline_recall(points, queries, served.answers(queries))
    sound = served.observed
    print(f"sound: offline {offline:.4f}, observed {sound}, seed {SEED}")
    assert (sound["queries"], sound["k"], sound["dropped"]) == (QUERIES, K, 0)
    assert sound["recall"] == pytest.approx(offline, abs=1e-4)
    assert TARGET <= sound["recall"] < 1.0
    another = Served(view)
    assert sound["low"] <= offline_recall(points, others, another.answers(others)) <= sound["high"]

    worse_view = replace(view, generation=2, segments=tuple(degraded(segment) for segment in view.segments))
    worse = Served(worse_view)
    offline = offline_recall(points, queries, worse.answers(queries))
    print(f"worse: offline {offline:.4f}, observed {worse.observed}")
    assert worse.observed["recall"] == pytest.approx(offline, abs=1e-4)
    assert worse.observed["high"] < sound["low"]
    assert served.observed == sound, "a generation of its own"
