"""What is tested on a GPU: every kind over clustered vectors under every metric that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from actors.exact_search import exact_search
from actors.faiss_index import use_threads
from actors.twin_index import TwinIndex
from benchmarks.gpu_collection import KINDS, Made
from benchmarks.gpu_sets import GpuSet, K, Shape, cores, made
from cluster.config import IndexConfig, Metric
from cluster.row_selection import RowSelection
from cluster.topk import recall_at_k
from tests.gpu.stand_in import DOUBLE, SMALLER


def sized(count: int) -> int:
    """So many points on a GPU, and a share of them for its stand-in."""
    return count // SMALLER if DOUBLE else count


COUNT, DIMENSION, QUERIES = sized(60_000), 64, 400
TARGET = 0.95
SLACK = 0.01  # these queries are others than those that were tuned with
SEED = 20261128


@dataclass(frozen=True)
class Case:
    kind: str
    metric: Metric

    def __str__(self) -> str:
        return f"{self.kind}-{self.metric}".replace(" ", "-").replace("_", "-")

    @property
    def index(self) -> IndexConfig:
        return replace(KINDS[self.kind], target_recall=TARGET, num_gpus=1.0)

    @property
    def exact(self) -> bool:
        return self.kind.startswith("flat")


CASES = tuple(
    Case(kind, metric)
    for kind in KINDS
    for metric in ("cosine", "l2", "ip")
    if metric != "ip" or kind.startswith("flat")
)


@cache
def clusters(metric: Metric, count: int = COUNT, dimension: int = DIMENSION) -> GpuSet:
    """Clusters of a thousand points; queries are others from the same clusters, with their true neighbours."""
    shape = Shape(count, dimension, metric, QUERIES)
    vectors, queries = made(count, shape, 1), made(QUERIES, shape, 2)
    return GpuSet("clusters", metric, vectors, queries, exact(vectors, queries, metric))


def exact(vectors: Any, queries: Any, metric: Metric, selection: RowSelection | None = None, k: int = K) -> Any:
    """The true rows, (n, k)."""
    use_threads(cores())
    kept = np.arange(len(vectors)) if selection is None else selection.rows()
    found = exact_search(queries, [(0, vectors[kept])], k, metric)[0]
    return kept[found]


def scores(vectors: Any, queries: Any, rows: Any, metric: Metric) -> Any:
    """The metric's own values in float64, (n, width), of each query with its rows."""
    pairs, asked = vectors[rows].astype(np.float64), queries[:, None, :].astype(np.float64)
    return ((pairs - asked) ** 2).sum(axis=2) if metric == "l2" else (pairs * asked).sum(axis=2)


def twin_of(collection: Made) -> TwinIndex:
    """The index of the one segment; on the GPU, or the test fails with the reason why not."""
    index = collection.segment.searcher.index
    assert isinstance(index, TwinIndex)
    assert index.gpu is not None, index.why
    return index


def recall(found: Any, truth: Any) -> float:
    return float(recall_at_k(found[:, :K], truth[:, :K]).mean())


def kept_at_random(count: int, share: float) -> RowSelection:
    return RowSelection.of(np.random.default_rng(SEED).random(count) < share)
