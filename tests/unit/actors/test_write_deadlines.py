"""Writes while the store does not answer: each is answered by its deadline, and what is told not to be there is not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import primary as primary_module
from actors.primary import Primary
from actors.replica import Replica
from cluster import wal as wal_module
from cluster.config import Limits, Settings
from cluster.errors import Exhausted, Unavailable
from cluster.memory_store import MemoryStore
from cluster.placement import ReplicaKey
from cluster.write import WriteOutcome
from tests.unit.actors.batches import LIMITS, UPKEEP, WAIT_S, created, held_ids, opened, upsert

KEY = ReplicaKey("words", 0, 0)
MAYBE = "the write may have been applied or not"
NOTHING = "nothing was applied"


class AwayStore(MemoryStore):
    """Once `leave` is called puts of WAL records hang until `come_back`; where `fails` they are Unavailable instead."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self._fails = fails
        self._here, self.asked = threading.Event(), threading.Event()
        self._here.set()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if "/wal/" in key and not self._here.is_set():
            self.asked.set()
            if self._fails:
                raise Unavailable("the store is away")
            assert self._here.wait(WAIT_S)
        return super().put_if_absent(key, data)

    def leave(self) -> None:
        self._here.clear()

    def come_back(self) -> None:
        self._here.set()


@pytest.fixture(params=[True, False], ids=["failing", "hanging"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AwayStore]:
    monkeypatch.setattr(primary_module, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.0)
    store = AwayStore(request.param)
    yield store
    store.come_back()


def test_queued_write_is_dropped_at_its_deadline_and_gives_its_room_back(store: AwayStore, tmp_path: Path) -> None:
    shard, one = created(store, tmp_path), upsert(1).size_bytes
    primary = Primary.claim(shard, Limits(queued_write_bytes_per_shard=2 * one), UPKEEP)
    store.leave()
    first = primary.write(upsert(1))
    assert store.asked.wait(WAIT_S)
    late, patient = primary.write(upsert(2), time.monotonic()), primary.write(upsert(3), time.monotonic() + WAIT_S)
    primary.drop_expired()
    with pytest.raises(Unavailable, match=NOTHING):
        late.result(WAIT_S)
    last = primary.write(upsert(4))
    with pytest.raises(Exhausted):
        primary.write(upsert(5))
    assert not patient.done()
    store.come_back()
    assert [one.result(WAIT_S).count for one in (patient, last)] == [1, 1]
    assert first.done()
    primary.stop()
    assert held_ids(shard) == held_ids(opened(store, tmp_path)) == [1, 3, 4]


def test_primary_whose_puts_fail_drops_what_expires_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primary_module, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.0)
    store = AwayStore(fails=True)
    primary = Primary.claim(created(store, tmp_path), LIMITS, UPKEEP)
    store.leave()
    first = primary.write(upsert(1))
    with pytest.raises(Unavailable, match=MAYBE):
        first.result(WAIT_S)
    with pytest.raises(Unavailable, match=NOTHING):
        primary.write(upsert(2), time.monotonic() + 0.01).result(WAIT_S)
    primary.stop()


def test_write_that_expired_while_another_was_put_is_not_put_after_it(tmp_path: Path) -> None:
    store = AwayStore(fails=False)
    shard = created(store, tmp_path)
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    store.leave()
    first = primary.write(upsert(1))
    assert store.asked.wait(WAIT_S)
    late = primary.write(upsert(2), time.monotonic())
    store.come_back()
    assert first.result(WAIT_S).count == 1
    with pytest.raises(Unavailable, match=NOTHING):
        late.result(WAIT_S)
    assert primary.write(upsert(3)).result(WAIT_S).lsn == 3
    primary.stop()
    assert held_ids(shard) == [1, 3]


def test_who_drops_what_another_thread_drops_finds_it_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a write that was taken from the queue, and is not answered yet, would be told that it may be applied."""
    store = AwayStore(fails=False)
    primary = Primary.claim(created(store, tmp_path), LIMITS, UPKEEP)
    store.leave()
    first = primary.write(upsert(1))
    assert store.asked.wait(WAIT_S)
    late = primary.write(upsert(2), time.monotonic())
    answering, looked, fail = threading.Event(), threading.Event(), primary_module._fail

    def slow(*args: Any) -> None:
        answering.set()
        looked.wait(0.1)
        fail(*args)

    monkeypatch.setattr(primary_module, "_fail", slow)
    other = threading.Thread(target=primary.drop_expired)
    other.start()
    assert answering.wait(WAIT_S)
    primary.drop_expired()
    answered = late.done()
    looked.set()
    other.join()
    store.come_back()
    assert first.result(WAIT_S).count == 1
    primary.stop()
    assert answered
    with pytest.raises(Unavailable, match=NOTHING):
        late.result(WAIT_S)


def test_replica_answers_every_write_by_its_deadline(store: AwayStore, tmp_path: Path) -> None:
    shard = created(store, tmp_path)
    replica = Replica(KEY, lambda: shard, Settings(data="memory://away"), 1)

    async def scenario() -> None:
        await replica.lead()
        store.leave()
        first = asyncio.ensure_future(replica.write([upsert(1)], 0.2))
        assert await asyncio.to_thread(store.asked.wait, WAIT_S)
        started = time.monotonic()
        queued = await replica.write([upsert(2), upsert(3)], 0.3)
        assert time.monotonic() - started < WAIT_S / 4
        assert [str(one)[: len(NOTHING)] for one in queued] == [NOTHING] * 2
        (doubtful,) = await first
        assert isinstance(doubtful, Unavailable)
        assert MAYBE in str(doubtful)
        patient = asyncio.ensure_future(replica.write([upsert(4)], WAIT_S))
        await asyncio.sleep(0)
        store.come_back()
        (outcome,) = await patient
        assert isinstance(outcome, WriteOutcome)

    try:
        asyncio.run(scenario())
    finally:
        store.come_back()
        replica.close()
    assert held_ids(shard) == held_ids(opened(store, tmp_path)) == [1, 4]
