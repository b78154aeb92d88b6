"""`jobs.rebuild` without Ray: the next generation holds exactly the live points, whatever is written meanwhile."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors import build_rates, entry_seal
from actors.replica_status import ReplicaStatus
from actors.segment_rows import LiveRows, open_rows
from actors.segment_upkeep import merge_segments
from cluster.config import CollectionConfig, IndexConfig
from cluster.entry_log import end_logs
from cluster.errors import Conflict, Exhausted, Unavailable
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore
from cluster.placement import ReplicaKey
from cluster.segment import delete_segment
from jobs import build_plan, gate, rebuild_task, sealing
from jobs.import_source import Columns
from jobs.report import JobStatus
from jobs.segment_task import is_segment_of
from tests.fakes import Fault, FaultyStore
from tests.unit.jobs.imports import log_of, random_table, run_import, write
from tests.unit.jobs.rebuilds import CONFIG, JOB, Collection, at_each_phase, run_rebuild


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little was written, it is sealed before the commit."""
    monkeypatch.setattr(entry_seal, "LITTLE_POINTS", 0)
    monkeypatch.setattr(entry_seal, "LITTLE_RECORDS", 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of few queries (`test_rebuild_gate` has one of all), and no thread for each build of a few points."""
    monkeypatch.setattr(gate, "EXACT_QUERIES", 2)
    monkeypatch.setattr(gate, "LATENCY_REPEATS", 1)
    monkeypatch.setattr("cluster.gate.LATENCY_FLOOR_MS", 1e6)  # of so few queries
    for module in (rebuild_task, sealing):
        monkeypatch.setattr(module, "shares_of", whole)


def whole(work: Callable[[Callable[[float], None]], Any]) -> Generator[float, None, Any]:
    """As `shares_of`, in this thread: the shares come when it is done."""
    shares: list[float] = []
    result = work(shares.append)
    yield from shares
    return result


def churned(folder: Path, config: CollectionConfig = CONFIG) -> Collection:
    """Several segments in each shard, deleted rows in them, and a tail."""
    made = made_once(config)
    collection = Collection(config, folder, live=dict(made.live), writes=made.writes)
    copy_into(collection.store, made.store)
    return collection


@cache
def made_once(config: CollectionConfig) -> Collection:
    with tempfile.TemporaryDirectory() as folder:
        return make_churned(Path(folder), config)


def make_churned(folder: Path, config: CollectionConfig) -> Collection:
    collection = Collection(config, folder)
    collection.write(range(200))
    collection.seal()
    collection.write(range(150, 260), range(20))
    collection.seal()
    collection.write(range(250, 270), range(140, 155))
    return collection


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("id_type", ["int64", "string"])
def test_rebuild_keeps_every_live_point_and_no_other(id_type: Any, dtype: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, id_type=id_type, vector_dtype=dtype, shards=2)
    collection = churned(tmp_path, config)
    before = collection.newest
    report = run_rebuild(collection)
    after = collection.newest
    assert collection.held() == collection.live
    assert (after.generation, after.version, after.config) == (2, report["version"], config)
    assert [len(entry.segments) for entry in after.shards] == [1, 1]
    assert all(not entry.tombstones and not entry.behind for entry in after.shards)
    assert before.segments.keys().isdisjoint(after.segments)
    assert report["points"] == len(collection.live)


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("little", [True, False])
def test_writes_at_every_phase_are_in_the_new_generation(
    old: int, new: int, little: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not little:
        request.getfixturevalue("eager")
    collection = churned(tmp_path, replace(CONFIG, shards=old))
    phases = []

    def write(phase: str) -> None:
        phases.append(phase)
        first = 1_000 * len(phases)
        collection.write([*range(first, first + 10), 30 + len(phases)], [first + 1, 60 + len(phases)])
        collection.write([first + 1], [first + 2, 999_999])

    run_rebuild(collection, listener=at_each_phase(write), shards=new)
    assert phases == ["seal", "plan", "build", "catch up", "gate", "catch up", "commit"]
    manifest = collection.newest
    assert (len(manifest.shards), manifest.config.shards, manifest.log_set) == (new, new, int(new != old))
    assert all(bool(entry.behind) == (new != old) for entry in manifest.shards)
    assert collection.held() == collection.live


def test_rebuild_keeps_types_that_only_an_import_can_bring_and_those_declared_meanwhile(
    tmp_path: Path, eager: None
) -> None:
    collection = Collection(CONFIG, tmp_path)
    table = random_table(60)
    lists = pa.array([[n, n + 1] if n % 4 else None for n in table["id"].to_pylist()], pa.list_(pa.int32()))
    source = write(tmp_path / "words.parquet", table.append_column("tags", lists))
    run_import(collection.data, source, columns=Columns(attributes="all"), job_id="import-1")
    collection.live = collection.held()
    before = {field.name: field.type for field in schemas(collection)[0]}
    assert before["tags"] == pa.list_(pa.int32())

    def write_new(phase: str) -> None:
        if phase == "gate":
            log_of(collection.store).declare_attributes({"colour": "large_string"})
            collection.write([5, 100], [6], colour=pa.array(["red", "blue"], pa.large_string()))

    run_rebuild(collection, listener=at_each_phase(write_new))
    assert collection.held() == collection.live
    first, second = schemas(collection)
    assert {field.name: field.type for field in first} == before
    types = {field.name: field.type for field in second}
    assert types["colour"] == pa.large_string()
    assert {name: types[name] for name in before} == before
    assert collection.newest.attributes["colour"] == "large_string"


def schemas(collection: Collection) -> list[Any]:
    """Of all segments, in the order of the manifest."""
    refs = [ref for entry in collection.newest.shards for ref in entry.segments]
    return [open_rows(collection.store, "words", ref, collection.folder).schema for ref in refs]


def test_rebuild_seals_what_is_more_than_little_before_its_commit(tmp_path: Path, eager: None) -> None:
    collection = churned(tmp_path, replace(CONFIG, shards=2))

    firsts = iter((1_000, 2_000))

    def write(phase: str) -> None:
        if phase == "catch up":
            first = next(firsts)
            collection.write([*range(first, first + 20), first // 20], [31])

    run_rebuild(collection, listener=at_each_phase(write), shards=3)
    manifest = collection.newest
    assert [len(entry.segments) for entry in manifest.shards] == [3, 3, 3]  # built, and two rounds
    assert manifest.points == len(collection.live)  # nothing is left for the replicas to read
    assert sum(ref.count for entry in manifest.shards for ref in entry.tombstones) == 3
    assert collection.held() == collection.live


def test_tail_is_not_sealed_point_by_point_however_little_memory_there_is(tmp_path: Path) -> None:
    collection = Collection(CONFIG, tmp_path)
    for number in range(12):
        collection.write([number])
    before = collection.newest.version
    run_rebuild(collection, memory_bytes=1)
    assert collection.newest.version == before + 2  # one seal, and the generation
    assert collection.held() == collection.live


def test_segment_whose_points_were_all_written_again_is_deleted(tmp_path: Path, eager: None) -> None:
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(20))

    at_commit: list[list[str]] = []

    def write(phase: str) -> None:
        if phase == "catch up" and collection.writes == 1:
            collection.write(range(30))
        if phase == "commit":
            at_commit.append(segments_of_job(collection))

    run_rebuild(collection, listener=at_each_phase(write))
    (ref,) = collection.newest.shards[0].segments
    assert ref.count == 30
    assert at_commit == [[ref.segment_id]]  # before it: who is stopped after it has committed
    assert collection.held() == collection.live
    assert segments_of_job(collection) == [ref.segment_id]


def segments_of_job(collection: Collection) -> list[str]:
    return [name for name in collection.store.folders("collections/words/segments/") if is_segment_of(JOB, name)]


def test_rebuild_of_a_collection_without_points(tmp_path: Path) -> None:
    collection = Collection(CONFIG, tmp_path)
    report = run_rebuild(collection, shards=2)
    assert (report["points"], report["segments"], report["shards"]) == (0, 0, 2)
    assert collection.held() == {}
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(3))
    collection.write([], range(3))
    assert run_rebuild(collection)["points"] == 0
    assert collection.held() == {}


# --- from set to set ----------------------------------------------------------------------------------------------


def test_reshards_in_turn_with_logs_that_end_and_writes_to_the_next_ones(tmp_path: Path) -> None:
    collection = churned(tmp_path)
    for number, shards in enumerate((3, 2, 1)):
        run_rebuild(collection, shards=shards, job_id=f"rebuild-{number}")
        assert collection.newest.log_set == number + 1
        old = collection.newest.behind
        end_logs(collection.store, "words", old, lambda: uuid.uuid4().hex)
        first = 2_000 + 100 * number
        collection.write(range(first, first + 50), [first - 90, 100 + number])
        assert collection.held() == collection.live
    collection.seal()
    manifest = collection.newest
    assert not manifest.crossing
    assert manifest.points == len(collection.live)
    assert collection.held() == collection.live


def test_rebuild_while_the_last_one_is_not_switched_to_is_a_conflict(tmp_path: Path) -> None:
    collection = churned(tmp_path)
    run_rebuild(collection, shards=2)
    before = collection.newest
    with pytest.raises(Conflict, match="is being switched to generation 2"):
        run_rebuild(collection, shards=3, job_id="rebuild-2")
    assert collection.newest == before


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_generation_that_is_committed_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    collection = churned(tmp_path)

    def replace_it(phase: str) -> None:
        if phase == "gate":
            run_rebuild(collection, job_id="rebuild-2")

    with pytest.raises(Conflict, match="generation 2 of 'words' has replaced 1"):
        run_rebuild(collection, listener=at_each_phase(replace_it))
    assert collection.newest.generation == 2
    assert segments_of_job(collection) == []
    assert collection.held() == collection.live


def test_commit_that_another_generation_comes_before_is_a_conflict(tmp_path: Path) -> None:
    collection = churned(tmp_path)

    def replace_it(phase: str) -> None:
        if phase == "commit":
            run_rebuild(collection, job_id="rebuild-2")

    with pytest.raises(Conflict, match="committed by another writer"):
        run_rebuild(collection, listener=at_each_phase(replace_it), shards=2)
    assert segments_of_job(collection) == []
    assert collection.held() == collection.live


def test_collection_that_is_deleted_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    collection = churned(tmp_path)

    def delete_it(phase: str) -> None:
        if phase == "gate":
            log_of(collection.store).delete()

    with pytest.raises(Conflict, match="deleted meanwhile"):
        run_rebuild(collection, listener=at_each_phase(delete_it))
    assert segments_of_job(collection) == []


def test_segment_that_was_collected_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    collection = churned(tmp_path)

    def collect(phase: str) -> None:
        if phase == "build":
            for ref in collection.newest.shards[0].segments:
                delete_segment(collection.store, "words", ref.segment_id)

    with pytest.raises(Conflict, match="a segment that is to be rebuilt is gone"):
        run_rebuild(collection, listener=at_each_phase(collect))


def test_seals_and_merges_of_what_is_served_do_not_disturb_a_rebuild(tmp_path: Path, eager: None) -> None:
    collection = churned(tmp_path)

    def keep(phase: str) -> None:
        collection.write([collection.writes + 500], [collection.writes])
        collection.seal()
        names = [ref.segment_id for ref in collection.newest.shards[0].segments]
        place = (collection.store, "words", 0, names, tmp_path)
        merge_segments(*place, lambda: uuid.uuid4().hex)

    run_rebuild(collection, listener=at_each_phase(keep), shards=3)
    assert collection.newest.generation == 2
    assert collection.held() == collection.live


@pytest.mark.parametrize("phase", ["seal", "plan", "build", "catch up", "gate", "commit"])
def test_rebuild_that_is_stopped_leaves_nothing_and_can_be_run_again(phase: str, tmp_path: Path) -> None:
    collection = churned(tmp_path)

    def stop(now: str) -> None:
        if now == phase:
            raise SystemExit(15)

    with pytest.raises(SystemExit):
        run_rebuild(collection, listener=at_each_phase(stop), shards=2)
    assert collection.newest.generation == 1
    assert collection.held() == collection.live
    assert segments_of_job(collection) == []
    run_rebuild(collection, shards=2)
    assert collection.newest.generation == 2
    assert collection.held() == collection.live


SOME, LAST = 23, 6  # of the calls one in so many is tried, another one for each fault, and all of the last ones


@pytest.mark.parametrize(("first", "fault"), [(1, "fail"), (5, "lose_answer"), (9, "die")])
def test_store_that_fails_at_some_call_leaves_the_old_generation_or_the_whole_new_one(
    first: int, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    small = Collection(CONFIG, tmp_path)
    small.write(range(12))
    small.seal()
    small.write([3, 20], [4])
    base = small.store
    stores: list[ObjectStore] = []
    for module in (rebuild_task, sealing):
        monkeypatch.setattr(module, "open_store", lambda url: stores[-1])

    def attempt(inner: MemoryStore, at: int) -> tuple[FaultyStore, dict[str, Any] | None]:
        store = FaultyStore(inner, at, fault)
        stores.append(store)
        monkeypatch.setattr(Collection, "store", inner)
        try:
            return store, run_rebuild(small, store=store, shards=2)
        except Unavailable:
            return store, None

    counted, clean = attempt(copy_of(base), 0)
    assert clean is not None
    assert counted.calls > 60
    until = counted.calls - LAST
    for at in (*range(first, until, SOME), *range(until, counted.calls + 1)):
        inner = copy_of(base)
        _, returned = attempt(inner, at)
        assert small.held() == small.live, f"call {at}"
        assert (small.newest.generation == 2) == (returned is not None), f"call {at}"
        if returned is None and at % 3 == 0:
            _, again = attempt(inner, 0)  # no repair by hand is needed
            assert again is not None
            assert small.held() == small.live, f"call {at}, run again"


def copy_of(store: ObjectStore) -> MemoryStore:
    copy = MemoryStore()
    copy_into(copy, store)
    return copy


def copy_into(copy: ObjectStore, store: ObjectStore) -> None:
    for info in store.objects(""):
        copy.put(info.key, store.get(info.key))


# --- memory and time ----------------------------------------------------------------------------------------------


def test_no_task_holds_more_than_its_range_of_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the memory that one segment takes, and all points in one segment to begin with."""
    collection = Collection(replace(CONFIG, dimension=8), tmp_path)
    collection.write(range(500))
    collection.seal()
    collection.write(range(450, 550), range(50))
    collection.seal()
    ordered: list[int] = []
    blocks: list[int] = []

    class Counted(LiveRows):
        def __init__(self, parts: Any) -> None:
            super().__init__(parts)
            ordered.append(sum(len(part.span) for part in parts))

        def blocks(self, schema: Any, step: int) -> Any:
            for block in super().blocks(schema, step):
                blocks.append(block.num_rows)
                yield block

    monkeypatch.setattr(rebuild_task, "LiveRows", Counted)
    monkeypatch.setattr(rebuild_task, "rows_per_batch", lambda config: 32)
    run_rebuild(collection, memory_bytes=500 * 8 * 4 // 10)
    (entry,) = collection.newest.shards
    assert len(entry.segments) >= 10
    assert len(ordered) == len(entry.segments)
    assert max(ordered) < 2 * 600 / len(ordered)
    assert sum(blocks) == len(collection.live)
    assert max(blocks) == 32
    assert collection.held() == collection.live


def test_large_builds_are_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "MEASURED_MIN", 400)
    monkeypatch.setattr(build_rates, "SAMPLE_MIN", 100)
    collection = churned(tmp_path, replace(CONFIG, index=IndexConfig("hnsw")))
    collection.write(range(1_000, 1_900), range(1_000, 1_100))
    phases: list[str] = []
    plans: list[dict[str, Any]] = []

    def listener(status: JobStatus) -> None:
        phases.append(status.phase)
        plans.append(status.plan)

    run_rebuild(collection, listener=listener, shards=2)
    assert list(dict.fromkeys(phases)) == ["seal", "plan", "measure", "build", "catch up", "gate", "commit"]
    assert plans[-1]["rates_measured"] is True
    assert collection.held() == collection.live


def test_progress_only_grows_and_tells_a_rate_and_the_time_left(tmp_path: Path) -> None:
    collection = churned(tmp_path, replace(CONFIG, shards=2))
    told: list[JobStatus] = []
    run_rebuild(collection, listener=told.append, shards=3)
    shares = [status.progress for status in told]
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] < 1.0
    assert any(status.phase == "build" and status.rate > 0 for status in told)
    assert any(status.remaining_s is not None for status in told)


def test_switch_that_memory_does_not_allow_is_refused_with_the_numbers_before_anything_is_built(tmp_path: Path) -> None:
    collection = churned(tmp_path)
    small = replica(available=1, total=10)
    with pytest.raises(Exhausted, match="memory of the switch: node a needs"):
        run_rebuild(collection, statuses=lambda: {ReplicaKey("words", 0, 0): small})
    assert segments_of_job(collection) == []
    assert collection.held() == collection.live


def test_switch_that_has_little_memory_is_made_by_one_replica_at_a_time(tmp_path: Path) -> None:
    collection = churned(tmp_path, replace(CONFIG, replicas=2))
    nodes = [replica(available=2_000, total=10, node=node, loaded=10**6) for node in "ab"]
    told = run_rebuild(collection, statuses=lambda: {ReplicaKey("words", 0, n): nodes[n] for n in range(2)})
    assert collection.newest.switch == "one_at_a_time"
    assert told["memory"]["switch"]["mode"] == "one_at_a_time"
    assert "one replica of each shard at a time" in told["memory"]["switch"]["statement"]


def replica(available: int, total: int, node: str = "a", loaded: int = 0) -> ReplicaStatus:
    segments = ({"predicted_bytes": loaded, "count": 0},)
    return ReplicaStatus("ready", node=node, segments=segments, node_memory=(available, total))
