"""One generation of a shard at one LSN: segments, what of them is deleted, and the tail. Never changes.

Searches and fetches run on a view, so that none sees half a write, and none waits for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.degradation import cpu_answers
from actors.segment_loader import LoadedSegment
from actors.tail import TailView
from cluster.config import CollectionConfig
from cluster.errors import EaglerayError, Invalid
from cluster.ids import ID_ARROW_TYPE
from cluster.query import Hits, SearchGroup, SearchParams, ShardSearch
from cluster.row_selection import RowSelection
from cluster.segment import ROW_COLUMNS
from cluster.topk import merge_hits


@dataclass(frozen=True, eq=False)
class ShardView:
    """`version` is the manifest's that named the segments; `selections` are the live rows of those with tombstones, by
    segment id. `declared` are types of attributes that the manifest names."""

    version: int
    generation: int
    config: CollectionConfig
    segments: tuple[LoadedSegment, ...]
    selections: Mapping[str, RowSelection] = field(default_factory=dict)
    tail: TailView | None = None
    lsn: int = 0
    declared: Mapping[str, Any] = field(default_factory=dict)

    def selection(self, segment: LoadedSegment) -> RowSelection | None:
        """The live rows of a segment; None where all are."""
        return self.selections.get(segment.description.segment_id)

    @property
    def tombstones(self) -> int:
        return sum(selection.count - selection.kept for selection in self.selections.values())

    @property
    def tail_points(self) -> int:
        return self.tail.points if self.tail is not None else 0

    @property
    def points(self) -> int:
        """Live points."""
        return sum(s.description.count for s in self.segments) - self.tombstones + self.tail_points

    @property
    def attributes(self) -> dict[str, Any]:
        """Arrow type of every attribute that the generation has, by name; a segment's own comes first."""
        types = dict(self.tail.attributes) if self.tail is not None else {}
        types |= self.declared
        for segment in self.segments:
            types |= {each.name: each.type for each in segment.rows.schema if each.name not in ROW_COLUMNS}
        return dict(sorted(types.items()))

    def search(self, request: ShardSearch) -> tuple[Hits | EaglerayError, ...]:
        """One `Hits`, or the error of that group alone, per group."""
        return tuple(self._group_outcome(request.vectors, group) for group in request.groups)

    def _group_outcome(self, vectors: NDArray[np.float32], group: SearchGroup) -> Hits | EaglerayError:
        before = cpu_answers()
        try:
            hits = self._search_group(vectors[group.start : group.stop], group)
        except EaglerayError as error:
            return error
        return hits if cpu_answers() == before else replace(hits, degraded="cpu")

    def _search_group(self, queries: NDArray[np.float32], group: SearchGroup) -> Hits:
        parts = self._segments_hits(queries, group)
        if self.tail is not None and self.tail.points:
            parts.append(self._tail_hits(self.tail, queries, group))
        if not parts:
            return Hits(np.zeros(len(queries), np.int64), self._no_ids(), np.empty(0, np.float32), lsn=self.lsn)
        return merge_hits(parts, group.k, self.config.metric)

    def _segments_hits(self, queries: NDArray[np.float32], group: SearchGroup) -> list[Hits]:
        """Raw knobs go to the segments whose index takes them; Invalid where one fits none of them."""
        parts: list[Hits] = []
        taken: set[str] = set()
        refused: dict[str, Invalid] = {}
        for segment in self.segments:
            params = group.params
            while self._has_rows(segment):
                try:
                    parts.append(self._segment_hits(segment, queries, group, params))
                    taken |= params.given.keys()
                    break
                except Invalid as error:
                    name = error.errors[0].field.removeprefix("params.") if error.errors else ""
                    if name not in params.given:
                        raise
                    refused[name] = error
                    params = params.without(name)
        for name in refused.keys() - taken:
            raise refused[name]
        return parts

    def _has_rows(self, segment: LoadedSegment) -> bool:
        selection = self.selection(segment)
        return selection is None or selection.kept > 0

    def _no_ids(self) -> Any:
        return pa.array([], type=ID_ARROW_TYPE[self.config.id_type])

    def _segment_hits(
        self, segment: LoadedSegment, queries: NDArray[np.float32], group: SearchGroup, params: SearchParams
    ) -> Hits:
        counts, rows, scores = _flat(*segment.search(queries, group.k, params, self.selection(segment)))
        columns = self._segment_columns(segment, rows, group.columns) if group.columns else None
        return Hits(counts, segment.ids_of(rows), scores, columns, self.lsn)

    def _tail_hits(self, tail: TailView, queries: NDArray[np.float32], group: SearchGroup) -> Hits:
        counts, rows, scores = _flat(*tail.search(queries, group.k))
        columns = self._tail_columns(tail, rows, group.columns) if group.columns else None
        return Hits(counts, tail.ids(rows), scores, columns, self.lsn)

    def _segment_columns(self, segment: LoadedSegment, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """The table of some rows; without rows an empty one, so that the answer's schema does not depend on the data.

        A column that this segment lacks is null.
        """
        schema = segment.rows.schema
        here = [name for name in columns if name in schema.names]
        if len(rows) and here:
            table = pa.table(segment.rows.take(rows, here))
        else:
            table = schema.empty_table().select(here)
        types = self.attributes if len(here) < len(columns) else {}
        arrays = {
            name: table.column(name) if name in here else pa.nulls(len(rows), types.get(name, pa.null()))
            for name in columns
        }
        return pa.table(arrays)

    def _tail_columns(self, tail: TailView, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
        names = [name for name in columns if name not in ("id", "vector")]
        types = self.attributes if names else {}
        arrays = tail.attributes_of(rows, {name: types.get(name, pa.null()) for name in names})
        if "id" in columns:
            arrays["id"] = tail.ids(rows)
        if "vector" in columns:
            arrays["vector"] = tail.vectors(rows)
        return pa.table({name: arrays[name] for name in columns})

    def fetch(self, ids: Any, columns: Sequence[str]) -> tuple[NDArray[np.bool_], Any]:
        """(found (n,), table of `columns` for the found ids in their order) for an Arrow array of ids."""
        found = np.zeros(len(ids), dtype=bool)
        tables, positions = [], []
        for segment in self.segments:
            rows = self.live_rows(segment, ids)
            here = rows >= 0
            if here.any():
                tables.append(self._segment_columns(segment, rows[here], columns))
                positions.append(np.flatnonzero(here))
                found |= here
        if self.tail is not None and self.tail.points:
            rows = self.tail.rows_of_ids(ids)
            here = rows >= 0
            if here.any():
                tables.append(self._tail_columns(self.tail, rows[here], columns))
                positions.append(np.flatnonzero(here))
                found |= here
        if not tables:
            return found, None
        order = np.argsort(np.concatenate(positions))
        return found, pa.concat_tables(tables, promote_options="default").take(pa.array(order))

    def live_rows(self, segment: LoadedSegment, ids: Any) -> NDArray[np.int64]:
        """The row of each id of an Arrow array that is live in a segment, -1 where there is none."""
        rows, selection = segment.rows.rows_of_ids(ids), self.selection(segment)
        if selection is None:
            return rows
        return np.where((rows >= 0) & selection.holds(np.maximum(rows, 0)), rows, -1)


def _flat(
    labels: NDArray[np.int64], scores: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(hits of each query (n,), their rows, their scores) of labels (n, width), negative where there is none."""
    missing = labels < 0
    if not np.count_nonzero(missing):
        return np.array([labels.shape[1]] * len(labels), np.int64), labels.reshape(-1), scores.reshape(-1)
    found = ~missing
    return found.sum(axis=1), labels[found], scores[found]
