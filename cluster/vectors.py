"""Checks and normalisation of vectors at the edges of the system: requests and imported rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.config import Metric

Vectors = NDArray[np.float32]
LENGTH_MAX = float(np.sqrt(np.finfo(np.float32).max)) / 2.0  # the squared distance of two such vectors is finite


def lengths(vectors: Vectors) -> NDArray[np.float64]:
    """Euclidean length of each row, summed in float64; shape (n, 1)."""
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return np.sqrt(squares)[:, None]


def vector_problem(vectors: Vectors, metric: Metric) -> tuple[int, str] | None:
    """(row, what is wrong) of the first unusable row of (n, d) vectors; None when all can be used."""
    if len(vectors) == 1 and _plainly_usable(vectors[0]):
        return None
    long = lengths(vectors)[:, 0]  # finite exactly where all numbers are: squares of float32 do not overflow float64
    finite = np.isfinite(long)
    if not finite.all():
        return int(np.argmin(finite)), "holds NaN or infinity"
    if metric == "cosine":
        return (int(np.argmin(long)), "is a zero vector: cosine is undefined") if not long.all() else None
    if long.max(initial=0.0) > LENGTH_MAX:
        return int(np.argmax(long)), f"is longer than {LENGTH_MAX:.2g}: its distances overflow float32"
    return None


def _plainly_usable(vector: Vectors) -> bool:
    """Whether a vector's length is far from every bound: the common case, in a third of the time."""
    numbers = vector.astype(np.float64)
    return bool(1e-30 < numbers.dot(numbers) < 1e30)  # false where one is NaN or infinite


def as_searched(vectors: Vectors, metric: Metric) -> Vectors:
    """What the index sees: rows of length one under cosine (a copy), else the vectors themselves."""
    return (vectors / lengths(vectors)).astype(np.float32) if metric == "cosine" else vectors
