"""Loads beside records that keep coming: the new generation is at the LSN of what is served when it takes its place."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors import shard as shard_module
from actors.live_generation import LiveGeneration
from actors.shard import APPLIED_AT_PUBLISH, Shard
from cluster.config import CollectionConfig, IndexConfig
from cluster.errors import Unavailable
from cluster.memory_store import MemoryStore
from cluster.wal import WalRecord
from tests.unit.actors.batches import CONFIG, WAIT_S, all_in_threads, delete, opened, record, upsert
from tests.unit.actors.log_writer import LogWriter, contents

OTHER = CollectionConfig(4, "l2", index=IndexConfig("hnsw"))
MOST_RECORDS = 5_000  # of a load that does not end


@pytest.fixture
def writer() -> LogWriter:
    return LogWriter(MemoryStore())


def assert_holds(shard: Shard, writer: LogWriter, generation: int = 1) -> None:
    """Every record of the log, and nothing else."""
    view = shard.view(generation)
    assert (shard.applied_lsn, view.lsn, shard.epoch) == (writer.lsn, writer.lsn, writer.epoch)
    assert contents(view) == writer.live


def while_loading(shard: Shard, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something once, when the next load has read the log up to what was served."""
    read_after, pending = shard.wal.read_after, [act]

    def reading(lsn: int, until: int | None = None) -> Iterator[WalRecord]:
        yield from read_after(lsn, until)
        if pending:
            pending.pop()()

    monkeypatch.setattr(shard.wal, "read_after", reading)


def receive(shard: Shard, writer: LogWriter, *points: int) -> None:
    """A record for each point is put and pushed."""
    for point_id in points:
        shard.receive(writer.push(upsert(point_id)))


# --- newer versions and next generations ------------------------------------------------------------------------


def test_newer_version_takes_the_place_of_the_older_while_records_come(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, *range(10))
    sealed = writer.seal(tmp_path)
    receive(shard, writer, 10, 11)

    def write() -> None:
        for one in (upsert(3, 12, at=70.0), delete(0, 10), upsert(13), delete(13)):
            shard.receive(writer.push(one))
        assert shard.status().versions == (1,), "it is not published yet"

    while_loading(shard, monkeypatch, write)
    shard.load(sealed.version)
    assert shard._joining == []
    assert_holds(shard, writer)
    status = shard.status()
    assert (status.versions, status.generations, status.lsn) == ((1, 2), (1,), 16)
    assert (status.points, status.tail_points, status.tombstones) == (11, 3, 2)
    receive(shard, writer, 14)
    assert_holds(shard, writer)


def test_next_generation_is_brought_to_the_same_lsn_while_records_come(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1, 2, 3)
    imported = writer.import_points(3, 4, 5, config=OTHER)
    receive(shard, writer, 5, 6)
    while_loading(shard, monkeypatch, lambda: (receive(shard, writer, 7), shard.receive(writer.push(delete(1, 4)))))
    shard.load(imported.version)
    receive(shard, writer, 8)
    assert_holds(shard, writer, generation=2)
    assert contents(shard.view(2)).keys() == {3, 5, 6, 7, 8}
    assert contents(shard.view(1)).keys() == {2, 3, 5, 6, 7, 8}
    assert shard.view(1).lsn == shard.view(2).lsn == 8
    assert (shard.view(2).config, shard.view(1).config) == (OTHER, CONFIG)
    newest = shard.newest()
    assert newest is not None
    assert newest.view is shard.view(2)


@pytest.mark.parametrize("imported", [False, True])
def test_load_of_what_was_sealed_beyond_the_applied_lsn_catches_up(
    imported: bool, writer: LogWriter, tmp_path: Path
) -> None:
    """A follower that got no pushes: no generation may be left behind at an older LSN."""
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1)
    writer.put_points(2, 3, 4)
    manifest = writer.import_points(7) if imported else writer.seal(tmp_path)
    writer.put_points(5)
    shard.load(manifest.version)
    assert shard.applied_lsn == 4
    receive(shard, writer, 6)  # after a gap
    assert_holds(shard, writer, generation=2 if imported else 1)
    if imported:
        assert contents(shard.view(1)) == {number: float(number) for number in range(1, 7)}


@pytest.mark.parametrize("imported", [False, True])
def test_generation_that_cannot_follow_because_its_log_is_gone_is_dropped(
    imported: bool, writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1)
    writer.put_points(2, 3)
    manifest = writer.import_points(7) if imported else writer.seal(tmp_path)
    writer.remove(2)
    shard.load(manifest.version)
    assert shard.status().generations == (manifest.generation,)
    receive(shard, writer, 4)
    assert_holds(shard, writer, manifest.generation)


# --- a primary, which applies only what it wrote ----------------------------------------------------------------


def leading(writer: LogWriter, cache_dir: Path) -> tuple[Shard, WalRecord, int]:
    """A primary with a durable record that it has not applied, and the version in which that is sealed."""
    shard = opened(writer.store, cache_dir)
    assert shard.lead(writer.claim())
    mine = writer.put(upsert(1))
    return shard, mine, writer.seal(cache_dir).version


def waiting_load(shard: Shard, version: int, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Load in another thread, and do something when it waits for records to be applied."""
    waits, wait_for = threading.Event(), shard._moved.wait_for

    def wait(*args: Any) -> bool:
        waits.set()
        return wait_for(*args)

    def act() -> None:
        assert waits.wait(WAIT_S)
        assert shard.status().versions == (1,)
        then()

    monkeypatch.setattr(shard._moved, "wait_for", wait)
    assert not all_in_threads(lambda: shard.load(version), act)


def test_load_by_a_primary_waits_until_what_was_sealed_is_applied(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, mine, version = leading(writer, tmp_path)
    outcomes: list[Any] = []
    waiting_load(shard, version, monkeypatch, lambda: outcomes.append(shard.apply_own(mine)))
    assert [outcome.upserts.tolist() for outcome in outcomes] == [[False]], "the write is counted as ever"
    assert shard.status().versions == (1, 2)
    assert shard.status().epoch == writer.epoch
    shard.apply_own(writer.put(upsert(2)))
    assert_holds(shard, writer)


def test_load_by_a_primary_that_gives_up_goes_on_as_a_followers(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, mine, version = leading(writer, tmp_path)
    waiting_load(shard, version, monkeypatch, lambda: shard.follow(writer.epoch))
    assert shard.status().versions == (1, 2)
    assert shard.apply_own(mine) is None
    assert_holds(shard, writer)


def test_load_by_a_primary_that_applies_nothing_is_unavailable_in_the_end(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "APPLY_WAIT_S", 0.01)
    shard, mine, version = leading(writer, tmp_path)
    with pytest.raises(Unavailable, match=r"shard 0 of 'words' did not reach LSN 2 within 0\.01 s"):
        shard.load(version)
    assert (shard.status().versions, shard.status().epoch, shard.applied_lsn) == ((1,), writer.epoch, 1)
    assert shard.apply_own(mine) is not None
    assert_holds(shard, writer)
    shard.load(version)
    assert shard.status().versions == (1, 2)
    assert_holds(shard, writer)


# --- a log that lacks records -----------------------------------------------------------------------------------


@pytest.mark.parametrize("comes", [False, True])
def test_load_over_a_log_that_lacks_records_is_unavailable_and_what_is_served_goes_on(
    comes: bool, writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1)
    version = writer.seal(tmp_path).version
    receive(shard, writer, 2, 3, 4)
    data = writer.remove(3)
    if comes:
        while_loading(shard, monkeypatch, lambda: receive(shard, writer, 5))
    with pytest.raises(Unavailable, match="the WAL of shard 0 of 'words' lacks records 3 to 4, which were applied"):
        shard.load(version)
    assert shard.status().versions == (1,)
    assert shard._joining == [], "nobody collects records for it any more"
    receive(shard, writer, 6)
    assert_holds(shard, writer)
    writer.store.put(writer.key(3), data)
    shard.load(version)
    assert shard.status().versions == (1, version)
    assert_holds(shard, writer)


# --- records that come as fast as they are applied --------------------------------------------------------------


class BusyWriter:
    """Whenever a generation that is being loaded applies a record, `rate` new ones are pushed to the shard.

    While the load holds the lock they wait, and come after it. `applied` are the LSNs that the loaded generation
    applied, `under_lock` how many of them while writes waited.
    """

    def __init__(self, shard: Shard, writer: LogWriter, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.applied: list[int] = []
        self.served: list[int] = []
        self.under_lock = 0
        self._shard, self._writer, self._rate = shard, writer, rate
        self._due, self._next_id = 0.0, 1_000
        self._held = shard.newest()
        self._take = LiveGeneration._take
        monkeypatch.setattr(LiveGeneration, "_take", lambda *args: self._taken(*args))

    def _taken(self, generation: LiveGeneration, records: Sequence[WalRecord], lsn: int) -> Any:
        assert len(self.applied) < MOST_RECORDS, "the load does not end"
        lsns = [record.lsn for record in records]
        if generation is self._held:
            self.served += lsns
            return self._take(generation, records, lsn)
        self.applied += lsns
        existed = self._take(generation, records, lsn)
        self._due += self._rate * len(records)
        if self._shard._lock.locked():
            self.under_lock += len(records)
        else:
            self.come()
        return existed

    def come(self) -> None:
        """What is due is put and pushed."""
        while self._due >= 1:
            self._due -= 1
            self._next_id += 1
            receive(self._shard, self._writer, self._next_id)


@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("imported", [False, True])
def test_load_ends_beside_records_that_come_as_fast_as_they_are_applied(
    imported: bool, rate: float, writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, *range(5))
    manifest = writer.import_points(500, 501) if imported else writer.seal(tmp_path)
    receive(shard, writer, *range(10, 80))
    with monkeypatch.context() as patched:
        busy = BusyWriter(shard, writer, rate, patched)
        shard.load(manifest.version)
    first, last = 6, shard.applied_lsn
    assert busy.applied == list(range(first, last + 1)), "each once, in order, and none is missing"
    assert Counter(busy.served) == Counter(range(76, last + 1))
    if rate <= 0.5:
        assert busy.under_lock <= APPLIED_AT_PUBLISH, "writes wait for no more than that where it gets less"
    assert_holds(shard, writer, manifest.generation)
    busy.come()
    assert_holds(shard, writer, manifest.generation)
    assert contents(opened(writer.store, tmp_path).view(manifest.generation)) == writer.live


def test_records_that_come_in_a_thread_of_their_own_are_all_there_after_the_load(
    writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, *range(50))
    version = writer.seal(tmp_path).version
    receive(shard, writer, *range(50, 150))
    versions: list[int] = []
    assert not all_in_threads(
        lambda: receive(shard, writer, *range(150, 400)), lambda: versions.append(shard.load(version).version)
    )
    assert versions == [version]
    assert shard.status().versions == (1, 2)
    assert_holds(shard, writer)


# --- versions, and several loads at once ------------------------------------------------------------------------


def test_version_that_is_held_or_older_changes_nothing(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1)
    writer.seal(tmp_path)
    receive(shard, writer, 2)
    writer.seal(tmp_path)
    shard.load(3)
    held = shard.newest()
    assert shard.status().versions == (1, 3)
    for version in (3, 2, 1, 2):
        assert shard.load(version) is shard.view(1)
        assert shard.newest() is held
    assert shard.status().versions == (1, 2, 3)
    assert_holds(shard, writer)
    fresh = Shard(writer.store, "words", 0, tmp_path)
    assert fresh.load(2).version == 2
    assert fresh.status().versions == (2,)
    assert_holds(fresh, writer)


def test_versions_that_a_generation_stands_for_are_the_latest(writer: LogWriter, tmp_path: Path) -> None:
    generation = opened(writer.store, tmp_path).newest()
    assert generation is not None
    generation.stand_for((7, 3))
    assert generation.versions == (1, 3, 7)
    generation.stand_for(tuple(range(5, 60)))
    assert generation.versions == tuple(range(28, 60))


@pytest.mark.parametrize(("outer", "inner"), [(2, 2), (2, 3), (3, 2), (3, 3)])
def test_of_two_loads_at_once_the_newer_version_is_served(
    outer: int, inner: int, writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1, 2)
    writer.seal(tmp_path)
    receive(shard, writer, 2, 3)
    writer.seal(tmp_path)
    receive(shard, writer, 4)
    while_loading(shard, monkeypatch, lambda: (receive(shard, writer, 5), shard.load(inner)))
    view = shard.load(outer)
    assert (view.version, contents(view)) == (outer, writer.live)
    assert shard.view(1).version == max(outer, inner)
    assert shard.status().versions == tuple(sorted({1, outer, inner}))
    receive(shard, writer, 6)
    assert_holds(shard, writer)


def test_first_loads_at_once_serve_one_generation(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one reads further: the log has grown meanwhile."""
    writer.put_points(1, 2)
    shard = Shard(writer.store, "words", 0, tmp_path)
    while_loading(shard, monkeypatch, lambda: (writer.put_points(3), shard.load()))
    shard.load()
    assert_holds(shard, writer)
    receive(shard, writer, 4)
    assert_holds(shard, writer)
    many = Shard(writer.store, "words", 0, tmp_path)
    assert not all_in_threads(*[many.load] * 6)
    receive(many, writer, 5)
    assert_holds(many, writer)
    assert many.status().versions == (1,)


def test_retire_drops_older_generations_and_the_rest_takes_records(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    receive(shard, writer, 1)
    for number in (10, 20):
        writer.import_points(number)
        shard.load()
    assert shard.status().generations == (1, 2, 3)
    shard.retire(2)
    assert shard.status().generations == (2, 3)
    shard.receive(record(2, upsert(2)).encode(0))
    assert (contents(shard.view(2)), contents(shard.view(3))) == ({2: 2.0, 10: 10.0}, {2: 2.0, 20: 20.0})
    for generation in (3, 1):
        shard.retire(generation)
        assert shard.status().generations == (3,)
    shard.retire(4)  # which this replica could not load
    assert shard.status().error == "nothing is loaded"
    shard.load()
    assert shard.status().generations == (3,)
