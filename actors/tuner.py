"""Tuning: walk the one knob of an index, cheapest first, until recall@10 is proven against exact truth.

The queries come from stored rows that the index has not seen yet: a third as they are, two thirds midpoints of
pairs of them. Midpoints stand for real queries, which are unlike the stored points: on WordNet definitions a graph
tuned on rows alone to .95 answered real sentences at .89 (docs/decisions/0002-index-policy.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from actors.faiss_index import FaissIndex
from cluster.config import Metric
from cluster.index_spec import IndexSpec
from cluster.segment import OperatingPoint
from cluster.topk import recall_at_k

TUNING_K = 10
HELD_OUT_MAX = 1_000
STANDARD_TARGETS = (0.90, 0.95, 0.99)
ONE_SIDED_95 = 1.645  # standard normal quantile
LATENCY_SAMPLES = 32

Vectors = NDArray[np.float32]


def held_out_count(count: int) -> int:
    """How many rows to keep out of the index while it is tuned."""
    return min(HELD_OUT_MAX, count // 10)


def tuning_queries(held_out: Vectors, metric: Metric) -> Vectors:
    """One third rows of `held_out` (n, d) as they are, two thirds midpoints of neighbouring rows of it."""
    third = max(1, len(held_out) // 3)
    rest = held_out[third:]
    midpoints = (rest + np.roll(rest, 1, axis=0)) / np.float32(2.0)
    if metric == "cosine":
        norms = np.linalg.norm(midpoints, axis=1, keepdims=True)
        midpoints = np.where(norms > 1e-6, midpoints / np.maximum(norms, 1e-6), rest)
    return np.concatenate([held_out[:third], midpoints]).astype(np.float32)


def recall_lower_bound(recalls: NDArray[np.float64]) -> float:
    """Lower end of the one-sided 95% confidence interval of the mean of per-query recalls (normal approximation)."""
    if len(recalls) < 2:
        return float(recalls.mean())
    return float(recalls.mean() - ONE_SIDED_95 * recalls.std(ddof=1) / np.sqrt(len(recalls)))


def tune(
    index: FaissIndex,
    spec: IndexSpec,
    queries: Vectors,
    truth: NDArray[np.int64],
    target_recall: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[OperatingPoint, ...]:
    """Operating points for the collection's own target (first) and the standard ones.

    `truth` (queries, 10) holds exact rows. A target that no grid value reaches gets the best one, `met=False`.
    """
    targets = (target_recall, *(t for t in STANDARD_TARGETS if t != target_recall))
    if spec.search_param is None:
        latency_ms = _latency_ms(index, queries, {}, clock)
        return tuple(OperatingPoint(t, {}, 1.0, 1.0, latency_ms, True) for t in targets)
    walked: list[OperatingPoint] = []
    for value in spec.search_grid():
        point = _measure(index, queries, truth, {spec.search_param: value}, clock)
        walked.append(point)
        if point.recall_low >= max(targets) or point.recall >= 1.0:
            break
    return tuple(_cheapest(walked, target) for target in targets)


def _measure(
    index: FaissIndex,
    queries: Vectors,
    truth: NDArray[np.int64],
    params: dict[str, int],
    clock: Callable[[], float],
) -> OperatingPoint:
    found, _ = index.search(queries, TUNING_K, params)
    recalls = recall_at_k(found, truth)
    latency_ms = _latency_ms(index, queries, params, clock)
    return OperatingPoint(0.0, params, float(recalls.mean()), recall_lower_bound(recalls), latency_ms, False)


def _latency_ms(index: FaissIndex, queries: Vectors, params: dict[str, int], clock: Callable[[], float]) -> float:
    """Median time of one single-query search, in milliseconds."""
    times = []
    for query in queries[:LATENCY_SAMPLES]:
        start = clock()
        index.search(query[None, :], TUNING_K, params)
        times.append(clock() - start)
    return float(np.median(times) * 1000.0) if times else 0.0


def _cheapest(walked: list[OperatingPoint], target: float) -> OperatingPoint:
    """The first point whose recall is proven to reach the target; else the best one, not met."""
    for point in walked:
        if point.recall_low >= target or point.recall >= 1.0:
            return OperatingPoint(target, point.params, point.recall, point.recall_low, point.latency_ms, True)
    best = max(walked, key=lambda point: point.recall)
    return OperatingPoint(target, best.params, best.recall, best.recall_low, best.latency_ms, False)
