"""Brute force over blocks of vectors: the truth that indexes are tuned and measured against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import faiss
import numpy as np

from actors.faiss_index import Rows, Vectors, faiss_metric, threads_in_use, to_scores, use_threads
from cluster.config import Metric
from cluster.row_selection import RowSelection


def exact_search(
    queries: Vectors,
    blocks: Iterable[tuple[int, Vectors]],
    k: int,
    metric: Metric,
    selection: RowSelection | None = None,
) -> tuple[Rows, Vectors]:
    """Brute force over (first row, vectors) blocks: (rows, scores), both (queries, k), best first; -1 where none.

    With a selection only its rows are found; blocks then begin at multiples of 8.
    """
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    worst = -np.inf if metric == "ip" else np.inf
    distances = np.full((len(queries), k), worst, dtype=np.float32)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    for first, vectors in blocks:
        part = _knn(queries, vectors, min(k, len(vectors)), metric, _selector(selection, first, len(vectors)))
        found = np.where(part[0] < 0, -1, part[0] + first)
        rows, distances = _best_of(rows, distances, found, part[1], k, metric)
    return rows, to_scores(distances, metric)


def _selector(selection: RowSelection | None, first: int, count: int) -> Any:
    """FAISS's selector of the rows `first` to `first + count`; None where all of them are kept."""
    if selection is None:
        return None
    bits = selection.bits[first >> 3 : (first + count + 7) >> 3]
    if np.unpackbits(bits, count=count, bitorder="little").all():
        return None
    return faiss.IDSelectorBitmap(bits)


def _knn(queries: Vectors, vectors: Vectors, k: int, metric: Metric, selector: Any = None) -> tuple[Rows, Vectors]:
    """With a selector, be it of all, FAISS takes every difference; else large batches are a matrix product.

    Under l2 that cancels (`faiss_index.blas_threshold`). It is as fast for 256 queries, and faster for one.
    """
    vectors = np.ascontiguousarray(vectors)
    if metric == "l2":
        return _knn_of(faiss.knn_L2sqr, queries, vectors, k, selector or faiss.IDSelectorAll())
    if selector is not None:
        by_product = faiss.knn_inner_product if metric == "ip" else faiss.knn_L2sqr
        return _knn_of(by_product, queries, vectors, k, selector)
    distances, rows = faiss.knn(queries, vectors, k, metric=faiss_metric(metric))
    return rows, distances


def _knn_of(search: Any, queries: Vectors, vectors: Vectors, k: int, selector: Any) -> tuple[Rows, Vectors]:
    distances = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    sizes = (queries.shape[1], len(queries), len(vectors), k)
    arrays = [faiss.swig_ptr(array) for array in (queries, vectors, distances, rows)]
    if search is faiss.knn_L2sqr:
        search(*arrays[:2], *sizes, *arrays[2:], None, selector)
    else:
        search(*arrays[:2], *sizes, *arrays[2:], selector)
    return rows, distances


def pair_distances(queries: Vectors, asked: Rows, vectors: Vectors, metric: Metric) -> Vectors:
    """FAISS's distance of `queries[asked[i]]` (m, d) and `vectors[i]` (n, d), for every i; all float32.

    By the calling thread alone: for so little work a second one costs more than it does, if it has to be woken up.
    """
    vectors, numbers = np.ascontiguousarray(vectors), np.arange(len(vectors))
    distances = np.empty(len(vectors), dtype=np.float32)
    compare = faiss.pairwise_indexed_inner_product if metric == "ip" else faiss.pairwise_indexed_L2sqr
    arrays = [faiss.swig_ptr(array) for array in (queries, asked, vectors, numbers, distances)]
    threads = threads_in_use()
    use_threads(1)
    compare(queries.shape[1], len(vectors), *arrays)
    use_threads(threads)
    return distances


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
