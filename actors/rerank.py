"""Exact scores of candidates from a segment's own memory-mapped rows: gathered and compared, cut to fit the caches.

Beside FAISS's refine, which reads a copy inside the index, this needs no bytes of its own and gives the metric's own
value at the rows' precision; what it costs is in docs/decisions/0004-adaptive-index.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from actors.exact_search import candidate_distances
from actors.faiss_index import to_scores
from cluster.config import Metric
from cluster.segment import Rows
from cluster.topk import smaller_is_better

SPLIT_FLOATS_MIN = 1 << 23  # less work than this is done as fast by one thread, while FAISS's others still spin


def rerank(
    rows: Rows, queries: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric, threads: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(labels, scores) of candidates `labels` (n, width), best first by exact score; label -1 and no score last.

    Equal scores are ordered by label.
    """
    scores = exact_scores(rows, queries, labels, metric, threads)
    cost = scores if smaller_is_better(metric) else -scores
    missing = labels < 0
    if np.count_nonzero(missing):
        cost = np.where(missing, np.float32(np.inf), cost)
    later = cost[:, 1:] > cost[:, :-1]
    if np.count_nonzero(later) == later.size:
        return labels, scores
    order = np.lexsort((labels, cost), axis=1)
    if len(labels) == 1:
        return labels[:, order[0]], scores[:, order[0]]
    lines = np.arange(len(labels))[:, None]
    return labels[lines, order], scores[lines, order]


def exact_scores(
    rows: Rows, queries: NDArray[np.float32], labels: NDArray[np.int64], metric: Metric, threads: int
) -> NDArray[np.float32]:
    """Score of every query (n, d) with each of its candidates (n, width); undefined where the label is negative."""
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    parts = min(threads, len(queries)) if labels.size * rows.dimension >= SPLIT_FLOATS_MIN else 1
    if parts <= 1:
        return to_scores(candidate_distances(queries, labels, rows.gather_vectors, metric), metric)
    bounds = np.linspace(0, len(queries), parts + 1).astype(int)
    cuts = [slice(start, stop) for start, stop in pairwise(bounds.tolist())]
    own, *others = [(queries[cut], labels[cut], rows.gather_vectors, metric) for cut in cuts]
    coming = [_threads(threads).submit(candidate_distances, *part) for part in others]
    distances = [candidate_distances(*own), *(part.result() for part in coming)]
    return to_scores(np.concatenate(distances), metric)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "rerank")
