"""Sealing all that was acknowledged so far: for jobs that need a version which holds everything in files.

One Ray task per shard, each seal committed by itself as the shard's own upkeep does (`actors.segment_upkeep`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from actors.entry_seal import SEAL_POINTS_MAX
from actors.faiss_index import use_threads
from actors.scratch import private_folder
from actors.segment_upkeep import seal_tail
from cluster.errors import Conflict
from cluster.manifest import Manifest, ManifestLog
from cluster.manifest_format import added_on
from cluster.object_store import ObjectStore, open_store
from cluster.upkeep import build_bytes, largest_build
from cluster.wal import Wal
from jobs.build_plan import Workers, plan_builds
from jobs.build_progress import shares_of
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter

SEAL_POINTS_MIN = 1_000  # however little memory there is: one by one they would take for ever
CONFLICTS_MAX = 10  # of one shard with its own upkeep, and of all with new generations

Shares = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class SealTask:
    """Everything a task needs to seal one shard of a generation up to an LSN."""

    data: str
    collection: str
    shard: int
    generation: int
    until: int
    points_max: int
    cache_dir: str | None
    threads: int = 1


@dataclass(frozen=True)
class Sealer:
    """Seals a collection. `share` is how much of the whole job that is, for its progress."""

    data: str
    log: ManifestLog
    workers: Workers
    cache_dir: str | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES

    def sealed(self, collection: str, reporter: JobReporter, share: float = 1.0) -> Manifest:
        """A version with every write in it that was acknowledged before this was called; none of its shards is behind.

        Nothing is committed where everything is sealed. Conflict while the collection is being switched to another
        number of shards.
        """
        reporter.phase("seal")
        for _ in range(CONFLICTS_MAX):
            base = self.log.newest_live()
            self._seal(base, self._tasks(collection, base), reporter, share)
            newest = self.log.newest_live()
            if newest.generation == base.generation and not newest.crossing:
                return newest
        raise Conflict(f"collection {collection!r}: generation after generation was committed while it was sealed")

    def _tasks(self, collection: str, base: Manifest) -> list[SealTask]:
        """Of the shards that are not sealed up to where their logs end now."""
        ends = self.log.ends_of_logs(base)
        behind = [
            (entry, end)
            for entry, end in zip(base.shards, ends, strict=True)
            if entry.behind or entry.applied_lsn < end.lsn
        ]
        points_max = seal_points(largest_build(base.built_for, self.memory_bytes, added_on(base.device)))
        return [
            SealTask(self.data, collection, entry.shard, base.generation, end.lsn, points_max, self.cache_dir)
            for entry, end in behind
        ]

    def _seal(self, base: Manifest, tasks: list[SealTask], reporter: JobReporter, share: float) -> None:
        if not tasks:
            return
        needed = build_bytes(base.built_for, tasks[0].points_max, added_on(base.device))
        bytes_each = ceil(min(self.memory_bytes, needed))
        builds = plan_builds(len(tasks), bytes_each, self.memory_bytes, self.workers)
        tasks = [replace(task, threads=builds.threads) for task in tasks]
        shares = [0.0] * len(tasks)
        for number, event in self.workers.build(seal_shard, tasks, builds):
            shares[number] = max(shares[number], event["share"])
            reporter.progress(share * min(0.99, sum(shares) / len(shares)))


def seal_points(largest: int) -> int:
    """How many ids one seal takes, where a segment of `largest` points is the largest that memory allows."""
    return max(SEAL_POINTS_MIN, min(SEAL_POINTS_MAX, largest))


def seal_shard(task: SealTask) -> Iterator[dict[str, Any]]:
    """Seal one shard until its entry has reached the task's LSN, or its generation was replaced. Yields {"share"}."""
    use_threads(task.threads)
    work = ShardWork(open_store(task.data), task.collection, task.shard, task.cache_dir, task.threads)
    yield from work.seal(task.generation, task.points_max, task.until)
    yield {"share": 1.0}


class ShardWork:
    """Seals, merges of one shard. Each is committed by itself, and done again after a conflict, with the shard's own
    upkeep as a rule: what that committed is progress."""

    def __init__(
        self, store: ObjectStore, collection: str, shard: int, cache_dir: str | None = None, threads: int = 1
    ) -> None:
        self.log = ManifestLog(store, collection, _new_nonce)
        self.conflicts = 0
        self._store = store
        self._collection = collection
        self._shard = shard
        self._cache_dir = Path(cache_dir) if cache_dir else private_folder("cache")
        self._threads = threads

    def seal(self, generation: int, points_max: int, end: int | None = None, width: float = 1.0) -> Shares:
        """Seal up to the LSN `end`, some points at a time; None: where the log ends now. Later writes wait for the
        next seal. Stops where another generation was committed. Yields {"share": 0..width}."""
        work = partial(seal_tail, points_max=points_max)
        first: int | None = None
        while True:
            manifest = self.log.newest_live()
            if manifest.generation != generation:
                return
            entry = manifest.shards[self._shard]
            if end is None and not entry.behind:  # else what it lacks of earlier logs is sealed first
                wal = Wal(self._store, self._collection, self._shard, manifest.log_set)
                end = wal.end(entry.applied_lsn, entry.epoch)[0]
            if end is not None and not entry.behind and entry.applied_lsn >= end:
                return
            first = entry.applied_lsn if first is None else first
            left = 1.0 if end is None else (end - entry.applied_lsn) / max(1, end - first)
            done, conflicts = min(0.9, 1.0 - left), self.conflicts
            sealed = yield from self.step(work, width * done, width * (0.99 - done))
            if sealed is None and self.conflicts == conflicts:
                return  # the log holds only claims

    def step(
        self, work: Callable[..., Manifest | None], share: float, width: float, *args: Any
    ) -> Generator[dict[str, Any], None, Manifest | None]:
        """One seal or merge, a function of `actors.segment_upkeep` that also takes `args`.

        Yields {"share"} from `share` on; None after a conflict, of which there may be `CONFLICTS_MAX`.
        """
        place = (self._store, self._collection, self._shard, *args, self._cache_dir, _new_nonce, self._threads)
        shares = shares_of(lambda progress: work(*place, progress=progress))
        try:
            while True:
                yield {"share": share + width * next(shares)}
        except StopIteration as stopped:
            manifest: Manifest | None = stopped.value
            return manifest
        except Conflict:
            self.conflicts += 1
            if self.conflicts > CONFLICTS_MAX:
                raise
            return None


def _new_nonce() -> str:
    return uuid.uuid4().hex
