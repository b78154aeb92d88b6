"""Checks and normalisation of vectors at the edges of the system: requests and imported rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.config import Metric

Vectors = NDArray[np.float32]


def lengths(vectors: Vectors) -> NDArray[np.float64]:
    """Euclidean length of each row, summed in float64; shape (n, 1)."""
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return np.sqrt(squares)[:, None]


def vector_problem(vectors: Vectors, metric: Metric) -> tuple[int, str] | None:
    """(row, what is wrong) of the first unusable row of (n, d) vectors; None when all can be used."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        return int(np.argmin(finite)), "holds NaN or infinity"
    if metric == "cosine":
        nonzero = lengths(vectors) > 0.0
        if not nonzero.all():
            return int(np.argmin(nonzero)), "is a zero vector: it has no direction, cosine is undefined"
    return None


def as_searched(vectors: Vectors, metric: Metric) -> Vectors:
    """What the index sees: rows of length one under cosine (a copy), else the vectors themselves."""
    return (vectors / lengths(vectors)).astype(np.float32) if metric == "cosine" else vectors
