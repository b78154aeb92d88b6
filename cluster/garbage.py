"""Garbage: objects that nothing names and nobody is going to name. Found, counted, and deleted where that is asked for.

An object is deleted only if all of this holds: its key is one of ours; it is older than the grace period by the
store's clock; nothing names it (`references`), read again after it was listed and right before it is deleted; no job
works on its collection. Why nobody can name it after that:

- A manifest is put in the place after the newest one, if that is free. So it names what the newest one names, which
  stays; what its writer has built, which is younger than the grace period or whose job is running; or, in a rollback,
  what the last of an earlier generation names. That of the generation before stays. Who goes back further looks once
  more after the commit whether everything is there, as does who branches. And here the mark of each item is taken away
  first (`Item.mark`), then looked once more what is named, and put back where it is by now: one of them sees the other.
- A job has said that it runs before it reads the manifest from which it works, and says that it ended after it
  committed; `references` reads jobs first. Jobs that do not write that they run for longer than the grace period are
  taken as dead. Upkeep of a shard, which is no job, publishes a segment and commits it right after that.
- A seal may find the tombstone file that another one left which crashed: those of LSNs over the newest manifest's stay.
- Writers that were taken over find that at the claim, or the end, in the place of their next record: those stay, for
  ever, and the last record of every log. Records are deleted only below every position that may be read from, so that
  each log is dense from there on.
- The number of a manifest can be taken again once it was deleted, by a writer that believes the newest to be the one
  before. So only those are deleted that are far below the newest (`MANIFESTS_KEPT`), and were replaced before the
  grace period: it would have to have slept since. What it then commits is not the newest, which is the truth, and is
  lost like a commit of the one that took its place. Manifests that say "deleted" stay: they end what a name stood for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil
from typing import Any, TypeVar

from cluster import paths
from cluster.errors import Corrupt, EaglerayError, NotFound
from cluster.manifest import Manifest, collection_names
from cluster.object_store import ObjectInfo, ObjectStore
from cluster.recent_queries import KEPT_S
from cluster.references import InUse, References
from cluster.stored_object import StoredObject, parsed
from cluster.wal import CLAIM_BYTES

GRACE_S = 24 * 3600.0
MANIFESTS_KEPT = 100  # the newest numbers: commits that a writer would have to miss
JOB_KEPT_S = 30 * 24 * 3600.0  # statuses of jobs
PUT_BACK_TRIES = 5
BATCH_OBJECTS = 2_000  # between two looks at what is named
BATCH_BYTES = 64 * 1024**2  # of the marks in a batch, which are in memory while they are away
DELETES_AT_ONCE = 16
ITEMS_PER_THREAD = 8  # fewer take less time than a thread more
MARKED = ("segment", "tombstones")  # each has a mark of its own
EXAMPLES_MAX = 20
JOBS = "jobs/"
T = TypeVar("T")


@dataclass
class Tally:
    """A number of objects, and their bytes."""

    objects: int = 0
    bytes: int = 0

    def add(self, infos: Iterable[ObjectInfo]) -> None:
        for info in infos:
            self.objects += 1
            self.bytes += info.size_bytes

    def to_dict(self) -> dict[str, int]:
        return {"objects": self.objects, "bytes": self.bytes}


@dataclass
class GarbageReport:
    """What was found. `removed` was deleted; of the errors, `failed` in number, `failures` are the first."""

    kept: dict[str, Tally] = field(default_factory=dict)
    garbage: dict[str, Tally] = field(default_factory=dict)
    removed: Tally = field(default_factory=Tally)
    unknown: Tally = field(default_factory=Tally)
    examples: list[str] = field(default_factory=list)
    unknown_examples: list[str] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    failed: int = 0

    def fail(self, key: str, message: str) -> None:
        self.failed += 1
        if len(self.failures) < EXAMPLES_MAX:
            self.failures.append({"object": key, "message": message})

    def to_dict(self) -> dict[str, Any]:
        return {
            "kept": {kind: tally.to_dict() for kind, tally in sorted(self.kept.items())},
            "garbage": {kind: tally.to_dict() for kind, tally in sorted(self.garbage.items())},
            "removed": self.removed.to_dict(),
            "examples": self.examples,
            "unknown": self.unknown.to_dict() | {"examples": self.unknown_examples},
            "held": [{"collection": name, "why": why} for name, why in sorted(self.held.items())],
            "failures": self.failures,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Item:
    """One object, or the files of one segment: what is kept or deleted as a whole. `last` is the end of its log."""

    name: StoredObject
    files: tuple[ObjectInfo, ...]
    last: bool = False

    @property
    def modified_s(self) -> float:
        return max(info.modified_s for info in self.files)

    @property
    def mark(self) -> ObjectInfo:
        """The object without which nobody takes the item as there: of a segment its description."""
        return next((info for info in self.files if info.key.endswith(f"/{paths.DESCRIPTION}")), self.files[0])


def items_of(objects: Iterable[ObjectInfo], unknown: Callable[[ObjectInfo], None]) -> Iterator[Item]:
    """What objects, in the order of their keys, are; `unknown` is given those whose keys are not ours."""

    def known() -> Iterator[tuple[StoredObject, ObjectInfo]]:
        for info in objects:
            name = parsed(info.key)
            if name is None:
                unknown(info)
            else:
                yield name, info

    def whole(pair: tuple[StoredObject, ObjectInfo]) -> tuple[StoredObject, str]:
        name, info = pair
        return name, "" if name.kind == "segment" else info.key

    found = (Item(name, tuple(info for _, info in files)) for (name, _), files in groupby(known(), whole))
    before: Item | None = None
    for item in found:
        if before is not None:
            yield _marked(before, item)
        before = item
    if before is not None:
        yield _marked(before, None)


def _marked(item: Item, after: Item | None) -> Item:
    if item.name.kind == "wal" and (after is None or _log_of(after.name) != _log_of(item.name)):
        return Item(item.name, item.files, last=True)
    return item


def with_marks(items: Sequence[Item]) -> list[Item]:
    """Those whose marks are taken away first: segments, tombstone files, and the last record of each log, without which
    the others of the log are of no use to who goes back to a version that needs them."""
    last = {_log_of(item.name): item for item in items if item.name.kind == "wal"}
    return [item for item in items if item.name.kind in MARKED] + list(last.values())


def _log_of(name: StoredObject) -> tuple[str, str, int, int]:
    return name.kind, name.collection, name.log_set, name.shard


def at_once(function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """What it returns for each item: called from several threads where there are many."""
    threads = min(DELETES_AT_ONCE, ceil(len(items) / ITEMS_PER_THREAD))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


class Sweep:
    """One pass over a store, or over one collection of it. `busy` says whether a job runs."""

    def __init__(
        self,
        store: ObjectStore,
        now_s: float,
        grace_s: float = GRACE_S,
        in_use: Callable[[], InUse] = InUse,
        busy: Callable[[str], bool] = lambda job_id: False,
        batch: int = BATCH_OBJECTS,
    ) -> None:
        self._store = store
        self._now_s = now_s
        self._grace_s = grace_s
        self._busy = busy
        self._batch = batch
        self.references = References(store, now_s, grace_s, in_use)
        self.report = GarbageReport()

    def run(self, only: str | None, delete: bool, progress: Callable[[float], None] = lambda share: None) -> None:
        """Go through one collection or, with None, everything. The report holds what was done, also where this raises:
        Unavailable where what is named cannot be read, and then nothing more is deleted."""
        try:
            self.references.refresh()
            self._go_through(only, delete, progress)
        finally:
            self.report.held = self.references.held_collections()
            for name, message in sorted(self.references.unreadable.items()):
                self.report.fail(f"{paths.collections_prefix()}{name}", message)

    def _go_through(self, only: str | None, delete: bool, progress: Callable[[float], None]) -> None:
        folders = [f"{paths.collections_prefix()}{name}/" for name in collection_names(self._store)]
        if only is not None:
            folders = [f"{paths.collections_prefix()}{only}/"]
        else:
            folders.append(JOBS)
        for number, folder in enumerate(folders):
            progress(number / len(folders))
            garbage = self._garbage(self._store.objects(folder))
            while batch := self._next_batch(garbage):
                self._take(batch, delete)
                progress(number / len(folders))

    def _next_batch(self, garbage: Iterator[Item]) -> list[Item]:
        batch: list[Item] = []
        size_bytes = 0
        while len(batch) < self._batch and size_bytes < BATCH_BYTES and (item := next(garbage, None)) is not None:
            batch.append(item)
            size_bytes += item.mark.size_bytes if item.name.kind in MARKED else 0  # of a log it is one record in all
        return batch

    def _garbage(self, objects: Iterable[ObjectInfo]) -> Iterator[Item]:
        """Items that nothing named when it was looked last; the others are counted."""
        for item in items_of(objects, self._unknown):
            if self._stays(item):
                self._keep(item)
            else:
                yield item

    def _keep(self, item: Item) -> None:
        self.report.kept.setdefault(item.name.kind, Tally()).add(item.files)

    def _unknown(self, info: ObjectInfo) -> None:
        self.report.unknown.add([info])
        if len(self.report.unknown_examples) < EXAMPLES_MAX:
            self.report.unknown_examples.append(info.key)

    def _take(self, batch: Sequence[Item], delete: bool) -> None:
        """Count what is garbage after another look, and delete it."""
        self.references.refresh()
        chosen = [item for item in batch if not self._stays(item) and not self._is_deletion(item)]
        if delete and chosen:
            chosen = self._delete(chosen)
        garbage = {item.files[0].key for item in chosen}
        for item in batch:
            if item.files[0].key not in garbage:
                self._keep(item)
        for item in chosen:
            self.report.garbage.setdefault(item.name.kind, Tally()).add(item.files)
            if len(self.report.examples) < EXAMPLES_MAX:
                self.report.examples.append(item.files[0].key)

    def _delete(self, chosen: Sequence[Item]) -> list[Item]:
        """Delete what still is garbage once its marks are away: returns that."""
        marked = with_marks(chosen)
        marks = dict(zip(marked, at_once(self._take_away, marked), strict=True))
        try:
            self.references.refresh()
        except BaseException:
            self._put_back(data for data in marks.values() if data is not None)
            raise
        self._put_back(data for item, data in marks.items() if data is not None and self._stays(item))
        garbage = [item for item in chosen if not self._stays(item)]
        for gone, failed in at_once(self._delete_files, garbage):
            self.report.removed.add(gone)
            if failed is not None:
                self.report.fail(*failed)
        return garbage

    def _take_away(self, item: Item) -> tuple[str, bytes] | None:
        """Delete what a commit of an item looks for, and return it; None where it is away already, or stays."""
        key = item.mark.key
        try:
            data = self._store.get(key)
            self._store.delete(key)
        except NotFound:
            return None
        except EaglerayError as error:
            self.report.fail(key, str(error))
            return None
        return key, data

    def _put_back(self, marks: Iterable[tuple[str, bytes]]) -> None:
        for key, data in marks:
            for left in reversed(range(PUT_BACK_TRIES)):
                try:
                    self._store.put_if_absent(key, data)
                    break
                except EaglerayError as error:
                    if not left:
                        self.report.fail(key, f"deleted, though it is named since, and not put back: {error}")

    def _delete_files(self, item: Item) -> tuple[list[ObjectInfo], tuple[str, str] | None]:
        """(the objects that are gone, the first that could not be deleted and why)."""
        gone: list[ObjectInfo] = []
        for info in sorted(item.files, key=lambda info: info != item.mark):
            try:
                self._store.delete(info.key)
            except EaglerayError as error:
                return gone, (info.key, str(error))
            gone.append(info)
        return gone, None

    def _stays(self, item: Item) -> bool:
        if item.modified_s >= self._now_s - self._grace_s:
            return True
        if item.name.kind == "job":
            return item.modified_s >= self._now_s - JOB_KEPT_S or self._busy(item.name.owner)
        if item.name.kind == "staging":
            return self._busy(item.name.owner)
        return bool(self.references.of(item.name.collection).held) or self._is_needed(item)

    def _is_needed(self, item: Item) -> bool:
        """Whether something names an item of a collection that no job works on."""
        name, known = item.name, self.references.of(item.name.collection)
        live = known.newest is not None and known.newest.state == "live"
        match name.kind:
            case "segment":
                return self.references.names_segment(name.collection, name.owner)
            case "tombstones":
                key = item.files[0].key
                return self.references.names_tombstones(key) or known.may_write_tombstones(name.shard, name.number)
            case "wal":
                mark = item.last or item.files[0].size_bytes == CLAIM_BYTES
                return mark or known.needs_record(name.log_set, name.shard, name.number)
            case "manifest":
                newest = known.newest.version if known.newest else 0
                far = name.number <= newest - MANIFESTS_KEPT and (known.served is None or name.number < known.served)
                return not far or name.number in known.named
            case "queries":
                return live and item.modified_s >= self._now_s - KEPT_S
            case _:  # a snapshot is its user's as long as there is a collection
                return live

    def _is_deletion(self, item: Item) -> bool:
        """Whether a manifest ends a collection; also where it cannot be read: nobody knows."""
        if item.name.kind != "manifest":
            return False
        key = item.files[0].key
        try:
            return Manifest.decode(self._store.get(key), key).state == "deleted"
        except NotFound:
            return False
        except Corrupt as error:
            self.report.fail(key, str(error))
            return True
