"""Compaction: each shard's tail is sealed, then what is small or has deleted rows becomes one segment again.

One Ray task per shard does both (`actors.segment_upkeep`). Every seal and merge is committed by itself: a crash leaves
garbage, and what was committed before it; running the job again goes on from there. The shard's own upkeep may work
at the same time: what it commits first is a Conflict here, which is tried again on what there is then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from actors.entry_seal import SEAL_POINTS_MAX
from actors.faiss_index import use_threads
from actors.segment_upkeep import merge_segments
from cluster.config import check_collection_name
from cluster.errors import Conflict, Invalid
from cluster.manifest import Manifest, ManifestLog
from cluster.manifest_format import added_on
from cluster.object_store import ObjectStore, open_store
from cluster.upkeep import SegmentFacts, build_bytes, largest_build, segment_facts
from jobs.build_plan import Builds, Workers, plan_builds
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter
from jobs.sealing import ShardWork, Shares, seal_points

SEAL_SHARE = 0.2  # of a shard's time, for the progress bar


@dataclass(frozen=True)
class CompactOptions:
    """`shard` is the only one to compact; None: all. `memory_bytes` bounds the indexes built at one time on a node."""

    collection: str
    shard: int | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES


@dataclass(frozen=True)
class ShardTask:
    """Everything a task needs to compact one shard. `points_max` is the largest segment that may be made."""

    data: str
    collection: str
    shard: int
    cache_dir: str | None
    points_max: int
    threads: int


@dataclass(frozen=True)
class ShardReport:
    """`tombstones_dropped` are the deleted rows of the segments that were merged; `left` are the segments that still
    have some, because rebuilding them takes more than `memory_bytes`, or they were written to meanwhile."""

    shard: int
    points: int
    segments_before: int
    segments_after: int
    tombstones_dropped: int
    left: int


class Compactor:
    """One run of one compaction."""

    def __init__(
        self,
        data: str,
        store: ObjectStore,
        log: ManifestLog,
        options: CompactOptions,
        workers: Workers,
        cache_dir: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_collection_name(options.collection)
        self._data = data
        self._store = store
        self._log = log
        self._options = options
        self._workers = workers
        self._cache_dir = cache_dir
        self._clock = clock

    def run(self, reporter: JobReporter) -> dict[str, Any]:
        """Compact; returns the report. What was committed before an error stays."""
        started = self._clock()
        reporter.phase("compact")
        manifest = self._log.newest_live()
        tasks, builds = self._tasks(manifest)
        shares = [0.0] * len(tasks)
        shards: dict[int, dict[str, Any]] = {}
        for number, event in self._workers.run_tasks(compact_shard, tasks, builds.num_cpus, builds.at_once):
            shares[number] = max(shares[number], event.get("share", 1.0))
            if "report" in event:
                shards[tasks[number].shard] = event["report"]
            reporter.progress(min(0.99, sum(shares) / len(shares)))
        newest = self._log.newest_live()
        summed = ("segments_before", "segments_after", "tombstones_dropped", "left")
        return {
            "points": newest.points,
            "version": newest.version,
            "generation": newest.generation,
            **{name: sum(each[name] for each in shards.values()) for name in summed},
            "seconds": round(self._clock() - started, 3),
            "shards": [shards[shard] for shard in sorted(shards)],
        }

    def _tasks(self, manifest: Manifest) -> tuple[list[ShardTask], Builds]:
        options, config, gpu = self._options, manifest.built_for, added_on(manifest.device)
        shards = [entry.shard for entry in manifest.shards]
        if options.shard is not None:
            if options.shard not in shards:
                raise Invalid.at("shard", f"collection {options.collection!r} has the shards 0 to {shards[-1]}")
            shards = [options.shard]
        points_max = largest_build(config, options.memory_bytes, gpu)
        most = max(manifest.shards[shard].points for shard in shards) + SEAL_POINTS_MAX  # the tail is not counted here
        bytes_each = ceil(min(options.memory_bytes, build_bytes(config, min(points_max, most), gpu)))
        builds = plan_builds(len(shards), bytes_each, options.memory_bytes, self._workers)
        place = (self._cache_dir, points_max, builds.threads)
        return [ShardTask(self._data, options.collection, shard, *place) for shard in shards], builds


def compact_shard(task: ShardTask) -> Iterator[dict[str, Any]]:
    """Seal and merge one shard. Yields {"share": 0..1}, and at last {"report": ShardReport fields}."""
    use_threads(task.threads)
    work = _Compaction(task, open_store(task.data))
    before = work.newest.shards[task.shard]
    yield from work.seal()
    yield from work.merge()
    after = work.newest.shards[task.shard]
    report = ShardReport(
        task.shard,
        after.points,
        len(before.segments),
        len(after.segments),
        work.dropped,
        sum(segment.tombstones > 0 for segment in segment_facts(after)),
    )
    yield {"report": asdict(report)}


def merge_groups(segments: Sequence[SegmentFacts], points_max: int) -> list[tuple[str, ...]]:
    """Which segments to merge with each other: all, where one segment may hold them; else what is small or has
    deleted rows, put together as closely as `points_max` allows. A segment alone is rebuilt for its deleted rows."""
    if sum(segment.live for segment in segments) <= points_max:
        chosen = list(segments)
    else:
        chosen = [s for s in segments if s.live <= points_max and (s.sealed_tombstones or 2 * s.live <= points_max)]
    groups: list[list[SegmentFacts]] = []
    for segment in sorted(chosen, key=lambda s: (-s.live, s.segment_id)):
        fitting = (group for group in groups if sum(s.live for s in group) + segment.live <= points_max)
        group = next(fitting, None)
        if group is None:
            groups.append([segment])
        else:
            group.append(segment)
    worth = [group for group in groups if len(group) > 1 or group[0].sealed_tombstones]
    return [tuple(segment.segment_id for segment in group) for group in worth]


class _Compaction:
    """The seal and the merges of one shard."""

    def __init__(self, task: ShardTask, store: ObjectStore) -> None:
        self._task = task
        self._work = ShardWork(store, task.collection, task.shard, task.cache_dir, task.threads)
        self.dropped = 0  # deleted rows of what was merged

    @property
    def newest(self) -> Manifest:
        """Conflict where it has fewer shards now."""
        manifest = self._work.log.newest_live()
        if self._task.shard >= len(manifest.shards):
            raise Conflict(f"collection {self._task.collection!r} has {len(manifest.shards)} shards now")
        return manifest

    def seal(self) -> Shares:
        """Where another generation is committed meanwhile, its tail as well."""
        sealed, newest = None, self.newest.generation
        while newest != sealed:
            yield from self._work.seal(newest, seal_points(self._task.points_max), width=SEAL_SHARE)
            sealed, newest = newest, self.newest.generation

    def merge(self) -> Shares:
        """What the newest manifest asks for, once; after a conflict what that asks for then."""
        segments, groups, done = self._groups()
        while done < len(groups):
            share = SEAL_SHARE + (1.0 - SEAL_SHARE) * done / len(groups)
            width = (1.0 - SEAL_SHARE) / len(groups)
            manifest = yield from self._work.step(merge_segments, share, width, groups[done])
            if manifest is None:
                segments, groups, done = self._groups()
            else:
                self.dropped += sum(segments[name].sealed_tombstones for name in groups[done])
                done += 1

    def _groups(self) -> tuple[dict[str, SegmentFacts], list[tuple[str, ...]], int]:
        """(segments by id, which of them to merge, how many of these merges are done)."""
        segments = segment_facts(self.newest.shards[self._task.shard])
        groups = merge_groups(segments, self._task.points_max)
        return {segment.segment_id: segment for segment in segments}, groups, 0
