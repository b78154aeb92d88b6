"""What collections go through in a store, without indexes: segments are three files of text that say what they are."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import paths
from cluster.config import CollectionConfig, IndexConfig
from cluster.deletion import delete_files
from cluster.entry_log import EntryLog, end_logs
from cluster.errors import Conflict, NotFound
from cluster.manifest import Manifest, ManifestLog, SegmentRef, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectInfo, ObjectStore
from cluster.rollback import roll_back
from cluster.segment import checksum_bytes
from cluster.snapshots import create_snapshot, delete_snapshot, list_snapshots
from cluster.tombstones import write_tombstones
from cluster.wal import Wal, WalRecord
from jobs.snapshots import BranchOptions, branch, now_utc
from tests.fakes import FaultyStore

CONFIG = CollectionConfig(4, "l2", index=IndexConfig("flat"), shards=2)
ROWS = 5  # of every segment
TURN_S_MAX = 30.0


class ClockStore(MemoryStore):
    """A memory store whose time is `now_s`, and goes on with every write."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        self._stamp(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        written = super().put_if_absent(key, data)
        if written:
            self._stamp(key)
        return written

    def copy(self) -> ClockStore:
        copied = ClockStore()
        copied.now_s, copied._objects = self.now_s, dict(self._objects)
        return copied

    def _stamp(self, key: str) -> None:
        self.now_s += 1.0
        self._objects[key] = (self._objects[key][0], self.now_s)


class InterruptedStore(FaultyStore):
    """Runs something else before its `at`-th call."""

    def __init__(self, inner: ObjectStore, at: int = 0, other: Callable[[], object] = lambda: None) -> None:
        super().__init__(inner)
        self._interrupted_at = at
        self._other = other
        self._gate = threading.Lock()
        self._seen = 0

    def _call(self, method: str, *args: Any) -> Any:
        with self._gate:
            self._seen += 1
            if self._seen == self._interrupted_at:
                self._other()
        answer = super()._call(method, *args)
        return iter(list(answer)) if method == "objects" else answer


class Turns:
    """Who makes the next call to a store is drawn by lot, call by call, until only one is left."""

    def __init__(self, inner: ObjectStore, seed: int, names: tuple[str, ...]) -> None:
        self._inner = inner
        self._random = random.Random(seed)
        self._alive = list(names)
        self._turn = self._random.choice(self._alive)
        self._changed = threading.Condition()

    def call(self, name: str, method: str, *args: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn == name, TURN_S_MAX), f"{name} never has a turn"
            try:
                answer = getattr(self._inner, method)(*args)
                return iter(list(answer)) if method == "objects" else answer
            finally:
                self._next()

    def leave(self, name: str) -> None:
        with self._changed:
            self._alive.remove(name)
            self._next()

    def _next(self) -> None:
        if self._alive:
            self._turn = self._random.choice(self._alive)
        self._changed.notify_all()


class TurnStore(FaultyStore):
    """The store as one of those who take turns sees it."""

    def __init__(self, turns: Turns, name: str, inner: ObjectStore) -> None:
        super().__init__(inner)
        self._turns = turns
        self._name = name

    def _call(self, method: str, *args: Any) -> Any:
        return self._turns.call(self._name, method, *args)


def new_nonce() -> str:
    return uuid.uuid4().hex


def log_of(store: ObjectStore, collection: str = "a") -> ManifestLog:
    return ManifestLog(store, collection, new_nonce)


def put_segment(store: ObjectStore, collection: str, name: str | None = None) -> SegmentRef:
    name = name or f"segment-{new_nonce()[:8]}"
    for file in paths.SEGMENT_FILES:
        store.put(paths.segment_file(collection, name, file), f"{file} of {name}".encode())
    return SegmentRef(name, ROWS, checksum_bytes(f"{paths.DESCRIPTION} of {name}".encode()))


def write(store: ObjectStore, collection: str = "a", count: int = 1) -> None:
    """Records at the end of every log that is in use."""
    log = log_of(store, collection)
    newest = log.newest_live()
    for at in log.ends_of_logs(newest):
        wal = Wal(store, collection, at.shard, newest.log_set)
        for lsn in range(at.lsn + 1, at.lsn + 1 + count):
            wal.append(WalRecord(lsn, at.epoch, "write", new_nonce(), None, pa.array([lsn])))


def claim(store: ObjectStore, collection: str = "a") -> None:
    log = log_of(store, collection)
    newest = log.newest_live()
    for at in log.ends_of_logs(newest):
        Wal(store, collection, at.shard, newest.log_set).claim(at.lsn, at.epoch, new_nonce())


def seal(store: ObjectStore, collection: str = "a", shard: int = 0) -> Manifest:
    """The shard's log becomes a segment, and a row of each other one is deleted; one more segment at most is merged."""
    log = log_of(store, collection)
    base = log.newest_live()
    entry = base.shards[shard]
    read = EntryLog.of(store, base, shard)
    list(read.records())
    if not read.crossed or read.lsn == entry.applied_lsn:
        return base
    segments = (*entry.segments[-2:], put_segment(store, collection))
    gone = tuple(
        write_tombstones(store, collection, shard, ref.segment_id, read.lsn, np.arange(1 + read.lsn % 3))
        for ref in segments[:-1]
    )
    return log.commit_shards(base, {shard: ShardEntry(shard, segments, read.lsn, read.epoch, gone)})


def new_generation(store: ObjectStore, collection: str = "a", shards: int | None = None) -> Manifest:
    """As an import commits it; with another number of shards as a reshard does, whose old logs are then ended."""
    log = log_of(store, collection)
    base = log.newest_live()
    wanted = shards or len(base.shards)
    entries = tuple(replace(end, segments=(put_segment(store, collection),)) for end in log.wal_ends(base, wanted))
    return log.commit_generation(base, replace(base.config, shards=wanted), entries)


def switch(store: ObjectStore, collection: str = "a") -> None:
    """The old logs are ended, as the supervisor does it."""
    end_logs(store, collection, log_of(store, collection).newest_live().behind, new_nonce)


def leave_behind(store: ObjectStore, collection: str = "a") -> None:
    """What builds and imports that were killed leave."""
    put_segment(store, collection)
    store.put(paths.staging_piece(collection, "import-dead", 3, 7), b"piece")
    store.put(paths.tombstones(collection, 0, "segment-dead", 0, "0" * 16), b"rows")


def snapshot(store: ObjectStore, name: str, collection: str = "a") -> None:
    create_snapshot(store, name, log_of(store, collection).newest_live(), now_utc())


def branch_of(store: ObjectStore, into: str, collection: str = "a") -> Manifest:
    log = log_of(store, collection)
    return branch(store, log, log_of(store, into), log.newest_live(), BranchOptions(collection, into))


def delete(store: ObjectStore, collection: str = "a", files: bool = True) -> None:
    log = log_of(store, collection)
    deleted = log.delete()
    if files:
        delete_files(store, log, deleted)


class History:
    """Random steps of some collections; a step that their state rules out does nothing."""

    def __init__(self, store: ClockStore, seed: int) -> None:
        self.store = store
        self.random = random.Random(seed)
        self.steps: list[str] = []

    def step(self) -> None:
        steps = (self.create, self.write, self.write, self.write, self.claim, self.seal, self.seal, self.seal)
        steps += (self.generation, self.reshard, self.switch, self.switch, self.roll_back, self.garbage)
        steps += (self.snapshot, self.forget_snapshot, self.branch, self.delete)
        chosen = self.random.choice(steps)
        name = self.random.choice("abc")
        self.steps.append(f"{chosen.__name__} {name}")
        try:
            chosen(name)
        except (NotFound, Conflict) as error:
            self.steps[-1] += f": {error}"

    def create(self, name: str) -> None:
        log_of(self.store, name).create(replace(CONFIG, shards=self.random.choice([1, 2, 3])))

    def write(self, name: str) -> None:
        write(self.store, name, self.random.choice([1, 3]))

    def claim(self, name: str) -> None:
        claim(self.store, name)

    def seal(self, name: str) -> None:
        for shard in range(len(log_of(self.store, name).newest_live().shards)):
            if self.random.random() < 0.8:
                seal(self.store, name, shard)

    def generation(self, name: str) -> None:
        new_generation(self.store, name)

    def reshard(self, name: str) -> None:
        new_generation(self.store, name, self.random.choice([1, 2, 3]))

    def switch(self, name: str) -> None:
        switch(self.store, name)

    def roll_back(self, name: str) -> None:
        roll_back(self.store, log_of(self.store, name))

    def garbage(self, name: str) -> None:
        leave_behind(self.store, name)

    def snapshot(self, name: str) -> None:
        if not log_of(self.store, name).newest_live().crossing:
            snapshot(self.store, f"s{self.random.randrange(3)}", name)

    def forget_snapshot(self, name: str) -> None:
        delete_snapshot(self.store, name, f"s{self.random.randrange(3)}")

    def branch(self, name: str) -> None:
        branch_of(self.store, self.random.choice([other for other in "abc" if other != name]), name)

    def delete(self, name: str) -> None:
        if self.random.random() < 0.5:
            delete(self.store, name, files=self.random.random() < 0.5)


# --- what must stay, worked out without the code under test -----------------------------------------------------------


def needed_versions(store: ObjectStore, collection: str) -> tuple[list[Manifest], list[Manifest]]:
    """(the versions that are needed with their logs, those that snapshots name)."""
    log = log_of(store, collection)
    versions = [log.read(number) for number in sorted(log.versions())]
    if not versions:
        return [], []
    needed = [versions[-1]]
    if versions[-1].state == "deleted":
        return needed, []
    for manifest in reversed(versions):
        if manifest.state == "deleted":
            break
        if manifest.generation < needed[-1].generation:
            needed.append(manifest)
            if not manifest.crossing:
                break
    named = {snapshot.version for snapshot in list_snapshots(store, collection)}
    return needed, [manifest for manifest in versions if manifest.version in named]


def files_of(manifest: Manifest) -> set[str]:
    name = manifest.collection
    segments = {
        paths.segment_file(ref.home(name), ref.segment_id, file)
        for ref in manifest.segments.values()
        for file in paths.SEGMENT_FILES
    }
    return segments | {
        paths.tombstones(name, entry.shard, ref.segment_id, ref.lsn, ref.variant)
        for entry in manifest.shards
        for ref in entry.tombstones
    }


def records_after(store: ObjectStore, manifest: Manifest) -> list[list[tuple[int, int, str]]]:
    """What every shard of a version reads of the logs."""
    found = []
    for entry in manifest.shards:
        read = EntryLog.of(store, manifest, entry.shard)
        found.append([(record.lsn, record.epoch, record.nonce) for record in read.records()])
    return found


def contents(store: ObjectStore) -> dict[str, ObjectInfo]:
    return {info.key: info for folder in ("collections/", "jobs/") for info in store.objects(folder)}


def assert_whole(store: ObjectStore, manifest: Manifest) -> None:
    """Every file that a version names is there."""
    missing = files_of(manifest) - contents(store).keys()
    assert not missing, f"{manifest.collection} {manifest.version} lacks {sorted(missing)}"
