"""Generations with another number of shards, committed by hand, and what logs hold: for the tests of the switch."""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

from actors.shard import Shard
from cluster.entry_log import end_logs
from cluster.ids import id_array
from cluster.manifest import Manifest, ShardEntry
from cluster.object_store import ObjectStore
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from cluster.wal import Wal, WalRecord
from tests.unit.actors.batches import vectors_of
from tests.unit.actors.log_writer import Contents, contents
from tests.unit.actors.points import Points, in_row_order, manifest_log, points_of_shard, publish


def new_nonce() -> str:
    return uuid.uuid4().hex


def replayed(store: ObjectStore, shards: int, collection: str = "words") -> Manifest:
    """Commit a generation of so many shards that holds nothing itself: all is in the logs of all sets so far.

    For collections that began empty, and were never sealed.
    """
    log = manifest_log(store, collection)
    base = log.newest_live()
    first = log.read(1).routing.shards
    sets = [LogSet(0, first, tuple(LogPosition(shard, 0, 0) for shard in range(first)))]
    for version in sorted(log.versions()):
        manifest = log.read(version)
        if manifest.log_set == len(sets):
            sets.append(LogSet(manifest.log_set, len(manifest.shards)))
    entries = tuple(behind_logs(ShardEntry(shard), *sets) for shard in range(shards))
    return log.commit_generation(base, replace(base.config, shards=shards), entries)


def split(store: ObjectStore, shards: int, collection: str = "words") -> Manifest:
    """Commit a generation of so many shards with segments of what the newest one holds now."""
    log = manifest_log(store, collection)
    base = log.newest_live()
    live: Contents = {}
    positions = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in base.shards:
            shard = Shard(store, collection, entry.shard, Path(folder))
            live |= contents(shard.load(base.version))
            positions.append(LogPosition(entry.shard, shard.applied_lsn, shard.epoch))
    points = Points(id_array(list(live), "int64"), vectors_of(list(live.values())))
    config = replace(base.config, shards=shards)
    entries = []
    for number in range(shards):
        mine = in_row_order(points_of_shard(points, shards, number))
        refs = (publish(store, collection, replace(config, shards=1), mine),) if len(mine) else ()
        entry = ShardEntry(number, refs)
        entries.append(behind_logs(entry, LogSet(base.log_set, len(base.shards), tuple(positions))))
    return log.commit_generation(base, config, tuple(entries))


def end(store: ObjectStore, manifest: Manifest) -> int:
    """End the logs that a generation is behind; the LSN at which its own begin."""
    return end_logs(store, manifest.collection, manifest.behind, new_nonce)[0]


def records(store: ObjectStore, log_set: int, shard: int, after: int = 0, collection: str = "words") -> list[WalRecord]:
    return list(Wal(store, collection, shard, log_set).read_after(after))
