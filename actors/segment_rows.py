"""The rows of stored segments, without their indexes: verified, memory-mapped, and which of them are deleted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.row_order import conformed, order_of_rows
from actors.segment_loader import opened, read_description, verified_file
from cluster import paths
from cluster.errors import Corrupt
from cluster.manifest import SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from cluster.segment import ROW_COLUMNS, Rows
from cluster.tombstones import read_tombstones

RowNumbers = NDArray[np.int64]


def open_rows(store: ObjectStore, collection: str, ref: SegmentRef, cache_dir: Path) -> Rows:
    """The rows of a segment, every byte verified: the store's own file where it has one, else one in the cache."""
    home = ref.home(collection)
    description = read_description(store, home, ref)

    def mapped() -> Rows:
        path = verified_file(store, home, description, paths.ROWS, cache_dir)
        return Rows(path, description.count, description.dimension, description.rows_per_batch)

    return opened(mapped, paths.segment_file(home, ref.segment_id, paths.ROWS))


def deleted_rows(store: ObjectStore, collection: str, entry: ShardEntry, ref: SegmentRef) -> RowNumbers:
    """The rows of a segment that an entry's tombstone file names, sorted; none where it has no file."""
    for tombstones in entry.tombstones:
        if tombstones.segment_id == ref.segment_id:
            return read_tombstones(store, collection, entry.shard, tombstones, ref.count)
    return np.empty(0, dtype=np.int64)


def attribute_types(rows: Rows) -> dict[str, Any]:
    """Name -> Arrow type."""
    return {field.name: field.type for field in rows.schema if field.name not in ROW_COLUMNS}


@dataclass(frozen=True)
class HashRange:
    """Ids whose hash is at least `start` and less than `stop`, at most 2**64: Python's integers."""

    start: int = 0
    stop: int = 2**64

    @classmethod
    def of_slot(cls, slot: int, slots: int) -> HashRange:
        """What `cluster.routing.slots_of_hashes` gives to one of `slots` slots."""
        return cls(-(-slot * 2**32 // slots) << 32, -(-(slot + 1) * 2**32 // slots) << 32)

    def meets(self, other: HashRange) -> bool:
        return self.start < other.stop and other.start < self.stop

    def rows(self, rows: Rows) -> range:
        """Of a segment, whose rows are ordered by their hash."""
        return range(_first_row(rows, self.start), _first_row(rows, self.stop))


def _first_row(rows: Rows, digest: int) -> int:
    """The first row whose hash is not less: a binary search in the mapped file."""

    def hash_of(row: int) -> int:
        return int(rows.take(np.array([row]), ["id_hash"]).column(0)[0].as_py())

    return bisect_left(range(rows.count), digest, key=hash_of)


@dataclass(frozen=True, eq=False)
class SegmentPart:
    """A segment that is to be merged: its rows, and those that were deleted when the merge began.

    Only those of `span` take part (None: all).
    """

    ref: SegmentRef
    rows: Rows
    deleted: RowNumbers
    span: range | None = None

    @property
    def live(self) -> RowNumbers:
        span = self.span if self.span is not None else range(self.ref.count)
        kept = np.ones(len(span), dtype=bool)
        kept[self.deleted[slice(*np.searchsorted(self.deleted, (span.start, span.stop)))] - span.start] = False
        return np.flatnonzero(kept) + span.start


def open_part(store: ObjectStore, collection: str, entry: ShardEntry, ref: SegmentRef, cache_dir: Path) -> SegmentPart:
    rows = open_rows(store, collection, ref, cache_dir)
    return SegmentPart(ref, rows, deleted_rows(store, collection, entry, ref))


def open_span(
    store: ObjectStore, collection: str, entry: ShardEntry, ref: SegmentRef, cache_dir: Path, hashes: HashRange
) -> SegmentPart | None:
    """The rows of a segment whose hashes are in a range; None where there are none.

    That is looked up in the store's own file as it is, where there is one: only what takes part is verified.
    """
    home = ref.home(collection)
    key = paths.segment_file(home, ref.segment_id, paths.ROWS)
    description, local = read_description(store, home, ref), store.local_path(key)
    if local is not None:
        form = (description.count, description.dimension, description.rows_per_batch)
        if not hashes.rows(opened(lambda: Rows(local, *form), key)):
            return None
    part = open_part(store, collection, entry, ref, cache_dir)
    span = hashes.rows(part.rows)
    return replace(part, span=span) if span else None


class LiveRows:
    """The live rows of several segments in the order of one.

    In memory are 40 bytes for each row that takes part while they are ordered, 16 after that; their columns only as
    blocks.
    """

    def __init__(self, parts: Sequence[SegmentPart]) -> None:
        self._parts = [part.rows for part in parts]
        live = [part.live for part in parts]
        self.count = sum(map(len, live))
        places = np.repeat(np.arange(len(live)), [len(rows) for rows in live])
        rows = np.concatenate(live) if live else np.empty(0, dtype=np.int64)
        order, same = order_of_rows(self._hashes(live), lambda at: self._take(places[at], rows[at], ["id"]).column(0))
        if same.any():
            row = order[int(np.argmax(same))]
            point_id = self._parts[places[row]].take(rows[row : row + 1], ["id"]).column(0)[0]
            raise Corrupt(f"segment {parts[places[row]].ref.segment_id!r}: {point_id} is live in another one as well")
        self._places, self._rows = places[order], rows[order]

    def _hashes(self, live: Sequence[RowNumbers]) -> NDArray[np.uint64]:
        columns = [
            segment.take(rows, ["id_hash"]).column(0).to_numpy()
            for segment, rows in zip(self._parts, live, strict=True)
            if len(rows)
        ]
        return np.concatenate(columns) if columns else np.empty(0, dtype=np.uint64)

    @property
    def attributes(self) -> dict[str, Any]:
        """Types of all attributes that any of the segments has; that of the first one counts."""
        types: dict[str, Any] = {}
        for segment in self._parts:
            types = attribute_types(segment) | types
        return types

    def blocks(self, schema: Any, step: int) -> Iterator[Any]:
        """Record batches of `step` rows, the last one of fewer."""
        for start in range(0, self.count, step):
            stop = start + step
            yield self._take(self._places[start:stop], self._rows[start:stop], schema.names, schema)
            for rows in self._parts:
                rows.forget_pages()  # read once, in order: they would count as this process's memory

    def _take(self, places: RowNumbers, rows: RowNumbers, columns: Sequence[str], schema: Any = None) -> Any:
        """One record batch: row i is row `rows[i]` of segment `places[i]`; (n,), n >= 1."""
        order = np.argsort(places, kind="stable")
        pieces = []
        for place in np.unique(places):
            segment = self._parts[place]
            here = [name for name in columns if name in segment.schema.names]
            piece = segment.take(rows[places == place], here)
            pieces.append(piece if schema is None else conformed(piece, schema))
        if len(pieces) == 1:
            return pieces[0]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_batches(pieces).take(pa.array(back))
