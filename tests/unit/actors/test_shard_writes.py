"""A shard under records of its WAL: replay, pushes, leading, views that stay, and records that cannot be applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.live_generation import LiveGeneration
from actors.shard import Shard
from cluster.errors import Corrupt, Unavailable
from cluster.memory_store import MemoryStore
from cluster.wal import Wal, WalRecord
from tests.fakes import FaultyStore
from tests.unit.actors.batches import delete, opened, record, upsert
from tests.unit.actors.log_writer import LogWriter, contents
from tests.unit.actors.points import flipped


@pytest.fixture
def writer() -> LogWriter:
    return LogWriter(MemoryStore())


def facts(shard: Shard) -> tuple[int, int, int, int]:
    """(LSN, points, tail points, tombstones)."""
    status = shard.status()
    assert status.state == "ready", status.error
    return status.lsn, status.points, status.tail_points, status.tombstones


def assert_holds(shard: Shard, writer: LogWriter, generation: int = 1) -> None:
    """Every record of the log, and nothing else."""
    view = shard.view(generation)
    assert (shard.applied_lsn, view.lsn, shard.epoch) == (writer.lsn, writer.lsn, writer.epoch)
    assert contents(view) == writer.live


def fail_at(monkeypatch: pytest.MonkeyPatch, lsn: int, generation: int = 1) -> None:
    """No memory for a record in a generation; others are applied."""
    take = LiveGeneration._take

    def failing(self: LiveGeneration, records: Sequence[WalRecord], until: int) -> Any:
        if self.view.generation == generation and lsn in [record.lsn for record in records]:
            raise MemoryError("no memory")
        return take(self, records, until)

    monkeypatch.setattr(LiveGeneration, "_take", failing)


# --- replay -----------------------------------------------------------------------------------------------------


def test_load_replays_the_log_over_the_files(writer: LogWriter, tmp_path: Path) -> None:
    assert facts(opened(writer.store, tmp_path)) == (0, 0, 0, 0)
    writer.put_points(*range(10))
    writer.seal(tmp_path)
    writer.claim()
    writer.put(upsert(3, 20, at=50.0))
    writer.put(delete(0, 1, 20, 99))
    writer.put_points(*range(30, 50))
    shard = opened(writer.store, tmp_path)
    assert_holds(shard, writer)
    assert facts(shard) == (33, 28, 21, 3)
    assert shard.status().epoch == 0, "it follows, whoever leads"
    assert shard.catch_up() == 33


def test_load_over_a_damaged_record_serves_nothing(writer: LogWriter, tmp_path: Path) -> None:
    writer.put_points(1, 2, 3)
    data = writer.store.get(writer.key(2))
    writer.store.put(writer.key(2), flipped(data, 100))
    shard = Shard(writer.store, "words", 0, tmp_path)
    with pytest.raises(Corrupt, match=writer.key(2)):
        shard.load()
    assert (shard.status().state, shard.applied_lsn) == ("failed", 0)
    writer.store.put(writer.key(2), data)
    shard.load()
    assert_holds(shard, writer)


def test_catch_up_goes_to_the_end_or_no_further_than_asked(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    assert shard.catch_up() == 0
    writer.put_points(*range(1, 8))
    assert [shard.catch_up(until) for until in (3, 2, 3)] == [3, 3, 3]
    assert contents(shard.view(1)) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert shard.catch_up(5) == 5
    assert shard.catch_up() == 7
    assert_holds(shard, writer)
    assert shard.catch_up(99) == 7


def test_catch_up_from_a_store_that_fails_keeps_what_was_applied(writer: LogWriter, tmp_path: Path) -> None:
    store = FaultyStore(writer.store, fault="die")
    shard = opened(store, tmp_path)
    writer.put_points(1, 2, 3)
    store.at = store.calls + 2
    with pytest.raises(Unavailable):
        shard.catch_up()
    assert (shard.applied_lsn, contents(shard.view(1))) == (1, {1: 1.0})


def test_catch_up_ends_before_a_record_that_is_missing(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    writer.put_points(1, 2, 3)
    data = writer.remove(2)
    assert shard.catch_up() == shard.catch_up(3) == 1
    writer.store.put(writer.key(2), data)
    assert shard.catch_up() == 3
    assert_holds(shard, writer)


# --- pushed records ---------------------------------------------------------------------------------------------


def test_pushed_records_are_applied_in_order_and_each_once(writer: LogWriter, tmp_path: Path) -> None:
    store = FaultyStore(writer.store)
    shard = opened(store, tmp_path)
    pushed = [writer.push(write) for write in (upsert(1, 2), delete(1), upsert(1, at=9.0), upsert(3))]
    calls = store.calls
    for data in (pushed[0], pushed[0], pushed[1], pushed[0], pushed[2], pushed[1], pushed[3], pushed[3]):
        shard.receive(data)
    assert_holds(shard, writer)
    assert facts(shard) == (4, 3, 3, 0)
    assert store.calls == calls, "nothing was missing, and nothing read"


def test_pushed_record_after_a_gap_has_the_log_read(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    writer.put_points(1, 2, 3)
    late = writer.push(delete(2))
    writer.put_points(4)
    shard.receive(late)
    assert_holds(shard, writer)


def test_pushed_record_whose_predecessor_is_nowhere_is_not_applied(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    writer.put_points(1)
    shard.receive(record(3, upsert(3)).encode(0))
    assert_holds(shard, writer)


def test_pushed_record_is_ignored_before_anything_is_loaded(writer: LogWriter, tmp_path: Path) -> None:
    shard = Shard(writer.store, "words", 0, tmp_path)
    shard.receive(writer.push(upsert(1)))
    shard.receive(writer.push(upsert(2)))
    assert (shard.catch_up(), shard.status().error) == (0, "nothing is loaded")
    shard.load()
    assert_holds(shard, writer)


@pytest.mark.parametrize("position", [48, 100, -1])
def test_pushed_record_that_is_damaged_is_corrupt_and_changes_nothing(
    position: int, writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    data = writer.push(upsert(1))
    with pytest.raises(Corrupt, match=r"^pushed record 1: "):
        shard.receive(flipped(data, position))
    assert facts(shard) == (0, 0, 0, 0)
    shard.receive(data)
    shard.receive(flipped(data, 100))  # it is old: nobody looks at it
    assert_holds(shard, writer)


# --- leading ----------------------------------------------------------------------------------------------------


def test_leader_applies_its_own_records_and_no_others(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    shard.receive(writer.push(upsert(1, 2)))
    assert shard.lead(writer.claim())
    assert (shard.status().epoch, shard.epoch, shard.applied_lsn) == (2, 2, 2)
    mine = writer.put(upsert(2, 3, at=7.0))
    shard.receive(mine.encode(0))
    assert shard.catch_up() == 2, "what it wrote it applies when it is told to"
    existed = shard.apply_own(mine)
    assert existed is not None
    assert (existed.upserts.tolist(), existed.deletes.tolist()) == ([True, False], [])
    existed = shard.apply_own(writer.put(delete(1, 9)))
    assert existed is not None
    assert (existed.upserts.tolist(), existed.deletes.tolist()) == ([], [True, False])
    assert_holds(shard, writer)
    shard.follow(writer.epoch - 1)
    assert shard.status().epoch == writer.epoch, "it gave up an earlier epoch"
    shard.follow(writer.epoch)
    assert shard.status().epoch == 0
    shard.receive(writer.push(upsert(4)))
    writer.put(upsert(5))
    shard.catch_up()
    assert_holds(shard, writer)


def test_leader_is_told_which_points_there_were_in_segments_too(writer: LogWriter, tmp_path: Path) -> None:
    writer.put_points(1, 2, 3)
    writer.seal(tmp_path)
    shard = opened(writer.store, tmp_path)
    assert shard.lead(writer.claim())
    steps = [(delete(1, 9), [True, False]), (delete(1), [False]), (delete(4, 2, 1), [False, True, False])]
    steps.append((upsert(3, 1), [True, False]))
    for write, expected in steps:
        existed = shard.apply_own(writer.put(write))
        assert existed is not None
        assert [*existed.upserts, *existed.deletes] == expected
    assert_holds(shard, writer)


def test_leader_reads_nothing_and_looks_at_no_push(writer: LogWriter, tmp_path: Path) -> None:
    store = FaultyStore(writer.store)
    shard = opened(store, tmp_path)
    assert shard.lead(writer.claim())
    calls, data = store.calls, writer.push(upsert(1))
    assert shard.catch_up() == 1
    shard.receive(flipped(data, -1))
    shard.receive(writer.push(upsert(2)))
    assert (store.calls, shard.applied_lsn) == (calls, 1)


def test_catch_up_ends_where_this_one_begins_to_lead(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes is applied, and counted, by `apply_own` alone."""
    shard, read_after, claim = opened(writer.store, tmp_path), Wal.read_after, writer.claim()
    mine = writer.put(upsert(1))

    def reading(self: Wal, lsn: int, until: int | None = None) -> Iterator[WalRecord]:
        for one in read_after(self, lsn, until):
            assert one.lsn != mine.lsn or shard.lead(claim)
            yield one

    monkeypatch.setattr(Wal, "read_after", reading)
    assert shard.catch_up() == claim.lsn
    assert shard.apply_own(mine) is not None
    assert_holds(shard, writer)


def test_own_record_that_was_replayed_or_does_not_follow_is_not_applied_again(
    writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    assert shard.lead(writer.claim())
    first, second = writer.put(upsert(1)), writer.put(delete(1))
    with pytest.raises(Unavailable, match="shard 0 of 'words' cannot apply record 3"):
        shard.apply_own(second)
    assert shard.applied_lsn == 1
    shard.follow(writer.epoch)
    shard.catch_up()
    assert shard.apply_own(first) is None
    assert_holds(shard, writer)


def test_lead_from_a_claim_that_was_applied_already(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    claim = writer.claim()
    shard.receive(claim.encode(0))
    assert shard.lead(claim)
    assert (shard.status().epoch, shard.applied_lsn) == (claim.epoch, claim.lsn)
    assert_holds(shard, writer)


def test_lead_is_refused_where_the_claim_is_not_the_end_of_what_was_applied(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    claim = writer.claim()
    assert not Shard(writer.store, "words", 0, tmp_path).lead(claim), "nothing is loaded"
    foreign = WalRecord(claim.lsn, claim.epoch + 1, "claim", "f" * 32)
    shard.receive(claim.encode(0))
    assert not shard.lead(foreign), "another's claim has that LSN"
    writer.put(upsert(1))
    later = writer.claim()
    assert not shard.lead(later), "a record before it was not applied"
    shard.catch_up()
    assert not shard.lead(claim), "there are records after it"
    assert shard.status().epoch == 0
    assert shard.lead(later)
    assert_holds(shard, writer)


def test_leader_whose_claim_cannot_be_applied_does_not_lead(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, claim = opened(writer.store, tmp_path), writer.claim()
    with monkeypatch.context() as patched:
        fail_at(patched, claim.lsn)
        with pytest.raises(MemoryError):
            shard.lead(claim)
    shard.load()
    assert shard.status().epoch == 0
    writer.put(upsert(1))
    shard.catch_up()
    assert_holds(shard, writer)


# --- views ------------------------------------------------------------------------------------------------------


def test_view_stays_as_it_was_taken_whatever_comes_after_it(writer: LogWriter, tmp_path: Path) -> None:
    writer.put_points(*range(10))
    writer.seal(tmp_path)
    shard = opened(writer.store, tmp_path)
    taken = [(shard.view(1), dict(writer.live))]

    def then(data: bytes) -> None:
        shard.receive(data)
        taken.append((shard.view(1), dict(writer.live)))

    for step in range(10):
        then(writer.push(upsert(step, 100 + step, at=50.0 + step)))
        then(writer.push(delete(step, 99 + step)))
    shard.load(writer.seal(tmp_path).version)
    then(writer.push(delete(5, 6)))
    writer.import_points(1, 2)
    shard.load()
    shard.retire(2)
    assert shard.status().generations == (2,)
    for view, expected in taken:
        assert contents(view) == expected
    assert [view.lsn for view, _ in taken] == list(range(10, 32))


# --- records that cannot be applied -----------------------------------------------------------------------------


def test_record_that_cannot_be_applied_ends_serving_until_the_next_load(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first generation had it already, the second could not: no search may see the one without the other."""
    shard = opened(writer.store, tmp_path)
    shard.receive(writer.push(upsert(1)))
    writer.import_points(7, 8)
    shard.load()
    assert shard.status().generations == (1, 2)
    data = writer.push(upsert(2))
    with monkeypatch.context() as patched:
        fail_at(patched, 2, generation=2)
        with pytest.raises(MemoryError):
            shard.receive(data)
    status = shard.status()
    assert (status.state, status.error, status.generations) == ("failed", "record 2: MemoryError: no memory", ())
    for generation in (1, 2):
        with pytest.raises(Unavailable, match=f"generation {generation} of 'words' is not loaded here"):
            shard.view(generation)
    shard.receive(writer.push(delete(7)))
    assert shard.catch_up() == 1, "nothing is applied before a load"
    shard.load()
    assert_holds(shard, writer, generation=2)
    shard.load(1)
    assert (contents(shard.view(1)), shard.view(1).lsn) == ({1: 1.0, 2: 2.0}, 3)


def test_record_that_fails_in_a_generation_being_loaded_leaves_what_is_served(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    shard.receive(writer.push(upsert(1)))
    writer.import_points(7)
    first = writer.put(upsert(2))
    shard.receive(first.encode(0))
    with monkeypatch.context() as patched:
        fail_at(patched, 2, generation=2)
        with pytest.raises(MemoryError):
            shard.load()
    assert shard.status().generations == (1,)
    shard.receive(writer.push(upsert(3)))
    assert contents(shard.view(1)) == {1: 1.0, 2: 2.0, 3: 3.0}
    shard.load()
    assert_holds(shard, writer, generation=2)


# --- status -----------------------------------------------------------------------------------------------------


def test_status_counts_what_is_live_in_tail_and_segments(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    steps: list[tuple[Any, tuple[int, int, int, int]]] = [
        (upsert(1, 2, 3, 4), (1, 4, 4, 0)),
        (delete(4, 5), (2, 3, 3, 0)),
        (upsert(3, at=30.0), (3, 3, 3, 0)),
        (None, (3, 3, 0, 0)),  # sealed
        (upsert(3, 4), (4, 4, 2, 1)),
        (delete(1, 3), (5, 2, 1, 2)),
        (delete(1), (6, 2, 1, 2)),
        (upsert(1), (7, 3, 2, 2)),
        (None, (7, 3, 0, 2)),
        (delete(2), (8, 2, 0, 3)),
    ]
    for write, expected in steps:
        if write is None:
            shard.load(writer.seal(tmp_path).version)
        else:
            shard.receive(writer.push(write))
        assert facts(shard) == expected
        assert_holds(shard, writer)
        assert facts(opened(writer.store, tmp_path)) == expected, "as a replica has it that starts now"
    (first, second) = shard.status().segments
    assert (first["count"], first["tombstones"], second["count"], second["tombstones"]) == (3, 3, 2, 0)
