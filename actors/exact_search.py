"""Brute force over blocks of vectors: the truth that indexes are tuned and measured against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import faiss
import numpy as np

from actors.faiss_index import Rows, Vectors, faiss_metric, to_scores
from cluster.config import Metric


def exact_search(
    queries: Vectors, blocks: Iterable[tuple[int, Vectors]], k: int, metric: Metric
) -> tuple[Rows, Vectors]:
    """Brute force over (first row, vectors) blocks: (rows, scores), both (queries, k), best first; -1 where none."""
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    worst = -np.inf if metric == "ip" else np.inf
    distances = np.full((len(queries), k), worst, dtype=np.float32)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    for first, vectors in blocks:
        part = _knn(queries, vectors, min(k, len(vectors)), metric)
        found = np.where(part[0] < 0, -1, part[0] + first)
        rows, distances = _best_of(rows, distances, found, part[1], k, metric)
    return rows, to_scores(distances, metric)


def _knn(queries: Vectors, vectors: Vectors, k: int, metric: Metric) -> tuple[Rows, Vectors]:
    vectors = np.ascontiguousarray(vectors)
    if metric == "l2":
        return _knn_l2(queries, vectors, k)
    distances, rows = faiss.knn(queries, vectors, k, metric=faiss_metric(metric))
    return rows, distances


def _knn_l2(queries: Vectors, vectors: Vectors, k: int) -> tuple[Rows, Vectors]:
    """With a selector, be it of all, FAISS takes every difference; else large batches are a matrix product.

    That cancels (`faiss_index.blas_threshold`). It is as fast for 256 queries, and faster for one.
    """
    distances = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    everything = faiss.IDSelectorAll()
    faiss.knn_L2sqr(
        faiss.swig_ptr(queries),
        faiss.swig_ptr(vectors),
        queries.shape[1],
        len(queries),
        len(vectors),
        k,
        faiss.swig_ptr(distances),
        faiss.swig_ptr(rows),
        None,
        everything,
    )
    return rows, distances


def nearest(points: Vectors, centroids: Vectors, metric: Metric) -> Rows:
    """The nearest centroid of each point, shape (n, 1), as k-means assigns them: by a matrix product."""
    _, rows = faiss.knn(points, centroids, 1, metric=faiss_metric(metric))
    return rows  # type: ignore[no-any-return]


def _best_of(
    rows: Rows, distances: Vectors, more_rows: Rows, more_distances: Vectors, k: int, metric: Metric
) -> tuple[Rows, Vectors]:
    all_rows = np.concatenate([rows, more_rows], axis=1)
    all_distances = np.concatenate([distances, more_distances], axis=1)
    cost = -all_distances if metric == "ip" else all_distances
    order = np.argsort(cost, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_rows, order, 1), np.take_along_axis(all_distances, order, 1)


def blocks_until(blocks: Iterable[tuple[int, Vectors]], stop: int) -> Iterator[tuple[int, Vectors]]:
    """The part of consecutive blocks below row `stop`."""
    for first, vectors in blocks:
        if first >= stop:
            return
        yield first, vectors[: stop - first]
