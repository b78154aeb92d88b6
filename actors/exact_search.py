"""Brute force over blocks of vectors: the truth that indexes are tuned and measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from actors.faiss_index import Rows, Vectors, faiss_metric, threads_in_use, to_scores, use_threads
from cluster.config import Metric
from cluster.row_selection import RowSelection

# isort: split
import faiss  # after `faiss_index`, which says how its threads wait before it is loaded

PRODUCT_ROWS_MIN = 512  # fewer are compared one by one in less time than a product and its hits' distances take
# Query numbers x rows of a block from which on several threads compare. For less they wait for each other longer than
# that saves, ten times as long where another process wants the cores: a tail has many blocks.
THREADS_FLOATS_MIN = 1 << 24
CHUNK_FLOATS = 1 << 17  # of gathered vectors: 512 KiB; of 1 MiB malloc gives back every page: up to 3 times as long


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
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best: tuple[Rows, Vectors] | None = None
    threads = threads_in_use()
    try:
        for first, vectors in blocks:
            use_threads(threads if queries.size * len(vectors) >= THREADS_FLOATS_MIN else 1)
            part = _knn(queries, vectors, min(k, len(vectors)), metric, _selector(selection, first, len(vectors)))
            found = np.where(part[0] < 0, -1, part[0] + first) if first else part[0], part[1]
            best = found if best is None else _best_of(best, found, k, metric)
    finally:
        use_threads(threads)
    rows, distances = _filled_up(best, len(queries), k, metric)
    return rows, to_scores(distances, metric)


def _filled_up(best: tuple[Rows, Vectors] | None, count: int, k: int, metric: Metric) -> tuple[Rows, Vectors]:
    """As wide as `k`: row -1, infinitely far, where there are not so many rows."""
    if best is not None and best[0].shape[1] == k:
        return best
    rows = np.full((count, k), -1, dtype=np.int64)
    distances = np.full((count, k), -np.inf if metric == "ip" else np.inf, dtype=np.float32)
    if best is not None:
        width = best[0].shape[1]
        rows[:, :width], distances[:, :width] = best
    return rows, distances


def _selector(selection: RowSelection | None, first: int, count: int) -> Any:
    """FAISS's selector of the rows `first` to `first + count`; None where all of them are kept."""
    if selection is None:
        return None
    bits = selection.bits[first >> 3 : (first + count + 7) >> 3]
    if np.unpackbits(bits, count=count, bitorder="little").all():
        return None
    return faiss.IDSelectorBitmap(bits)


def _knn(queries: Vectors, vectors: Vectors, k: int, metric: Metric, selector: Any = None) -> tuple[Rows, Vectors]:
    """The `k` nearest of `vectors`. What a pair's distance is does not depend on the other queries and vectors.

    With a selector, be it of all, FAISS takes every difference, or product, by itself. Else many queries are a product
    of matrices: three times as fast, but its last digits depend on the shapes, so the hits' distances are taken again.
    Under l2 it cancels besides (`faiss_index.blas_threshold`).
    """
    vectors = np.ascontiguousarray(vectors)
    multiplied = metric != "l2" and selector is None and len(queries) > 1 and len(vectors) >= PRODUCT_ROWS_MIN
    if not multiplied:
        compare = faiss.knn_inner_product if metric == "ip" else faiss.knn_L2sqr
        return _knn_of(compare, queries, vectors, k, selector or faiss.IDSelectorAll())
    _, rows = faiss.knn(queries, vectors, k, metric=faiss_metric(metric))
    distances = candidate_distances(queries, rows, lambda wanted: vectors[wanted], metric)
    order = np.lexsort((rows, -distances if metric == "ip" else distances), axis=1)
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


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


def candidate_distances(
    queries: Vectors, labels: Rows, vectors_of: Callable[[Rows], Vectors], metric: Metric
) -> Vectors:
    """FAISS's distance of every query (n, d) and each of its candidates (n, width); undefined where one is negative.

    `vectors_of` gives the vectors of some labels (m,), float32 (m, d). By the calling thread alone: for so little work
    a second one costs more than it does, if it has to be woken up.
    """
    count, width = labels.shape
    step = max(1, CHUNK_FLOATS // max(1, width * queries.shape[1]))
    if count <= step:
        return _pair_distances(queries, labels, vectors_of, metric)
    distances = np.empty(labels.shape, dtype=np.float32)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        distances[chunk] = _pair_distances(queries[chunk], labels[chunk], vectors_of, metric)
    return distances


def _pair_distances(queries: Vectors, labels: Rows, vectors_of: Callable[[Rows], Vectors], metric: Metric) -> Vectors:
    """As `candidate_distances`, of all at once."""
    vectors = np.ascontiguousarray(vectors_of(np.maximum(labels, 0).reshape(-1)))
    asked, numbers = _pairs(*labels.shape)
    distances = np.empty(labels.shape, dtype=np.float32)
    compare = faiss.pairwise_indexed_inner_product if metric == "ip" else faiss.pairwise_indexed_L2sqr
    arrays = [faiss.swig_ptr(array) for array in (queries, asked, vectors, numbers, distances)]
    threads = threads_in_use()
    use_threads(1)
    compare(queries.shape[1], labels.size, *arrays)
    use_threads(threads)
    return distances


@lru_cache(16)
def _pairs(count: int, width: int) -> tuple[Rows, Rows]:
    """The query, and the number, of each pair of `count` queries with `width` candidates; not to be written to."""
    numbers = np.arange(count * width)
    return numbers // max(1, width), numbers


def nearest(points: Vectors, centroids: Vectors, metric: Metric) -> Rows:
    """The nearest centroid of each point, shape (n, 1), as k-means assigns them: by a matrix product."""
    _, rows = faiss.knn(points, centroids, 1, metric=faiss_metric(metric))
    return rows  # type: ignore[no-any-return]


def _best_of(best: tuple[Rows, Vectors], more: tuple[Rows, Vectors], k: int, metric: Metric) -> tuple[Rows, Vectors]:
    rows = np.concatenate([best[0], more[0]], axis=1)
    distances = np.concatenate([best[1], more[1]], axis=1)
    order = np.argsort(-distances if metric == "ip" else distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


def blocks_until(blocks: Iterable[tuple[int, Vectors]], stop: int) -> Iterator[tuple[int, Vectors]]:
    """The part of consecutive blocks below row `stop`."""
    for first, vectors in blocks:
        if first >= stop:
            return
        yield first, vectors[: stop - first]
