"""The primary: groups, bounds, stores that fail, and writers that take over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors import primary as primary_module
from actors.live_generation import LiveGeneration
from actors.primary import Primary
from actors.shard import Shard
from cluster import wal as wal_module
from cluster.config import Limits, Upkeep
from cluster.errors import Exhausted, Fenced, Unavailable
from cluster.memory_store import MemoryStore
from cluster.wal import Wal, WalRecord, lsn_of
from cluster.write import PointWrite, WriteOutcome
from tests.unit.actors.batches import (
    LIMITS,
    UPKEEP,
    WAIT_S,
    all_in_threads,
    created,
    delete,
    held_ids,
    opened,
    record,
    upsert,
)

Claim = Callable[..., Primary]


class GateStore(MemoryStore):
    """Puts of WAL records wait while the gate is shut, and go wrong as often as they are told to.

    `lost` answers do the put and then fail; `failures` do nothing. `waiting` is set while a put is at the gate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()
        self.failures = self.lost = self.tries = 0

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if "/wal/" not in key:
            return super().put_if_absent(key, data)
        self.waiting.set()
        assert self.gate.wait(WAIT_S)
        self.tries += 1
        if self.failures:
            self.failures -= 1
            raise Unavailable("the store is away")
        done = super().put_if_absent(key, data)
        if self.lost:
            self.lost -= 1
            raise Unavailable("the answer was lost")
        return done

    def hold(self) -> None:
        self.waiting.clear()
        self.gate.clear()

    def held(self) -> None:
        """Wait until a put is at the gate."""
        assert self.waiting.wait(WAIT_S)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primary_module, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.0)


@pytest.fixture
def claim() -> Iterator[Claim]:
    """`Primary.claim`; all are stopped in the end."""
    claimed: list[Primary] = []

    def claim(shard: Shard, limits: Limits = LIMITS, upkeep: Upkeep = UPKEEP, **options: Any) -> Primary:
        claimed.append(Primary.claim(shard, limits, upkeep, **options))
        return claimed[-1]

    yield claim
    for primary in claimed:
        primary.stop()


@pytest.fixture
def store() -> GateStore:
    return GateStore()


def done(outcome: Future[WriteOutcome]) -> tuple[int, int]:
    """(LSN, count)."""
    result = outcome.result(WAIT_S)
    return result.lsn, result.count


def records(store: MemoryStore) -> list[WalRecord]:
    return list(Wal(store, "words", 0, 0).read_after(0))


# --- acknowledgement --------------------------------------------------------------------------------------------


def test_acknowledged_write_is_durable_applied_and_pushed(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard, pushed = created(store, tmp_path), list[bytes]()
    primary = claim(shard, push=pushed.append)
    assert (primary.epoch, primary.lost, shard.status().epoch, shard.applied_lsn) == (1, "", 1, 1)
    assert done(primary.write(upsert(1, 2, 3))) == (2, 3)
    assert held_ids(shard) == [1, 2, 3]
    assert done(primary.write(delete(2, 9))) == (3, 1)
    assert done(primary.write(upsert(1, at=7.0))) == (4, 1)
    assert held_ids(shard) == [3, 1]
    assert [(one.lsn, one.epoch, one.kind) for one in records(store)] == [
        (1, 1, "claim"), (2, 1, "write"), (3, 1, "write"), (4, 1, "write")]  # fmt: skip
    assert [lsn_of(data) for data in pushed] == [2, 3, 4]
    assert held_ids(opened(store, tmp_path)) == [3, 1]


def test_write_is_not_acknowledged_before_its_put_is_done(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    store.hold()
    outcome = primary.write(upsert(1))
    store.held()
    assert not outcome.done()
    assert held_ids(shard) == []
    store.gate.set()
    assert done(outcome) == (2, 1)


def test_writes_that_arrive_during_a_put_share_the_next_object(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    store.hold()
    first = primary.write(upsert(1))
    store.held()
    others = [upsert(2, 3), delete(1, 50), upsert(1, at=8.0), delete(3), upsert(3, at=9.0), delete(2)]
    outcomes = [primary.write(write) for write in others]
    store.gate.set()
    assert done(first) == (2, 1)
    assert [done(outcome) for outcome in outcomes] == [(3, 2), (3, 1), (3, 1), (3, 1), (3, 1), (3, 1)]
    assert len(records(store)) == 3
    assert held_ids(shard) == [1, 3]


def test_group_is_cut_at_the_bound_of_an_object_and_a_larger_write_goes_alone(
    store: GateStore, tmp_path: Path, claim: Claim
) -> None:
    shard, one = created(store, tmp_path), upsert(1).size_bytes
    primary = claim(shard, Limits(wal_object_bytes=3 * one))
    store.hold()
    first = primary.write(upsert(0))
    store.held()
    outcomes = [primary.write(upsert(number)) for number in range(1, 6)]
    outcomes += [primary.write(upsert(*range(10, 20))), primary.write(upsert(30))]
    store.gate.set()
    assert [done(outcome)[0] for outcome in (first, *outcomes)] == [2, 3, 3, 3, 4, 4, 5, 6]


def test_writes_of_two_types_of_an_attribute_are_all_applied(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    store.hold()
    first = primary.write(upsert(1))
    store.held()
    columns = (pa.array([1]), pa.array([2]), pa.array(["3"]), pa.array([4]))
    outcomes = [primary.write(upsert(number, n=column)) for number, column in enumerate(columns, 2)]
    store.gate.set()
    assert [done(outcome)[0] for outcome in (first, *outcomes)] == [2, 3, 3, 4, 5]
    _, table = shard.fetch(1, pa.array([2, 3, 4, 5]), ["n"])
    assert table["n"].to_pylist() == [1, 2, 3, 4]


def test_many_writers_at_once_lose_nothing(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)

    def writer(number: int) -> None:
        for step in range(40):
            assert done(primary.write(upsert(1_000 * number + step)))[1] == 1
            if step % 2:
                assert done(primary.write(delete(1_000 * number + step - 1)))[1] == 1

    assert not all_in_threads(*(lambda number=number: writer(number) for number in range(4)))
    expected = [1_000 * number + step for number in range(4) for step in range(1, 40, 2)]
    assert held_ids(shard) == expected
    assert held_ids(opened(store, tmp_path)) == expected


# --- bounds -----------------------------------------------------------------------------------------------------


def test_writes_beyond_the_queue_are_refused_and_not_applied(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard, one = created(store, tmp_path), upsert(1).size_bytes
    primary = claim(shard, Limits(queued_write_bytes_per_shard=2 * one))
    store.hold()
    outcomes = [primary.write(upsert(0))]
    store.held()
    outcomes += [primary.write(upsert(number)) for number in (1, 2)]
    with pytest.raises(Exhausted, match="queued_write_bytes_per_shard") as refused:
        primary.write(upsert(3))
    assert refused.value.retry_after_s == primary_module.QUEUE_FULL_RETRY_S
    store.gate.set()
    assert [done(outcome)[0] for outcome in outcomes] == [2, 3, 3]
    assert done(primary.write(upsert(*range(10, 20)))) == (4, 10), "a write larger than the queue is taken alone"
    assert held_ids(shard) == [0, 1, 2, *range(10, 20)]


def test_writes_beyond_the_tail_are_refused_until_it_is_sealed(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard, upkeep=Upkeep(seal_bytes=4 * 24, tail_bytes_max=4 * 24))
    assert done(primary.write(upsert(1, 2, 3, 4, 5))) == (2, 5)
    with pytest.raises(Exhausted, match="tail_bytes_max: 120 bytes") as refused:
        primary.write(upsert(6))
    assert refused.value.retry_after_s == primary_module.TAIL_FULL_RETRY_S
    assert held_ids(shard) == [1, 2, 3, 4, 5]


# --- a store that fails -----------------------------------------------------------------------------------------


def test_lost_answer_is_no_loss_and_no_second_record(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    store.lost = 1
    assert done(primary.write(upsert(1))) == (2, 1)
    assert done(primary.write(upsert(2))) == (3, 1)
    assert [one.lsn for one in records(store)] == [1, 2, 3]
    assert held_ids(shard) == [1, 2]


@pytest.mark.parametrize("how", ["failures", "lost"])
def test_write_in_doubt_is_told_and_its_record_is_put_until_it_is_there(
    how: str, store: GateStore, tmp_path: Path, claim: Claim
) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    tries = store.tries
    setattr(store, how, 3 * wal_module.APPEND_TRIES + 1)
    if how == "lost":  # the put is done, and nobody can read it back
        store.lost, store.failures = 0, 2 * wal_module.APPEND_TRIES
    outcome = primary.write(upsert(1))
    with pytest.raises(Unavailable, match="may have been applied or not"):
        outcome.result(WAIT_S)
    assert done(primary.write(upsert(2))) == (3, 1), "it follows the record that was in doubt"
    assert primary.lost == ""
    assert store.tries > tries + wal_module.APPEND_TRIES
    assert held_ids(shard) == held_ids(opened(store, tmp_path)) == [1, 2]


def test_stop_ends_a_put_that_keeps_failing(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    store.failures = 10**9
    outcome = primary.write(upsert(1))
    with pytest.raises(Unavailable, match="may have been applied or not"):
        outcome.result(WAIT_S)
    waiting = primary.write(upsert(2))
    primary.stop()
    with pytest.raises(Fenced, match="given up"):
        waiting.result(WAIT_S)
    with pytest.raises(Fenced, match="epoch 1 of shard 0 was given up"):
        primary.write(upsert(3))
    assert shard.status().epoch == 0
    store.failures = 0
    assert held_ids(opened(store, tmp_path)) == []


def test_write_in_doubt_that_another_writer_overtook_was_not_applied(
    store: GateStore, tmp_path: Path, claim: Claim
) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    store.hold()
    store.failures = wal_module.APPEND_TRIES
    outcome = primary.write(upsert(1))
    store.held()
    waiting = primary.write(upsert(2))
    store.put(f"collections/words/shards/0000/wal/{2:020d}.arrow", record(2, epoch=2, nonce=5).encode(0))
    store.gate.set()
    with pytest.raises(Unavailable, match="may have been applied or not"):
        outcome.result(WAIT_S)
    with pytest.raises(Fenced, match="LSN 2 is another writer's claim of epoch 2"):
        waiting.result(WAIT_S)
    assert "epoch 2" in primary.lost
    assert shard.catch_up() == 2
    assert held_ids(shard) == []


# --- taking over ------------------------------------------------------------------------------------------------


def test_new_primary_has_all_acknowledged_writes_and_the_old_one_is_fenced(
    store: GateStore, tmp_path: Path, claim: Claim
) -> None:
    first, second = created(store, tmp_path), opened(store, tmp_path)
    old = claim(first)
    assert done(old.write(upsert(1))) == (2, 1)
    new = claim(second)
    assert (new.epoch, second.applied_lsn, held_ids(second)) == (2, 3, [1])
    outcome = old.write(upsert(2))
    with pytest.raises(Fenced, match="another writer's claim of epoch 2"):
        outcome.result(WAIT_S)
    with pytest.raises(Fenced):
        old.write(upsert(2))
    assert done(new.write(upsert(3))) == (4, 1)
    assert first.catch_up() == 4
    assert held_ids(first) == held_ids(second) == [1, 3]
    assert first.status().epoch == 0
    again = claim(first)
    assert (again.epoch, done(again.write(upsert(4)))) == (3, (6, 1))


def test_put_that_is_overtaken_by_a_claim_is_fenced_and_nowhere(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    first, second = created(store, tmp_path), opened(store, tmp_path)
    old = claim(first)
    store.hold()
    outcomes = [old.write(upsert(1))]
    store.held()
    outcomes.append(old.write(upsert(2)))
    store.put(f"collections/words/shards/0000/wal/{2:020d}.arrow", record(2, epoch=2, nonce=9).encode(0))
    store.gate.set()
    for outcome in outcomes:
        with pytest.raises(Fenced):
            outcome.result(WAIT_S)
    assert second.catch_up() == first.catch_up() == 2
    assert held_ids(first) == held_ids(second) == []


def test_idle_primary_notices_that_another_took_over(
    store: GateStore, tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primary_module, "IDLE_CHECK_S", 0.002)
    first, second = created(store, tmp_path), opened(store, tmp_path)
    old, followed = claim(first), threading.Event()
    follow = first.follow
    monkeypatch.setattr(first, "follow", lambda epoch: (follow(epoch), followed.set()))
    claim(second)
    assert followed.wait(WAIT_S)
    assert old.lost == "epoch 2 took over from epoch 1 at LSN 2"
    assert first.status().epoch == 0


def test_of_replicas_that_claim_at_once_the_highest_epoch_leads(store: GateStore, tmp_path: Path, claim: Claim) -> None:
    shards = [created(store, tmp_path), *(opened(store, tmp_path) for _ in range(3))]
    claimed: list[Primary] = []
    assert not all_in_threads(*(lambda shard=shard: claimed.append(claim(shard)) for shard in shards))
    assert sorted(primary.epoch for primary in claimed) == [1, 2, 3, 4]
    outcomes = [(primary, primary.write(upsert(primary.epoch))) for primary in claimed]
    for primary, outcome in outcomes:
        if primary.epoch == 4:
            assert done(outcome) == (5, 1)
        else:
            with pytest.raises(Fenced):
                outcome.result(WAIT_S)
    for shard in shards:
        shard.catch_up()
        assert held_ids(shard) == [4]


def test_record_that_cannot_be_applied_ends_the_primary_and_is_not_lost(
    store: GateStore, tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    assert done(primary.write(upsert(1))) == (2, 1)

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(LiveGeneration, "apply", fail)
        with pytest.raises(Unavailable, match="may have been applied or not: no memory"):
            primary.write(upsert(2)).result(WAIT_S)
    primary.stop()
    assert "record 3 could not be applied" in primary.lost
    status = shard.status()
    assert (status.state, status.epoch) == ("failed", 0)
    assert "record 3: MemoryError: no memory" in status.error
    shard.load()
    assert held_ids(shard) == [1, 2]
    assert done(claim(shard).write(PointWrite(deletes=pa.array([2])))) == (5, 1)
