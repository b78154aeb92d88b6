"""Every single store call of every kind of work goes wrong once, in every way; afterwards everything is there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from actors.primary import Primary
from actors.shard import Shard
from cluster.errors import Conflict, Fenced, Unavailable
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from tests.fakes import Fault, FaultyStore
from tests.faults.shards import (
    ANSWER_S,
    COLLECTION,
    CONFIG,
    GateStore,
    Points,
    anonymous,
    assert_one_history,
    contents,
    copied,
    delete,
    entry,
    grown,
    held,
    lead,
    loaded,
    log,
    merge,
    new_nonce,
    records,
    seal,
    upsert,
    write,
)

FAULTS: tuple[Fault, ...] = ("fail", "lose_answer", "die")
every_fault = pytest.mark.parametrize("fault", FAULTS)


@dataclass(frozen=True)
class Base:
    """A store with a shard in it, which every case copies, its points, and a folder for cached files."""

    store: MemoryStore
    points: Points
    folder: Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    store, folder = MemoryStore(), tmp_path_factory.mktemp("base")
    log(store).create(CONFIG)
    return Base(store, grown(store, folder), folder)


def each_call(base: Base, fault: Fault, work: Callable[[MemoryStore, FaultyStore, int], None]) -> int:
    """Do the work on a copy for every store call that may go wrong, until there is none; how many there were.

    `work` lets the given store fail at that call, counted from a moment that it chooses.
    """
    for at in count(1):
        inner = copied(base.store)
        store = FaultyStore(inner, 0, fault)
        work(inner, store, at)
        assert store.at, "the store was never told to fail"
        if store.calls < store.at:
            return at - 1
    raise AssertionError("count ends")


GONE_ON: set[object] = set()  # what stores had in them that a replica has gone on from


def assert_goes_on(store: ObjectStore, folder: Path, *allowed: Points) -> None:
    """A fresh replica holds one of the allowed states; it can lead, and be written to, sealed and merged.

    Most calls that fail leave the same behind as others, or nothing: it goes on once from each thing that is left.
    """
    replica = loaded(store, folder)
    points = contents(replica)
    assert points in allowed, f"holds {points}"
    left = (anonymous(store), frozenset(points.items()))
    if left in GONE_ON:
        return
    primary = lead(replica)
    write(primary, {7: 70.0, 700: 70.0})
    write(primary, gone=[11])
    points = {number: value for number, value in points.items() if number != 11} | {7: 70.0, 700: 70.0}
    assert contents(replica) == points
    assert seal(store, folder) is not None
    replica.load()
    assert contents(replica) == points
    merged = merge(store, folder)
    assert merged is not None
    assert len(merged.shards[0].segments) == 1
    write(primary, {7: 71.0})
    replica.load()
    primary.stop()
    assert contents(replica) == held(store, folder) == points | {7: 71.0}
    assert_one_history(store)
    GONE_ON.add(left)


# --- a call fails -----------------------------------------------------------------------------------------------


@every_fault
def test_write_whose_store_fails_at_any_call_is_whole_or_not_there(fault: Fault, base: Base) -> None:
    after = {number: value for number, value in base.points.items() if number != 13} | {1: 9.0, 12: 9.0, 500: 9.0}
    between = base.points | {1: 9.0, 12: 9.0, 500: 9.0}

    def work(inner: MemoryStore, store: FaultyStore, at: int) -> None:
        replica = loaded(store, base.folder)
        primary = lead(replica)
        store.at = store.calls + at
        states, done = [base.points, between, after], 0
        for request in (upsert({1: 9.0, 12: 9.0, 500: 9.0}), delete([13])):
            try:
                primary.write(request).result(ANSWER_S)
            except Unavailable:
                assert fault == "die", "the retries of the primary hide one failure"
                break
            done += 1
        if done == 2:
            assert contents(replica) == after
        assert (done == 2) == (fault != "die" or store.calls < store.at)
        primary.stop()
        assert_goes_on(inner, base.folder, *states[done : done + 2])  # what was acknowledged, or one more

    assert each_call(base, fault, work) == 2


@every_fault
def test_claim_whose_store_fails_at_any_call_can_be_repeated(fault: Fault, base: Base) -> None:
    def work(inner: MemoryStore, store: FaultyStore, at: int) -> None:
        replica = loaded(store, base.folder)
        store.at = store.calls + at
        primary: Primary | None = None
        try:
            primary = lead(replica)
        except Unavailable:
            assert replica.status().epoch == 0, "it leads though its claim failed"
            if fault != "die":
                primary = lead(replica)
        assert contents(replica) == base.points
        points = base.points
        if primary is not None:
            if store.calls >= store.at:  # that call is behind it
                write(primary, {1: 5.0})
                points = points | {1: 5.0}
            primary.stop()
        assert_goes_on(inner, base.folder, points)

    assert each_call(base, fault, work) >= 4


def upkeep_that_fails(base: Base, fault: Fault, work: Callable[[ObjectStore, Path], object]) -> int:
    """Upkeep through a failing store, beside a primary whose store is sound, and which is written to meanwhile."""

    def attempt(inner: MemoryStore, store: FaultyStore, at: int) -> None:
        replica = loaded(inner, base.folder)
        primary = lead(replica)
        write(primary, {14: 6.0})
        store.at = at
        try:
            work(store, base.folder)
        except Unavailable:
            assert store.calls >= at
        write(primary, gone=[14, 15])
        points = {number: value for number, value in base.points.items() if number not in (14, 15)}
        replica.load()
        primary.stop()
        assert contents(replica) == points
        assert_goes_on(inner, base.folder, points)

    return each_call(base, fault, attempt)


@every_fault
def test_seal_whose_store_fails_at_any_call_loses_nothing(fault: Fault, base: Base) -> None:
    assert upkeep_that_fails(base, fault, seal) > 15


@every_fault
def test_merge_whose_store_fails_at_any_call_loses_nothing(fault: Fault, base: Base) -> None:
    assert upkeep_that_fails(base, fault, merge) > 10


@every_fault
def test_recovery_whose_store_fails_at_any_call_is_whole_or_serves_nothing(fault: Fault, base: Base) -> None:
    def work(inner: MemoryStore, store: FaultyStore, at: int) -> None:
        folder = base.folder / new_nonce()  # nothing is cached
        replica = loaded_or_failed(store, folder, at)
        if replica.newest() is None:
            assert replica.status().state == "failed"
            if fault == "die":
                replica = loaded(inner, folder)
            else:
                replica.load()
        assert contents(replica) == base.points

    assert each_call(base, fault, work) > 12


def loaded_or_failed(store: FaultyStore, folder: Path, at: int) -> Shard:
    replica = Shard(store, COLLECTION, 0, folder, new_nonce)
    store.at = at
    try:
        replica.load()
    except Unavailable:
        assert store.calls >= at
    return replica


@every_fault
def test_replica_that_fails_to_load_a_newer_version_serves_on(fault: Fault, base: Base) -> None:
    def work(inner: MemoryStore, store: FaultyStore, at: int) -> None:
        folder = base.folder / new_nonce()
        replica = loaded(store, folder)
        seal(inner, base.folder)
        primary = lead(loaded(inner, base.folder))
        write(primary, {2: 8.0})
        primary.stop()
        store.at = store.calls + at
        try:
            replica.load()
            replica.catch_up()
        except Unavailable:
            assert contents(replica) in (base.points, base.points | {2: 8.0})
            if fault == "die":
                return
            replica.load()
            replica.catch_up()
        assert contents(replica) == base.points | {2: 8.0}
        assert replica.status().versions[-1] == log(inner).newest_live().version

    assert each_call(base, fault, work) > 6


# --- a call takes long ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["goes through", "fails"])
@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after"])
def test_write_whose_put_stalls_waits_while_reads_go_on(after: bool, fails: bool, base: Base) -> None:
    inner = copied(base.store)
    store = GateStore(inner)
    replica = loaded(store, base.folder)
    primary = lead(replica)
    store.shut(after)
    first = primary.write(upsert({1: 9.0}))
    assert store.stalled.wait(ANSWER_S)
    second, third = primary.write(upsert({1: 10.0, 2: 10.0})), primary.write(delete([12]))
    assert contents(replica) == base.points
    assert not any(future.done() for future in (first, second, third))
    fresh = held(inner, base.folder)
    assert fresh == (base.points | {1: 9.0} if after else base.points)
    store.open(fails)
    lsns = [future.result(ANSWER_S).lsn for future in (first, second, third)]
    assert lsns == [lsns[0], lsns[0] + 1, lsns[0] + 1]
    points = {number: value for number, value in base.points.items() if number != 12} | {1: 10.0, 2: 10.0}
    assert contents(replica) == points
    primary.stop()
    assert_goes_on(inner, base.folder, points)


@pytest.mark.parametrize("fails", [False, True], ids=["goes through", "fails"])
@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after"])
def test_claim_whose_put_stalls_is_overtaken_by_another(after: bool, fails: bool, base: Base) -> None:
    inner = copied(base.store)
    store = GateStore(inner)
    replica = loaded(store, base.folder)
    store.shut(after)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lead, replica)
        assert store.stalled.wait(ANSWER_S)
        other = lead(loaded(inner, base.folder))
        write(other, {1: 9.0})
        store.open(fails)
        late = slow.result(ANSWER_S)
    points = base.points | {1: 9.0}
    if after:  # its claim was there before that of the other
        assert late.epoch < other.epoch
        with pytest.raises(Fenced):
            write(late, {2: 11.0})
        assert late.lost
        write(other, {3: 12.0})
        replica.catch_up()
        points = points | {3: 12.0}
    else:  # it found the claim of the other, and claimed behind what that has written
        assert late.epoch > other.epoch
        with pytest.raises(Fenced):
            write(other, {1: 10.0})
        write(late, {2: 11.0})
        points = points | {2: 11.0}
    assert contents(replica) == points
    late.stop()
    other.stop()
    assert_goes_on(inner, base.folder, points)


@pytest.mark.parametrize("fails", [False, True], ids=["goes through", "fails"])
@pytest.mark.parametrize("after", [False, True], ids=["before it took effect", "after"])
@pytest.mark.parametrize("work", [seal, merge])
def test_upkeep_whose_commit_stalls_leaves_room_for_others(
    work: Callable[[ObjectStore, Path], object], after: bool, fails: bool, base: Base
) -> None:
    inner = copied(base.store)
    store = GateStore(inner, "/manifest/")
    replica = loaded(inner, base.folder)
    primary = lead(replica)
    store.shut(after)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(work, store, base.folder)
        assert store.stalled.wait(ANSWER_S)
        write(primary, {1: 9.0, 12: 9.0})
        assert seal(inner, base.folder) is not None  # the same points, or those since where the first is committed
        version = log(inner).newest_live().version
        write(primary, gone=[13])
        store.open(fails)
        error = slow.exception(ANSWER_S)
    if work is seal and not after:
        assert isinstance(error, Conflict), error
    else:  # a manifest that is there is found, whatever the store said; a merge is committed on top of a seal
        assert error is None
    assert log(inner).newest_live().version == version + (work is merge and not after)
    replica.load()
    primary.stop()
    points = {number: value for number, value in base.points.items() if number != 13} | {1: 9.0, 12: 9.0}
    assert contents(replica) == points
    assert entry(inner).applied_lsn < records(inner)[-1].lsn
    assert_goes_on(inner, base.folder, points)
