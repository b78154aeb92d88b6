"""What a scrub does in Ray tasks: one shard's segments verified, one log read, one shard's recall measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.faiss_index import use_threads
from actors.scratch import private_folder
from actors.segment_check import (
    Answers,
    live_twice,
    measured,
    merged,
    recalls,
    sampled_vectors,
    verify_stored,
    wrong_rows,
)
from actors.segment_loader import load_segment, read_description
from actors.segment_rows import SegmentPart, deleted_rows, open_rows
from actors.tuner import recall_interval
from cluster import paths
from cluster.config import CollectionConfig
from cluster.errors import Corrupt, EaglerayError, NotFound
from cluster.log_check import CheckedLog, Finding, check_log
from cluster.manifest import SegmentRef, ShardEntry
from cluster.object_store import ObjectStore, open_store
from cluster.routing import Routing

RECALL_SLACK = 0.02  # under the target: queries are others than those it was tuned with
NAMED = re.compile(r"(?:no object )?(collections/[^\s:]+)(?:: )?(.*)", re.DOTALL)  # an error's message
BROKEN = (Corrupt, NotFound)  # what damage looks like; a store that is away is none


@dataclass(frozen=True)
class CheckedEntry:
    """A shard's entry in one version."""

    version: int
    config: CollectionConfig
    routing: Routing
    entry: ShardEntry


@dataclass(frozen=True)
class VerifyTask:
    """One shard in several versions, the newest first. `sample` of its live vectors are returned."""

    data: str
    collection: str
    shard: int
    entries: tuple[CheckedEntry, ...]
    cache_dir: str | None
    sample: int
    seed: int


@dataclass(frozen=True)
class LogTask:
    data: str
    log: CheckedLog


@dataclass(frozen=True, eq=False)
class MeasureTask:
    """One shard: its segments in the newest version, and those that only other versions name, which are loaded only.

    The first `stored` of `queries` (n, dimension) were made of stored rows, the others are real ones.
    """

    data: str
    collection: str
    entry: ShardEntry
    others: tuple[SegmentRef, ...]
    config: CollectionConfig
    queries: NDArray[np.float32]
    stored: int
    cache_dir: str | None
    threads: int


def verify_shard(task: VerifyTask) -> Iterator[dict[str, Any]]:
    """Yields {"share": 0..1}, and at last {"findings", "segments", "vectors"}."""
    check = _ShardCheck(task, open_store(task.data))
    for number, checked in enumerate(task.entries):
        for share in check.entry(checked, first=number == 0):
            yield {"share": (number + share) / len(task.entries)}
    yield {
        "findings": check.findings,
        "segments": len(check.opened),
        "vectors": check.vectors,
    }


def verify_log(task: LogTask) -> Iterator[dict[str, Any]]:
    """Yields {"findings", "records"}."""
    records, findings = check_log(open_store(task.data), task.log)
    yield {"findings": findings, "records": records}


def measure_shard(task: MeasureTask) -> Iterator[dict[str, Any]]:
    """Yields {"share": 0..1}, and at last {"findings", "segments", "bytes", "found", "truth"}, the last two None
    where there is nothing.

    Every segment is loaded as a replica loads it, with its self-test.
    """
    use_threads(task.threads)
    store, cache_dir = open_store(task.data), _cache(task.cache_dir)
    findings: list[Finding] = []
    told: list[dict[str, Any]] = []
    found: list[Answers] = []
    truth: list[Answers] = []
    refs, size_bytes = [*task.entry.segments, *task.others], 0
    for number, ref in enumerate(refs):
        yield {"share": number / len(refs)}
        key = paths.segment_file(ref.home(task.collection), ref.segment_id, paths.INDEX)
        try:
            segment = load_segment(store, task.collection, ref, task.config.metric, cache_dir)
            size_bytes += sum(file.size_bytes for file in segment.description.files.values())
            if number >= len(task.entry.segments) or not len(task.queries):
                continue
            deleted = deleted_rows(store, task.collection, task.entry, ref)
        except BROKEN as error:
            findings.append(finding_of(error, key))
            continue
        answers = measured(segment, deleted, task.queries)
        found, truth = [*found, answers.found], [*truth, answers.truth]
        shares = recalls(answers.found, answers.truth, task.config.metric)[: task.stored]
        if len(shares):
            point = segment.promised_point  # of the twin, where there is no GPU
            high = recall_interval(shares)[1]
            facts = {"recall_at_10": float(shares.mean()), "recall_high": high, "target_recall": point.target_recall}
            told.append({"segment": ref.segment_id, "rows": ref.count, **facts})
            if point.met and high < point.target_recall - RECALL_SLACK:
                problem = (
                    f"recall@10 is {facts['recall_at_10']:.3f}, at most {high:.3f}; {point.target_recall:g} was met"
                )
                findings.append(Finding(key, problem))
    metric = task.config.metric
    both = (merged(found, metric), merged(truth, metric)) if found else (None, None)
    yield {"findings": findings, "segments": told, "bytes": size_bytes, "found": both[0], "truth": both[1]}


def finding_of(error: EaglerayError, key: str) -> Finding:
    """An error that names the object it is about, else `key`, as a finding."""
    match = NAMED.match(str(error))
    return Finding(match[1], match[2] or str(error)) if match else Finding(key, str(error))


def _cache(cache_dir: str | None) -> Path:
    return Path(cache_dir) if cache_dir else private_folder("cache")


@dataclass
class _ShardCheck:
    """What was verified so far. A segment that several versions name is read once."""

    task: VerifyTask
    store: ObjectStore
    findings: list[Finding] = field(default_factory=list)
    opened: dict[tuple[str, str], Any] = field(default_factory=dict)  # (home, segment) -> Rows; None: damaged
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def entry(self, checked: CheckedEntry, first: bool) -> Iterator[float]:
        """Yields the share done."""
        entry, parts = checked.entry, []
        for number, ref in enumerate(entry.segments):
            yield number / len(entry.segments)
            part = self._part(checked, ref)
            if part is not None:
                parts.append(part)
        if len(parts) < len(entry.segments):
            return  # what is damaged is told; ids are not compared with what cannot be read
        twice = live_twice(parts, entry.shard, checked.routing.shards)
        if twice is not None:
            where = paths.manifest(self.task.collection, checked.version)
            self.findings.append(Finding(where, f"shard {entry.shard}: {twice}"))
        if first:
            self.vectors = sampled_vectors(parts, self.task.sample, self.task.seed + entry.shard)

    def _part(self, checked: CheckedEntry, ref: SegmentRef) -> SegmentPart | None:
        name, key = self.task.collection, paths.segment_file(ref.home(self.task.collection), ref.segment_id, paths.ROWS)
        rows = self._rows(checked, ref, key)
        try:
            deleted = deleted_rows(self.store, name, checked.entry, ref)
        except BROKEN as error:
            self.findings.append(finding_of(error, key))
            return None
        return SegmentPart(ref, rows, deleted) if rows is not None else None

    def _rows(self, checked: CheckedEntry, ref: SegmentRef, key: str) -> Any:
        """The verified rows of a segment; None where they are damaged."""
        place = ref.home(self.task.collection), ref.segment_id
        if place not in self.opened:
            try:
                cache_dir = _cache(self.task.cache_dir)
                description = read_description(self.store, self.task.collection, ref)
                verify_stored(self.store, place[0], description, cache_dir)
                rows = open_rows(self.store, self.task.collection, ref, cache_dir)
                wrong = list(wrong_rows(rows, checked.config, checked.routing, checked.entry.shard))
                if rows.count != ref.count:
                    wrong.append(f"{rows.count} rows, the manifest says {ref.count}")
            except BROKEN as error:
                self.findings.append(finding_of(error, key))
                self.opened[place] = None
                return None
            self.findings += [Finding(key, problem) for problem in wrong]
            self.opened[place] = None if wrong else rows
        return self.opened[place]
