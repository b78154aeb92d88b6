"""Whether vectors survive being stored as float16 or 8 bits: whether neighbours stay neighbours.

Embeddings do. Features far from the origin, beyond 65,504 or below 1e-7 do not, and no index would say so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actors.exact_search import exact_search
from cluster.config import Codes, Metric
from cluster.topk import recall_at_k

CHECKED_ROWS = 2_000
CHECKED_QUERIES = 100
CHECKED_K = 10
KEPT_MIN = {"float16": 0.98, "sq8": 0.90}  # of the neighbours: 8-bit codes are ranked again by exact distances

Vectors = NDArray[np.float32]


def neighbours_kept(sample: Vectors, codes: Codes, metric: Metric) -> float:
    """Recall@10 of a search among coded rows of `sample` (n, d), against the rows themselves; 1.0 where n is small."""
    sample = np.asarray(sample[:CHECKED_ROWS], dtype=np.float32)
    if codes == "float32" or len(sample) <= CHECKED_K:
        return 1.0
    queries = sample[:CHECKED_QUERIES]
    truth, _ = exact_search(queries, [(0, sample)], CHECKED_K, metric)
    with np.errstate(over="ignore"):
        coded = _as_float16(sample) if codes == "float16" else _as_8_bits(sample)
    if not np.isfinite(coded).all():
        return 0.0
    found, _ = exact_search(queries, [(0, coded)], CHECKED_K, metric)
    return float(recall_at_k(found, truth).mean())


def codes_fit(sample: Vectors, codes: Codes, metric: Metric) -> bool:
    return codes == "float32" or neighbours_kept(sample, codes, metric) >= KEPT_MIN[codes]


def _as_float16(vectors: Vectors) -> Vectors:
    return vectors.astype(np.float16).astype(np.float32)


def _as_8_bits(vectors: Vectors) -> Vectors:
    """As FAISS's SQ8 trains: 255 steps between the least and the greatest value of each dimension."""
    low = vectors.min(axis=0)
    step = np.maximum(vectors.max(axis=0) - low, np.finfo(np.float32).tiny) / np.float32(255.0)
    coded: Vectors = (low + np.round((vectors - low) / step) * step).astype(np.float32)
    return coded
