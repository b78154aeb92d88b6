"""A generation of a shard as the files and logs that its manifest names have it, and the cached files in use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from actors.crossing import Crossing
from actors.gpu_device import GpuDevice
from actors.gpu_placement import GpuPlacement
from actors.live_generation import LiveGeneration
from actors.segment_loader import LoadedSegment, cached_path, load_on_host
from actors.shard_view import ShardView
from cluster import paths
from cluster.entry_log import EntryLog, start_after
from cluster.errors import Unavailable
from cluster.manifest import Manifest, SegmentRef, ShardEntry
from cluster.object_store import ObjectStore
from cluster.row_selection import RowSelection
from cluster.tombstones import read_tombstones
from cluster.wal import Wal


class GenerationFiles:
    """Loads one shard's segments and tombstones. A segment that a view has already is shared.

    `placement` has what of them is on the GPU.
    """

    def __init__(
        self,
        store: ObjectStore,
        collection: str,
        shard: int,
        cache_dir: Path,
        device: GpuDevice | None = None,
        on_cpus: bool = False,
        no_gpu: str = "",
    ) -> None:
        self._store = store
        self._collection = collection
        self._shard = shard
        self._cache_dir = cache_dir
        self._on_cpus = on_cpus
        self.placement = GpuPlacement(device, no_gpu)

    def generation(self, manifest: Manifest, views: Sequence[ShardView]) -> LiveGeneration:
        """The generation at the applied LSN of its entry. `views` are all that are in use."""
        self.placement.keep_only(segments_of(views))
        loaded = {s.description.segment_id: s for view in views for s in view.segments}
        entry = manifest.shards[self._shard]
        segments = tuple(loaded.get(ref.segment_id) or self._load(ref, manifest) for ref in entry.segments)
        return LiveGeneration(manifest, segments, self._selections(entry, segments), entry.applied_lsn, entry.epoch)

    def _load(self, ref: SegmentRef, manifest: Manifest) -> LoadedSegment:
        config = manifest.config
        twin = config.index.cpu_twin or self._on_cpus
        segment = load_on_host(self._store, self._collection, ref, config.metric, self._cache_dir, twin)
        self.placement.place(segment)
        return segment

    def crossing(self, manifest: Manifest, views: Sequence[ShardView]) -> Crossing:
        """The generation, which has read nothing yet of the logs that its entry is behind."""
        log = EntryLog.of(self._store, manifest, self._shard)
        return Crossing(self.generation(manifest, views), manifest.shards[self._shard], log)

    def at_own_log(self, manifest: Manifest, views: Sequence[ShardView]) -> LiveGeneration:
        """The generation with what it lacks of earlier log sets; Unavailable while these have not ended."""
        crossing = self.crossing(manifest, views)
        if not crossing.advance():
            which = f"generation {manifest.generation} of {self._collection!r}"
            raise Unavailable(f"shard {self._shard}: logs that {which} is behind have not ended")
        return crossing.arrived()

    def past(self, manifest: Manifest, views: Sequence[ShardView]) -> LiveGeneration:
        """The generation at the end of its own log, which nobody writes to any more."""
        generation = self.at_own_log(manifest, views)
        wal = Wal(self._store, self._collection, self._shard, manifest.log_set)
        generation.replay(wal.read_after(generation.view.lsn))
        generation.check()
        return generation

    def may_begin(self, manifest: Manifest) -> bool:
        """Whether nobody writes any more to the logs that the shard's entry is behind."""
        behind = manifest.shards[self._shard].behind
        return not behind or start_after(self._store, self._collection, behind) is not None

    def log_start(self, generation: LiveGeneration) -> int:
        """The LSN at which the own log of a generation begins: the one before its first record.

        What is deleted of a log are writes, and its first record is a claim.
        """
        if not generation.log_set:
            return 0
        prefix = paths.wal_prefix(self._collection, self._shard, generation.log_set)
        lsns = [lsn for info in self._store.objects(prefix) if (lsn := paths.wal_lsn(info.key)) is not None]
        return min(lsns, default=generation.view.lsn + 1) - 1

    def _selections(self, entry: ShardEntry, segments: Sequence[LoadedSegment]) -> dict[str, RowSelection]:
        counts = {segment.description.segment_id: segment.description.count for segment in segments}
        selections = {}
        for ref in entry.tombstones:
            count = counts[ref.segment_id]
            rows = read_tombstones(self._store, self._collection, self._shard, ref, count)
            selections[ref.segment_id] = RowSelection.everything(count).without(rows)
        return selections

    def cached(self, views: Iterable[ShardView]) -> set[Path]:
        """Where the files of views lie if they are cached; equal files are one."""
        segments = (segment for view in views for segment in view.segments)
        return {cached_path(self._cache_dir, entry) for s in segments for entry in s.description.files.values()}

    def delete_unused(self, before: set[Path], views: Sequence[ShardView]) -> None:
        """Delete cached files that were in use before and are not by these views; who has mapped one keeps it.

        What of other views is on the GPU leaves it.
        """
        for path in before - self.cached(views):
            path.unlink(missing_ok=True)
        self.placement.keep_only(segments_of(views))

    def promote(self, views: Sequence[ShardView]) -> list[str]:
        """Place on the GPU what could not be so far, of the newest view first; which segments that was done for."""
        return self.placement.promote(segments_of(views))


def segments_of(views: Sequence[ShardView]) -> list[LoadedSegment]:
    """The segments of views, each once, those of the last view first."""
    return list({id(segment): segment for view in reversed(views) for segment in view.segments}.values())
