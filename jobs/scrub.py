"""Scrub: everything that a collection's newest version, its rollback target and its snapshots name is read and checked.

Phases: manifests (they decode, each follows from the one before), verify (a Ray task per shard: checksums, rows in
order and in the right shard, tombstones in range, no id live twice), logs (a task per log: every record decodes, none
is missing), recall (a task per shard: each index is loaded as a replica does, with its self-test, and searched with
stored rows that got noise, and with recent real queries, against exact truth). Nothing is changed. While it runs,
garbage is not collected from the collection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.segment_check import Answers, merged, recalls
from actors.tuner import recall_interval, tuning_queries
from cluster import paths
from cluster.config import check_collection_name
from cluster.errors import Corrupt, Invalid, NotFound
from cluster.garbage import MANIFESTS_KEPT
from cluster.log_check import Finding, logs_of
from cluster.manifest import Manifest, ManifestLog, SegmentRef, broken_invariants
from cluster.object_store import ObjectStore
from cluster.recent_queries import read_queries
from cluster.snapshots import Snapshot
from cluster.upkeep import build_bytes
from jobs.build_plan import Builds, Workers, plan_builds
from jobs.importer import DEFAULT_MEMORY_BYTES
from jobs.report import JobReporter
from jobs.scrub_tasks import (
    CheckedEntry,
    LogTask,
    MeasureTask,
    VerifyTask,
    finding_of,
    measure_shard,
    verify_log,
    verify_shard,
)
from jobs.snapshots import check_not_deleted_since

FINDINGS_MAX = 100  # that are told one by one
SAMPLE_MAX = 10_000
VERIFY_SHARE, LOGS_SHARE = 0.5, 0.6  # of the whole, for the progress bar: up to the end of these phases

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class ScrubOptions:
    """`sample` is the number of queries made of stored rows, and of recent real ones, that recall is measured with.

    0 measures none. `memory_bytes` bounds the indexes that are loaded at one time on one node.
    """

    collection: str
    sample: int = 200
    seed: int = 0
    memory_bytes: int = DEFAULT_MEMORY_BYTES

    def check(self) -> None:
        """Raise Invalid, naming the field."""
        check_collection_name(self.collection)
        if not 0 <= self.sample <= SAMPLE_MAX:
            raise Invalid.at("sample", f"must be 0 to {SAMPLE_MAX}, not {self.sample}")


@dataclass
class _Found:
    """What the phases found so far."""

    findings: list[Finding] = field(default_factory=list)
    total: int = 0
    segments: int = 0
    bytes: int = 0
    records: int = 0
    measured: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[Answers, Answers]] = field(default_factory=list)  # (found, truth) of each shard with points

    def add(self, findings: Sequence[Finding]) -> None:
        """What several phases come upon is told once."""
        new = [each for each in dict.fromkeys(findings) if each not in self.findings]
        self.total += len(new)
        self.findings += new[: max(0, FINDINGS_MAX - len(self.findings))]


class Scrubber:
    """One run of one scrub."""

    def __init__(
        self,
        data: str,
        store: ObjectStore,
        log: ManifestLog,
        options: ScrubOptions,
        workers: Workers,
        cache_dir: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options.check()
        self._data = data
        self._store = store
        self._log = log
        self._options = options
        self._workers = workers
        self._cache_dir = cache_dir
        self._clock = clock

    def run(self, reporter: JobReporter) -> dict[str, Any]:
        """Check everything; returns the report. `sound` is whether nothing was wrong.

        NotFound without a collection, also where it is deleted meanwhile; Corrupt where the newest manifest itself
        cannot be read.
        """
        started, found = self._clock(), _Found()
        reporter.phase("manifests")
        newest = self._log.newest_live()
        versions, target = self._versions(newest, found)
        queries, stored = self._verify(versions, found, reporter)
        self._read_logs(newest, target, found, reporter)
        self._measure(versions, queries, stored, found, reporter)
        if found.total:  # of a collection that was deleted meanwhile what is missing is no damage
            check_not_deleted_since(self._log, newest.version, self._log.newest_live(), f"version {newest.version}")
        return {
            "version": newest.version,
            "generation": newest.generation,
            "points": newest.points,
            "manifests": len(versions),
            "segments": found.segments,
            "bytes": found.bytes,
            "wal_records": found.records,
            "sound": found.total == 0,
            "findings": [{"object": each.object, "problem": each.problem} for each in found.findings],
            "findings_total": found.total,
            "recall": _recall(found, stored, newest),
            "seconds": round(self._clock() - started, 3),
        }

    # --- manifests ------------------------------------------------------------------------------------------------

    def _versions(self, newest: Manifest, found: _Found) -> tuple[list[Manifest], Manifest]:
        """(the versions whose files are checked, the newest first; the rollback target, or `newest` without one)."""
        self._check_manifests(newest, found)
        versions = {newest.version: newest}
        try:
            target = self._log.last_of_generation(None, newest)
        except NotFound:
            target = newest
        except Corrupt as error:
            target = newest
            found.add([finding_of(error, paths.manifest_prefix(newest.collection))])
        versions.setdefault(target.version, target)
        for snapshot in self._snapshots(found):
            if snapshot.version not in versions:
                try:
                    versions[snapshot.version] = self._log.read(snapshot.version)
                except (Corrupt, NotFound) as error:
                    found.add([Finding(paths.snapshot(newest.collection, snapshot.name), f"its version: {error}")])
        return list(versions.values()), target

    def _check_manifests(self, newest: Manifest, found: _Found) -> None:
        """The newest ones, as many as garbage collection leaves: each on its own, and after the one before."""
        parent: Manifest | None = None
        for number in sorted(self._log.versions()):
            if not newest.version - MANIFESTS_KEPT < number <= newest.version:
                continue
            key = paths.manifest(newest.collection, number)
            try:
                manifest = self._log.read(number)
            except (Corrupt, NotFound) as error:
                found.add([finding_of(error, key)])
                parent = None
                continue
            follows = parent if parent is not None and parent.version == number - 1 else None
            if follows is not None or number == 1:
                found.add([Finding(key, wrong) for wrong in broken_invariants(manifest, follows)])
            parent = manifest

    def _snapshots(self, found: _Found) -> Iterator[Snapshot]:
        for info in list(self._store.objects(paths.snapshots_prefix(self._options.collection))):
            if paths.snapshot_name(info.key) is None:
                continue
            try:
                yield Snapshot.decode(self._store.get(info.key), info.key)
            except NotFound:  # deleted since it was listed
                continue
            except Corrupt as error:
                found.add([finding_of(error, info.key)])

    # --- segments -------------------------------------------------------------------------------------------------

    def _verify(self, versions: Sequence[Manifest], found: _Found, reporter: JobReporter) -> tuple[Vectors, int]:
        """(queries (n, dimension), how many of them were made of stored rows)."""
        reporter.phase("verify")
        newest, options = versions[0], self._options
        each = ceil(options.sample / len(newest.shards))
        tasks = [
            VerifyTask(self._data, options.collection, shard, entries, self._cache_dir, each, options.seed)
            for shard, entries in sorted(_entries(versions).items())
        ]
        vectors: list[Vectors] = []
        for number, event in self._events(verify_shard, tasks, self._builds(newest, len(tasks)), reporter, 0.0):
            if "findings" in event:
                found.add(event["findings"])
                found.segments += event["segments"]
                if tasks[number].entries[0].version == newest.version and len(event["vectors"]):
                    vectors.append(event["vectors"])
        return self._queries(newest, vectors)

    def _queries(self, newest: Manifest, vectors: Sequence[Vectors]) -> tuple[Vectors, int]:
        options, config = self._options, newest.config
        parts = [np.empty((0, config.dimension), dtype=np.float32)]
        if vectors:
            sampled = np.concatenate(vectors)[: options.sample]
            parts.append(tuning_queries(sampled, sampled, config.metric, options.seed))
        stored = sum(map(len, parts))
        recent = read_queries(self._store, options.collection, config, options.seed) if options.sample else None
        if recent is not None:
            parts.append(recent[: options.sample])
        return np.concatenate(parts), stored

    # --- logs, recall ---------------------------------------------------------------------------------------------

    def _read_logs(self, newest: Manifest, target: Manifest, found: _Found, reporter: JobReporter) -> None:
        """Of the newest version and the rollback target; what a snapshot names needs no log."""
        reporter.phase("logs")
        tasks = [LogTask(self._data, log) for log in logs_of(self._store, newest, [newest, target])]
        builds = Builds(self._workers.cpus, 1, 1)
        for _, event in self._events(verify_log, tasks, builds, reporter, VERIFY_SHARE, LOGS_SHARE):
            found.add(event["findings"])
            found.records += event["records"]

    def _measure(
        self, versions: Sequence[Manifest], queries: Vectors, stored: int, found: _Found, reporter: JobReporter
    ) -> None:
        reporter.phase("recall")
        newest, others = versions[0], _only_others_name(versions)
        builds = self._builds(newest, len(newest.shards))
        tasks = [
            MeasureTask(
                self._data,
                self._options.collection,
                entry,
                tuple(others[entry.shard :: len(newest.shards)]),
                newest.config,
                queries,
                stored,
                self._cache_dir,
                builds.threads,
            )
            for entry in newest.shards
        ]
        for _, event in self._events(measure_shard, tasks, builds, reporter, LOGS_SHARE, 1.0):
            if "findings" in event:
                found.add(event["findings"])
                found.measured += event["segments"]
                found.bytes += event["bytes"]
                if event["found"] is not None:
                    found.answers.append((event["found"], event["truth"]))

    def _builds(self, newest: Manifest, tasks: int) -> Builds:
        """An index takes about what it takes to build it."""
        options = self._options
        points = max((ref.count for ref in newest.segments.values()), default=1)
        bytes_each = min(options.memory_bytes, build_bytes(newest.config, points))
        return plan_builds(tasks, ceil(bytes_each), options.memory_bytes, self._workers)

    def _events(
        self,
        function: Callable[[Any], Iterator[dict[str, Any]]],
        tasks: Sequence[Any],
        builds: Builds,
        reporter: JobReporter,
        start: float,
        stop: float = VERIFY_SHARE,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """What the tasks yield, and the progress that follows from it, from `start` to `stop` of the whole."""
        shares = [0.0] * len(tasks)
        if not tasks:
            return
        for number, event in self._workers.run_tasks(function, tasks, builds.num_cpus, builds.at_once):
            shares[number] = event.get("share", 1.0)
            reporter.progress(min(0.99, start + (stop - start) * sum(shares) / len(shares)))
            yield number, event


def _entries(versions: Sequence[Manifest]) -> dict[int, tuple[CheckedEntry, ...]]:
    """Shard -> its different entries in the versions, in their order."""
    found: dict[int, list[CheckedEntry]] = {}
    for manifest in versions:
        for entry in manifest.shards:
            known = found.setdefault(entry.shard, [])
            same = (entry.segments, entry.tombstones, manifest.routing)
            if same not in [(each.entry.segments, each.entry.tombstones, each.routing) for each in known]:
                known.append(CheckedEntry(manifest.version, manifest.config, manifest.routing, entry))
    return {shard: tuple(entries) for shard, entries in found.items()}


def _only_others_name(versions: Sequence[Manifest]) -> list[SegmentRef]:
    """Segments that versions name, and the first one does not."""
    known = set(versions[0].segments)
    found: dict[str, SegmentRef] = {}
    for manifest in versions[1:]:
        found |= {name: ref for name, ref in manifest.segments.items() if name not in known}
    return [found[name] for name in sorted(found)]


def _recall(found: _Found, stored: int, newest: Manifest) -> dict[str, Any]:
    """Of the whole collection, all shards together; without `recall_at_10` where there was nothing to measure."""
    told: dict[str, Any] = {"queries": 0, "recent_queries": 0, "segments": found.measured}
    if not found.answers:
        return told
    metric = newest.config.metric
    both = [merged(parts, metric) for parts in zip(*found.answers, strict=True)]
    shares = recalls(both[0], both[1], metric)
    if stored:
        mean, low = float(shares[:stored].mean()), recall_interval(shares[:stored])[0]
        told |= {"queries": stored, "recall_at_10": mean, "recall_low": low}
    if len(shares) > stored:
        told |= {"recent_queries": len(shares) - stored, "recent_recall_at_10": float(shares[stored:].mean())}
    return told
