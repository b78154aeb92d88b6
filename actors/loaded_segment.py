"""A segment in this process: memory-mapped rows, its index, and its ids; searched at its operating points."""

from __future__ import annotations

from math import ceil, log10
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.faiss_index import SearchableIndex
from actors.segment_searcher import SegmentSearcher, itopk
from actors.ties import found_with_ties
from actors.twin_index import TwinIndex
from cluster.config import Metric
from cluster.errors import Invalid
from cluster.index_spec import FAR_EF_SEARCH, FAR_SCORE, ITOPK_MAX, IndexSpec
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.segment import OperatingPoint, Rows, SegmentDescription


class LoadedSegment:
    """One searchable segment: memory-mapped rows and index, and the ids in memory."""

    def __init__(self, description: SegmentDescription, rows: Rows, index: SearchableIndex, metric: Metric) -> None:
        self.description = description
        self.rows = rows
        self.metric = metric
        self.spec = IndexSpec.from_dict(description.spec)
        self.ids = rows.ids()
        self._id_numbers = self.ids.to_numpy() if pa.types.is_integer(self.ids.type) else None
        self.searcher = SegmentSearcher(index, self.spec, rows, metric)

    @property
    def twin(self) -> TwinIndex | None:
        """Its index where that is for a GPU; None where it is served on CPUs."""
        index = self.searcher.index
        return index if isinstance(index, TwinIndex) else None

    def ids_of(self, rows: NDArray[np.int64]) -> Any:
        """The ids of some rows (n,) as an Arrow array."""
        if self._id_numbers is None:
            return self.ids.take(pa.array(rows))
        return pa.array(self._id_numbers[rows])

    def search(
        self, queries: NDArray[np.float32], k: int, params: SearchParams, selection: RowSelection | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(rows, scores), both (n, width), best first, row -1 where there is none; rows of the selection only.

        Width is min(k, count), or more where points tie with the k-th: the caller orders them by id and cuts.
        """
        return found_with_ties(lambda asked, width: self._found(asked, width, k, params, selection), queries, k)

    def _found(
        self,
        queries: NDArray[np.float32],
        width: int,
        k: int,
        params: SearchParams,
        selection: RowSelection | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best `width` rows by brute force, by the operating point, which always fills up k, or by raw knobs.

        A raw knob replaces that of the operating point; the answer then is as it comes.
        """
        if params.exact:
            return self.searcher.exact(queries, width, selection)
        given = params.given
        knobs = widened(self.operating_point_for(params.target_recall).params, k) | given
        if "ef_search" in given:  # for every query, however far it is
            knobs = {name: value for name, value in knobs.items() if name not in (FAR_EF_SEARCH, FAR_SCORE)}
        if width > k and not self.searcher.takes(width, knobs):  # more than a GPU without a twin finds
            if width > k + 1:  # many tie with the k-th
                return self.searcher.exact(queries, width, selection)
            width = k
        rows, scores = self.searcher.search(queries, width, knobs, selection)
        if given or not np.count_nonzero(rows < 0):
            return rows, scores
        wanted = min(k, rows.shape[1], selection.kept if selection else rows.shape[1])
        short: NDArray[np.bool_] = np.asarray((rows[:, :wanted] < 0).any(axis=1))
        if short.any():  # the tuned lists hold fewer points than asked for, or a graph reached fewer
            if self.spec.exhaustive_params is not None and selection is None:
                knobs = knobs | self.spec.exhaustive_params
                more = self.searcher.search(queries[short], width, knobs)
            else:
                more = self.searcher.exact(queries[short], width, selection)
            columns = more[0].shape[1]
            rows[short, :columns], scores[short, :columns] = more
        return rows, scores

    def operating_point_for(self, target_recall: float | None) -> OperatingPoint:
        """The cheapest tuned point for a target: the lowest that is no lower; Invalid above the highest that was met.

        None takes the collection's own.
        """
        if target_recall is None or self.spec.is_exact:
            return self.operating_point
        points = sorted(self.description.operating_points, key=lambda point: point.target_recall)
        for point in points:
            if point.target_recall >= target_recall and point.met:
                return point
        met = [point.target_recall for point in points if point.met]
        reached = f"up to {max(met):g}" if met else "none"
        raise Invalid.at(
            "params.target_recall", f"{target_recall:g} is not reached here; tuned are targets {reached}: or ask exact"
        )

    @property
    def operating_point(self) -> OperatingPoint:
        """The tuned point of the collection's own target."""
        return self.description.operating_points[0]

    @property
    def promised_point(self) -> OperatingPoint:
        """What that one was measured to reach with what answers now: on a GPU, or with its twin."""
        twins = self.description.twin_points
        return twins[0] if twins and self.twin is not None and self.twin.gpu is None else self.operating_point


def widened(params: dict[str, float], k: int) -> dict[str, float]:
    """Tuned parameters, which hold for k = 10, for a larger k (docs/decisions/0002-index-policy.md)."""
    if k <= 10:
        return params
    wider = dict(params)
    for name in ("ef_search", FAR_EF_SEARCH):
        if name in params:
            wider[name] = k + params[name]
    if "nprobe" in params:
        wider["nprobe"] = ceil(params["nprobe"] * (1.0 + log10(k / 10.0)))
    if "itopk_size" in params:
        wider["itopk_size"] = min(ITOPK_MAX, itopk(k + params["itopk_size"]))
    return wider
