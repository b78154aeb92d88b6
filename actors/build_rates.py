"""How fast this machine builds indexes from the vectors at hand: a graph over a sample, and a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import log2

import numpy as np
from numpy.typing import NDArray

from actors.exact_search import nearest
from actors.faiss_index import build_index
from cluster.config import Metric
from cluster.index_costs import REFERENCE, Rates
from cluster.index_spec import HNSW_EF_CONSTRUCTION, HNSW_M, IndexSpec

SAMPLE_POINTS = REFERENCE.graph_points
SAMPLE_MIN = 2_000  # of fewer points a graph is built too quickly to tell
CENTROIDS = 1_024
PRODUCT_POINTS = 8_192


def measure_rates(
    sample: NDArray[np.float32], metric: Metric, threads: int, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Rates for vectors like `sample` (n, d) with the calling thread's FAISS threads, `threads`; takes some seconds.

    Those of the reference machine where there are too few vectors.
    """
    sample = np.ascontiguousarray(sample[:SAMPLE_POINTS], dtype=np.float32)
    if len(sample) < SAMPLE_MIN:
        return REFERENCE
    spec = IndexSpec("hnsw", {"m": HNSW_M, "ef_construction": HNSW_EF_CONSTRUCTION}, "float16", 0, "")
    graph = build_index(spec, sample.shape[1], metric, sample[:1], seed=0)
    started = clock()
    graph.add(sample)
    graph_s = clock() - started
    points, centroids = sample[:PRODUCT_POINTS], sample[:CENTROIDS]
    nearest(points[:256], centroids, metric)  # the first product starts threads
    started = clock()
    nearest(points, centroids, metric)
    product_s = max(1e-6, clock() - started)
    return Rates(
        threads,
        graph_s * 1e9 / (len(sample) * log2(len(sample))),
        len(sample),
        2.0 * len(points) * len(centroids) * sample.shape[1] / product_s,
        measured=True,
    )
