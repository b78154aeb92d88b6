"""Searching one segment: candidates from its index, exact scores from its rows, filters, brute force.

The same steps serve a loaded segment and one that is being built and tuned.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import numpy as np
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.faiss_index import SearchableIndex, threads_in_use
from actors.rerank import rerank
from cluster.config import Metric
from cluster.index_spec import IndexSpec
from cluster.row_selection import RowSelection
from cluster.segment import Rows

# Under a filter an index finds fewer of the neighbours that are kept; how many depends on the query, near which all
# rows may be kept, or none (docs/decisions/0004-adaptive-index.md):
SCAN_FLOATS_MAX = 1_000_000  # kept rows x dimension that are scanned in about half a millisecond: no index is asked
NEAR_ROWS = 32  # of at least so many of a query's nearest rows, found with a part of the effort, the kept are counted
NEAR_EFFORT = 0.25
WIDEN_MAX = 16  # times as much is visited where a sixteenth is kept nearby; where less is, the kept rows are scanned
CANDIDATES_MAX = 4_000_000  # of the queries of one call to the index: 48 MB of rows and distances
GATHER_FLOATS = 1 << 20  # of kept rows scanned at a time: 4 MiB, which stay in the caches and in malloc's hands

Labels = NDArray[np.int64]
Vectors = NDArray[np.float32]


class SegmentSearcher:
    """An index and the rows it was built from; `search` and `exact` answer with row numbers and the metric's values."""

    def __init__(self, index: SearchableIndex, spec: IndexSpec, rows: Rows, metric: Metric) -> None:
        self.index = index
        self._spec = spec
        self._rows = rows
        self._metric = metric

    def search(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[Labels, Vectors]:
        """(rows, scores), both (n, min(width, count)), best first; row -1 where fewer were found."""
        if selection is None or selection.kept == selection.count:
            return self._in_parts(queries, width, params, None)
        self.index.check(params)
        if selection.kept * self._rows.dimension <= SCAN_FLOATS_MAX:
            return self.exact(queries, width, selection)
        return self._filtered(queries, width, params, selection)

    def _in_parts(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None
    ) -> tuple[Labels, Vectors]:
        """So many queries at once that their candidates fit into memory."""
        at_once = max(1, int(CANDIDATES_MAX / (width * max(1.0, params.get("rerank", self._spec.rerank)))))
        parts = [
            self._search(queries[start : start + at_once], width, params, selection)
            for start in range(0, max(1, len(queries)), at_once)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([labels for labels, _ in parts]), np.concatenate([scores for _, scores in parts])

    def _search(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None
    ) -> tuple[Labels, Vectors]:
        factor, params = self._candidates(params)
        labels, scores = self.index.search(queries, ceil(max(1.0, factor) * width), params, selection)
        if factor and labels.size:
            labels, scores = rerank(self._rows, queries, labels, self._metric, threads_in_use())
        return labels[:, :width], scores[:, :width]

    def _candidates(self, params: dict[str, float]) -> tuple[float, dict[str, float]]:
        """(candidates per hit to score by the rows, the index's own parameters); 0: the index's scores are exact."""
        store = self._spec.rerank_store
        if store == "rows":
            return max(1.0, params.get("rerank", self._spec.rerank)), {k: v for k, v in params.items() if k != "rerank"}
        if store == "float16":
            return 1.0, params
        if store == "sq8":
            return 2.0, params | ({"rerank": params["rerank"] / 2.0} if "rerank" in params else {})
        return 0.0, params

    def _filtered(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection
    ) -> tuple[Labels, Vectors]:
        """Queries near which the same share of rows is kept are searched together, with the effort that it takes."""
        factors = widening(self._shares_near(queries, max(NEAR_ROWS, width), params, selection))
        rows = np.full((len(queries), min(width, self._rows.count)), -1, dtype=np.int64)
        scores = np.zeros(rows.shape, dtype=np.float32)
        for factor in np.unique(factors).tolist():
            mine = factors == factor
            if factor > WIDEN_MAX:
                found, found_scores = self.exact(queries[mine], width, selection)
            else:
                found, found_scores = self._in_parts(queries[mine], width, self._scaled(params, factor), selection)
            rows[mine, : found.shape[1]], scores[mine, : found.shape[1]] = found, found_scores
        return rows, scores

    def _shares_near(
        self, queries: Vectors, near_rows: int, params: dict[str, float], selection: RowSelection
    ) -> NDArray[np.float64]:
        """The share of a query's nearest rows that is kept, (n,); 1.0 of an index that visits all rows anyway."""
        if not {"nprobe", "ef_search"} & set(self.index.knobs):
            return np.ones(len(queries))
        rough = self._scaled({name: value for name, value in params.items() if name != "rerank"}, NEAR_EFFORT)
        near, _ = self.index.search(queries, near_rows, rough)
        found = near >= 0
        kept = found & selection.holds(np.maximum(near, 0))
        return np.asarray(kept.sum(axis=1) / np.maximum(1, found.sum(axis=1)), dtype=np.float64)

    def _scaled(self, params: dict[str, float], factor: float) -> dict[str, float]:
        """Parameters that visit `factor` times as much."""
        limits = {"nprobe": self.index.lists, "ef_search": self.index.count}
        return {
            name: min(ceil(value * factor), limits[name]) if name in limits else value for name, value in params.items()
        }

    def exact(self, queries: Vectors, width: int, selection: RowSelection | None = None) -> tuple[Labels, Vectors]:
        """Brute force over the rows: (rows, scores), both (n, min(width, rows to be found)), best first."""
        if selection is None:
            return exact_search(queries, self._rows.blocks(), min(width, self._rows.count), self._metric)
        kept = selection.rows()
        found, scores = exact_search(queries, gathered_blocks(self._rows, kept), min(width, len(kept)), self._metric)
        return np.where(found < 0, found, kept[found]), scores


def gathered_blocks(rows: Rows, kept: Labels) -> Iterator[tuple[int, Vectors]]:
    """(first position in `kept`, vectors) of some rows, a bounded number at a time."""
    step = max(1, GATHER_FLOATS // rows.dimension)
    for start in range(0, len(kept), step):
        yield start, rows.gather_vectors(kept[start : start + step])


def widening(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times as much is visited where these shares are kept: the nearest powers of two to 1 / share."""
    return np.asarray(np.exp2(np.ceil(-np.log2(np.maximum(shares, 1e-9)) - 0.5)), dtype=np.float64)
