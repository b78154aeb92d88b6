"""Vectors for the GPU benchmark: clusters made by all cores, the same every time, or the WordNet set's files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from actors.exact_search import exact_search
from actors.faiss_index import use_threads
from cluster.arrow_rows import vectors_view
from cluster.config import Metric
from cluster.vectors import as_searched

K = 10
SEED = 7
QUERIES = 8_192  # twice the largest batch
TRUTH_QUERIES = 500  # of them, whose exact neighbours are known
POINTS_A_CLUSTER, NOISE = 1_000, 0.7
CHUNK_FLOATS = 1 << 24  # made at a time by one thread, from a seed of its own: not by how many threads there are
BLOCK_FLOATS = 1 << 26  # of rows that exact answers are taken of at a time
WORDS = ("wordnet-minilm-384.parquet", "wordnet-minilm-384-queries.parquet")


@dataclass(frozen=True)
class GpuSet:
    """Rows (n, d) and queries (q, d) float32, of unit length under cosine; true rows (t, K) of the first t queries."""

    name: str
    metric: Metric
    vectors: Any
    queries: Any
    truth: Any

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    def __str__(self) -> str:
        return f"{self.name}, {len(self.vectors):,} x {self.dimension}, {self.metric}"


@dataclass(frozen=True)
class Shape:
    """What to make: so many vectors around a centre for every `POINTS_A_CLUSTER` of them."""

    count: int
    dimension: int
    metric: Metric
    queries: int = QUERIES


SHAPES = {
    "clusters-96": Shape(1_000_000, 96, "l2"),
    "clusters-128": Shape(1_000_000, 128, "cosine"),
    "clusters-768": Shape(1_000_000, 768, "cosine"),
}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def make_set(name: str, shape: Shape) -> GpuSet:
    """Gaussian clusters with their exact neighbours by brute force on all cores."""
    vectors = made(shape.count, shape, 1)
    queries = made(shape.queries, shape, 2)
    return GpuSet(name, shape.metric, vectors, queries, true_rows(vectors, queries[:TRUTH_QUERIES], shape.metric))


def made(count: int, shape: Shape, stream: int) -> Any:
    """(count, dimension) float32 around the centres of the shape; other numbers for another `stream`."""
    lots = max(1, shape.count // POINTS_A_CLUSTER)
    centres = np.random.default_rng([SEED, 0]).standard_normal((lots, shape.dimension), dtype=np.float32)
    vectors = np.empty((count, shape.dimension), np.float32)
    step = max(1, CHUNK_FLOATS // shape.dimension)

    def fill(start: int) -> None:
        chunk, random = vectors[start : start + step], np.random.default_rng([SEED, stream, start])
        random.standard_normal(out=chunk, dtype=np.float32)
        chunk *= np.float32(NOISE)
        chunk += centres[random.integers(0, lots, len(chunk))]
        if shape.metric == "cosine":
            chunk /= np.linalg.norm(chunk, axis=1, keepdims=True)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(fill, range(0, count, step)))
    return vectors


def true_rows(vectors: Any, queries: Any, metric: Metric) -> Any:
    """The K nearest rows of each query, (n, K)."""
    use_threads(cores())
    step = max(1, BLOCK_FLOATS // vectors.shape[1])
    blocks = ((start, vectors[start : start + step]) for start in range(0, len(vectors), step))
    return exact_search(queries, blocks, K, metric)[0]


def read_words(folder: Path, most: int | None = None) -> GpuSet:
    """The WordNet set of a folder with `WORDS`, compared by cosine; its queries repeated up to `QUERIES`.

    `most` rows only, for a quick look: the true neighbours are then those among these rows.
    """
    vectors = _vectors(folder / WORDS[0])[:most]
    queries = _vectors(folder / WORDS[1])
    truth = true_rows(vectors, queries[:TRUTH_QUERIES], "cosine")
    return GpuSet("words", "cosine", vectors, queries.take(range(QUERIES), axis=0, mode="wrap"), truth)


def _vectors(path: Path) -> Any:
    column = pq.read_table(path, columns=["vector"])["vector"].combine_chunks()
    return as_searched(vectors_view(column).astype(np.float32), "cosine")
