"""Sealing all that was acknowledged so far: for jobs that need a version which holds everything in files.

One Ray task per shard, each seal committed by itself as the shard's own upkeep does (`actors.segment_upkeep`).
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator
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
from jobs.build_plan import Workers, plan_builds
from jobs.build_progress import shares_of
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter

SEAL_POINTS_MIN = 1_000  # however little memory there is: one by one they would take for ever
CONFLICTS_MAX = 10  # of one shard with its own upkeep, and of all with new generations


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
    store = open_store(task.data)
    log = ManifestLog(store, task.collection, _new_nonce)
    conflicts, first = 0, None
    while True:
        newest = log.newest_live()
        if newest.generation != task.generation:
            break
        entry = newest.shards[task.shard]
        if not entry.behind and entry.applied_lsn >= task.until:
            break
        first = entry.applied_lsn if first is None else first
        done = max(0.0, (entry.applied_lsn - first) / max(1, task.until - first))
        try:
            manifest = yield from _seal(task, store, min(0.9, done))
        except Conflict:
            conflicts += 1
            if conflicts > CONFLICTS_MAX:
                raise
            continue
        if manifest is None:  # no writes, only claims
            break
    yield {"share": 1.0}


def _seal(task: SealTask, store: ObjectStore, done: float) -> Generator[dict[str, Any], None, Manifest | None]:
    """One seal of as many points as it takes."""
    cache_dir = Path(task.cache_dir) if task.cache_dir else private_folder("cache")
    place = (store, task.collection, task.shard, cache_dir, _new_nonce, task.threads)
    shares = shares_of(lambda progress: partial(seal_tail, *place, points_max=task.points_max)(progress=progress))
    try:
        while True:
            yield {"share": done + (0.99 - done) * next(shares)}
    except StopIteration as end:
        manifest: Manifest | None = end.value
        return manifest


def _new_nonce() -> str:
    return uuid.uuid4().hex
