"""Where a log ends: beside writers, in logs whose beginning is gone, and through stores that fail at any call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pyarrow as pa
import pytest

from cluster import paths
from cluster.entry_log import start_after
from cluster.errors import Fenced, Unavailable
from cluster.log_check import CheckedLog, check_log
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.shard_entry import LogPosition, LogSet
from cluster.wal import READ_TRIES, RecordKind, Wal, WalRecord
from tests.fakes import FaultyStore

SHARD = 3


def key_of(lsn: int) -> str:
    return paths.wal_record("c", SHARD, lsn)


def wal_of(store: ObjectStore) -> Wal:
    return Wal(store, "c", SHARD, 0, lambda _: None)


def record_of(lsn: int, epoch: int = 1, writer: int = 0) -> WalRecord:
    """A small record that nobody else writes."""
    return WalRecord(lsn, epoch, "write", f"{writer * 1_000_000 + lsn:032x}", deletes=pa.array([lsn]))


def log_with(count: int, store: MemoryStore | None = None, epoch: int = 1) -> MemoryStore:
    store = store or MemoryStore()
    for lsn in range(1, count + 1):
        store.put(key_of(lsn), record_of(lsn, epoch).encode(SHARD))
    return store


class HookStore(MemoryStore):
    """Runs `before` with the number of the read ahead of every read of an object."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.before: Callable[[int], object] = lambda _: None

    def get(self, key: str) -> bytes:
        self.reads.append(key)
        self.before(len(self.reads))
        return super().get(key)


def lsns(records: Iterator[WalRecord]) -> list[int]:
    return [record.lsn for record in records]


# --- the end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 16, 33])
@pytest.mark.parametrize("appended", [1, 3, 20])
def test_end_beside_a_writer_is_at_or_after_all_that_was_durable_before(count: int, appended: int) -> None:
    """The writer gets on between any two reads of the search."""
    for at in range(1, 14):
        store = HookStore()
        log_with(count, store)

        def write(read: int, at: int = at, store: HookStore = store) -> None:
            if read == at:
                for lsn in range(count + 1, count + appended + 1):
                    store.put(key_of(lsn), record_of(lsn, epoch=2).encode(SHARD))

        store.before = write
        last, epoch = wal_of(store).end(0, 1)
        assert count <= last <= count + appended
        assert epoch == (2 if last > count else 1)


def test_end_beside_a_writer_that_never_pauses_is_found() -> None:
    store = HookStore()
    log_with(1, store)
    written = [1]

    def write(_: int) -> None:
        written.append(written[-1] + 1)
        store.put(key_of(written[-1]), record_of(written[-1]).encode(SHARD))

    store.before = write
    last, _ = wal_of(store).end(0, 0)
    assert 1 <= last <= written[-1]


@pytest.mark.parametrize("after", [9, 12, 19, 20])
def test_end_of_a_log_whose_beginning_is_gone_is_found_from_behind_it(after: int) -> None:
    store = HookStore()
    log_with(20, store)
    for lsn in range(1, 10):
        store.delete(key_of(lsn))
    assert wal_of(store).end(after, 7) == ((20, 1) if after < 20 else (20, 7))
    assert min(store.reads) > key_of(after), "what lies before is none of its business"


def test_end_whose_record_vanishes_is_unavailable() -> None:
    store = HookStore()
    log_with(3, store)

    def vanish(_: int) -> None:
        if store.reads.count(key_of(3)) == 2:  # for its epoch
            store.delete(key_of(3))

    store.before = vanish
    with pytest.raises(Unavailable, match=f"{key_of(3)}: was there, and is gone"):
        wal_of(store).end(0, 0)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_end_through_a_failing_store_is_right_or_unavailable(count: int) -> None:
    """An object that could not be read is no reason to say that there is none. The last read is tried again."""
    counted = FaultyStore(log_with(count))
    assert wal_of(counted).end(0, 1) == (count, 1)
    outcomes = []
    for at in range(1, counted.calls + 1):
        try:
            outcomes.append(wal_of(FaultyStore(log_with(count), at)).end(0, 1))
        except Unavailable:
            outcomes.append(None)
    assert set(outcomes) <= {(count, 1), None}
    assert outcomes[0] is None
    assert outcomes[-1] == ((count, 1) if count else None)


@pytest.mark.parametrize("failures", range(1, READ_TRIES + 1))
def test_read_is_tried_again_a_few_times(failures: int) -> None:
    store = HookStore()
    log_with(1, store)

    def fail(read: int) -> None:
        if read <= failures:
            raise Unavailable("no network")

    store.before = fail
    if failures < READ_TRIES:
        record = wal_of(store).read(1)
        assert record is not None
        assert record.lsn == 1
    else:
        with pytest.raises(Unavailable, match="no network"):
            wal_of(store).read(1)
    assert len(store.reads) == min(failures + 1, READ_TRIES)


# --- claims at the end ------------------------------------------------------------------------------------------


def test_claim_whose_answer_is_lost_is_recognised_and_one_that_lost_is_fenced() -> None:
    inner = log_with(4)
    claim = wal_of(FaultyStore(inner, 1, "lose_answer")).claim(4, 1, "a" * 32)
    assert (claim.lsn, claim.epoch) == (5, 2)
    there = wal_of(inner).read(5)
    assert there is not None
    assert (there.kind, there.nonce) == ("claim", "a" * 32)
    with pytest.raises(Fenced, match="LSN 5 is another writer's claim of epoch 2"):
        wal_of(inner).claim(4, 1, "b" * 32)
    with pytest.raises(Fenced):
        wal_of(inner).append(record_of(5))
    assert lsns(wal_of(inner).read_after(0)) == [1, 2, 3, 4, 5]


def test_fence_goes_on_from_where_another_fence_was() -> None:
    """Two at once: both are at the end of all that was written, and the epochs are in the order of the log."""
    wal, others = wal_of(log_with(4, epoch=3)), list[tuple[int, int]]()

    def other_first() -> str:
        if not others:  # the end was found, and is not claimed yet
            others.append(wal.fence(0, 0, lambda: "c" * 32))
        return "d" * 32

    assert wal.fence(0, 0, other_first) == (6, 5)
    assert others == [(5, 4)]
    assert wal.end(0, 0) == (6, 5)


class BusyStore(MemoryStore):
    """A writer whose next record is always there first, `others` times; some of them are claims of others."""

    def __init__(self, others: int, claims: tuple[int, ...] = ()) -> None:
        super().__init__()
        self._others = others
        self._claims = claims
        self._epoch = 1

    def put_if_absent(self, key: str, data: bytes) -> bool:
        lsn = int(key.removesuffix(".arrow").rsplit("/", 1)[1])
        if self._others and wal_of(self).read(lsn) is None:
            self._others -= 1
            self._epoch += self._others in self._claims
            kind: RecordKind = "claim" if self._others in self._claims else "write"
            self.put(key, WalRecord(lsn, self._epoch, kind, f"{lsn:032x}", None, pa.array([lsn])).encode(SHARD))
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("claims", [(), (0,), (1,), (0, 1, 2), (29,), (0, 25)])
@pytest.mark.parametrize("others", [2, 9, 10, 11, 40])
def test_log_of_a_writer_that_never_rests_is_taken_over(others: int, claims: tuple[int, ...]) -> None:
    store = BusyStore(others, claims)
    log_with(5, store)
    nonces = (f"{number:032x}" for number in count(1_000))
    claim = wal_of(store).take_over(5, 1, lambda: next(nonces))
    last, *before = reversed(list(wal_of(store).read_after(0)))
    assert (last.lsn, last.epoch, last.nonce) == (claim.lsn, claim.epoch, claim.nonce)
    assert (claim.kind, wal_of(store).end(0, 0)) == ("claim", (claim.lsn, claim.epoch))
    assert claim.epoch > max(record.epoch for record in before)
    assert 5 + others < claim.lsn <= 5 + others + 2
    with pytest.raises(Fenced):
        wal_of(store).append(record_of(claim.lsn))


@pytest.mark.parametrize("strays", [1, 2])
def test_claims_behind_the_end_change_nothing(strays: int) -> None:
    """Of who took over a busy log, and passed the end over: readers stop at the end, so must all who look for it."""
    store = log_with(3)
    nonces = (f"{number:032x}" for number in count(1_000))
    end = wal_of(store).finish(0, 0, lambda: next(nonces))
    for number in range(strays):
        wal_of(store).append(WalRecord(end.lsn + 1 + number, end.epoch + 1, "claim", next(nonces)))
    assert wal_of(store).finish(0, 0, lambda: next(nonces)).lsn == end.lsn
    assert start_after(store, "c", (LogSet(0, 1, (LogPosition(SHARD, 0, 0),)),)) == (end.lsn, end.epoch)
    with pytest.raises(Fenced, match=f"ended at LSN {end.lsn}"):
        wal_of(store).take_over(0, 0, lambda: next(nonces))
    assert wal_of(store).last_listed() == end.lsn + strays, "nothing was added"
    assert check_log(store, CheckedLog("c", 0, SHARD, ended=True)) == (end.lsn + strays, [])


class EndedMeanwhile(MemoryStore):
    """The log is ended, and two others claim behind the end, while `take_over` is busy with it."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self._others = others

    def put_if_absent(self, key: str, data: bytes) -> bool:
        lsn = int(key.removesuffix(".arrow").rsplit("/", 1)[1])
        if self._others and wal_of(self).read(lsn) is None:
            self._others -= 1
            kinds: dict[int, RecordKind] = {3: "claim", 2: "end", 1: "claim", 0: "claim"}
            kind = kinds.get(self._others, "write")
            gone = pa.array([lsn]) if kind == "write" else None
            self.put(key, WalRecord(lsn, 2, kind, f"{lsn:032x}", None, gone).encode(SHARD))
        return super().put_if_absent(key, data)


def test_a_log_that_ended_while_it_was_busy_is_not_taken_over() -> None:
    store = EndedMeanwhile(20)
    log_with(5, store)
    nonces = (f"{number:032x}" for number in count(1_000))
    with pytest.raises(Fenced, match="ended at LSN 23"):
        wal_of(store).take_over(5, 1, lambda: next(nonces))


# --- listing and deleting ---------------------------------------------------------------------------------------


def test_last_listed_is_the_highest_lsn_whatever_is_missing_or_beside_it() -> None:
    store = log_with(12)
    assert Wal(MemoryStore(), "c", SHARD, 0).last_listed() == 0
    for lsn in (1, 2, 5):
        store.delete(key_of(lsn))
    for name in ("notes.txt", "00000000000000000099.tmp", "99.arrow"):
        store.put(paths.wal_prefix("c", SHARD) + name, b"?")
    store.put(paths.wal_record("c", 4, 70), record_of(70).encode(4))
    assert wal_of(store).last_listed() == 12
    assert Wal(store, "c", 4, 0).last_listed() == 70


def test_records_before_an_lsn_are_deleted_and_nothing_else() -> None:
    store = log_with(12)
    beside = [paths.wal_prefix("c", SHARD) + "notes.txt", paths.wal_record("c", 4, 2), paths.wal_record("d", SHARD, 2)]
    for key in beside:
        store.put(key, b"?")
    for before, left in ((0, 1), (1, 1), (5, 5), (3, 5), (12, 12)):
        wal_of(store).delete_before(before)
        there = {info.key for info in store.objects("collections/")}
        assert there == {*beside, *map(key_of, range(left, 13))}
    assert lsns(wal_of(store).read_after(11)) == [12]
    assert all(store.get(key) == b"?" for key in beside)
    wal = wal_of(store)
    wal.claim(12, 1, "a" * 32)
    wal.append(record_of(14, epoch=2))
    wal.delete_before(15)
    assert wal.last_listed() == 13, "the claim stays: a writer that was taken over would have to find it"
