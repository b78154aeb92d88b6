"""The gate of a rebuild: what it measures is true, and what fails it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import ray_jobs, ray_runtime, segment_builder
from actors.segment_builder import build_segment, publish_segment
from actors.segment_rows import LiveRows
from cluster import gate as rules
from cluster import paths
from cluster.arrow_rows import vectors_array
from cluster.config import CollectionConfig, IndexConfig, Settings
from cluster.errors import Conflict, Invalid
from cluster.gate import GateFailed
from cluster.ids import hash_ids, id_array
from cluster.object_store import open_store
from cluster.recent_queries import QuerySample, store_queries
from cluster.segment import SegmentDescription, SelfTest, rows_schema, write_rows
from jobs import gate, rebuild_task, report, run
from jobs.__main__ import parse_index
from jobs.rebuild import RebuildOptions, changed_config
from jobs.report import JobStatus, read_status
from tests.fakes import run_tasks_here
from tests.unit.actors.points import ONE_THREAD, Points, brute_force, random_vectors
from tests.unit.jobs.imports import log_of
from tests.unit.jobs.rebuilds import CONFIG, JOB, Collection, at_each_phase, run_rebuild

HARD = CollectionConfig(16, metric="l2", index=IndexConfig(kind="flat"))
TINY_CODES = {"kind": "factory", "factory": "IVF4,PQ2x4fs", "rerank_store": "none"}  # two numbers for sixteen


def filled(folder: Path, config: CollectionConfig = HARD, count: int = 600) -> Collection:
    collection = Collection(config, folder)
    collection.write(range(count))
    return collection


# --- fails --------------------------------------------------------------------------------------------------------


def test_index_that_misses_its_target_is_not_served(tmp_path: Path) -> None:
    collection = filled(tmp_path)
    before = collection.newest
    with pytest.raises(GateFailed, match=r"recall@10 of 500 rows with noise is 0\.\d+ .*0.95 is the target") as failed:
        run_rebuild(collection, index=TINY_CODES)
    assert failed.value.report["passed"] is False
    after = collection.newest
    assert (after.generation, after.config) == (before.generation, before.config)
    assert collection.held() == collection.live
    assert [name for name in collection.store.folders("collections/words/segments/") if name.startswith(JOB)] == []
    run_rebuild(collection, index=TINY_CODES | {"target_recall": 0.05})
    assert collection.newest.generation == 2


def test_rows_that_are_lost_on_the_way_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(LiveRows):
        def __init__(self, parts: Any) -> None:
            super().__init__(parts)
            self._rows, self._places, self.count = self._rows[1:], self._places[1:], self.count - 1

    monkeypatch.setattr(rebuild_task, "LiveRows", Forgetful)
    with pytest.raises(GateFailed, match="599 points were built, there are 600"):
        run_rebuild(filled(tmp_path))


def test_vectors_that_changed_on_the_way_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Confused(LiveRows):
        def __init__(self, parts: Any) -> None:
            super().__init__(parts)
            self._rows[1] = self._rows[0]

    monkeypatch.setattr(rebuild_task, "LiveRows", Confused)
    with pytest.raises(GateFailed, match="the points' checksum is"):
        run_rebuild(filled(tmp_path))


def _mixed_up(column: Any) -> Any:
    return column.take(pa.array(np.roll(np.arange(len(column)), 1)))


def _one_lost(column: Any) -> Any:
    return pa.concat_arrays([column[:-1], pa.nulls(1, column.type)])


@pytest.mark.parametrize("name", ["name", "seen"])
@pytest.mark.parametrize("wrong", [_mixed_up, _one_lost])
def test_attributes_that_changed_on_the_way_are_noticed(
    wrong: Callable[[Any], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(LiveRows):
        def blocks(self, schema: Any, step: int) -> Iterator[Any]:
            for block in super().blocks(schema, step):
                yield block.set_column(block.schema.get_field_index(name), name, wrong(block.column(name)))

    collection = filled(tmp_path)
    monkeypatch.setattr(rebuild_task, "LiveRows", Careless)
    with pytest.raises(GateFailed, match="the points' checksum is"):
        run_rebuild(collection)
    monkeypatch.undo()
    run_rebuild(collection)


def test_segments_with_other_attributes_or_types_of_them_are_compared_as_what_is_built_has_them(tmp_path: Path) -> None:
    """The first segment has `size` as int32, the second as text, of which some is no number; the third lacks it."""
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(100), size=pa.array(range(100), pa.int32()), tags=pa.array([["a", None], []] * 50))
    collection.seal()
    _publish_beside(collection, range(100, 200), size=pa.array([str(n) if n % 7 else "?" for n in range(100)]))
    _publish_beside(collection, range(200, 300))
    told = run_rebuild(collection, shards=2)["gate"]["points"]
    assert told["old"] == told["new"]
    assert told["new"]["count"] == 300
    sizes = [attributes.get("size") for _, attributes in collection.held().values()]
    assert sorted(size for size in sizes if size is not None) == sorted(
        [*range(100), *(n for n in range(100) if n % 7)]
    )


def test_lists_that_fit_are_kept_whatever_lies_beside_them(tmp_path: Path) -> None:
    """Else what is built, where they lie beside others, would have other values than were counted: refused for ever."""
    collection = Collection(CONFIG, tmp_path)
    collection.write(range(100), parts=pa.array([[number] for number in range(100)]))
    collection.seal()
    texts = pa.array([[str(number) if number % 3 else "?"] for number in range(100, 200)])
    _publish_beside(collection, range(100, 200), parts=texts)
    run_rebuild(collection, shards=2)
    parts = [attributes.get("parts") for _, attributes in collection.held().values()]
    assert sorted(part for part in parts if part) == [[n] for n in range(200) if n < 100 or n % 3]


def _publish_beside(collection: Collection, numbers: range, **more: Any) -> None:
    """Commit a segment of these points, with these attributes, whatever the others have."""
    ids, folder = pa.array(numbers), collection.folder / f"from-{numbers.start}"
    folder.mkdir()
    schema = rows_schema(CONFIG, {name: column.type for name, column in more.items()})
    vectors = vectors_array(random_vectors(CONFIG, len(ids), numbers.start))
    batch = pa.record_batch([ids, vectors, pa.array(hash_ids(ids)), *more.values()], schema=schema)
    write_rows(folder / paths.ROWS, schema, iter([batch.take(pa.array(np.argsort(hash_ids(ids))))]))
    build_segment(folder, folder.name, CONFIG, len(ids), len(ids), ONE_THREAD)
    ref, log = publish_segment(collection.store, "words", folder, folder.name), log_of(collection.store)
    entry = log.newest_live().shards[0]
    log.commit_shards(log.newest_live(), {0: replace(entry, segments=(*entry.segments, ref))})


def test_segment_that_fails_its_self_test_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_test(*args: Any) -> SelfTest:
        return SelfTest((598, 599), ((1, 2, 3), (4, 5, 6)), 1.0)

    monkeypatch.setattr(segment_builder, "_self_test", wrong_test)
    with pytest.raises(GateFailed, match=r"self-test: .*index.faiss: the self-test found"):
        run_rebuild(filled(tmp_path), index={"kind": "hnsw"})


def test_slower_search_fails_only_where_nobody_asked_for_another_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = cycle((1.0, 9.0))
    monkeypatch.setattr(gate, "_shard_ms", lambda *args: next(times))
    collection = filled(tmp_path)
    with pytest.raises(GateFailed, match=r"a query takes 9.000 ms, it took 1.000 ms"):
        run_rebuild(collection)
    told = run_rebuild(collection, index={"kind": "ivf_flat"})
    assert told["gate"]["latency"] == {"old_ms": 1.0, "new_ms": 9.0, "binding": False, "bound_ms": 3.0}


def test_search_that_was_slow_only_for_a_moment_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1.0, 9.0, 4.0, 2.5))
    monkeypatch.setattr(gate, "_shard_ms", lambda *args: next(times))
    told = run_rebuild(filled(tmp_path))
    assert told["gate"]["latency"] == {"old_ms": 1.0, "new_ms": 2.5, "binding": True, "bound_ms": 3.0}


def test_old_segments_that_take_more_memory_than_the_job_may_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = filled(tmp_path)
    collection.seal()  # one segment
    monkeypatch.setattr(gate, "measure_latency", None)
    told = run_rebuild(collection, memory_bytes=600 * 16 * 4 // 3)
    assert (told["gate"]["latency"], told["segments"]) == (None, 4)


# --- measures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_type", ["int64", "string"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_recall_is_that_of_the_whole_generation(
    metric: Any, id_type: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against brute force in float64, of three shards of several segments with deleted rows, by what is found."""
    monkeypatch.setattr("actors.entry_seal.LITTLE_POINTS", 0)
    monkeypatch.setattr("actors.entry_seal.LITTLE_RECORDS", 0)
    asked: list[Any] = []
    answered: list[Any] = []
    numbered = gate._numbered

    def remembered(found: Any, truth: Any) -> Any:
        answered.append((found, truth))
        return numbered(found, truth)

    monkeypatch.setattr(gate, "_numbered", remembered)
    monkeypatch.setattr(gate, "_query_sets", lambda candidate: asked or fill(candidate))

    def fill(candidate: Any) -> Any:
        asked.append(("rows with noise", candidate.made[:60], True))
        return asked

    config = replace(HARD, metric=metric, id_type=id_type, shards=2)
    collection = filled(tmp_path, config, 400)

    def write(phase: str) -> None:
        if phase == "catch up" and collection.writes == 1:
            collection.write(range(350, 450), range(100))

    told = run_rebuild(
        collection,
        listener=at_each_phase(write),
        shards=3,
        index=TINY_CODES | {"target_recall": 0.05},
    )
    assert [len(entry.segments) for entry in collection.newest.shards] == [2, 2, 2]
    ((found, truth),) = answered
    points = Points(
        id_array(list(collection.live), id_type),
        np.array([vector for vector, _ in collection.live.values()], np.float32),
    )
    queries = asked[0][1]
    expected = brute_force(points, queries, 10, metric)
    assert np.split(truth.ids.to_numpy(zero_copy_only=False), np.cumsum(truth.counts)[:-1])[7].tolist() == expected[7]
    assert truth.ids.to_pylist() == [point_id for line in expected for point_id in line]
    parts = np.split(found.ids.to_numpy(zero_copy_only=False), np.cumsum(found.counts)[:-1])
    recalls = [len(set(line) & set(part.tolist())) / 10 for line, part in zip(expected, parts, strict=True)]
    (measured,) = told["gate"]["recall"]
    assert measured["mean"] == pytest.approx(np.mean(recalls))
    assert 0.05 <= measured["mean"] < 1.0
    assert measured["deviation"] == pytest.approx(np.std(recalls, ddof=1))


@pytest.mark.parametrize(("count", "binding"), [(150, "rows with noise"), (600, "recent queries")])
def test_what_the_index_was_tuned_with_decides(count: int, binding: str, tmp_path: Path) -> None:
    collection = filled(tmp_path)
    vectors = random_vectors(HARD, count, 9)
    store_queries(collection.store, "words", "a-coordinator", QuerySample(vectors, "l2"))
    told = run_rebuild(collection, index={"kind": "ivf_flat"})["gate"]["recall"]
    assert [each["asked"] for each in told] == ["rows with noise", "recent queries"]
    assert [each["queries"] for each in told] == [500, min(count, gate.GATE_QUERIES)]
    assert [each["asked"] for each in told if each["binding"]] == [binding]


def test_points_are_summed_whatever_is_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.entry_seal.LITTLE_POINTS", 0)
    monkeypatch.setattr("actors.entry_seal.LITTLE_RECORDS", 0)
    collection = filled(tmp_path, CONFIG, 50)

    def write(phase: str) -> None:
        if phase == "catch up" and collection.writes == 1:
            collection.write(range(60))  # all points of the segment that was built

    told = run_rebuild(collection, listener=at_each_phase(write), shards=2)["gate"]["points"]
    assert told["old"] == told["new"]
    assert told["old"]["count"] == 50


def test_report_says_what_memory_the_new_generation_takes_and_what_is_loaded_beside_it(tmp_path: Path) -> None:
    collection = filled(tmp_path, replace(HARD, replicas=2))
    plans: list[dict[str, Any]] = []
    told = run_rebuild(collection, shards=2, listener=lambda status: plans.append(status.plan))
    each, old = 300 * 16 * 4, 600 * 16 * 4
    assert told["memory"] == {
        "bytes_per_replica": each,
        "bytes": 4 * each,
        "beside_bytes_per_replica": old,
        "beside_bytes": 2 * old,
        "switch": told["memory"]["switch"],
    }
    assert (told["memory"]["switch"]["mode"], collection.newest.switch) == ("beside", "beside")
    assert plans[-1]["memory"] == told["memory"]
    assert (plans[-1]["segments"], plans[-1]["points"], plans[-1]["shards"]) == (2, 600, 2)


# --- options ------------------------------------------------------------------------------------------------------


def test_options_change_the_config_that_is_committed(tmp_path: Path) -> None:
    config = replace(HARD, index=IndexConfig("ivf_flat", nlist=4, churn=0.1))
    collection = filled(tmp_path, config)
    run_rebuild(collection, index={"kind": "hnsw", "target_recall": 0.9}, shards=2)
    changed = collection.newest
    assert changed.config == replace(config, shards=2, index=IndexConfig("hnsw", 0.9, churn=0.1))
    kinds = {description(collection, name).spec["kind"] for name in changed.segments}
    assert kinds == {"hnsw"}
    assert {
        point.target_recall for name in changed.segments for point in description(collection, name).operating_points
    } >= {0.9}
    collection = filled(tmp_path, config)
    run_rebuild(collection, index={"nlist": 6})
    assert collection.newest.config == replace(config, index=IndexConfig("ivf_flat", nlist=6, churn=0.1))


def description(collection: Collection, segment_id: str) -> SegmentDescription:
    key = f"collections/words/segments/{segment_id}/segment.json"
    return SegmentDescription.decode(collection.store.get(key), key)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"index": {"kind": "tree"}}, "index.kind"),
        ({"index": {"knid": "flat"}}, "index.knid"),
        ({"index": {"kind": "flat", "m": 3}}, "index.m"),
        ({"index": {"target_recall": 2.0}}, "index.target_recall"),
        ({"index": {"kind": "factory", "factory": "nonsense"}}, "index.factory"),
        ({"shards": 0}, "shards"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_done(
    options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    collection = filled(tmp_path, count=20)
    phases: list[str] = []
    with pytest.raises(Invalid) as refused:
        run_rebuild(collection, listener=at_each_phase(phases.append), **options)
    assert [error.field for error in refused.value.errors] == [field]
    assert phases == []


@pytest.mark.parametrize(
    ("index", "field"),
    [
        ({"device": "gpu"}, "index.device"),
        ({"memory_bytes": 1}, "index.memory_bytes"),
        ({"kind": "ivf_flat", "nlist": 9}, "index.nlist"),
    ],
)
def test_index_that_cannot_be_built_of_so_many_points_is_refused_before_any_is_read(
    index: dict[str, Any], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = filled(tmp_path, count=20)
    monkeypatch.setattr("jobs.rebuild.survey_segment", None)
    with pytest.raises(Invalid) as refused:
        run_rebuild(collection, index=index)
    assert [error.field for error in refused.value.errors] == [field]
    assert collection.held() == collection.live


def test_index_option_is_a_kind_or_an_object() -> None:
    assert parse_index("hnsw") == {"kind": "hnsw"}
    assert parse_index('{"nlist": 5}') == {"nlist": 5}
    for text in ("{", '{"a": }'):
        with pytest.raises(Invalid, match="index: not JSON"):
            parse_index(text)
    assert changed_config(HARD, RebuildOptions("words", {})) == HARD


# --- from its first to its last status ----------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "run_tasks", lambda *args, waiting: run_tasks_here(*args))
    monkeypatch.setattr(ray_jobs, "cluster_cpus", lambda: ray_jobs.ClusterCpus(2, 2, 2))
    monkeypatch.setattr(ray_jobs, "cluster_gpus", ray_jobs.ClusterGpus)
    monkeypatch.setattr(ray_runtime, "find_supervisor", lambda namespace: "a supervisor")
    monkeypatch.setattr(ray_runtime, "wait_until_served", lambda *args: None)
    monkeypatch.setattr(report, "FINISH_PAUSES_S", (0.0, 0.0))


def start(collection: Collection, **options: Any) -> JobStatus:
    settings = Settings(collection.data, cache_dir=str(collection.folder))
    run.run_rebuild(settings, RebuildOptions("words", **options), JobStatus(JOB, "rebuild", "words"))
    return read_status(open_store(collection.data), JOB)


def test_rebuild_that_is_served_says_what_the_gate_measured(tmp_path: Path, no_ray: None) -> None:
    collection = filled(tmp_path)
    status = start(collection, index={"kind": "ivf_flat"}, metric_report=str(tmp_path / "report.json"))
    assert (status.state, status.phase, status.progress) == ("succeeded", "serve", 1.0)
    assert (status.report["served"], status.report["generation"], status.report["points"]) == (True, 2, 600)
    assert status.report["gate"]["passed"] is True
    assert status.report["gate"] == json.loads((tmp_path / "report.json").read_text())


def test_rebuild_that_fails_its_gate_says_why(tmp_path: Path, no_ray: None) -> None:
    collection = filled(tmp_path)
    with pytest.raises(Conflict, match="may not be served"):
        start(collection, index=TINY_CODES, metric_report=str(tmp_path / "report.json"))
    status = read_status(open_store(collection.data), JOB)
    assert (status.state, status.phase, status.report["error"]) == ("failed", "gate", "GateFailed")
    assert status.report["gate"]["refused"]
    assert status.report["gate"] == json.loads((tmp_path / "report.json").read_text())
    assert status.report["gate"]["recall"][0]["k"] == rules.GATE_K


def test_report_that_cannot_be_written_to_its_file_is_in_the_status(tmp_path: Path, no_ray: None) -> None:
    status = start(filled(tmp_path), metric_report=str(tmp_path / "nowhere" / "report.json"))
    assert (status.state, status.report["gate"]["passed"]) == ("succeeded", True)
