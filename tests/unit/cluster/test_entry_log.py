"""What a shard reads after its entry: logs of earlier sets to their end records, split by the routing; then its own."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig
from cluster.entry_log import EntryLog, end_logs, ends_of_logs, only_shard, start_after
from cluster.errors import Conflict, Corrupt, Fenced, NotFound
from cluster.ids import id_array
from cluster.manifest import Manifest, ManifestLog, ShardEntry, broken_invariants
from cluster.memory_store import MemoryStore
from cluster.routing import Routing
from cluster.shard_entry import LogPosition, LogSet, behind_logs
from cluster.wal import CLAIM_BYTES, Wal, WalRecord

IDS = tuple(range(40))


def nonces() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"{next(numbers):032x}"


def write(lsn: int, upserts: Iterable[int] = (), deletes: Iterable[int] = (), epoch: int = 1) -> WalRecord:
    ups, gone = sorted(upserts), sorted(deletes)
    vectors = np.array([[float(lsn), float(i)] for i in ups], dtype=np.float32).reshape(len(ups), 2)
    batch = pa.record_batch([id_array(ups, "int64"), vectors_array(vectors)], names=["id", "vector"]) if ups else None
    return WalRecord(lsn, epoch, "write", f"{lsn:032x}", batch, id_array(gone, "int64") if gone else None)


class Collection:
    """A collection `c` whose logs are written by hand: each write goes to the log that the routing names."""

    def __init__(self, shards: int = 1) -> None:
        self.store = MemoryStore()
        self.log = ManifestLog(self.store, "c", nonces())
        self.manifest = self.log.create(CollectionConfig(dimension=2, shards=shards))[0]
        self.truth: dict[int, float] = {}  # id -> number of the write
        self.number = 0

    def wal(self, shard: int) -> Wal:
        return Wal(self.store, "c", shard, self.manifest.log_set, pause=lambda seconds: None)

    def put(self, upserts: Iterable[int] = (), deletes: Iterable[int] = ()) -> None:
        self.number += 1
        where = dict(zip(IDS, self.manifest.routing.shards_of_ids(id_array(list(IDS), "int64")), strict=True))
        for end in ends_of_logs(self.store, self.manifest):
            mine = [i for i in upserts if where[i] == end.shard], [i for i in deletes if where[i] == end.shard]
            if any(mine):
                record = write(end.lsn + 1, *mine, max(1, end.epoch))
                if record.upserts is not None:
                    numbers = np.full((len(record.upserts), 2), self.number, dtype=np.float32)
                    batch = record.upserts.set_column(1, "vector", vectors_array(numbers))
                    record = WalRecord(record.lsn, record.epoch, "write", record.nonce, batch, record.deletes)
                self.wal(end.shard).append(record)
        self.truth |= dict.fromkeys(upserts, float(self.number))
        self.truth = {i: at for i, at in self.truth.items() if i not in set(deletes)}

    def reshard(self, shards: int) -> Manifest:
        """The next generation: empty segments, behind everything that was ever written."""
        base = self.manifest
        logs = LogSet(base.log_set, len(base.shards), self.positions(base))
        entries = []
        for shard in range(shards):
            if base.behind:
                entries.append(behind_logs(ShardEntry(shard), base.behind[0], *base.behind[1:], own_set(base)))
            else:
                entries.append(behind_logs(ShardEntry(shard), logs))
        return self.log.commit_generation(base, CollectionConfig(dimension=2, shards=shards), tuple(entries))

    @staticmethod
    def positions(base: Manifest) -> tuple[LogPosition, ...]:
        return tuple(LogPosition(entry.shard, entry.applied_lsn, entry.epoch) for entry in base.shards)

    def end(self, manifest: Manifest) -> tuple[int, int]:
        return end_logs(self.store, "c", manifest.behind, nonces())


def own_set(manifest: Manifest) -> LogSet:
    return LogSet(manifest.log_set, len(manifest.shards))


def contents(records: Iterable[WalRecord], into: dict[int, float] | None = None) -> dict[int, float]:
    found = {} if into is None else into
    for record in records:
        if record.upserts is not None:
            values = record.upserts.column("vector").flatten().to_numpy()[::2]
            found |= dict(zip(record.upserts.column("id").to_pylist(), values.tolist(), strict=True))
        for point_id in record.deletes.to_pylist() if record.deletes is not None else ():
            found.pop(point_id, None)
    return found


def all_contents(collection: Collection, manifest: Manifest) -> dict[int, float]:
    """Of all shards; every id in the shard that the routing names."""
    found: dict[int, float] = {}
    for entry in manifest.shards:
        part = contents(EntryLog.of(collection.store, manifest, entry.shard).records())
        if part:
            assert set(manifest.routing.shards_of_ids(id_array(sorted(part), "int64"))) == {entry.shard}
        assert not part.keys() & found.keys()
        found |= part
    return found


def test_entry_without_earlier_sets_reads_its_own_log_on_and_on() -> None:
    collection = Collection()
    log = EntryLog.of(collection.store, collection.manifest, 0)
    assert (list(log.records()), log.crossed, log.lag()) == ([], True, 0)
    collection.put([1, 2])
    collection.put([3], [1])
    assert log.lag() == 2
    assert contents(log.records()) == {2: 1.0, 3: 2.0}
    assert (log.lsn, log.epoch, list(log.records()), log.lag()) == (2, 1, [], 0)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 5)])
def test_resharded_shards_read_their_ids_while_the_old_logs_grow(before: int, after: int) -> None:
    collection = Collection(before)
    collection.put(IDS)
    pending = collection.reshard(after)
    logs = [EntryLog.of(collection.store, pending, shard) for shard in range(after)]
    found: dict[int, float] = {}
    for log in logs:
        found |= contents(log.records())
    assert found == collection.truth
    collection.put(IDS[:7], IDS[7:20])
    assert not any(log.crossed for log in logs)
    assert all(0 < log.lag() <= before for log in logs), "every log has at most one record more"
    start, epoch = collection.end(pending)
    for log in logs:
        contents(log.records(), found)
    assert found == collection.truth
    assert all((log.crossed, log.start, log.lsn, log.epoch) == (True, start, start, epoch) for log in logs)


def test_the_own_log_goes_on_behind_the_earlier_ones() -> None:
    collection = Collection(2)
    collection.put(IDS)
    collection.put(IDS[:3])
    pending = collection.reshard(3)
    start, _ = collection.end(pending)
    collection.manifest = pending
    assert [end.lsn for end in ends_of_logs(collection.store, pending)] == [start] * 3
    collection.put(IDS[5:9], IDS[:2])
    assert all_contents(collection, pending) == collection.truth
    ends = ends_of_logs(collection.store, pending)
    assert {end.lsn for end in ends} <= {start, start + 1}
    assert start + 1 in {end.lsn for end in ends}


def test_a_chain_of_sets_is_read_in_order() -> None:
    """As a rollback over several reshards has it: the points of the first generation, and all that came after."""
    collection = Collection(1)
    collection.put(IDS)
    for shards in (3, 2, 4):
        pending = collection.reshard(shards)
        collection.end(pending)
        collection.manifest = pending
        collection.put([0, shards, 30 + shards], [20 + shards, 10 + shards])
    assert [logs.number for logs in collection.manifest.behind] == [0, 1, 2]
    assert all_contents(collection, collection.manifest) == collection.truth


def test_positions_at_an_end_record_are_known_to_be_ended() -> None:
    """A catch-up that had read to the end is gone on from there by another process."""
    collection = Collection(2)
    collection.put(IDS)
    pending = collection.reshard(3)
    first = EntryLog.of(collection.store, pending, 1)
    found = contents(first.records())
    Wal(collection.store, "c", 0, 0).finish(0, 0, nonces())
    contents(first.records(), found)
    entry = behind_logs(ShardEntry(1), *first.behind)
    again = EntryLog(collection.store, "c", entry, pending.routing, pending.log_set)
    assert list(again.records()) == []
    start, _ = collection.end(pending)
    assert list(again.records()) == []
    assert (again.crossed, again.start) == (True, start)


def test_consumer_that_stops_early_goes_on_where_it_stopped() -> None:
    collection = Collection(2)
    for point_id in IDS:
        collection.put([point_id])
    pending = collection.reshard(1)
    log = EntryLog.of(collection.store, pending, 0)
    found: dict[int, float] = {}
    for _ in IDS:
        found |= contents(itertools.islice(log.records(), 1))
    assert found == collection.truth
    assert list(log.records()) == []


def test_logs_that_have_not_ended_have_no_start_and_hold_up_other_generations() -> None:
    collection = Collection(2)
    collection.put(IDS)
    pending = collection.reshard(3)
    assert start_after(collection.store, "c", pending.behind) is None
    with pytest.raises(Conflict, match="switched to generation 2, which has 3 shards"):
        collection.log.wal_ends(pending, 3)
    Wal(collection.store, "c", 0, 0).finish(0, 0, nonces())
    assert start_after(collection.store, "c", pending.behind) is None
    start = collection.end(pending)
    assert start_after(collection.store, "c", pending.behind) == start
    assert collection.log.wal_ends(pending, 3) == tuple(ShardEntry(shard, (), *start) for shard in range(3))
    assert collection.end(pending) == start, "ending again changes nothing"


def test_new_generation_with_other_shards_is_behind_the_ends_of_the_logs() -> None:
    collection = Collection(2)
    collection.put(IDS)
    entries = collection.log.wal_ends(collection.manifest, 3)
    ends = (LogPosition(0, 1, 1), LogPosition(1, 1, 1))
    assert entries == tuple(ShardEntry(shard, (), 1, 1, (), (LogSet(0, 2, ends),)) for shard in range(3))
    config = CollectionConfig(dimension=2, shards=3)
    manifest = collection.log.commit_generation(collection.manifest, config, entries)
    assert (manifest.log_set, manifest.crossing, manifest.generation) == (1, True, 2)
    assert all_contents(collection, manifest) == {}, "what was written before is replaced"


def test_deleted_while_crossing_ends_every_log() -> None:
    collection = Collection(2)
    collection.put(IDS)
    collection.reshard(3)
    deleted = collection.log.delete()
    for shard in range(2):
        with pytest.raises(Fenced, match="ended at LSN"):
            Wal(collection.store, "c", shard, 0).take_over(0, 0, nonces())
    assert (len(deleted.shards), deleted.log_set, deleted.crossing) == (3, 1, False)
    created, _ = collection.log.create(CollectionConfig(dimension=2, shards=4))
    collection.manifest, collection.truth = created, {}
    collection.put(IDS[:9])
    assert all_contents(collection, created) == collection.truth


def test_generation_before_is_the_last_version_of_it() -> None:
    collection = Collection(1)
    collection.log.declare_attributes({"a": "int64"})
    second = collection.log.declare_attributes({"b": "int64"})
    third = collection.log.commit_generation(second, second.config, second.shards)
    fourth = collection.log.commit_generation(third, third.config, third.shards)
    assert collection.log.last_of_generation(None, fourth) == third
    assert collection.log.last_of_generation(1, fourth) == second
    for wanted in (0, 3, 4):
        with pytest.raises(NotFound, match=f"no version of generation {wanted} before 3 is kept"):
            collection.log.last_of_generation(wanted, fourth)
    collection.log.delete()
    created, _ = collection.log.create(second.config)
    with pytest.raises(NotFound, match="no version of an earlier generation"):
        collection.log.last_of_generation(None, created)


def test_only_the_ids_of_a_shard_stay() -> None:
    routing, record = Routing(3), write(5, IDS[:30], IDS[30:])
    parts = [only_shard(record, routing, shard) for shard in range(3)]
    ids = [part.upserts.column("id").to_pylist() for part in parts if part is not None]
    deletes = [part.deletes.to_pylist() for part in parts if part is not None]
    assert sorted(itertools.chain(*ids)) == list(IDS[:30])
    assert sorted(itertools.chain(*deletes)) == list(IDS[30:])
    assert only_shard(record, Routing(1), 0) is not None
    assert only_shard(WalRecord(6, 1, "claim", "0" * 32), routing, 0) is None
    assert only_shard(write(1), Routing(1), 0) is None


def test_start_is_known_as_soon_as_all_was_read() -> None:
    """Another thread may look in between, and would have the own log begin where the entry's positions are."""
    collection = Collection()
    collection.put(IDS)
    manifest = collection.reshard(2)
    start, _ = end_logs(collection.store, "c", manifest.behind, nonces())
    seen: list[tuple[bool, int | None]] = []

    class Watched(EntryLog):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if hasattr(self, "start"):
                seen.append((self.crossed, self.start))

    assert len(list(Watched.of(collection.store, manifest, 0).records())) == 1
    assert seen[-1] == (True, start)
    assert (True, None) not in seen


# --- ending a log -----------------------------------------------------------------------------------------------------


def test_ended_log_takes_no_claim_and_no_record_is_read_behind_it() -> None:
    store = MemoryStore()
    wal = Wal(store, "c", 0, 4, pause=lambda seconds: None)
    wal.append(write(1, [1]))
    end = wal.finish(0, 0, nonces())
    assert (end.lsn, end.epoch, end.kind) == (3, 2, "end"), "the claim before it fences the writer"
    for at in ((0, 0), (end.lsn, end.epoch)):
        assert wal.finish(*at, nonces()).nonce == end.nonce
    for after in (0, 1, end.lsn):
        with pytest.raises(Fenced, match=r"the log of set 4 ended at LSN 3"):
            wal.take_over(after, 1, nonces())
    with pytest.raises(Fenced):
        wal.append(write(3, [2]))
    assert wal.fence(0, 0, nonces()) == (3, 2)
    wal.append(write(4, [5]))  # a writer with a bug
    assert [record.kind for record in wal.read_after(0)] == ["write", "claim", "end"]
    wal.delete_before(10)
    assert [info.size_bytes for info in store.objects("collections/c/shards/0000/wal-000004/")] == [CLAIM_BYTES] * 2


def test_log_without_records_ends_behind_its_start() -> None:
    wal = Wal(MemoryStore(), "c", 0, 1)
    end = wal.finish(17, 3, nonces())
    assert (end.lsn, end.epoch, end.kind) == (19, 4, "end")


def test_log_of_a_writer_that_never_rests_ends() -> None:
    store = MemoryStore()
    stop, acknowledged = threading.Event(), list[int]()

    def keep_writing() -> None:
        wal, lsn = Wal(store, "c", 0, 0), 0
        while not stop.is_set():
            lsn += 1
            try:
                wal.append(write(lsn, [1]))
            except Fenced:
                return
            acknowledged.append(lsn)

    thread = threading.Thread(target=keep_writing)
    thread.start()
    end = Wal(store, "c", 0, 0).finish(0, 0, nonces())
    stop.set()
    thread.join()
    assert end.lsn > max(acknowledged, default=0)
    assert [r.lsn for r in Wal(store, "c", 0, 0).read_after(0) if r.kind == "write"] == acknowledged


# --- invariants -------------------------------------------------------------------------------------------------------


def test_what_a_manifest_says_of_earlier_sets_must_fit() -> None:
    collection = Collection(2)
    collection.put(IDS)
    pending = collection.reshard(1)
    (entry,) = pending.shards
    first = entry.behind[0]
    for behind, wrong in (
        ((LogSet(0, 3, first.positions),), "positions of other logs than 0 to 2"),
        ((LogSet(0, 2, first.positions[::-1]),), "positions of other logs than 0 to 1"),
        ((LogSet(0, 2),), "positions of other logs than 0 to 1"),
        ((first, LogSet(0, 2)), r"log sets \[0, 0\] behind it are not in order"),
        ((LogSet(1, 2, first.positions),), "behind log set 1 or a later one"),
        ((LogSet(0, 2, (LogPosition(0, 9, 1), first.positions[1])),), r"the logs behind it are at \(9, 1\)"),
    ):
        changed = replace(pending, shards=(replace(entry, behind=behind),))
        assert any(re.search(wrong, text) for text in broken_invariants(changed)), wrong
        with pytest.raises(Corrupt):
            Manifest.decode(changed.encode(), "k")
    assert "log set 0 goes back from 1" in broken_invariants(collection.manifest, pending)
