"""Rollback as a job: where a replica would replay too many records of the log, they are sealed first.

What is sealed goes into the old generation's entries before anybody sees them, one Ray task per shard; then one
manifest is committed (`cluster.rollback`). A crash before that leaves garbage and nothing else.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from actors.entry_seal import DraftEntry, finished_entry, seal_entry
from actors.faiss_index import use_threads
from actors.scratch import private_folder
from actors.segment_rows import deleted_rows
from actors.shard_place import ShardPlace
from cluster.config import check_collection_name
from cluster.errors import Conflict, NotFound
from cluster.manifest import Manifest, ManifestLog, ShardEntry
from cluster.manifest_format import added_on
from cluster.object_store import ObjectStore, open_store
from cluster.rollback import Rollback, checked_plan, commit_rollback, replay_of
from cluster.upkeep import build_bytes, largest_build
from jobs.build_plan import Workers, plan_builds
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter
from jobs.sealing import seal_points
from jobs.segment_task import delete_segments_of

ROUNDS_MAX = 10  # of sealing what was written during the round before; the replicas replay what is left


@dataclass(frozen=True)
class RollbackOptions:
    """`generation` is the one to go back to; None: the one that was current before the newest."""

    collection: str
    generation: int | None = None


@dataclass(frozen=True)
class CatchUpTask:
    """Everything a task needs to seal what one shard's old entry lacks. `base` is the newest version."""

    data: str
    rollback: Rollback
    shard: int
    job_id: str
    cache_dir: str | None
    points_max: int
    threads: int


class RollbackJob:
    """One run of one rollback."""

    def __init__(
        self,
        data: str,
        store: ObjectStore,
        log: ManifestLog,
        options: RollbackOptions,
        workers: Workers,
        cache_dir: str | None = None,
    ) -> None:
        check_collection_name(options.collection)
        self._data = data
        self._store = store
        self._log = log
        self._options = options
        self._workers = workers
        self._cache_dir = cache_dir

    def run(self, job_id: str, reporter: JobReporter) -> tuple[Manifest, dict[str, Any]]:
        """Go back; returns the committed manifest, and the report: `replayed_records` are those that one replica has to
        read at most, or would have had to (`sealed`).

        When this raises nothing is committed, unless it is Unavailable from the commit: then nobody knows.
        """
        reporter.phase("plan")
        rollback = checked_plan(self._store, self._log, self._log.newest_live(), self._options.generation)
        replay = replay_of(self._store, rollback)
        try:
            entries = self._caught_up(rollback, job_id, reporter) if replay.is_long else None
        except BaseException:  # stopped, too: SystemExit
            self._delete_segments(job_id)
            raise
        reporter.phase("commit")
        try:
            manifest = commit_rollback(self._store, self._log, rollback, entries)
        except (Conflict, NotFound):  # only these say for sure that what was sealed is not in use
            self._delete_segments(job_id)
            raise
        self._delete_segments(job_id)  # those whose points were all written again meanwhile
        report = {
            "version": manifest.version,
            "generation": manifest.generation,
            "back_to_generation": rollback.old.generation,
            "replayed_records": replay.records,
            "sealed": entries is not None,
        }
        return manifest, report

    def _delete_segments(self, job_id: str) -> None:
        """Delete what the job sealed and no manifest names."""
        delete_segments_of(job_id, self._store, self._log, self._options.collection)

    def _caught_up(self, rollback: Rollback, job_id: str, reporter: JobReporter) -> list[ShardEntry]:
        reporter.phase("seal")
        config, gpu = rollback.old.built_for, added_on(rollback.old.device)
        points_max = seal_points(largest_build(config, DEFAULT_MEMORY_BYTES, gpu))
        bytes_each = ceil(min(DEFAULT_MEMORY_BYTES, build_bytes(config, points_max, gpu)))
        builds = plan_builds(len(rollback.entries), bytes_each, DEFAULT_MEMORY_BYTES, self._workers)
        tasks = [
            CatchUpTask(self._data, rollback, entry.shard, job_id, self._cache_dir, points_max, builds.threads)
            for entry in rollback.entries
        ]
        entries: dict[int, ShardEntry] = {}
        for number, event in self._workers.build(catch_up, tasks, builds):
            if "entry" in event:
                entries[tasks[number].shard] = event["entry"]
                reporter.progress(min(0.99, len(entries) / len(tasks)))
        return [entries[shard] for shard in sorted(entries)]


def catch_up(task: CatchUpTask) -> Iterator[dict[str, Any]]:
    """Seal one shard's old entry up to now. Yields {"ids": n} for each round, and at last {"entry": ShardEntry}."""
    use_threads(task.threads)
    store, old, base = open_store(task.data), task.rollback.old, task.rollback.base
    cache_dir = Path(task.cache_dir) if task.cache_dir else private_folder("cache")
    place = ShardPlace(store, base.collection, task.shard, cache_dir, lambda: uuid.uuid4().hex, task.threads)
    draft = draft_of(store, base.collection, task.rollback.entries[task.shard])
    name, rounds, ids = f"{task.job_id}-{task.shard:06d}", 0, 0  # as `is_segment_of` reads it
    while rounds < ROUNDS_MAX or ids >= task.points_max:
        before = draft
        draft, ids = seal_entry(place, draft, base, old.built_for, name, task.points_max, task.rollback.log_set)
        yield {"ids": ids}
        if draft is before or not ids:
            break
        rounds += 1
    yield {"entry": finished_entry(place, draft)}


def draft_of(store: ObjectStore, collection: str, entry: ShardEntry) -> DraftEntry:
    """The entry, with its tombstone files read."""
    deleted = {
        ref.segment_id: rows for ref in entry.segments if len(rows := deleted_rows(store, collection, entry, ref))
    }
    return DraftEntry(replace(entry, tombstones=()), deleted)
