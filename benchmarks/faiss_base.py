"""FAISS in this process as the base of ratios: on the very files that are served, and an HNSW built by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from actors.faiss_index import use_threads
from actors.shard import Shard
from benchmarks.vector_sets import EF_SEARCH, K, VectorSet, faiss_metric, recall
from cluster.object_store import open_store
from cluster.query import SearchGroup, SearchParams, ShardSearch
from cluster.topk import merge_hits
from cluster.vectors import as_searched

BATCH = 256
SINGLES = 300
HAND_M, HAND_THREADS = 32, 2


@dataclass(frozen=True)
class FaissRound:
    """Queries per second in batches of 256, the milliseconds of a single query, and the ids found, (n, K)."""

    per_second: float
    p50_ms: float
    p99_ms: float
    ids: Any


def measure_served_files(
    data: str,
    described: dict[str, Any],
    params: dict[str, int],
    queries: Any,
    seconds: float = 2.0,
    threads: int | None = None,
) -> FaissRound:
    """Search the very index files that are served: shards one after the other, all their threads together."""
    name, store = described["name"], open_store(data)
    shards = [Shard(store, name, entry["shard"], Path(data)) for entry in described["shards"]]
    for shard in shards:
        shard.load()
    use_threads(threads or sum(entry["replicas"][0]["threads"] for entry in described["shards"]))
    metric = described["config"]["metric"]
    queries = as_searched(queries, metric)

    def search(part: Any) -> Any:
        request = ShardSearch(described["generation"], part, (SearchGroup(0, len(part), K, SearchParams(**params)),))
        hits = [shard.search(request)[0] for shard in shards]
        return merge_hits(hits, K, metric).ids.to_numpy().reshape(-1, K)

    return _measured(search, queries, seconds)


def _measured(search: Callable[[Any], Any], queries: Any, seconds: float) -> FaissRound:
    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
    ids = np.concatenate([search(batch) for batch in batches])
    started, searched = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for batch in batches:
            searched += len(search(batch))
    per_second = searched / (time.perf_counter() - started)
    singles = []
    for query in queries[:SINGLES]:
        at = time.perf_counter()
        search(query[None, :])
        singles.append(time.perf_counter() - at)
    p50_ms, p99_ms = (float(np.percentile(singles, percent) * 1000.0) for percent in (50, 99))
    return FaissRound(per_second, p50_ms, p99_ms, ids)


def build_by_hand(vectors: VectorSet, target_recall: float, path: Path) -> int:
    """Write an HNSW over plain vectors; gives the least efSearch of the grid that reaches the recall."""
    faiss.omp_set_num_threads(HAND_THREADS)
    points, ids = vectors.points()
    index = faiss.IndexHNSWFlat(points.shape[1], HAND_M, faiss_metric(vectors.metric))
    index.add(points)
    faiss.write_index(index, str(path))
    for ef_search in EF_SEARCH:
        rows = index.search(vectors.queries, K, params=faiss.SearchParametersHNSW(efSearch=ef_search))[1]
        if recall(ids[rows], vectors.truth) >= target_recall:
            return ef_search
    raise SystemExit(f"HNSW{HAND_M} does not reach recall {target_recall} with efSearch {EF_SEARCH[-1]}")


def measure_by_hand(path: Path, ef_search: int, queries: Any, seconds: float = 2.0) -> FaissRound:
    """Its `ids` are row numbers."""
    faiss.omp_set_num_threads(HAND_THREADS)
    index = faiss.read_index(str(path))
    params = faiss.SearchParametersHNSW(efSearch=ef_search)
    return _measured(lambda part: index.search(part, K, params=params)[1], queries, seconds)
