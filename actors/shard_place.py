"""One shard in the store and this process: its stored rows, new segments beside them, commits of its entry."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from actors.segment_builder import Progress, publish_segment
from actors.segment_rows import RowNumbers, open_rows
from actors.small_builds import build_beside_others
from cluster import paths
from cluster.config import CollectionConfig
from cluster.errors import Conflict, EaglerayError, NotFound
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry, TombstonesRef
from cluster.object_store import ObjectStore
from cluster.segment import Rows, delete_segment, rows_per_batch, write_rows
from cluster.tombstones import write_tombstones

COMMIT_TRIES = 20  # each is lost to another shard's upkeep, or a declaration
logger = logging.getLogger(__name__)


def no_progress(share: float) -> None:
    """Nobody is told."""


class RowBlocks(Protocol):
    """`TailRows` and `LiveRows`: rows in the order of a segment."""

    @property
    def count(self) -> int: ...

    def blocks(self, schema: Any, step: int) -> Any: ...


@dataclass(frozen=True)
class Built:
    """A segment that was published, and its rows, which stay in a local file."""

    ref: SegmentRef
    rows: Rows


class Change(Protocol):
    """A seal or a merge, once its segments are built."""

    built: tuple[Built, ...]

    def entry_after(self, entry: ShardEntry) -> ShardEntry:
        """The shard's next entry; Conflict where the newest one rules it out."""
        ...


@dataclass(frozen=True)
class ShardPlace:
    """`shard` of a collection; `threads` are FAISS's, `progress` is told the share done of what is built."""

    store: ObjectStore
    collection: str
    shard: int
    cache_dir: Path
    new_nonce: Callable[[], str]
    threads: int = 1
    progress: Progress = no_progress
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
        return newest_of_generation(self.log, base)

    def rows(self, ref: SegmentRef) -> Rows:
        if ref.segment_id not in self._opened:
            self._opened[ref.segment_id] = open_rows(self.store, self.collection, ref, self.cache_dir)
        return self._opened[ref.segment_id]

    def build(
        self, folder: Path, segment_id: str, config: CollectionConfig, live: RowBlocks, schema: Any, others: int
    ) -> Built:
        """Write, index and publish a segment; where that fails nothing is left of it.

        `others` are the points of the shard's other segments.
        """
        step = rows_per_batch(config)
        folder.mkdir(exist_ok=True)
        write_rows(folder / paths.ROWS, schema, live.blocks(schema, step))
        build_beside_others(
            self.store, self.collection, config, folder, segment_id, live.count, others, step,
            self.threads, self.progress,
        )  # fmt: skip
        try:
            ref = publish_segment(self.store, self.collection, folder, segment_id)
        except BaseException:
            self.discard(segment_id)
            raise
        return Built(ref, Rows(folder / paths.ROWS, live.count, config.dimension, step))

    def discard(self, segment_id: str) -> None:
        """Delete a segment that no manifest names; where that fails it stays as garbage."""
        try:
            delete_segment(self.store, self.collection, segment_id)
        except EaglerayError as error:
            logger.warning("segment %s is left behind: %s", segment_id, error)

    def commit(self, base: Manifest, change: Change) -> Manifest:
        """Commit a change after the newest manifest, again when that is overtaken by one that leaves room for it.

        The segments that were built are deleted unless a manifest names them, or may do so: when the outcome is
        unknown.
        """
        named: set[str] = set()
        try:
            for _ in range(COMMIT_TRIES):
                newest = self.newest(base)
                entry = change.entry_after(self.entry(newest))
                named = {ref.segment_id for ref in entry.segments}
                try:
                    return self.log.commit_shards(newest, {self.shard: entry})
                except Conflict:  # only this says for sure that the manifest was not written
                    named = set()
            raise Conflict(f"shard {self.shard} of {self.collection!r}: overtaken {COMMIT_TRIES} times")
        finally:
            for built in change.built:
                if built.ref.segment_id not in named:
                    self.discard(built.ref.segment_id)

    def tombstones(self, lsn: int, segment_id: str, rows: RowNumbers) -> TombstonesRef:
        return write_tombstones(self.store, self.collection, self.shard, segment_id, lsn, rows)


def newest_of_generation(log: ManifestLog, base: Manifest) -> Manifest:
    """The newest manifest of base's generation; Conflict where there is a later one, or none."""
    try:
        newest = log.newest_live()
    except NotFound as error:
        raise Conflict(f"{error}: it was deleted meanwhile") from error
    if newest.generation != base.generation:
        raise Conflict(f"generation {newest.generation} of {base.collection!r} has replaced {base.generation}")
    return newest
