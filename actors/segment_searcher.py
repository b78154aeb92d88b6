"""Searching one segment: candidates from its index, exact scores from its rows, filters, brute force.

The same steps serve a loaded segment and one that is being built and tuned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.faiss_index import SearchableIndex, threads_in_use
from actors.rerank import rerank
from actors.twin_index import TwinIndex
from cluster.config import Metric
from cluster.index_spec import FAR_EF_SEARCH, FAR_SCORE, ITOPK_STEP, IndexSpec
from cluster.row_selection import RowSelection
from cluster.segment import Rows
from cluster.topk import smaller_is_better

# Under a filter an index finds fewer of the neighbours that are kept; how many depends on the query, near which all
# rows may be kept, or none (docs/decisions/0004-adaptive-index.md):
SCAN_FLOATS_MAX = 1_000_000  # kept rows x dimension that are scanned in about half a millisecond: no index is asked
NEAR_ROWS = 32  # of at least so many of a query's nearest rows, found with a part of the effort, the kept are counted
NEAR_EFFORT = 0.25
MOSTLY_KEPT = 0.9  # from this share on what is near a query is looked at only where the query seems far
WIDEN_MAX = 16  # times as much is visited where a sixteenth is kept nearby; where less is, the kept rows are scanned
TUNED_K = 10  # what operating points were proven for
CANDIDATES_MAX = 4_000_000  # of the queries of one call to the index: 48 MB of rows and distances
GATHER_FLOATS = 1 << 20  # of kept rows scanned at a time: 4 MiB, which stay in the caches and in malloc's hands

EFFORTS = {"nprobe", "ef_search", "itopk_size"}  # knobs that say how many of the rows a search visits

Labels = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Far:
    """From which score of the tenth hit on a query is far, and the parameters that it then takes."""

    score: float
    params: dict[str, float]

    def tells(self, scores: Vectors, metric: Metric) -> NDArray[np.bool_]:
        """Which queries are far, (n,), by their hits' scores (n, width), best first."""
        tenth = scores[:, min(TUNED_K, scores.shape[1]) - 1]
        return tenth > self.score if smaller_is_better(metric) else tenth < self.score


def _by_distance(params: dict[str, float]) -> tuple[dict[str, float], _Far | None]:
    """(the index's own parameters, what is different for far queries)."""
    if FAR_SCORE not in params:
        return params, None
    near = dict(params)
    return near, _Far(near.pop(FAR_SCORE), {"ef_search": near.pop(FAR_EF_SEARCH)})


class SegmentSearcher:
    """An index and the rows it was built from; `search` and `exact` answer with row numbers and the metric's values."""

    def __init__(self, index: SearchableIndex, spec: IndexSpec, rows: Rows, metric: Metric) -> None:
        self.index = index
        self.rows = rows
        self._spec = spec
        self._metric = metric

    def search(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None = None
    ) -> tuple[Labels, Vectors]:
        """(rows, scores), both (n, min(width, count)), best first; row -1 where fewer were found.

        With `FAR_SCORE` among the parameters, queries whose tenth hit scores worse are searched with `FAR_EF_SEARCH`.
        """
        if selection is None or selection.kept == selection.count:
            return self._in_parts(queries, width, params, None)
        near, far = _by_distance(params)
        self.index.check(near)
        if selection.kept * self.rows.dimension <= SCAN_FLOATS_MAX:
            return self.exact(queries, width, selection)
        if selection.kept >= MOSTLY_KEPT * selection.count and far is not None:
            return self._in_parts(queries, width, self._scaled(params, selection.count / selection.kept), selection)
        return self._filtered(queries, width, near if far is None else near | far.params, selection)

    def _in_parts(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None
    ) -> tuple[Labels, Vectors]:
        """So many queries at once that their candidates fit into memory."""
        at_once = max(1, int(CANDIDATES_MAX / (width * max(1.0, params.get("rerank", self._spec.rerank)))))
        if len(queries) <= at_once:
            return self._search(queries, width, params, selection)
        parts = [
            self._search(queries[start : start + at_once], width, params, selection)
            for start in range(0, len(queries), at_once)
        ]
        return np.concatenate([labels for labels, _ in parts]), np.concatenate([scores for _, scores in parts])

    def _search(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None
    ) -> tuple[Labels, Vectors]:
        near, far = _by_distance(params)
        factor, own = self._candidates(near, len(queries))
        wanted = ceil(max(1.0, factor) * width)
        if far is None:
            return self._ranked(queries, width, factor, *self.index.search(queries, wanted, own, selection))
        labels, scores = self.index.search(queries, max(TUNED_K, wanted), own, selection)
        beyond = far.tells(scores, self._metric)
        labels, scores = labels[:, :wanted], scores[:, :wanted]
        if not np.count_nonzero(beyond):
            return self._ranked(queries, width, factor, labels, scores)
        again = self._search_far(queries[beyond], width, near | far.params, selection)
        if len(again[0]) == len(queries):
            return again
        close = ~beyond
        found = self._ranked(queries[close], width, factor, labels[close], scores[close])
        rows = np.empty((len(queries), found[0].shape[1]), dtype=np.int64)
        exact = np.empty(rows.shape, dtype=np.float32)
        rows[close], exact[close] = found
        rows[beyond], exact[beyond] = again
        return rows, exact

    def _search_far(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection | None
    ) -> tuple[Labels, Vectors]:
        """Under a selection a query may only seem far, because what is near it was not kept."""
        if selection is None:
            return self._search(queries, width, params, None)
        return self._filtered(queries, width, params, selection)

    def _ranked(
        self, queries: Vectors, width: int, factor: float, labels: Labels, scores: Vectors
    ) -> tuple[Labels, Vectors]:
        """The best `width` candidates, by the rows where `factor` is not 0."""
        if factor and labels.size:
            labels, scores = rerank(self.rows, queries, labels, self._metric, threads_in_use())
        return labels[:, :width], scores[:, :width]

    def _candidates(self, params: dict[str, float], queries: int) -> tuple[float, dict[str, float]]:
        """(candidates per hit to score by the rows, the index's own parameters); 0: the index's scores are exact.

        Those that a flat index has from a product of matrices depend, in their last digits, on what else is asked.
        """
        store = self._spec.rerank_store
        if store == "rows":
            return max(1.0, params.get("rerank", self._spec.rerank)), {k: v for k, v in params.items() if k != "rerank"}
        if store == "float16":
            return 1.0, params
        if store == "sq8":
            return 2.0, params | ({"rerank": params["rerank"] / 2.0} if "rerank" in params else {})
        multiplied = self._spec.kind == "flat" and self._spec.codes == "float32" and self._metric != "l2"
        return (1.0 if multiplied and queries > 1 else 0.0), params

    def _filtered(
        self, queries: Vectors, width: int, params: dict[str, float], selection: RowSelection
    ) -> tuple[Labels, Vectors]:
        """Queries near which the same share of rows is kept are searched together, with the effort that it takes."""
        factors = widening(self._shares_near(queries, max(NEAR_ROWS, width), params, selection))
        rows = np.full((len(queries), min(width, self.rows.count)), -1, dtype=np.int64)
        scores = np.zeros(rows.shape, dtype=np.float32)
        for factor in np.unique(factors).tolist():
            mine = factors == factor
            wider = self._scaled(params, factor)
            if factor > WIDEN_MAX or not self.takes(width, wider):
                found, found_scores = self.exact(queries[mine], width, selection)
            else:
                found, found_scores = self._in_parts(queries[mine], width, wider, selection)
            rows[mine, : found.shape[1]], scores[mine, : found.shape[1]] = found, found_scores
        return rows, scores

    def _shares_near(
        self, queries: Vectors, near_rows: int, params: dict[str, float], selection: RowSelection
    ) -> NDArray[np.float64]:
        """The share of a query's nearest rows that is kept, (n,); 1.0 of an index that visits all rows anyway."""
        if not EFFORTS & set(self.index.knobs):
            return np.ones(len(queries))
        rough = self._scaled({name: value for name, value in params.items() if name != "rerank"}, NEAR_EFFORT)
        if not self.takes(near_rows, rough):  # a graph on a GPU without a twin: fewer say enough
            near_rows = NEAR_ROWS
        near, _ = self.index.search(queries, near_rows, rough)
        found = near >= 0
        kept = found & selection.holds(np.maximum(near, 0))
        return np.asarray(kept.sum(axis=1) / np.maximum(1, found.sum(axis=1)), dtype=np.float64)

    def _scaled(self, params: dict[str, float], factor: float) -> dict[str, float]:
        """Parameters that visit `factor` times as much. Those of a graph on a GPU may come to more than it takes."""
        limits = {"nprobe": self.index.lists, "ef_search": self.index.count, FAR_EF_SEARCH: self.index.count}
        scaled = {
            name: min(ceil(value * factor), limits[name]) if name in limits else value for name, value in params.items()
        }
        return scaled | ({"itopk_size": itopk(params["itopk_size"] * factor)} if "itopk_size" in params else {})

    def takes(self, width: int, params: dict[str, float]) -> bool:
        """Whether the index answers such a search. A GPU's has limits, beyond which only its twin does."""
        if not isinstance(self.index, TwinIndex):
            return True
        factor, own = self._candidates(_by_distance(params)[0], 1)
        return self.index.takes(ceil(max(1.0, factor) * width), own)

    def exact(self, queries: Vectors, width: int, selection: RowSelection | None = None) -> tuple[Labels, Vectors]:
        """Brute force over the rows: (rows, scores), both (n, min(width, rows to be found)), best first."""
        if selection is None:
            return exact_search(queries, self.rows.blocks(), min(width, self.rows.count), self._metric)
        kept = selection.rows()
        found, scores = exact_search(queries, gathered_blocks(self.rows, kept), min(width, len(kept)), self._metric)
        return np.where(found < 0, found, kept[found]), scores


def itopk(candidates: float) -> int:
    """At least so many candidates, as a graph on a GPU keeps them."""
    return ITOPK_STEP * max(1, ceil(candidates / ITOPK_STEP))


def gathered_blocks(rows: Rows, kept: Labels) -> Iterator[tuple[int, Vectors]]:
    """(first position in `kept`, vectors) of some rows, a bounded number at a time."""
    step = max(1, GATHER_FLOATS // rows.dimension)
    for start in range(0, len(kept), step):
        yield start, rows.gather_vectors(kept[start : start + step])


def widening(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times as much is visited where these shares are kept: the nearest powers of two to 1 / share."""
    return np.asarray(np.exp2(np.ceil(-np.log2(np.maximum(shares, 1e-9)) - 0.5)), dtype=np.float64)
