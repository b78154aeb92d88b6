"""Merging hits: best first by the metric, ties by id; and recall@k."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from operator import neg
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.config import Metric
from cluster.query import Degraded, Hits

PLAIN_HITS_MAX = 128  # two parts of 10: half the time of arrays; of 64: as much


def smaller_is_better(metric: Metric) -> bool:
    """True for squared L2 distance; False for inner product and cosine similarity."""
    return metric == "l2"


def merge_hits(parts: Sequence[Hits], k: int, metric: Metric) -> Hits:
    """Merge several answers to the same queries into the best `k` of each query.

    Every part must hold the same number of queries, and the parts' points must be disjoint. A column that some of the
    parts lack is null in their rows; the merged answer includes the lowest LSN that every part does, and is degraded
    where one of them is.
    """
    if len(parts) == 1 and _most(parts[0].counts) <= k and not _has_ties(parts[0]):
        return parts[0]
    if len(parts[0].counts) == 1 and (merged := _merged_query(parts, k, metric)) is not None:
        return merged
    queries = len(parts[0].counts)
    query = np.concatenate([np.repeat(np.arange(queries), part.counts) for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    ids = pa.concat_arrays([part.ids for part in parts])
    order = _best_first(query, scores if smaller_is_better(metric) else -scores, ids)
    counts = np.bincount(query, minlength=queries)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = order[rank < k]
    columns = _joined_columns(parts)
    return Hits(
        np.minimum(counts, k),
        ids.take(pa.array(order)),
        scores[order],
        None if columns is None else columns.take(pa.array(order)),
        min(part.lsn for part in parts),
        _degraded(parts),
    )


def _merged_query(parts: Sequence[Hits], k: int, metric: Metric) -> Hits | None:
    """Of one query with few hits and without columns: plain Python, where arrays would cost more. Else None."""
    if sum(len(part.scores) for part in parts) > PLAIN_HITS_MAX:
        return None
    scored: list[tuple[float, Any]] = []
    for part in parts:
        scores = part.scores.tolist()
        if part.columns is not None or isnan(sum(scores)):  # what is not a number has no place in an order
            return None
        costs = scores if smaller_is_better(metric) else map(neg, scores)
        scored += zip(costs, part.ids.to_pylist(), strict=True)
    scored.sort()
    costs, ids = zip(*scored[:k], strict=True) if scored else ((), ())
    scores = np.array(costs if smaller_is_better(metric) else [-cost for cost in costs], dtype=np.float32)
    ids_array, lsn = pa.array(ids, parts[0].ids.type), min(part.lsn for part in parts)
    return Hits(np.array([len(ids)]), ids_array, scores, None, lsn, _degraded(parts))


def _degraded(parts: Sequence[Hits]) -> Degraded:
    """What the first of the degraded parts says; "" where none is."""
    return next((part.degraded for part in parts if part.degraded), "")


def _joined_columns(parts: Sequence[Hits]) -> Any:
    """The parts' columns below each other; not every part has to know an attribute that was written just now."""
    tables = [part.columns for part in parts if part.columns is not None]  # a part without hits has none
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def _most(counts: NDArray[np.int64]) -> int:
    return int(counts[0]) if len(counts) == 1 else int(counts.max(initial=0))  # a reduction takes microseconds


def _has_ties(hits: Hits) -> bool:
    """True if two neighbouring hits have equal scores (of one query, or by chance across two)."""
    return bool(np.count_nonzero(hits.scores[1:] == hits.scores[:-1]))


def _best_first(query: NDArray[np.int64], cost: NDArray[np.float32], ids: Any) -> NDArray[np.int64]:
    """Order by query, then cost, then id."""
    if pa.types.is_integer(ids.type):
        return np.lexsort((ids.to_numpy(zero_copy_only=False), cost, query))
    table = pa.table({"query": query, "cost": cost, "id": ids})
    keys = [("query", "ascending"), ("cost", "ascending"), ("id", "ascending")]
    return np.asarray(pc.sort_indices(table, sort_keys=keys).to_numpy(), dtype=np.int64)


def split_hits(hits: Hits, sizes: Sequence[int]) -> list[Hits]:
    """Cut the answers of consecutive queries into runs of `sizes` queries each."""
    if len(sizes) == 1:
        return [hits]
    counts, ids, scores, columns = hits.counts, hits.ids, hits.scores, hits.columns
    ends = [0, *np.cumsum(counts).tolist()]
    parts, first = [], 0
    for size in sizes:
        last = first + size
        start, stop = ends[first], ends[last]
        rows = None if columns is None else columns.slice(start, stop - start)
        part_ids = ids.slice(start, stop - start)
        parts.append(Hits(counts[first:last], part_ids, scores[start:stop], rows, hits.lsn, hits.degraded))
        first = last
    return parts


def best_of_each(hits: Hits, k: int) -> Hits:
    """The best `k` of each query, of hits that are in order."""
    if _most(hits.counts) <= k:
        return hits
    ends = np.cumsum(hits.counts)
    rank = np.arange(len(hits.scores)) - np.repeat(ends - hits.counts, hits.counts)
    rows = np.flatnonzero(rank < k)
    taken = pa.array(rows)
    columns = None if hits.columns is None else hits.columns.take(taken)
    counts = np.minimum(hits.counts, k)
    return Hits(counts, hits.ids.take(taken), hits.scores[rows], columns, hits.lsn, hits.degraded)


def join_queries(parts: Sequence[Hits]) -> Hits:
    """The inverse of `split_hits`: answers to consecutive runs of queries as one."""
    if len(parts) == 1:
        return parts[0]
    return Hits(
        np.concatenate([part.counts for part in parts]),
        pa.concat_arrays([part.ids for part in parts]),
        np.concatenate([part.scores for part in parts]),
        _joined_columns(parts),
        min(part.lsn for part in parts),
        _degraded(parts),
    )


def recall_at_k(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per-query recall: the share of each row of `truth` (queries, k) that the same row of `found` holds.

    Negative entries of `truth` (fewer than k points exist) do not count; a query with no truth has recall 1.
    """
    hits = (truth[:, :, None] == found[:, None, :]).any(axis=2) & (truth >= 0)
    wanted = (truth >= 0).sum(axis=1)
    return np.where(wanted == 0, 1.0, hits.sum(axis=1) / np.maximum(wanted, 1))
