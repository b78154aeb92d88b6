"""Becoming the primary: the claim comes first, at the end of the log; then what is before it is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.live_generation import LiveGeneration
from actors.primary import CLAIM_ATTEMPTS, Primary
from actors.shard import Shard
from cluster import paths
from cluster import wal as wal_module
from cluster.arrow_rows import vectors_array
from cluster.errors import Corrupt, Fenced, NotFound, Unavailable
from cluster.memory_store import MemoryStore
from cluster.wal import Wal, WalRecord
from cluster.write import PointWrite
from tests.fakes import Fault, FaultyStore
from tests.unit.actors.batches import LIMITS, UPKEEP, WAIT_S, created, held_ids, opened, record, upsert
from tests.unit.actors.log_writer import LogWriter, contents
from tests.unit.actors.points import flipped, manifest_log

Claim = Callable[[Shard], Primary]
FAULTS: tuple[Fault, ...] = ("fail", "lose_answer", "die")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.0)


@pytest.fixture
def claim() -> Iterator[Claim]:
    """`Primary.claim`; all are stopped in the end."""
    claimed: list[Primary] = []

    def claim(shard: Shard) -> Primary:
        claimed.append(Primary.claim(shard, LIMITS, UPKEEP))
        return claimed[-1]

    yield claim
    for primary in claimed:
        primary.stop()


@pytest.fixture
def store() -> ClaimStore:
    return ClaimStore()


@pytest.fixture
def writer(store: ClaimStore) -> LogWriter:
    return LogWriter(store)


class ClaimStore(MemoryStore):
    """Does something with the LSN whenever a claim is about to be put there."""

    before: Callable[[int], object] = staticmethod(lambda _: None)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        lsn = paths.wal_lsn(key)
        if lsn is not None and WalRecord.decode(data, key, 0, lsn).kind == "claim":
            self.before(lsn)
        return super().put_if_absent(key, data)


def kinds(store: MemoryStore) -> list[tuple[str, int]]:
    return [(one.kind, one.epoch) for one in Wal(store, "words", 0, 0).read_after(0)]


def assert_leads(primary: Primary, shard: Shard, writer: LogWriter, lsn: int, epoch: int) -> None:
    """From its claim at an LSN on, with everything that was written before, and that it takes writes."""
    assert (primary.epoch, primary.lost, shard.status().epoch, shard.applied_lsn) == (epoch, "", epoch, lsn)
    assert contents(shard.view(1)) == writer.live
    assert primary.write(upsert(900)).result(WAIT_S).lsn == lsn + 1
    assert contents(shard.view(1)) == writer.live | {900: 900.0}


def test_claim_is_put_at_the_end_of_the_log_before_what_lies_before_it_is_applied(
    store: ClaimStore, writer: LogWriter, tmp_path: Path, claim: Claim
) -> None:
    shard = opened(store, tmp_path)
    writer.put_points(*range(20))
    claims: list[tuple[int, int]] = []
    store.before = lambda lsn: claims.append((lsn, shard.applied_lsn))
    primary = claim(shard)
    assert claims == [(21, 0)], "the one before is fenced while its 20 are still to be applied"
    assert_leads(primary, shard, writer, lsn=21, epoch=2)


@pytest.mark.parametrize("faster", [1, wal_module.CLAIM_TRIES, 30])
def test_claim_beside_a_busy_writer_succeeds_between_two_of_its_records(
    faster: int, store: ClaimStore, writer: LogWriter, tmp_path: Path, claim: Claim
) -> None:
    """Its next record is there before each of the first claims."""
    shard = opened(store, tmp_path)
    tries: list[int] = []

    def write(lsn: int) -> None:
        tries.append(lsn)
        if writer.lsn < lsn <= faster:
            writer.put_points(lsn)

    store.before = write
    primary = claim(shard)
    assert sorted(set(tries)) == list(range(1, faster + 2))
    assert_leads(primary, shard, writer, lsn=faster + 1, epoch=2)
    with pytest.raises(Fenced, match=f"LSN {faster + 1} is another writer's claim of epoch 2"):
        Wal(store, "words", 0, 0).append(record(faster + 1, upsert(1)))


def test_writer_that_would_go_on_while_its_records_are_applied_is_fenced(
    writer: LogWriter, tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the log applied first, a busy writer would put a record for each that is applied, for ever."""
    shard = opened(writer.store, tmp_path)
    writer.put_points(*range(5))
    apply, fenced = LiveGeneration.apply, list[int]()

    def applied(self: LiveGeneration, one: WalRecord) -> Any:
        with pytest.raises(Fenced):
            Wal(writer.store, "words", 0, 0).append(record(6, upsert(1_000)))
        fenced.append(one.lsn)
        return apply(self, one)

    with monkeypatch.context() as patched:
        patched.setattr(LiveGeneration, "apply", applied)
        primary = claim(shard)
    assert fenced == [1, 2, 3, 4, 5, 6]
    assert_leads(primary, shard, writer, lsn=6, epoch=2)


def test_claim_that_another_one_follows_at_once_is_repeated_behind_it(
    writer: LogWriter, tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, catch_up = opened(writer.store, tmp_path), Shard.catch_up
    writer.put_points(1, 2)
    others = [5, 6]  # epochs

    def overtaken(self: Shard, until: int | None = None) -> int:
        lsn = catch_up(self, until)
        if others:
            Wal(writer.store, "words", 0, 0).claim(lsn, self.epoch, f"{others.pop():032x}")
            return catch_up(self)
        return lsn

    with monkeypatch.context() as patched:
        patched.setattr(Shard, "catch_up", overtaken)
        primary = claim(shard)
    assert kinds(writer.store)[2:] == [("claim", epoch) for epoch in (2, 3, 4, 5, 6)]
    assert_leads(primary, shard, writer, lsn=7, epoch=6)


def test_claim_loads_the_newest_version(writer: LogWriter, tmp_path: Path, claim: Claim) -> None:
    shard = opened(writer.store, tmp_path)
    writer.put_points(1, 2, 3)
    writer.seal(tmp_path)
    writer.put_points(4)
    primary = claim(shard)
    status = shard.status()
    assert (status.versions, status.tail_points, status.points) == ((1, 2), 1, 4)
    assert_leads(primary, shard, writer, lsn=5, epoch=2)


def test_claim_gives_up_where_another_goes_on_writing(
    store: ClaimStore, writer: LogWriter, tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal_module, "BUSY_CLAIM_TRIES", 5)
    shard = opened(store, tmp_path)
    store.before = lambda lsn: writer.put_points(lsn)
    with pytest.raises(Unavailable, match="others wrote to the log 5 times before it was claimed"):
        claim(shard)
    assert kinds(store) == [("write", 1)] * writer.lsn
    assert shard.status().epoch == 0


def test_claim_gives_up_where_others_claim_for_ever(
    store: ClaimStore, writer: LogWriter, tmp_path: Path, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, catch_up = opened(store, tmp_path), Shard.catch_up

    def overtaken(self: Shard, until: int | None = None) -> int:
        Wal(store, "words", 0, 0).claim(catch_up(self, until), self.epoch, f"{self.epoch:032x}")
        return catch_up(self)

    with monkeypatch.context() as patched:
        patched.setattr(Shard, "catch_up", overtaken)
        with pytest.raises(Unavailable, match="shard 0 of 'words': others claim it, too"):
            claim(shard)
    assert kinds(store) == [("claim", epoch) for epoch in range(1, 2 * CLAIM_ATTEMPTS + 1)]
    assert shard.status().epoch == 0


def test_claim_of_a_shard_that_holds_nothing_is_unavailable_and_writes_nothing(
    writer: LogWriter, tmp_path: Path, claim: Claim
) -> None:
    writer.put_points(1)
    shard = Shard(writer.store, "words", 0, tmp_path)
    with pytest.raises(Unavailable, match="shard 0 of 'words': nothing is loaded"):
        claim(shard)
    assert kinds(writer.store) == [("write", 1)]
    shard.load()
    assert_leads(claim(shard), shard, writer, lsn=2, epoch=2)


def test_claim_of_a_deleted_collection_does_not_lead(tmp_path: Path, claim: Claim) -> None:
    store = MemoryStore()
    shard = created(store, tmp_path)
    manifest_log(store, "words").delete()
    with pytest.raises(NotFound):
        claim(shard)
    assert shard.status().epoch == 0


def test_claim_over_a_damaged_record_does_not_lead_and_goes_on_serving(
    writer: LogWriter, tmp_path: Path, claim: Claim
) -> None:
    shard = opened(writer.store, tmp_path)
    writer.put_points(1, 2, 3)
    data = writer.store.get(writer.key(2))
    writer.store.put(writer.key(2), flipped(data, 100))
    with pytest.raises(Corrupt, match=writer.key(2)):
        claim(shard)
    assert (shard.status().epoch, held_ids(shard)) == (0, [1])
    writer.store.put(writer.key(2), data)
    assert_leads(claim(shard), shard, writer, lsn=5, epoch=3)


@pytest.mark.parametrize("fault", FAULTS)
def test_claim_through_a_failing_store_leads_or_not_and_the_next_one_does(
    fault: Fault, tmp_path: Path, claim: Claim
) -> None:
    def before() -> tuple[LogWriter, FaultyStore, Shard]:
        writer = LogWriter(MemoryStore())
        store = FaultyStore(writer.store, fault=fault)
        shard = opened(store, tmp_path)
        writer.put_points(1, 2, 3)
        store.calls = 0
        return writer, store, shard

    _, store, shard = before()
    Primary.claim(shard, LIMITS, UPKEEP).stop()
    for at in range(1, store.calls + 1):
        writer, store, shard = before()
        store.at = at
        try:
            primary = claim(shard)
        except Unavailable:
            assert shard.status().epoch == 0, f"call {at}"
            shard = opened(writer.store, tmp_path)
            primary = claim(shard)
        claims = kinds(writer.store)[3:]
        assert claims == [("claim", epoch) for epoch in range(2, 2 + len(claims))]
        assert len(claims) <= 2
        assert (primary.epoch, shard.status().epoch) == claims[-1][1:] * 2
        assert contents(shard.view(1)) == writer.live


def test_primary_under_which_all_generations_were_retired_ends_and_answers(
    store: ClaimStore, tmp_path: Path, claim: Claim
) -> None:
    shard = created(store, tmp_path)
    primary = claim(shard)
    assert primary.write(upsert(1)).result(WAIT_S).count == 1
    shard.retire(99)
    outcomes = [primary.write(PointWrite(deletes=pa.array([1])))]
    with pytest.raises(Unavailable, match="cannot apply record 3: nothing is loaded"):
        outcomes[0].result(WAIT_S)
    primary.stop()
    assert "record 3 could not be applied" in primary.lost
    with pytest.raises(Fenced):
        primary.write(upsert(2))
    shard.load()
    assert held_ids(shard) == []  # it was durable
    assert claim(shard).write(upsert(3)).result(WAIT_S).lsn == 5


def test_record_behind_one_that_failed_is_not_acknowledged(store: ClaimStore, tmp_path: Path) -> None:
    shard = created(store, tmp_path)
    for lsn in (2, 1):
        shard.receive(record(lsn, upsert(lsn)).encode(0))  # the second before the first
    assert shard.apply_own(record(1, upsert(1))) is None, "the replay had it"
    with pytest.raises(Unavailable, match="cannot apply record 3: 1"):
        shard.apply_own(record(3, upsert(3)))


def test_end_of_an_earlier_primary_leaves_the_later_one_leading(
    store: ClaimStore, tmp_path: Path, claim: Claim
) -> None:
    shard = created(store, tmp_path)
    first = claim(shard)
    second = claim(shard)
    first.stop()
    assert shard.status().epoch == second.epoch == 2
    assert second.write(upsert(1)).result(WAIT_S).count == 1


def test_generation_of_a_deleted_collection_does_not_take_the_records_of_the_next(
    store: ClaimStore, tmp_path: Path, claim: Claim
) -> None:
    shard, log = created(store, tmp_path), manifest_log(store, "words")
    claim(shard).write(upsert(1)).result(WAIT_S)
    config = log.newest_live().config
    log.delete()
    log.create(replace(config, dimension=2 * config.dimension))
    shard.load()
    assert shard.status().generations == (2,)
    row = pa.record_batch(
        [pa.array([5]), vectors_array(np.ones((1, 2 * config.dimension), np.float32))], names=["id", "vector"]
    )
    assert claim(shard).write(PointWrite(row)).result(WAIT_S).count == 1
    assert shard.fetch(2, pa.array([5]), ["id"])[0].all()
