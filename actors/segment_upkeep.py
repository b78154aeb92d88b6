"""Upkeep of a shard's segments: the tail becomes one, several become one. Functions of object storage alone.

They may run anywhere, several of them at the same time: the manifest's put-if-absent decides. Whatever is interrupted
leaves garbage and nothing else; doing it again is always right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.entry_seal import SEAL_BYTES_MAX, SEAL_POINTS_MAX, moved, sealed_schema
from actors.segment_builder import Progress
from actors.segment_rows import LiveRows, SegmentPart, deleted_rows, open_part
from actors.shard_place import Built, ShardPlace, no_progress
from actors.tail_rows import TailRows, read_tail
from cluster.entry_log import EntryLog, start_after
from cluster.errors import Conflict
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from cluster.segment import Rows, rows_schema

UNBOUNDED = 2**62


def seal_tail(
    store: ObjectStore,
    collection: str,
    shard: int,
    cache_dir: Path,
    new_nonce: Callable[[], str],
    threads: int = 1,
    progress: Progress = no_progress,
    points_max: int = SEAL_POINTS_MAX,
) -> Manifest | None:
    """Make a segment of the live points that the newest manifest lacks, and commit it with their tombstones.

    None where the log holds no writes after it. Of a long log the first `points_max` ids or `SEAL_BYTES_MAX` bytes are
    sealed: call again while the committed `applied_lsn` is before the one that is wanted. Logs of earlier sets are
    sealed as a whole, in several segments if need be, with what the own log holds behind them. Conflict where another
    seal or import was committed meanwhile, the collection deleted, or such a log has not ended yet; NotFound where
    there is no such collection.

    Memory: 40 bytes and the id for each id in the records, one block of rows, the index; vectors are in local files.
    """
    place = ShardPlace(store, collection, shard, cache_dir, new_nonce, threads, progress)
    first = place.log.newest_live()
    entry = place.entry(first)
    if entry.behind and start_after(store, collection, entry.behind) is None:
        raise Conflict(
            f"shard {shard} of {collection!r} still reads logs of the generation before {first.generation}: "
            "it can be sealed once that is served"
        )
    log = EntryLog.of(store, first, shard)
    with tempfile.TemporaryDirectory(prefix="eagleray-seal-") as name:
        folder = Path(name)
        bounds = (UNBOUNDED, UNBOUNDED) if entry.behind else (points_max, SEAL_BYTES_MAX)
        tail = read_tail(log, first.config, folder, *bounds)
        if tail is None and not entry.behind:
            return None
        base = place.newest(first)  # after the records: it names the attributes that they were declared with
        seal = _Seal(place, entry, moved(entry, log), tail)
        seal.check(place.entry(base))
        if tail is not None and tail.count:
            seal.build(folder, base, tail, points_max)
        return place.commit(first, seal)


def merge_segments(
    store: ObjectStore,
    collection: str,
    shard: int,
    segment_ids: Sequence[str],
    cache_dir: Path,
    new_nonce: Callable[[], str],
    threads: int = 1,
    progress: Progress = no_progress,
) -> Manifest | None:
    """Make one segment of the live rows of some, from their original vectors, and commit it in their place.

    None without segments to merge. Conflict where the newest manifest does not name all of them, when it begins or in
    the end. Rows that are deleted while it runs become tombstones of the new segment.

    Memory: 40 bytes for each live row, one block of rows, the index.
    """
    place = ShardPlace(store, collection, shard, cache_dir, new_nonce, threads, progress)
    base = place.log.newest_live()
    entry = place.entry(base)
    refs = _chosen(entry, segment_ids)
    if not refs:
        return None
    parts = [open_part(store, collection, entry, ref, cache_dir) for ref in refs]
    live = LiveRows(parts)
    with tempfile.TemporaryDirectory(prefix="eagleray-merge-") as name:
        merge = _Merge(place, parts)
        if live.count:
            schema = rows_schema(base.config, live.attributes)
            rest = replace(entry, segments=tuple(ref for ref in entry.segments if ref not in refs))
            segment_id = f"merge-{shard:04d}-{new_nonce()}"
            merge.built = (place.build(Path(name), segment_id, base.built_for, live, schema, rest.points),)
        return place.commit(base, merge)


def _chosen(entry: ShardEntry, segment_ids: Sequence[str]) -> list[SegmentRef]:
    """In the order of the manifest; Conflict where it lacks one."""
    missing = set(segment_ids) - {ref.segment_id for ref in entry.segments}
    if missing:
        raise Conflict(f"shard {entry.shard}: {', '.join(sorted(missing))} is no segment of the newest version")
    return [ref for ref in entry.segments if ref.segment_id in segment_ids]


@dataclass
class _Seal:
    """The tail is in its own segments; its ids are deleted in all others. `after` is where the log was read to."""

    place: ShardPlace
    before: ShardEntry
    after: ShardEntry
    tail: TailRows | None
    built: tuple[Built, ...] = ()
    _found: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # rows of the tail's ids by segment

    def check(self, entry: ShardEntry) -> None:
        """Merges leave room for a seal, another seal does not."""
        if (entry.applied_lsn, entry.behind) != (self.before.applied_lsn, self.before.behind):
            raise Conflict(f"shard {entry.shard}: another seal has applied LSN {entry.applied_lsn}")

    def build(self, folder: Path, base: Manifest, tail: TailRows, points_max: int) -> None:
        """The tail's segments; where one fails none is left."""
        place, entry = self.place, self.place.entry(base)
        schema = sealed_schema(base.config, base, [place.rows(ref) for ref in entry.segments], tail)
        try:
            for number, part in enumerate(tail.parts(points_max)):
                segment_id = f"seal-{place.shard:04d}-{self.after.applied_lsn}-{place.new_nonce()}"
                others = entry.points + tail.count - part.count
                built = place.build(folder / str(number), segment_id, base.built_for, part, schema, others)
                self.built = (*self.built, built)
        except BaseException:
            for built in self.built:
                place.discard(built.ref.segment_id)
            raise

    def entry_after(self, entry: ShardEntry) -> ShardEntry:
        self.check(entry)
        segments, tombstones = [], []
        before = {ref.segment_id: ref for ref in entry.tombstones}
        for ref in entry.segments:
            old = deleted_rows(self.place.store, self.place.collection, entry, ref)
            deleted = np.union1d(old, self._rows_of_ids(ref))
            if len(deleted) == ref.count:
                continue
            segments.append(ref)
            if len(deleted) > len(old):
                tombstones.append(self.place.tombstones(self.after.applied_lsn, ref.segment_id, deleted))
            elif len(old):
                tombstones.append(before[ref.segment_id])
        segments += [built.ref for built in self.built]
        return replace(self.after, segments=tuple(segments), tombstones=tuple(tombstones))

    def _rows_of_ids(self, ref: SegmentRef) -> NDArray[np.int64]:
        if self.tail is None:
            return np.empty(0, dtype=np.int64)
        if ref.segment_id not in self._found:
            rows = self.place.rows(ref).rows_of_ids(self.tail.ids, self.tail.hashes)
            self._found[ref.segment_id] = rows[rows >= 0]
        return self._found[ref.segment_id]


@dataclass
class _Merge:
    """The live rows of `parts` are in a segment of their own."""

    place: ShardPlace
    parts: Sequence[SegmentPart]
    built: tuple[Built, ...] = ()

    def entry_after(self, entry: ShardEntry) -> ShardEntry:
        names = [part.ref.segment_id for part in self.parts]
        at = entry.segments.index(_chosen(entry, names)[0])
        segments = [ref for ref in entry.segments if ref.segment_id not in names]
        tombstones = [ref for ref in entry.tombstones if ref.segment_id not in names]
        for built in self.built:
            deleted = self._deleted_since(entry, built.rows)
            if len(deleted) < built.ref.count:
                segments.insert(at, built.ref)
                if len(deleted):
                    tombstones.append(self.place.tombstones(entry.applied_lsn, built.ref.segment_id, deleted))
        return replace(entry, segments=tuple(segments), tombstones=tuple(tombstones))

    def _deleted_since(self, entry: ShardEntry, merged: Rows) -> NDArray[np.int64]:
        """Rows of the new segment whose old ones were deleted since the merge began."""
        found = []
        for part in self.parts:
            now = deleted_rows(self.place.store, self.place.collection, entry, part.ref)
            since = np.setdiff1d(now, part.deleted, assume_unique=True)
            if len(since):
                found.append(merged.rows_of_ids(part.rows.take(since, ["id"]).column(0)))
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)
