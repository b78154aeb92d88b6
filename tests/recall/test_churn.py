"""Recall after churn: 30% of a shard's points deleted or replaced by WAL records, of every kind of index.

The shard at its tuned operating point must find as much of the live points as a fresh index of them does with the same
parameters: while the new points are in the tail, once they are sealed, and once all is merged. What is written over or
deleted is never found.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import actors.segment_searcher
import actors.tuner
from actors.exact_search import exact_search, nearest
from actors.faiss_index import use_threads
from actors.segment_loader import LoadedSegment
from actors.segment_searcher import SegmentSearcher
from actors.segment_upkeep import merge_segments, seal_tail
from actors.shard import Shard
from cluster.arrow_rows import vectors_array, vectors_view
from cluster.config import CollectionConfig, IndexConfig, Metric
from cluster.memory_store import MemoryStore
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.topk import recall_at_k
from cluster.vectors import as_searched
from cluster.wal import Wal, WalRecord
from tests.unit.actors.points import Points, built_index, commit, in_row_order, write_points

pytestmark = pytest.mark.recall

COLLECTION = "churn"
K, DROP_MAX, FLOOR = 10, 0.01, 0.95
COUNT, DIMENSION, CLUSTERS, QUERIES = 3_000, 32, 60, 300
DELETED, REPLACED, RECORDS = 0.15, 0.15, 6
CLUSTERS_DELETED = 0.3
SEED = 20261208
WORDS = Path(__file__).parents[2] / "examples" / "words" / "wordnet-minilm-384-5k.parquet"
Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """The points that are imported, id i is row i; vectors to replace some; unseen queries; clusters of both."""

    points: Vectors
    new: Vectors
    queries: Vectors
    clusters: Ids
    query_clusters: Ids


@cache
def clusters() -> Data:
    """Gaussian clusters as wide as their centres are apart."""
    random = np.random.default_rng(SEED)
    total = 2 * COUNT + QUERIES
    labels = random.integers(CLUSTERS, size=total)
    spread = random.normal(size=(total, DIMENSION))
    vectors = (random.normal(size=(CLUSTERS, DIMENSION))[labels] + spread).astype(np.float32)
    return Data(vectors[:COUNT], vectors[COUNT:-QUERIES], vectors[-QUERIES:], labels[:COUNT], labels[-QUERIES:])


@cache
def words() -> Data:
    """Definitions of WordNet; those that are nearest to the same one of some are a cluster."""
    column = pq.read_table(WORDS)["vector"].combine_chunks()
    random = np.random.default_rng(SEED)
    vectors = as_searched(random.permutation(vectors_view(column)).astype(np.float32), "cosine")
    labels = nearest(vectors, vectors[:CLUSTERS], "cosine")[:, 0]
    return Data(vectors[:COUNT], vectors[COUNT:-QUERIES], vectors[-QUERIES:], labels[:COUNT], labels[-QUERIES:])


@dataclass(frozen=True)
class Case:
    data: str
    metric: Metric
    index: IndexConfig

    def __str__(self) -> str:
        options = "-".join(str(value) for value in self.index.options.values())
        return f"{self.data}-{self.index.kind}-{options}".rstrip("-")

    @property
    def set(self) -> Data:
        return words() if self.data == "words" else clusters()

    @property
    def config(self) -> CollectionConfig:
        return CollectionConfig(self.set.points.shape[1], self.metric, index=self.index)


CASES = (
    Case("clusters", "l2", IndexConfig("flat")),
    Case("clusters", "l2", IndexConfig("hnsw", codes="float16")),
    Case("clusters", "cosine", IndexConfig("hnsw", codes="sq8")),
    Case("clusters", "l2", IndexConfig("ivf_rabitq", rerank_store="sq8")),
    Case("clusters", "l2", IndexConfig("ivf_pq", rerank_store="float16")),
    Case("clusters", "cosine", IndexConfig("ivf_pq", rerank_store="sq8")),
    Case("clusters", "l2", IndexConfig("ivf_pq", rerank_store="rows")),
    Case("words", "cosine", IndexConfig("hnsw", codes="sq8")),
    Case("words", "cosine", IndexConfig("ivf_rabitq", rerank_store="rows")),
)


@pytest.fixture(autouse=True, scope="module")
def indexes_answer_and_tune_for_one_target() -> Iterator[None]:
    """So few live rows would be scanned otherwise. One FAISS thread, for this thread too."""
    use_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)
        patch.setattr(actors.tuner, "STANDARD_TARGETS", ())
        yield


@pytest.fixture(scope="module", params=CASES, ids=str)
def imported(request: pytest.FixtureRequest) -> tuple[Case, MemoryStore]:
    """A collection of one segment, tuned."""
    case: Case = request.param
    store = MemoryStore()
    points = Points(pa.array(np.arange(COUNT)), as_searched(case.set.points, case.metric))
    commit(store, COLLECTION, case.config, points)
    return case, store


class Churned:
    """A shard, and which of its points are live with what vectors: `vectors[id]` where `live[id]`."""

    def __init__(self, imported: tuple[Case, MemoryStore], folder: Path) -> None:
        self.case, source = imported
        self.store, self.folder = _copy(source), folder
        self.shard = Shard(self.store, COLLECTION, 0, folder / "cache")
        self.shard.load()
        self.vectors = as_searched(self.case.set.points, self.case.metric).copy()
        self.live = np.ones(COUNT, dtype=bool)
        self._known_fresh: tuple[object, SegmentSearcher, Ids] | None = None

    def write(self, replaced: Ids, new: Vectors, deleted: Ids) -> None:
        """One WAL record, applied by the shard as a follower does."""
        new = as_searched(new, self.case.metric)
        upserts = pa.record_batch([pa.array(replaced), vectors_array(new)], names=["id", "vector"])
        record = WalRecord(self.shard.applied_lsn + 1, 0, "write", uuid.uuid4().hex, upserts, pa.array(deleted))
        Wal(self.store, COLLECTION, 0, 0).append(record)
        assert self.shard.catch_up() == record.lsn
        self.vectors[replaced] = new
        self.live[replaced], self.live[deleted] = True, False
        self._known_fresh = None

    @property
    def largest(self) -> LoadedSegment:
        return max(self.shard.view(1).segments, key=lambda segment: segment.description.count)

    @property
    def params(self) -> dict[str, float]:
        """The operating point of its largest segment."""
        return self.largest.operating_point.params

    def found(self, queries: Vectors) -> Ids:
        """(n, K) ids; fails unless every one is live, with the score of the vector that it has now."""
        (hits,) = self.shard.search(ShardSearch(1, queries, (SearchGroup(0, len(queries), K, SearchParams()),)))
        assert isinstance(hits, Hits), hits
        assert (hits.counts == K).all()
        ids: Ids = hits.ids.to_numpy().reshape(-1, K)
        assert self.live[ids].all(), "a deleted id was found"
        distances = np.square(queries[:, None, :] - self.vectors[ids]).sum(axis=2)
        scores = distances if self.case.metric == "l2" else 1.0 - distances / 2.0
        np.testing.assert_allclose(hits.scores.reshape(-1, K), scores, rtol=1e-3, atol=1e-3)
        return ids

    def truth(self, queries: Vectors) -> Ids:
        ids = np.flatnonzero(self.live)
        return ids[exact_search(queries, [(0, self.vectors[ids])], K, self.case.metric)[0]]

    def check_recall(self, queries: Vectors, phase: str) -> float:
        """Recall@K, which is not lower by more than `DROP_MAX` than that of a fresh index of the live points."""
        truth = self.truth(queries)
        recall = float(recall_at_k(self.found(queries), truth).mean())
        fresh = float(recall_at_k(self._fresh(queries), truth).mean())
        print(f"{self.case} {phase}: recall@{K} {recall:.4f}, fresh {fresh:.4f} at {self.params}, seed {SEED}")
        assert recall >= fresh - DROP_MAX
        return recall

    def _fresh(self, queries: Vectors) -> Ids:
        """(n, K) ids that an index like its largest, of the live points alone, finds with the same parameters."""
        searcher, ids = self._fresh_searcher()
        found, _ = searcher.search(queries, K, self.params)
        return np.where(found < 0, -1, ids[found])

    def _fresh_searcher(self) -> tuple[SegmentSearcher, Ids]:
        """(the fresh index, ids of its rows); built once for the same live points and the same kind of index."""
        config, spec = self.case.config, self.largest.spec
        if self._known_fresh is None or self._known_fresh[0] != spec:
            live = np.flatnonzero(self.live)
            points = in_row_order(Points(pa.array(live), self.vectors[live]))
            folder = Path(mkdtemp(dir=self.folder))
            rows = write_points(folder, config, points, per_batch=4_096)
            searcher = SegmentSearcher(built_index(spec, config.metric, points.vectors), spec, rows, config.metric)
            self._known_fresh = spec, searcher, points.ids.to_numpy()
        return self._known_fresh[1:]


def _copy(source: MemoryStore) -> MemoryStore:
    store = MemoryStore()
    for info in source.objects(""):
        store.put(info.key, source.get(info.key))
    return store


def churn_at_random(churned: Churned) -> Vectors:
    """Delete and replace points; some of the replaced again, or are deleted then. Returns vectors that are gone."""
    random = np.random.default_rng(SEED)
    new = random.permutation(churned.case.set.new)
    chosen = random.permutation(COUNT)
    replaced, deleted = np.split(chosen[: round(COUNT * (DELETED + REPLACED))], [round(COUNT * REPLACED)])
    gone = [churned.vectors[chosen[:100]], churned.vectors[deleted[:100]]]
    for ids, others in zip(np.array_split(replaced, RECORDS), np.array_split(deleted, RECORDS), strict=True):
        churned.write(ids, new[: len(ids)], others)
        new = new[len(ids) :]
    gone.append(churned.vectors[replaced[:40]])
    churned.write(replaced[:20], new[:20], replaced[20:40])
    return np.concatenate(gone)


def test_recall_after_random_churn_is_that_of_a_fresh_build_in_tail_sealed_and_merged(
    imported: tuple[Case, MemoryStore], tmp_path: Path
) -> None:
    churned = Churned(imported, tmp_path)
    gone = churn_at_random(churned)
    queries = as_searched(churned.case.set.queries, churned.case.metric)
    upkeep = (churned.store, COLLECTION, 0, tmp_path / "upkeep", lambda: uuid.uuid4().hex)

    def check(phase: str, segments: int, tail: int) -> None:
        view = churned.shard.view(1)
        live = int(churned.live.sum())
        assert (len(view.segments), view.tail_points, view.points) == (segments, tail, live), phase
        churned.found(gone)
        assert churned.check_recall(queries, phase) >= FLOOR - DROP_MAX

    check("tail", 1, round(COUNT * REPLACED) - 20)
    assert seal_tail(*upkeep) is not None
    churned.shard.load()
    check("sealed", 2, 0)
    names = [segment.description.segment_id for segment in churned.shard.view(1).segments]
    assert merge_segments(*upkeep[:3], names, *upkeep[3:]) is not None
    churned.shard.load()
    check("merged", 1, 0)
    assert churned.shard.view(1).tombstones == 0


def test_recall_after_deletion_of_whole_clusters_is_that_of_a_fresh_build(
    imported: tuple[Case, MemoryStore], tmp_path: Path
) -> None:
    """The queries of those clusters are far from all that is left, the others as they were."""
    churned, data = Churned(imported, tmp_path), imported[0].set
    chosen = np.random.default_rng(SEED).permutation(CLUSTERS)[: round(CLUSTERS * CLUSTERS_DELETED)]
    deleted = np.flatnonzero(np.isin(data.clusters, chosen))
    for ids in np.array_split(deleted, RECORDS):
        churned.write(np.empty(0, np.int64), churned.vectors[:0], ids)
    queries, near = as_searched(data.queries, churned.case.metric), np.isin(data.query_clusters, chosen)
    for phase, some in (("of the deleted clusters", queries[near]), ("of the others", queries[~near])):
        assert churned.check_recall(some, phase) >= FLOOR - DROP_MAX
    churned.found(churned.vectors[deleted[:200]])
