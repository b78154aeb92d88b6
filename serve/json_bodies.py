"""Answers as plain data for JSON: hits and points."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from cluster.query import Hits, SearchResult


def search_answer(result: SearchResult, took_ms: float) -> dict[str, Any]:
    """`degraded` is told where it is so, alone."""
    answer = {
        "results": _hit_lists(result.hits),
        "coverage": result.coverage.to_dict(),
        "generation": result.generation,
        "lsn": lsn_answer(result.lsn),
        "took_ms": round(took_ms, 3),
    }
    return answer | {"degraded": result.degraded} if result.degraded else answer


def lsn_answer(lsn: Mapping[int, int]) -> dict[str, int]:
    """LSNs by shard number, as JSON has them."""
    return {str(shard): value for shard, value in lsn.items()}


def _hit_lists(hits: Hits) -> list[list[dict[str, Any]]]:
    """One list of hits per query."""
    ids, scores = hits.ids.to_pylist(), hits.scores.tolist()
    flat: list[dict[str, Any]] = [{"id": i, "score": s} for i, s in zip(ids, scores, strict=True)]
    if hits.columns is not None:
        attributes = tuple(name for name in hits.columns.column_names if name != "vector")
        for hit, more in zip(flat, points_of(hits.columns, attributes), strict=True):
            hit |= more
    lists, start = [], 0
    for count in hits.counts.tolist():
        lists.append(flat[start : start + count])
        start += count
    return lists


def points_of(table: Any, attributes: Collection[str]) -> list[dict[str, Any]]:
    """Rows of a table as points: id and vector where there are such columns, and the attributes together."""
    if table is None:
        return []
    points = []
    columns = [_values(column) for column in table.columns]
    for row in (dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)):
        point = {name: row[name] for name in ("id", "vector") if name in row}
        if attributes:
            point["attributes"] = {name: row[name] for name in attributes}
        points.append(point)
    return points


def _values(column: Any) -> list[Any]:
    """A column's values. Times finer or later than Python's are told as text, durations as their number."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        try:
            values = column.cast(pa.int64() if pa.types.is_duration(column.type) else pa.string()).to_pylist()
        except pa.ArrowNotImplementedError:  # nested: each value as Arrow prints it
            values = [str(value) if value.is_valid else None for value in column]
    return values
