"""One shard on its way to another log set: it reads the earlier logs beside what is served, then follows its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.crossing import NEAR_S, Crossing, CrossingThread
from actors.generation_files import GenerationFiles
from actors.live_generation import LiveGeneration
from actors.primary import Primary
from actors.shard import Shard
from cluster import wal as wal_module
from cluster.errors import Fenced, Unavailable
from cluster.ids import id_array
from cluster.manifest import Manifest, ShardEntry
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.routing import Routing
from cluster.wal import Wal, WalRecord
from cluster.write import PointWrite
from tests.fakes import FaultyStore, ManualClock
from tests.unit.actors.batches import LIMITS, UPKEEP, WAIT_S, delete, opened, record, upsert
from tests.unit.actors.log_writer import Contents, LogWriter, contents
from tests.unit.actors.points import manifest_log
from tests.unit.actors.resharding import end, new_nonce, records, replayed, split

SHARDS = 3
Reshard = Callable[[ObjectStore, int], Manifest]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_module, "APPEND_PAUSE_S", 0.0)


@pytest.fixture
def writer() -> LogWriter:
    writer = LogWriter(MemoryStore())
    writer.put(upsert(*range(40)))
    writer.put(delete(0, 3))
    return writer


def part(live: Contents, shard: int, shards: int = SHARDS) -> Contents:
    """What of it a shard holds."""
    numbers = Routing(shards).shards_of_ids(id_array(list(live), "int64")).tolist()
    return {point_id: at for (point_id, at), number in zip(live.items(), numbers, strict=True) if number == shard}


def shard_of(writer: LogWriter, number: int, cache_dir: Path) -> Shard:
    return Shard(writer.store, "words", number, cache_dir)


def near(shard: Shard) -> Shard:
    """It has read all there is."""
    assert not shard.advance()
    return shard


def arrived(shard: Shard) -> Shard:
    assert shard.advance()
    shard.arrive()
    return shard


def mine(shard: int, first: int = 100, shards: int = SHARDS) -> int:
    """An id that the shard takes."""
    return next(n for n in range(first, 10_000) if Routing(shards).shards_of_ids(id_array([n], "int64"))[0] == shard)


# --- on the way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reshard", [replayed, split])
def test_generation_of_another_log_set_reads_the_earlier_logs_beside_what_is_served(
    reshard: Reshard, writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    manifest = reshard(writer.store, SHARDS)
    writer.put(upsert(1, 2, at=500.0))
    shard.load()
    status = near(shard).status()
    assert (status.state, status.versions, status.generations) == ("ready", (1, manifest.version), (1,))
    assert list(status.crossing) == [2]
    assert (status.log_set, status.log_ended, status.error) == (0, False, "")
    with pytest.raises(Unavailable, match="generation 2 of 'words' is not loaded here"):
        shard.view(2)
    shard.receive(writer.push(upsert(41, 42)))
    shard.catch_up()
    assert contents(shard.view(1)) == writer.live, "what is served follows its log"
    near(shard)
    end(writer.store, manifest)
    arrived(shard)
    assert contents(shard.view(2)) == part(writer.live, 0)


def test_all_shards_of_the_new_set_hold_every_point_once(writer: LogWriter, tmp_path: Path) -> None:
    manifest = replayed(writer.store, SHARDS)
    shards = [shard_of(writer, number, tmp_path) for number in range(SHARDS)]
    for shard in shards:
        shard.load()
        assert (near(shard).status().generations, list(shard.status().crossing)) == ((), [2])
    writer.put(upsert(*range(30, 60), at=7.0))
    writer.put(delete(31))
    start = end(writer.store, manifest)
    assert [record.kind for record in records(writer.store, 0, 0, writer.lsn)] == ["claim", "end"]
    for number, shard in enumerate(shards):
        arrived(shard)
        assert contents(shard.view(2)) == part(writer.live, number)
        status = shard.status()
        assert (status.lsn, status.log_start, status.log_set, status.log_ended) == (start, start, 1, False)
        assert (status.generations, status.crossing) == ((2,), {})


def test_lag_is_what_is_unread_until_little_is_left(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.crossing.NEAR_RECORDS", 5)
    replayed(writer.store, SHARDS)
    writer.put_points(*range(100, 130))
    shard = opened(writer.store, tmp_path)
    lags = [shard.status().crossing[2]]
    cross = LiveGeneration.cross

    def crossing(self: LiveGeneration, record: WalRecord) -> None:
        cross(self, record)
        lags.append(shard.status().crossing[2])

    monkeypatch.setattr(LiveGeneration, "cross", crossing)
    near(shard)
    assert lags[0] == writer.lsn + 5
    assert lags == sorted(lags, reverse=True)
    assert min(lags) > 5, "it is not near before it has read to the end"
    assert shard.status().crossing == {2: 0}
    writer.put_points(200, 201)
    near(shard)
    assert shard.status().crossing[2] <= 2


@pytest.mark.parametrize("read_s", [0.5 * NEAR_S, 2.0 * NEAR_S])
def test_what_is_left_under_heavy_writes_is_near_where_it_is_read_in_a_moment(
    read_s: float, writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many records come while some are read, so that the lag never gets less."""
    monkeypatch.setattr("actors.crossing.NEAR_RECORDS", 3)
    manifest = replayed(writer.store, SHARDS)
    shard, clock = opened(writer.store, tmp_path), ManualClock()
    crossing = shard.crossing
    assert crossing is not None
    monkeypatch.setattr(crossing, "_clock", clock)
    read_on = Crossing._read_on

    def reading(self: Crossing) -> int:
        count = read_on(self)
        clock.advance(read_s)
        writer.put_points(*range(100, 105))
        return count

    monkeypatch.setattr(Crossing, "_read_on", reading)
    for _ in range(3):
        lag = near(shard).status().crossing[manifest.generation]
    assert lag == (3 if read_s < NEAR_S else 5)


def test_records_of_other_shards_count_for_what_is_unread_because_they_are_read_as_well(
    writer: LogWriter, tmp_path: Path
) -> None:
    manifest = replayed(writer.store, SHARDS)
    shard = near(opened(writer.store, tmp_path))
    writer.put_points(*[mine(1, first) for first in range(100, 110)])
    assert near(shard).status().crossing == {manifest.generation: 10}


def test_crossing_that_is_loaded_again_and_again_keeps_a_bounded_list_of_versions(
    writer: LogWriter, tmp_path: Path
) -> None:
    manifest = replayed(writer.store, SHARDS)
    shard = opened(writer.store, tmp_path)
    for _ in range(5):  # the supervisor has it loaded until it has arrived
        shard.load(manifest.version)
    assert shard.crossing is not None
    assert shard.crossing.versions == (manifest.version,)


def test_later_version_of_the_same_files_goes_on_where_the_crossing_is(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replayed(writer.store, SHARDS)
    shard = near(opened(writer.store, tmp_path))
    taken: list[int] = []
    cross = LiveGeneration.cross

    def crossing(self: LiveGeneration, record: WalRecord) -> None:
        taken.append(record.lsn)
        cross(self, record)

    monkeypatch.setattr(LiveGeneration, "cross", crossing)
    declared = manifest_log(writer.store, "words").declare_attributes({"name": "string"})
    writer.put(upsert(50))
    shard.load()
    assert set(shard.status().versions) == {manifest.version, declared.version}
    end(writer.store, manifest)
    arrived(shard)
    assert set(taken) <= {writer.lsn}, "nothing is read again"
    assert shard.view(2).version == declared.version
    assert list(shard.view(2).attributes) == ["name"]
    assert contents(shard.view(2)) == part(writer.live, 0)


def test_crossing_that_was_taken_back_is_dropped(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    replayed(writer.store, SHARDS)
    shard.load()
    back = replayed(writer.store, 1)
    shard.load()
    status = near(shard).status()
    assert (status.generations, list(status.crossing), set(status.versions)) == ((1,), [3], {1, 3})
    writer.put(upsert(77))
    start = end(writer.store, back)
    arrived(shard)
    assert contents(shard.view(3)) == contents(shard.view(1)) == writer.live
    assert (shard.status().log_set, shard.status().log_start) == (2, start)
    assert [record.kind for record in records(writer.store, 1, 0, start - 2)] == ["claim", "end"]


# --- what fails there -----------------------------------------------------------------------------------------------


def test_store_that_fails_while_crossing_harms_nothing_and_it_goes_on_afterwards(
    writer: LogWriter, tmp_path: Path
) -> None:
    store = FaultyStore(writer.store)
    shard = opened(store, tmp_path)
    manifest = replayed(writer.store, SHARDS)
    shard.load()
    near(shard)
    writer.put(upsert(50))
    for _ in range(3):
        store.at = store.calls + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wal_module, "READ_TRIES", 1)
            with pytest.raises(Unavailable):
                shard.advance()
        status = shard.status()
        assert (status.state, status.generations, status.versions, status.crossing) == ("ready", (1,), (1,), {})
        assert contents(shard.view(1)).keys() == writer.live.keys() - {50}
    shard.load()  # as the supervisor has it, for the version is not among those that are held
    assert list(shard.status().crossing) == [2]
    end(writer.store, manifest)
    assert contents(arrived(shard).view(2)) == part(writer.live, 0)


def test_crossing_that_applied_a_record_by_half_is_loaded_anew(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = opened(writer.store, tmp_path)
    manifest = replayed(writer.store, SHARDS)
    shard.load()
    with monkeypatch.context() as patch:
        patch.setattr(LiveGeneration, "cross", lambda self, record: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shard.advance()
    assert (shard.crossing, shard.status().versions) == (None, (1,))
    assert contents(shard.view(1)) == writer.live
    shard.load()
    near(shard)
    end(writer.store, manifest)
    assert contents(arrived(shard).view(2)) == part(writer.live, 0)


def test_own_log_that_cannot_be_read_on_arrival_is_read_again(writer: LogWriter, tmp_path: Path) -> None:
    store = FaultyStore(writer.store)
    shard = opened(store, tmp_path)
    manifest = replayed(writer.store, SHARDS)
    shard.load()
    start = end(writer.store, manifest)
    Wal(writer.store, "words", 0, 1).claim(start, 9, new_nonce())
    assert shard.advance()
    shard.catch_up()
    store.at = store.calls + 1
    with pytest.raises(Unavailable):
        shard.arrive()
    assert (shard.status().generations, shard.status().log_ended) == ((1,), True)
    shard.arrive()
    assert (shard.status().generations, shard.status().lsn) == ((1, 2), start + 1)


def test_crossing_that_is_dropped_while_it_is_loaded_again_is_no_error(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that reads on drops it where a record was applied by half."""
    shard = opened(writer.store, tmp_path)
    manifest = replayed(writer.store, SHARDS)
    shard.load()
    stands_for = Crossing.stands_for

    def dropped_meanwhile(self: Crossing, manifest: Manifest) -> bool:
        stands = stands_for(self, manifest)
        shard.crossing = None
        return stands

    with monkeypatch.context() as patch:
        patch.setattr(Crossing, "stands_for", dropped_meanwhile)
        shard.load()
    shard.load()
    near(shard)
    end(writer.store, manifest)
    assert contents(arrived(shard).view(2)) == part(writer.live, 0)


# --- arrival and after ------------------------------------------------------------------------------------------------


def switched(writer: LogWriter, shard: Shard) -> int:
    """Shard 0 has gone over; the LSN at which its log begins."""
    manifest = replayed(writer.store, SHARDS)
    shard.load()
    start = end(writer.store, manifest)
    arrived(shard)
    return start


def test_old_generation_stays_at_the_end_of_its_log_and_the_new_one_takes_records(
    writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    writer.put(upsert(90))  # not applied yet
    start = switched(writer, shard)
    before, new = dict(writer.live), mine(0)
    assert shard.view(1).lsn == start
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    outcome = primary.write(upsert(new)).result(WAIT_S)
    primary.stop()
    assert outcome.lsn == start + 2
    assert [record.kind for record in records(writer.store, 1, 0, start)] == ["claim", "write"]
    assert contents(shard.view(1)) == before, "which has all that was written before the end, and nothing after"
    assert contents(shard.view(2)) == part(before, 0) | {new: float(new)}
    assert records(writer.store, 1, 0, start)[0].epoch > records(writer.store, 0, 0)[-1].epoch
    shard.retire(2)
    assert shard.status().generations == (2,)


def test_replica_that_arrives_late_reads_what_another_wrote_meanwhile(writer: LogWriter, tmp_path: Path) -> None:
    late, shard = opened(writer.store, tmp_path), opened(writer.store, tmp_path)
    manifest = replayed(writer.store, SHARDS)
    late.load()
    start = switched_to(manifest, writer, shard)
    primary = Primary.claim(shard, LIMITS, UPKEEP, push=late.receive)
    new = mine(0)
    primary.write(upsert(new)).result(WAIT_S)
    assert (late.status().generations, late.status().log_ended) == ((1,), True), "its old log has ended"
    arrived(late)
    assert late.applied_lsn == start + 2
    primary.write(upsert(mine(0, new + 1))).result(WAIT_S)
    primary.stop()
    assert late.applied_lsn == start + 3, "pushed records are applied from now on"
    assert contents(late.view(2)) == contents(shard.view(2))


def switched_to(manifest: Manifest, writer: LogWriter, shard: Shard) -> int:
    shard.load()
    start = end(writer.store, manifest)
    arrived(shard)
    return start


@pytest.mark.parametrize("led", [False, True])
def test_restart_after_the_switch_comes_to_the_same_state(led: bool, writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    start = switched(writer, shard)
    if led:
        primary = Primary.claim(shard, LIMITS, UPKEEP)
        primary.write(upsert(mine(0))).result(WAIT_S)
        primary.stop()
    again = opened(writer.store, tmp_path)
    assert contents(again.view(2)) == contents(shard.view(2))
    status = again.status()
    assert (status.generations, status.log_set, status.log_start, status.lsn) == ((2,), 1, start, shard.applied_lsn)
    again.load(1)  # which is served until all have arrived
    assert again.status().generations == (1, 2)
    assert contents(again.view(1)) == contents(shard.view(1))
    assert again.view(1).lsn == start
    assert (again.status().log_set, again.applied_lsn, again.crossing) == (1, shard.applied_lsn, None)
    Primary.claim(again, LIMITS, UPKEEP).stop()


def test_restart_while_crossing_holds_nothing_until_the_served_version_is_loaded_beside_it(
    writer: LogWriter, tmp_path: Path
) -> None:
    manifest = replayed(writer.store, SHARDS)
    shard = opened(writer.store, tmp_path)
    status = shard.status()
    assert (status.state, status.generations, status.versions) == ("ready", (), (manifest.version,))
    shard.load(1)
    assert (shard.status().generations, list(shard.status().crossing)) == ((1,), [2])
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    primary.write(upsert(70)).result(WAIT_S)
    near(shard)
    end(writer.store, manifest)
    with pytest.raises(Fenced, match="another writer's claim"):
        primary.write(upsert(71)).result(WAIT_S)
    arrived(shard)
    assert contents(shard.view(2)) == part(writer.live | {70: 70.0}, 0)


def test_restart_while_crossing_goes_on_with_what_it_has_read_when_the_logs_have_ended(
    writer: LogWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replayed(writer.store, SHARDS)
    shard = near(opened(writer.store, tmp_path))
    crossing = shard.crossing
    end(writer.store, manifest)
    given_up: list[int] = []
    shard.before_arrival = lambda: given_up.append(shard.applied_lsn)
    monkeypatch.setattr(GenerationFiles, "generation", lambda *_: pytest.fail("it is loaded twice"))
    shard.load(manifest.version)
    assert crossing is not None
    assert (shard.crossing, shard.newest()) == (None, crossing.generation)
    shard.arrive()
    assert given_up == [0], "it arrives once, before anybody can lead"
    assert contents(shard.view(2)) == part(writer.live, 0)


class Switching(Shard):
    """Another thread has it arrive just when somebody looks which log it follows."""

    armed = False

    @property
    def wal(self) -> Wal:
        followed: Wal = self.__dict__["wal"]
        if self.armed:
            self.armed = False
            other = threading.Thread(target=self.arrive)
            other.start()
            other.join(0.1)
            self.arriving = other
        return followed

    @wal.setter
    def wal(self, wal: Wal) -> None:
        self.__dict__["wal"] = wal


def test_claim_behind_the_end_of_a_log_is_not_taken_for_a_record_of_the_next_one(
    writer: LogWriter, tmp_path: Path
) -> None:
    shard = Switching(writer.store, "words", 0, tmp_path)
    shard.load()
    manifest = replayed(writer.store, SHARDS)
    shard.load()
    start = end(writer.store, manifest)
    assert shard.advance()
    Wal(writer.store, "words", 0, 0).append(WalRecord(start + 1, 9, "claim", new_nonce()))  # it came too late
    shard.armed = True
    shard.catch_up()
    shard.arriving.join()
    assert (shard.status().log_set, shard.applied_lsn) == (1, start)


def test_shard_that_was_away_until_the_new_set_was_sealed_goes_over_all_the_same(
    writer: LogWriter, tmp_path: Path
) -> None:
    away, shard = opened(writer.store, tmp_path), opened(writer.store, tmp_path)
    start = switched(writer, shard)
    Primary.claim(shard, LIMITS, UPKEEP).stop()
    log = manifest_log(writer.store, "words")
    sealed = log.commit_shards(log.newest_live(), {0: ShardEntry(0, (), shard.applied_lsn, shard.epoch)})
    away.load(sealed.version)
    status = away.status()
    assert (status.generations, status.log_set, status.log_start, status.lsn) == ((1, 2), 1, start, start + 1)
    assert contents(away.view(1)) == writer.live
    assert (opened(writer.store, tmp_path).status().log_start, away.view(2).points) == (start, 0)


def test_version_of_the_new_set_that_was_not_sealed_is_brought_to_the_lsn_of_the_others(
    writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    start = switched(writer, shard)
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    new = mine(0)
    primary.write(upsert(new)).result(WAIT_S)
    declared = manifest_log(writer.store, "words").declare_attributes({"name": "string"})
    shard.load(declared.version)
    assert (shard.view(2).version, shard.view(2).lsn) == (declared.version, start + 2)
    assert contents(shard.view(2)) == part(writer.live, 0) | {new: float(new)}
    primary.write(upsert(mine(0, new + 1))).result(WAIT_S)
    primary.stop()
    assert shard.view(2).lsn == start + 3


def test_log_sets_follow_one_another(writer: LogWriter, tmp_path: Path) -> None:
    """1 -> 3 -> 2: what was written to each set is in the last one, and what came later counts."""
    shards = {number: shard_of(writer, number, tmp_path) for number in range(SHARDS)}
    three = replayed(writer.store, 3)
    end(writer.store, three)
    for number, shard in shards.items():
        shard.load()
        primary = Primary.claim(shard, LIMITS, UPKEEP)
        point = next(iter(part(writer.live, number)))
        primary.write(upsert(point, at=900.0)).result(WAIT_S)
        gone = mine(number, 10) if number else point + 10_000
        primary.write(delete(gone)).result(WAIT_S)
        primary.stop()
        writer.live[point] = 900.0
        writer.live.pop(gone, None)
    two = replayed(writer.store, 2)
    start = end(writer.store, two)
    for number in range(2):
        shards[number].load()
        assert shards[number].status().generations == (2, 3)
        assert contents(shards[number].view(3)) == part(writer.live, number, 2)
        assert (shards[number].status().log_set, shards[number].status().log_start) == (2, start)
    assert max(record.lsn for number in range(3) for record in records(writer.store, 1, number, three_start(writer)))
    assert not records(writer.store, 2, 0, start), "nobody has led it yet"


def three_start(writer: LogWriter) -> int:
    return records(writer.store, 0, 0)[-1].lsn


# --- who leads a log that ends ----------------------------------------------------------------------------------------


def test_primary_of_a_log_that_ends_acknowledges_nothing_more(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    manifest = replayed(writer.store, SHARDS)
    start = end(writer.store, manifest)
    with pytest.raises(Fenced):
        primary.write(upsert(1)).result(WAIT_S)
    with pytest.raises(Fenced):
        primary.write(upsert(1))
    assert "another writer's end" in primary.lost
    shard.load()
    primary.stop()
    assert contents(shard.view(2)) == part(writer.live, 0)
    assert records(writer.store, 1, 0, start) == []


def test_claim_of_an_ended_log_is_fenced_and_writes_nothing(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    end(writer.store, replayed(writer.store, SHARDS))
    before = {info.key for info in writer.store.objects("")}
    with pytest.raises(Fenced, match="ended at LSN 4"):
        Primary.claim(shard, LIMITS, UPKEEP)
    assert {info.key for info in writer.store.objects("")} == before
    assert shard.status().epoch == 0


def test_restart_at_a_manifest_that_names_the_end_of_the_log_knows_that_it_has_ended(
    writer: LogWriter, tmp_path: Path
) -> None:
    last = Wal(writer.store, "words", 0, 0).finish(0, 0, new_nonce)
    log = manifest_log(writer.store, "words")
    log.commit_shards(log.newest_live(), {0: ShardEntry(0, (), last.lsn, last.epoch)})
    shard = opened(writer.store, tmp_path)
    assert shard.status().log_ended
    pushed = record(last.lsn + 1, upsert(1)).encode(0, "words")
    shard.receive(pushed)
    assert (shard.applied_lsn, contents(shard.view(1))) == (last.lsn, {}), "what comes then is of another log"


@pytest.mark.parametrize("write", [upsert(1), delete(1)])
def test_write_that_was_split_by_another_routing_is_fenced(
    write: PointWrite, writer: LogWriter, tmp_path: Path
) -> None:
    shard = opened(writer.store, tmp_path)
    switched(writer, shard)
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    with pytest.raises(Fenced, match="split over 1 shards, shard 0 is one of 3: nothing was applied"):
        primary.write(PointWrite(write.upserts, write.deletes, shards=1))
    primary.write(PointWrite(write.upserts, write.deletes, shards=3)).result(WAIT_S)
    primary.stop()


def test_whoever_leads_gives_up_before_the_log_changes(writer: LogWriter, tmp_path: Path) -> None:
    shard = opened(writer.store, tmp_path)
    primary = Primary.claim(shard, LIMITS, UPKEEP)
    given_up: list[int] = []

    def give_up() -> None:
        given_up.append(shard.applied_lsn)
        primary.stop()

    shard.before_arrival = give_up
    start = switched(writer, shard)
    assert given_up == [writer.lsn + 1]
    assert (shard.status().epoch, shard.applied_lsn) == (0, start)


# --- the thread -------------------------------------------------------------------------------------------------------


def test_thread_tells_why_a_crossing_fails_and_goes_on_until_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.crossing.PERIOD_S", 0.001)
    thread, done = CrossingThread("words/0/0", threading.Event()), threading.Event()
    outcomes: list[bool | None] = [None, None, False, True]
    seen: list[str] = []

    def advance() -> bool:
        seen.append(thread.failure)
        outcome = outcomes.pop(0)
        if outcome is None:
            raise Unavailable("the store is away")
        return outcome

    for _ in range(2):  # one thread is enough
        thread.see_to(lambda: None if done.is_set() else 0, advance, done.set)
    assert done.wait(WAIT_S)
    failure = "crossing to another log set: the store is away"
    assert (seen, outcomes) == (["", failure, failure, ""], [])


class Pauses(threading.Event):
    """What a thread waits for between its looks at the logs: `periods` has how long each time, and no time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.periods = [0]

    def wait(self, timeout: float | None = None) -> bool:
        self.periods[-1] += 1
        return self.is_set()


def looked_at(read_by: list[int | None], called_at: int | None = None) -> list[int]:
    """How many periods a thread waits after each look; `read_by` has how many records were read after each."""
    thread, pauses, left, done = CrossingThread("words/0/0", threading.Event()), Pauses(), iter(read_by), []
    thread._called = pauses
    now: int | None = 0

    def advance() -> bool:
        nonlocal now
        now = next(left)
        pauses.periods.append(0)
        done.append(now)
        if len(done) == called_at:
            thread.see_to(lambda: now, advance, lambda: None)
        return False

    thread.see_to(lambda: now, advance, lambda: None)
    if (running := thread._thread) is not None:
        running.join(WAIT_S)
    assert done == read_by
    return pauses.periods[1:-1]


def test_logs_without_records_are_looked_at_less_and_less() -> None:
    assert looked_at([0] * 8 + [None]) == [1, 2, 4, 8, 16, 20, 20, 20]


def test_pause_is_short_again_once_a_record_was_read() -> None:
    assert looked_at([0] * 5 + [1] * 4 + [None]) == [1, 2, 4, 8, 16, 1, 2, 4, 8]


def test_pause_is_short_again_after_a_call_in_a_look() -> None:
    """Nobody knows whether that look still saw what the call is for: the next one comes after one period."""
    assert looked_at([0] * 8 + [None], called_at=5) == [1, 2, 4, 8, 1, 1, 2, 4]


def test_call_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.crossing.PERIOD_S", 10 * WAIT_S)
    thread, looked = CrossingThread("words/0/0", threading.Event()), threading.Semaphore(0)
    now: int | None = 0

    def advance() -> bool:
        looked.release()
        return False

    for _ in range(3):
        thread.see_to(lambda: now, advance, lambda: None)
        assert looked.acquire(timeout=WAIT_S)
    running, now = thread._thread, None
    thread.see_to(lambda: now, advance, lambda: None)
    assert running is not None
    running.join(WAIT_S)
    assert not running.is_alive()


def test_end_of_the_logs_is_read_when_the_replica_is_told(writer: LogWriter, tmp_path: Path) -> None:
    """However long the thread's pause is by then: writes wait."""
    manifest = replayed(writer.store, SHARDS)
    shard = shard_of(writer, 1, tmp_path)
    shard.load()
    near(shard)
    end(writer.store, manifest)
    shard.load(manifest.version)
    assert (shard.crossing, contents(shard.view(2))) == (None, part(writer.live, 1))
