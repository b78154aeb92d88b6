"""A collection through imports, reshards, seals, rollbacks and restores under writes, and what it must hold.

A generation holds what it began with, and every write since: whatever was committed in between, a generation that goes
back to it does so too.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.segment_rows import deleted_rows, open_rows
from actors.segment_upkeep import merge_segments, seal_tail
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig
from cluster.entry_log import EntryLog, end_logs, start_after
from cluster.manifest import Manifest, ManifestLog, ShardEntry
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.wal import Wal, WalRecord
from tests.unit.actors.points import Points, in_row_order, publish

CONFIG = CollectionConfig(4, metric="l2", shards=2, index=IndexConfig(kind="flat"))
Contents = dict[int, float]  # id -> the first number of its vector


def new_nonce() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Began:
    """What a generation began with, and how many writes there had been."""

    contents: Contents
    writes: int


@dataclass
class History:
    """`generations` are those committed so far; `ends` is where the logs in use end, (LSN, epoch) by shard."""

    store: ObjectStore
    folder: Path
    config: CollectionConfig = CONFIG
    collection: str = "words"
    generations: dict[int, Began] = field(default_factory=dict)
    writes: list[tuple[list[int], list[int], float]] = field(default_factory=list)
    log_set: int = 0
    ends: list[tuple[int, int]] = field(default_factory=list)

    @property
    def log(self) -> ManifestLog:
        return ManifestLog(self.store, self.collection, new_nonce)

    @property
    def newest(self) -> Manifest:
        return self.log.newest_live()

    def create(self) -> None:
        manifest, _ = self.log.create(self.config)
        self.began(manifest, {})
        self.ends = [(0, 0)] * self.config.shards

    def began(self, manifest: Manifest, contents: Contents, writes: int | None = None) -> None:
        self.generations[manifest.generation] = Began(contents, len(self.writes) if writes is None else writes)

    def write(self, upserts: Iterable[int] = (), deletes: Iterable[int] = ()) -> None:
        """One record in each shard that it concerns; what it writes has a value of its own."""
        number = float(len(self.writes) + 1)
        written = (list(upserts), list(deletes), number)
        routing = Routing(len(self.ends))
        for shard in range(len(self.ends)):
            ours, gone = (
                [one for one in ids if routing.shards_of_ids(pa.array([one], pa.int64()))[0] == shard]
                for ids in written[:2]
            )
            if ours or gone:
                self.append(shard, "write", batch_of(ours, number) if ours else None, gone)
        self.writes.append(written)

    def claim(self, shard: int) -> None:
        lsn, epoch = self.ends[shard]
        self.ends[shard] = lsn, epoch + 1
        self.append(shard, "claim")

    def append(self, shard: int, kind: str, upserts: object = None, deletes: Iterable[int] = ()) -> None:
        lsn, epoch = self.ends[shard]
        gone = pa.array(list(deletes), pa.int64()) if deletes else None
        record = WalRecord(lsn + 1, max(1, epoch), kind, new_nonce(), upserts, gone)  # type: ignore[arg-type]
        Wal(self.store, self.collection, shard, self.log_set).append(record)
        self.ends[shard] = record.lsn, record.epoch

    # --- generations ------------------------------------------------------------------------------------------------

    def import_ids(self, ids: Iterable[int], shards: int | None = None) -> Manifest:
        """The next generation has these points, and another number of shards where one is given."""
        base, number = self.newest, 0.5 + len(self.writes)
        contents = dict.fromkeys(ids, number)
        ends = self.log.wal_ends(base, shards or len(base.shards))
        config = replace(base.config, shards=len(ends))
        manifest = self.log.commit_generation(base, config, self.entries_with(contents, ends))
        self.began(manifest, contents)
        self.follow(manifest)
        return manifest

    def reshard(self, shards: int) -> Manifest:
        """The next generation has the same points in so many shards. Nothing is written to its logs before `switch`."""
        base = self.newest
        contents = self.must_hold(base.generation)
        ends = self.log.wal_ends(base, shards)
        config = replace(base.config, shards=shards)
        manifest = self.log.commit_generation(base, config, self.entries_with(contents, ends))
        self.began(manifest, contents)
        return manifest

    def entries_with(self, contents: Contents, ends: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
        found = []
        ids = pa.array(list(contents), pa.int64())
        shards = Routing(len(ends)).shards_of_ids(ids)
        vectors = vectors_of(contents)
        for end in ends:
            rows = np.flatnonzero(shards == end.shard)
            points = in_row_order(Points(ids.take(pa.array(rows)), vectors[rows]))
            refs = (publish(self.store, self.collection, self.config, points),) if len(rows) else ()
            found.append(replace(end, segments=refs))
        return tuple(found)

    def went_back(self, manifest: Manifest, generation: int) -> None:
        """The newest generation is a rollback to that one."""
        began = self.generations[generation]
        self.began(manifest, began.contents, began.writes)

    def switch(self) -> None:
        """The newest generation is served: the logs of earlier sets are ended where it has a set of its own."""
        newest = self.newest
        if newest.log_set != self.log_set:
            start = end_logs(self.store, self.collection, newest.behind, new_nonce)
            self.log_set, self.ends = newest.log_set, [start] * len(newest.shards)

    def follow(self, manifest: Manifest) -> None:
        if manifest.log_set != self.log_set:
            self.switch()

    def seal(self, shard: int) -> None:
        seal_tail(self.store, self.collection, shard, self.folder, new_nonce)

    def merge(self, shard: int) -> None:
        names = [ref.segment_id for ref in self.newest.shards[shard].segments]
        merge_segments(self.store, self.collection, shard, names, self.folder, new_nonce)

    # --- contents ---------------------------------------------------------------------------------------------------

    def must_hold(self, generation: int) -> Contents:
        began = self.generations[generation]
        contents = dict(began.contents)
        for upserts, deletes, number in self.writes[began.writes :]:
            contents |= dict.fromkeys(upserts, number)
            for one in deletes:
                contents.pop(one, None)
        return contents

    def held(self, manifest: Manifest | None = None, replayed: bool = True) -> Contents:
        """What a version holds, with all writes since (`replayed`) or in its files alone."""
        manifest = manifest or self.newest
        found: Contents = {}
        for entry in manifest.shards:
            mine = files_of(self.store, manifest, entry, self.folder)
            assert len(mine) == entry.points
            for record in EntryLog.of(self.store, manifest, entry.shard).records() if replayed else ():
                for one in record.deletes.to_pylist() if record.deletes is not None else ():
                    mine.pop(one, None)
                for row in record.upserts.to_pylist() if record.upserts is not None else ():
                    mine[row["id"]] = row["vector"][0]
            routed = manifest.routing.shards_of_ids(pa.array(list(mine), pa.int64())).tolist()
            assert routed == [entry.shard] * len(mine), f"shard {entry.shard} has points of others"
            assert not found.keys() & mine.keys()
            found |= mine
        return found

    def assert_held(self) -> None:
        newest = self.newest
        assert self.held() == self.must_hold(newest.generation)
        if newest.crossing:
            started = start_after(self.store, self.collection, newest.behind) is not None
            assert started == (newest.log_set == self.log_set)


def files_of(store: ObjectStore, manifest: Manifest, entry: ShardEntry, folder: Path) -> Contents:
    found: Contents = {}
    for ref in entry.segments:
        rows = open_rows(store, manifest.collection, ref, folder)
        gone = set(deleted_rows(store, manifest.collection, entry, ref).tolist())
        for number, row in enumerate(rows.take(np.arange(ref.count), ["id", "vector"]).to_pylist()):
            if number not in gone:
                assert row["id"] not in found, f"{row['id']} is live twice"
                found[row["id"]] = row["vector"][0]
    return found


def vectors_of(contents: Contents) -> NDArray[np.float32]:
    return np.array([[value, one, 0.0, 0.0] for one, value in contents.items()], np.float32).reshape(-1, 4)


def batch_of(ids: list[int], number: float) -> object:
    return pa.record_batch(
        {"id": pa.array(ids, pa.int64()), "vector": vectors_array(vectors_of(dict.fromkeys(ids, number)))}
    )
