"""Vectors to index, vectors to ask, and the exact answers: made here, or read from files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.arrow_rows import vectors_array, vectors_view
from cluster.topk import recall_at_k
from cluster.vectors import as_searched

K = 10
EF_SEARCH = (8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 400)  # tried for a recall, cheapest first
SEED = 7


@dataclass(frozen=True)
class VectorSet:
    """A Parquet file to import (columns id and vector), and queries (n, d) float32 with their true ids (n, K)."""

    parquet: Path
    queries: Any  # unit length under cosine
    truth: Any
    metric: str
    name: str

    def points(self) -> Any:
        """The indexed vectors (n, d) as they are compared, and their ids."""
        table = pq.read_table(self.parquet, columns=["id", "vector"])
        vectors = vectors_view(table["vector"].combine_chunks()).astype(np.float32)
        return as_searched(vectors, self.metric), table["id"].to_numpy()


def read_vectors(data: Path, queries: Path, metric: str) -> VectorSet:
    """Files whose queries have the column exact_ids."""
    table = pq.read_table(queries)
    vectors = table["vector"].combine_chunks()
    asked = vectors.flatten().to_numpy().astype(np.float32).reshape(len(vectors), -1)
    truth = np.array([line[:K] for line in table["exact_ids"].to_pylist()])
    return VectorSet(data, as_searched(asked, metric), truth, metric, data.stem)


def make_images(folder: Path, count: int = 60_000, asked: int = 2_000) -> VectorSet:
    """784 numbers from 0 to 255 with few degrees of freedom, as images have: 16 latent numbers through two layers."""
    random = np.random.default_rng(SEED)
    latent, hidden, dimension = 16, 256, 784
    centres = random.standard_normal((10, latent)) * 1.5
    drawn = centres[random.integers(0, len(centres), count + asked)] + random.standard_normal((count + asked, latent))
    first = random.standard_normal((latent, hidden)) / np.sqrt(latent)
    second = random.standard_normal((hidden, dimension)) / 16
    vectors = np.maximum(0, np.tanh(drawn @ first) @ second) * 255
    vectors = (vectors + random.standard_normal(vectors.shape) * 5).clip(0, 255).astype(np.float32)
    return _written(folder, vectors, asked, "l2", f"images made in code, {count:,} x {dimension}, L2")


def make_clusters(folder: Path, count: int = 60_000, asked: int = 2_000) -> VectorSet:
    """128 numbers around 1,000 centres (noise 0.7), compared by cosine."""
    random = np.random.default_rng(SEED)
    dimension = 128
    centres = random.standard_normal((1_000, dimension))
    which = random.integers(0, len(centres), count + asked)
    vectors = (centres[which] + 0.7 * random.standard_normal((count + asked, dimension))).astype(np.float32)
    return _written(
        folder, as_searched(vectors, "cosine"), asked, "cosine", f"clusters {count:,} x {dimension}, cosine"
    )


MADE: dict[str, Callable[[Path], VectorSet]] = {"images": make_images, "clusters": make_clusters}


def _written(folder: Path, vectors: Any, asked: int, metric: str, name: str) -> VectorSet:
    points, queries = vectors[:-asked], vectors[-asked:]
    ids = np.arange(len(points))
    pq.write_table(pa.table({"id": ids, "vector": vectors_array(points)}), folder / "points.parquet")
    _, truth = faiss.knn(queries, points, K, metric=faiss_metric(metric))
    return VectorSet(folder / "points.parquet", queries, truth, metric, name)


def faiss_metric(metric: str) -> int:
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def recall(found: Any, truth: Any) -> float:
    return float(recall_at_k(found, truth).mean())
