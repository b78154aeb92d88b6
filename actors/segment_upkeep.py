"""Upkeep of a shard's segments: the tail becomes one, several become one. Functions of object storage alone.

They may run anywhere, several of them at the same time: the manifest's put-if-absent decides. Whatever is interrupted
leaves garbage and nothing else; doing it again is always right.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.segment_builder import Progress, publish_segment
from actors.segment_rows import LiveRows, SegmentPart, attribute_types, deleted_rows, open_part, open_rows
from actors.small_builds import build_beside_others
from actors.tail_rows import TailRows, column_types, read_tail
from cluster import paths
from cluster.attributes import arrow_type
from cluster.errors import Conflict, EaglerayError, NotFound
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry, TombstonesRef
from cluster.object_store import ObjectStore
from cluster.segment import Rows, delete_segment, rows_per_batch, rows_schema, write_rows
from cluster.tombstones import write_tombstones
from cluster.wal import Wal

SEAL_POINTS_MAX = 1_000_000  # ids in the records of one seal: the next one goes on behind them
SEAL_BYTES_MAX = 1024**3
COMMIT_TRIES = 20  # each is lost to another shard's upkeep, or a declaration
logger = logging.getLogger(__name__)


def no_progress(share: float) -> None:
    """Nobody is told."""


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
    """Make a segment of the live points of the WAL after the newest manifest, and commit it with their tombstones.

    None where the WAL holds no writes after it. Of a long WAL the first `points_max` ids or `SEAL_BYTES_MAX` bytes are
    sealed: call again while the committed `applied_lsn` is before the one that is wanted. Conflict where another
    seal or import was committed meanwhile, or the collection deleted; NotFound where there is none.

    Memory: 40 bytes and the id for each id in the records, one block of rows, the index; vectors are in local files.
    """
    place = _Place(store, collection, shard, cache_dir, new_nonce, threads, progress)
    first = place.log.newest_live()
    with tempfile.TemporaryDirectory(prefix="eagleray-seal-") as name:
        folder = Path(name)
        wal = Wal(store, collection, shard)
        tail = read_tail(wal, place.entry(first), first.config, folder, points_max, SEAL_BYTES_MAX)
        if tail is None:
            return None
        base = place.newest(first)  # after the records: it names the attributes that they were declared with
        seal = _Seal(place, place.entry(first).applied_lsn, tail)
        seal.check(place.entry(base))
        if tail.count:
            others = [place.rows(ref) for ref in place.entry(base).segments]
            schema = seal.schema(base, others)
            seal.built = place.build(folder, f"seal-{shard:04d}-{tail.lsn}", base, tail, schema, base.shards[shard])
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
    place = _Place(store, collection, shard, cache_dir, new_nonce, threads, progress)
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
            merge.built = place.build(Path(name), f"merge-{shard:04d}", base, live, schema, rest)
        return place.commit(base, merge)


def _chosen(entry: ShardEntry, segment_ids: Sequence[str]) -> list[SegmentRef]:
    """In the order of the manifest; Conflict where it lacks one."""
    missing = set(segment_ids) - {ref.segment_id for ref in entry.segments}
    if missing:
        raise Conflict(f"shard {entry.shard}: {', '.join(sorted(missing))} is no segment of the newest version")
    return [ref for ref in entry.segments if ref.segment_id in segment_ids]


# --- what both do -----------------------------------------------------------------------------------------------


class _LiveRows(Protocol):
    """`TailRows` and `LiveRows`: rows in the order of a segment."""

    @property
    def count(self) -> int: ...

    def blocks(self, schema: Any, step: int) -> Any: ...


@dataclass(frozen=True)
class _Built:
    """A segment that was published, and its rows, which stay in a local file."""

    ref: SegmentRef
    rows: Rows


class _Change(Protocol):
    """A seal or a merge, once its segment is built."""

    built: _Built | None

    def entry_after(self, entry: ShardEntry) -> ShardEntry:
        """The shard's next entry; Conflict where the newest one rules it out."""
        ...


@dataclass(frozen=True)
class _Place:
    """One shard in the store, and this process."""

    store: ObjectStore
    collection: str
    shard: int
    cache_dir: Path
    new_nonce: Callable[[], str]
    threads: int
    progress: Progress
    _opened: dict[str, Rows] = field(default_factory=dict)

    @property
    def log(self) -> ManifestLog:
        return ManifestLog(self.store, self.collection, self.new_nonce)

    def entry(self, manifest: Manifest) -> ShardEntry:
        if self.shard >= len(manifest.shards):
            raise NotFound(f"collection {self.collection!r} has no shard {self.shard}")
        return manifest.shards[self.shard]

    def newest(self, base: Manifest) -> Manifest:
        """The newest manifest of base's generation; Conflict where there is a later one, or none."""
        try:
            newest = self.log.newest_live()
        except NotFound as error:
            raise Conflict(f"{error}: it was deleted meanwhile") from error
        if newest.generation != base.generation:
            raise Conflict(f"generation {newest.generation} of {self.collection!r} has replaced {base.generation}")
        return newest

    def rows(self, ref: SegmentRef) -> Rows:
        if ref.segment_id not in self._opened:
            self._opened[ref.segment_id] = open_rows(self.store, self.collection, ref, self.cache_dir)
        return self._opened[ref.segment_id]

    def build(
        self, folder: Path, name: str, base: Manifest, live: _LiveRows, schema: Any, others: ShardEntry
    ) -> _Built:
        """Write, index and publish a segment; where that fails nothing is left of it."""
        segment_id, step = f"{name}-{self.new_nonce()}", rows_per_batch(base.config)
        write_rows(folder / paths.ROWS, schema, live.blocks(schema, step))
        build_beside_others(
            self.store, self.collection, base.config, folder, segment_id, live.count, others.points, step,
            self.threads, self.progress,
        )  # fmt: skip
        try:
            ref = publish_segment(self.store, self.collection, folder, segment_id)
        except BaseException:
            self.discard(segment_id)
            raise
        return _Built(ref, Rows(folder / paths.ROWS, live.count, base.config.dimension, step))

    def discard(self, segment_id: str) -> None:
        """Delete a segment that no manifest names; where that fails it stays as garbage."""
        try:
            delete_segment(self.store, self.collection, segment_id)
        except EaglerayError as error:
            logger.warning("segment %s is left behind: %s", segment_id, error)

    def commit(self, base: Manifest, change: _Change) -> Manifest:
        """Commit a change after the newest manifest, again when that is overtaken by one that leaves room for it.

        The segment that was built is deleted unless a manifest names it, or may do so: when the outcome is unknown.
        """
        named = False
        try:
            for _ in range(COMMIT_TRIES):
                newest = self.newest(base)
                entry = change.entry_after(self.entry(newest))
                named = change.built is not None and change.built.ref in entry.segments
                try:
                    return self.log.commit_shards(newest, {self.shard: entry})
                except Conflict:  # only this says for sure that the manifest was not written
                    named = False
            raise Conflict(f"shard {self.shard} of {self.collection!r}: overtaken {COMMIT_TRIES} times")
        finally:
            if change.built is not None and not named:
                self.discard(change.built.ref.segment_id)

    def tombstones(self, lsn: int, segment_id: str, rows: NDArray[np.int64]) -> TombstonesRef:
        return write_tombstones(self.store, self.collection, self.shard, segment_id, lsn, rows)


@dataclass
class _Seal:
    """The tail is in its own segment; its ids are deleted in all others."""

    place: _Place
    applied_lsn: int  # before it
    tail: TailRows
    built: _Built | None = None
    _found: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # rows of the tail's ids by segment

    def check(self, entry: ShardEntry) -> None:
        """Merges leave room for a seal, another seal does not."""
        if entry.applied_lsn != self.applied_lsn:
            raise Conflict(f"shard {entry.shard}: another seal has applied LSN {entry.applied_lsn}")

    def schema(self, base: Manifest, others: Sequence[Rows]) -> Any:
        known: dict[str, Any] = {}
        for rows in others:
            known = attribute_types(rows) | known
        declared = {name: dtype for name, text in base.attributes.items() if (dtype := arrow_type(text)) is not None}
        return rows_schema(base.config, column_types(known, declared, self.tail.attributes))

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
                tombstones.append(self.place.tombstones(self.tail.lsn, ref.segment_id, deleted))
            elif len(old):
                tombstones.append(before[ref.segment_id])
        if self.built is not None:
            segments.append(self.built.ref)
        return ShardEntry(entry.shard, tuple(segments), self.tail.lsn, self.tail.epoch, tuple(tombstones))

    def _rows_of_ids(self, ref: SegmentRef) -> NDArray[np.int64]:
        if ref.segment_id not in self._found:
            rows = self.place.rows(ref).rows_of_ids(self.tail.ids, self.tail.hashes)
            self._found[ref.segment_id] = rows[rows >= 0]
        return self._found[ref.segment_id]


@dataclass
class _Merge:
    """The live rows of `parts` are in a segment of their own."""

    place: _Place
    parts: Sequence[SegmentPart]
    built: _Built | None = None

    def entry_after(self, entry: ShardEntry) -> ShardEntry:
        names = [part.ref.segment_id for part in self.parts]
        at = entry.segments.index(_chosen(entry, names)[0])
        segments = [ref for ref in entry.segments if ref.segment_id not in names]
        tombstones = [ref for ref in entry.tombstones if ref.segment_id not in names]
        if self.built is not None:
            deleted = self._deleted_since(entry, self.built.rows)
            if len(deleted) < self.built.ref.count:
                segments.insert(at, self.built.ref)
                if len(deleted):
                    tombstones.append(self.place.tombstones(entry.applied_lsn, self.built.ref.segment_id, deleted))
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
