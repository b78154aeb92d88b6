"""Two replicas that both think they lead: one history, no write of the one that was taken over, and none lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.primary import Primary
from actors.shard import Shard
from cluster.config import Limits, Upkeep
from cluster.deletion import delete_files
from cluster.errors import Fenced
from cluster.memory_store import MemoryStore
from tests.faults.shards import (
    ANSWER_S,
    CONFIG,
    GateStore,
    Points,
    assert_one_history,
    contents,
    delete,
    held,
    lead,
    loaded,
    log,
    records,
    seal,
    upsert,
    write,
)

FEW_BYTES = Limits(wal_object_bytes=100)  # a record holds one or two of the writes that wait
before_and_after = pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after"])
goes_through_or_fails = pytest.mark.parametrize("fails", [False, True], ids=["goes through", "fails"])


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    log(store).create(CONFIG)
    return store


def assert_all_equal(store: MemoryStore, folder: Path, points: Points, *replicas: Shard) -> None:
    """All replicas hold these points, as one does that starts now, and there is one history."""
    assert held(store, folder) == points
    for replica in replicas:
        replica.catch_up()
        assert contents(replica) == points
        assert replica.applied_lsn == len(records(store))
    assert_one_history(store)


# --- the old one is paused --------------------------------------------------------------------------------------


@goes_through_or_fails
def test_paused_primary_is_fenced_when_it_goes_on_and_applied_nothing(
    fails: bool, store: MemoryStore, tmp_path: Path
) -> None:
    gate = GateStore(store)
    old_shard, new_shard = loaded(gate, tmp_path), loaded(store, tmp_path)
    old = lead(old_shard, FEW_BYTES)
    write(old, {1: 1.0, 2: 1.0})
    gate.shut()
    paused = old.write(upsert({1: 2.0, 3: 2.0}))
    assert gate.stalled.wait(ANSWER_S)
    waiting = [old.write(upsert({4: 2.0})), old.write(delete([2])), old.write(upsert({5: 2.0}))]

    new = lead(new_shard)
    write(new, {6: 3.0})
    write(new, gone=[1])
    assert old_shard.applied_lsn == 2
    assert contents(old_shard) == {1: 1.0, 2: 1.0}  # it serves what it has

    gate.open(fails)
    for future in (paused, *waiting):
        assert isinstance(future.exception(ANSWER_S), Fenced)
    assert "claim of epoch 2" in old.lost
    with pytest.raises(Fenced):
        old.write(upsert({7: 2.0}))
    assert old_shard.applied_lsn == 2
    assert contents(old_shard) == {1: 1.0, 2: 1.0}

    write(new, {8: 3.0})
    assert_all_equal(store, tmp_path, {2: 1.0, 6: 3.0, 8: 3.0}, old_shard, new_shard)
    again = lead(old_shard)
    write(again, {9: 4.0})
    with pytest.raises(Fenced):
        write(new, {9: 5.0})
    assert_all_equal(store, tmp_path, {2: 1.0, 6: 3.0, 8: 3.0, 9: 4.0}, old_shard, new_shard)
    again.stop()


@goes_through_or_fails
def test_write_that_was_durable_before_the_claim_stays_and_the_next_is_fenced(
    fails: bool, store: MemoryStore, tmp_path: Path
) -> None:
    gate = GateStore(store)
    old_shard, new_shard = loaded(gate, tmp_path), loaded(store, tmp_path)
    old = lead(old_shard, FEW_BYTES)
    gate.shut(after=True)
    paused = old.write(upsert({1: 2.0}))
    assert gate.stalled.wait(ANSWER_S)
    waiting = [old.write(upsert({2: 2.0})), old.write(upsert({3: 2.0}))]
    new = lead(new_shard)
    assert contents(new_shard) == {1: 2.0}
    write(new, {1: 3.0})

    gate.open(fails)
    assert paused.result(ANSWER_S).lsn == 2
    for future in waiting:
        assert isinstance(future.exception(ANSWER_S), Fenced)
    assert_all_equal(store, tmp_path, {1: 3.0}, old_shard, new_shard)
    new.stop()


@before_and_after
def test_two_claims_at_one_lsn_leave_one_primary(after: bool, store: MemoryStore, tmp_path: Path) -> None:
    """The old primary writes on until the slower of two claims is there."""
    gate = GateStore(store)
    first, second = loaded(store, tmp_path), loaded(gate, tmp_path)
    old = lead(first)
    write(old, {1: 1.0})
    gate.shut(after)
    with ThreadPoolExecutor(1) as pool:
        claiming = pool.submit(lead, second)
        assert gate.stalled.wait(ANSWER_S)
        if after:
            with pytest.raises(Fenced):
                write(old, {2: 1.0})
        else:
            write(old, {2: 1.0})
        gate.open()
        new = claiming.result(ANSWER_S)
    with pytest.raises(Fenced):
        write(old, {3: 1.0})
    write(new, {4: 2.0})
    assert_all_equal(store, tmp_path, {1: 1.0, 4: 2.0} | ({} if after else {2: 1.0}), first, second)
    new.stop()


def test_idle_primary_finds_out_that_it_was_taken_over(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.primary.IDLE_CHECK_S", 0.001)
    first, second = loaded(store, tmp_path), loaded(store, tmp_path)
    old = lead(first)
    write(old, {1: 1.0})
    new = lead(second)
    for thread in old._threads:
        thread.join(ANSWER_S)
    assert "epoch 2 took over from epoch 1 at LSN 3" in old.lost
    assert first.status().epoch == 0
    write(new, {2: 2.0})
    assert_all_equal(store, tmp_path, {1: 1.0, 2: 2.0}, first, second)
    new.stop()


def test_records_pushed_to_a_primary_that_was_taken_over_are_not_mixed_with_its_own(
    store: MemoryStore, tmp_path: Path
) -> None:
    gate = GateStore(store)
    old_shard, new_shard = loaded(gate, tmp_path), loaded(store, tmp_path)
    old = lead(old_shard)
    write(old, {1: 1.0})
    gate.shut()
    paused = old.write(upsert({1: 2.0}))
    assert gate.stalled.wait(ANSWER_S)
    new = Primary.claim(new_shard, Limits(), Upkeep(), old_shard.receive)
    for number in range(5):
        write(new, {number: 3.0})
    assert contents(old_shard) == {1: 1.0}
    gate.open()
    assert isinstance(paused.exception(ANSWER_S), Fenced)
    for thread in old._threads:
        thread.join(ANSWER_S)
    write(new, {9: 3.0})  # the push of this one finds a gap
    assert contents(old_shard) == dict.fromkeys((0, 1, 2, 3, 4, 9), 3.0)
    assert_all_equal(store, tmp_path, dict.fromkeys((0, 1, 2, 3, 4, 9), 3.0), old_shard, new_shard)
    new.stop()


@before_and_after
def test_paused_primary_of_a_deleted_collection_is_fenced_where_it_was_taken_over(
    after: bool, store: MemoryStore, tmp_path: Path
) -> None:
    """The files of its collection are gone, and there is another one of that name."""
    gate = GateStore(store)
    old = lead(loaded(gate, tmp_path), FEW_BYTES)
    write(old, {1: 1.0})
    gate.shut(after)
    paused = old.write(upsert({7: 7.0}))
    assert gate.stalled.wait(ANSWER_S)
    waiting = old.write(upsert({8: 7.0}))
    new = lead(loaded(store, tmp_path))
    write(new, {2: 2.0})
    delete_files(store, log(store), log(store).delete())
    new.stop()
    log(store).create(CONFIG)
    gate.open()
    if after:  # it was durable before the collection was deleted
        assert paused.result(ANSWER_S).lsn == 3
    else:
        assert isinstance(paused.exception(ANSWER_S), Fenced)
    assert isinstance(waiting.exception(ANSWER_S), Fenced)
    assert old.lost
    newest = lead(loaded(store, tmp_path))
    write(newest, {3: 3.0})
    newest.stop()
    assert held(store, tmp_path) == {3: 3.0}


# --- both are written to ----------------------------------------------------------------------------------------


@dataclass
class Writers:
    """Threads that write to whatever `choose` gives, each to ids of its own, and each remembers what was acknowledged.

    Fenced means that nothing was applied, so that every thread knows for sure what its ids must be.
    """

    choose: Callable[[int], Primary]
    threads: int = 6
    points: Points = field(default_factory=dict)
    acknowledged: list[int] = field(default_factory=lambda: [0] * 64)
    fenced: int = 0
    errors: list[BaseException] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Writers:
        self._running = [threading.Thread(target=self._run, args=(number,)) for number in range(self.threads)]
        for thread in self._running:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._running:
            thread.join(ANSWER_S)
        assert not self.errors, self.errors

    def _run(self, number: int) -> None:
        try:
            for value in self._values():
                self._write(number, 100 * number + int(value) % 7, value)
        except BaseException as error:  # noqa: BLE001  # raised by the thread of the test
            self.errors.append(error)

    def _values(self) -> Iterator[float]:
        value = 0.0
        while not self._ended.is_set():
            value += 1.0
            yield value

    def _write(self, number: int, point_id: int, value: float) -> None:
        gone = value % 5 == 0
        try:
            outcome = self.choose(number).write(delete([point_id]) if gone else upsert({point_id: value}))
            count = outcome.result(ANSWER_S).count
        except Fenced:
            self.fenced += 1
            self._ended.wait(0.001)  # it would be refused at once again
            return
        with self._lock:
            assert count == (not gone or point_id in self.points)
            self.acknowledged[number] += 1
            if gone:
                self.points.pop(point_id, None)
            else:
                self.points[point_id] = value

    def go_on_until(self, count: int, *numbers: int) -> None:
        """Wait until each of these threads was acknowledged so many writes more."""
        goals = {number: self.acknowledged[number] + count for number in numbers or range(self.threads)}
        pause = threading.Event()
        for _ in range(int(ANSWER_S / 0.001)):
            if self.errors or all(self.acknowledged[number] >= goal for number, goal in goals.items()):
                return
            pause.wait(0.001)
        raise AssertionError(f"{self.acknowledged} writes were acknowledged, wanted are {goals}")


def test_many_threads_write_to_both_while_one_takes_over(store: MemoryStore, tmp_path: Path) -> None:
    shards = [loaded(store, tmp_path), loaded(store, tmp_path)]
    primaries = [lead(shards[0])] * 2
    with Writers(lambda number: primaries[number % 2]) as writers:
        writers.go_on_until(20)
        primaries[1] = lead(shards[1])  # half of the threads go on with the old one
        writers.go_on_until(20, 1, 3, 5)
        seal(store, tmp_path)
        shards[1].load()
        writers.go_on_until(20, 1, 3, 5)
    assert writers.fenced > 0
    assert primaries[0].lost
    primaries[1].stop()
    assert_all_equal(store, tmp_path, writers.points, *shards)


def test_claims_back_and_forth_under_many_writes_lose_none(store: MemoryStore, tmp_path: Path) -> None:
    shards = [loaded(store, tmp_path), loaded(store, tmp_path)]
    primaries: list[Primary] = [lead(shards[0])]
    with Writers(lambda number: primaries[-1 - (number == 0 and len(primaries) > 1)]) as writers:
        for turn in range(1, 13):
            here = shards[turn % 2]
            if turn > 1:  # the one that led here knows by now, or is told
                primaries[-2].stop()
            primaries.append(lead(here))
            writers.go_on_until(5, 1, 2, 3)
            if turn % 4 == 0:
                seal(store, tmp_path)
                here.load()
    assert [primary.epoch for primary in primaries] == list(range(1, 14))
    for primary in primaries:
        primary.stop()
    assert writers.fenced > 0
    assert_all_equal(store, tmp_path, writers.points, *shards)
    kinds = [record.kind for record in records(store)]
    assert kinds.count("claim") == 13


def test_replicas_that_all_claim_at_once_end_with_one_that_writes(store: MemoryStore, tmp_path: Path) -> None:
    shards = [loaded(store, tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(len(shards)) as pool:
        primaries = list(pool.map(lead, shards))
    assert sorted(primary.epoch for primary in primaries) == list(range(1, 7))
    futures = [primary.write(upsert({number: 1.0})) for number, primary in enumerate(primaries)]
    written = [number for number, future in enumerate(futures) if future.exception(ANSWER_S) is None]
    assert [primaries[number].epoch for number in written] == [6]
    for primary in primaries:
        primary.stop()
    assert_all_equal(store, tmp_path, {written[0]: 1.0}, *shards)
