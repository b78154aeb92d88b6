"""Segments for GPUs: built there, placed and tested there when they are loaded, and answered for by their twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.segment_builder
import actors.segment_searcher
import actors.tuner
import tests.gpu_double
from actors.degradation import cpu_answers
from actors.gpu_device import GpuDevice, GpuMemoryFull
from actors.gpu_placement import GpuPlacement
from actors.segment_loader import LoadedSegment, load_segment, read_description, widened
from actors.segment_searcher import SegmentSearcher
from actors.self_test import problem_on_gpu
from cluster.config import CollectionConfig
from cluster.errors import Invalid, Unavailable
from cluster.gpu_memory import GpuFacts
from cluster.index_policy import IndexPlan, plan_index
from cluster.index_spec import IndexSpec
from cluster.memory_store import MemoryStore
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.segment import SegmentDescription
from cluster.topk import recall_at_k
from tests.gpu_double import double_device
from tests.unit.actors.gpu_segments import COUNT, DIMENSION, KINDS, double_of, gpu_config, gpu_points, published
from tests.unit.actors.points import Points, build, random_vectors, true_rows_of

STORE = MemoryStore()  # segments never change: each kind is built once
SPOILT = 900  # of 1,000 rows: as 100,000 of a large segment
AS_TUNED = SearchParams()


@pytest.fixture(autouse=True)
def times_nothing_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the stand-in is says nothing."""
    monkeypatch.setattr(actors.tuner, "LATENCY_SAMPLES", 2)
    monkeypatch.setattr(actors.tuner, "THROUGHPUT_REPEATS", 1)


class Built:
    """A segment of each kind, built on a device."""

    def __init__(self, kind: str, metric: str = "l2") -> None:
        self.config = gpu_config(kind, metric)
        self.points = gpu_points(self.config)
        self.device = double_device()
        empty = double_of(self.device).taken_bytes
        self.ref = published(STORE, self.config, self.points, self.device)
        self.left_bytes = double_of(self.device).taken_bytes - empty
        self.description = read_description(STORE, "words", self.ref)
        self.spec = IndexSpec.from_dict(self.description.spec)

    def load(self, folder: Path, device: GpuDevice | None, cpu_twin: bool = True) -> LoadedSegment:
        return load_segment(STORE, "words", self.ref, self.config.metric, folder, device, cpu_twin)


BUILT: dict[tuple[str, str], Built] = {}


def built(kind: str, metric: str = "l2") -> Built:
    if (kind, metric) not in BUILT:
        BUILT[kind, metric] = Built(kind, metric)
    return BUILT[kind, metric]


def queries_of(config: CollectionConfig, count: int = 40) -> Any:
    return random_vectors(config, count, seed=11)


def recall_of(segment: LoadedSegment, points: Points, k: int = 10, params: SearchParams = AS_TUNED) -> float:
    config = CollectionConfig(DIMENSION, segment.metric)
    queries = queries_of(config)
    rows, _ = segment.search(queries, k, params)
    return float(recall_at_k(rows, true_rows_of(points, queries, k, segment.metric)[0]).mean())


# --- build --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_build_on_a_gpu_describes_the_index_its_points_and_its_twin(kind: str) -> None:
    made = built(kind)
    description, name = made.description, kind.split()[0]
    assert (made.spec.kind, made.spec.device) == (name, "gpu")
    assert made.spec.gpu_bytes > 0
    assert description.built["gpu"] == "double"
    assert "predicted_seconds" not in description.built, "nothing was measured that it could come from"
    assert "rows with noise" in description.built["tuned_on"]
    knobs = {"flat": set(), "cagra": {"itopk_size", "search_width", "ef_search"}, "ivf_flat": {"nprobe"}}
    assert description.operating_points[0].params.keys() == knobs.get(name, {"nprobe", "rerank"})
    assert all(point.met for point in description.operating_points)
    assert made.left_bytes == 0, "the build has given its memory back"
    double_of(made.device).check()


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq", "cagra", "cagra float16"])
def test_twin_is_measured_with_what_it_is_searched_with(kind: str) -> None:
    description = built(kind).description
    assert [point.target_recall for point in description.twin_points] == [0.95, 0.90, 0.99]
    for point, twin in zip(description.operating_points, description.twin_points, strict=True):
        assert twin.params.items() <= point.params.items()
        assert twin.met
        assert twin.recall_low >= twin.target_recall
    assert description.cpu_twin["recall"] > 0.9


def test_twin_of_an_exact_index_needs_no_telling() -> None:
    assert built("flat").description.cpu_twin == {}
    assert b"cpu_twin" not in built("flat").description.encode()
    encoded = built("cagra").description.encode()
    assert SegmentDescription.decode(encoded, "segment.json") == built("cagra").description


@pytest.mark.parametrize("kind", KINDS)
def test_self_test_of_an_index_for_gpus_asks_rows_of_the_whole_segment(kind: str) -> None:
    rows = built(kind).description.self_test.rows
    assert rows[0] == 0
    assert rows[-16:] == tuple(range(COUNT - 16, COUNT))
    assert max(np.diff(rows)) < 1.1 * COUNT / 48 + 1


@pytest.mark.parametrize("kind", ["flat", "ivf_pq"])
def test_without_a_gpu_the_cpu_builds_what_it_can(kind: str, tmp_path: Path) -> None:
    config, store = gpu_config(kind), MemoryStore()
    points = gpu_points(config)
    ref = published(store, config, points, None)
    device = double_device()
    segment = load_segment(store, "words", ref, "l2", tmp_path, device)
    assert segment.twin is not None
    assert segment.twin.gpu is not None, segment.twin.why
    assert "gpu" not in segment.description.built
    assert recall_of(segment, points) >= 0.93


def test_without_a_gpu_a_graph_for_gpus_is_refused(tmp_path: Path) -> None:
    config = gpu_config("cagra")
    with pytest.raises(Invalid, match="cagra is built on a GPU"):
        build(tmp_path, "s1", config, gpu_points(config))


def test_recent_queries_are_tuned_with_where_there_are_enough() -> None:
    config, store = gpu_config("ivf_flat"), MemoryStore()
    ref = published(store, config, gpu_points(config), double_device(), queries=random_vectors(config, 600, seed=3))
    assert read_description(store, "words", ref).built["tuned_on"] == "600 recent queries"


def test_gpu_that_has_no_room_to_build_after_all_leaves_it_to_the_cpu() -> None:
    """A graph steps down to what a CPU can build."""
    config, store, device = gpu_config("cagra"), MemoryStore(), double_device()
    double_of(device).run_out_of_memory()
    ref = published(store, config, gpu_points(config), device, gpu=GpuFacts(8 << 30))
    description = read_description(store, "words", ref)
    assert description.spec["kind"] in ("ivf_flat", "ivf_pq")
    assert description.spec["device"] == "gpu"
    assert "double failed to build cagra: " in description.spec["reason"]
    assert "gpu" not in description.built


def test_build_of_lists_goes_on_with_the_cpu_when_the_gpu_is_lost() -> None:
    config, store, device = gpu_config("ivf_flat"), MemoryStore(), double_device()
    double_of(device).lose()
    description = read_description(store, "words", published(store, config, gpu_points(config), device))
    assert (description.spec["kind"], description.spec["device"]) == ("ivf_flat", "gpu")
    assert "illegal memory access" in description.spec["reason"]


def test_gpu_that_computes_wrongly_builds_nothing() -> None:
    config, store, device = gpu_config("ivf_flat"), MemoryStore(), double_device()
    double_of(device).spoil_from(SPOILT)
    description = read_description(store, "words", published(store, config, gpu_points(config), device))
    assert "gpu" not in description.built
    assert "double failed to build ivf_flat: its self-test failed: it scores row " in description.spec["reason"]
    assert description.operating_points[0].met


def graph_plan(config: CollectionConfig, **spec: Any) -> IndexPlan:
    """As if the policy had chosen a graph for a collection that leaves it the choice."""
    planned = plan_index(COUNT, gpu_config("cagra")).spec
    return IndexPlan(replace(planned, **spec), ())


def test_codes_that_would_lose_neighbours_are_not_taken_on_a_gpu() -> None:
    config, store, device = gpu_config("auto"), MemoryStore(), double_device()
    points = gpu_points(config)
    far = Points(points.ids, points.vectors + np.float32(5_000.0))
    ref = published(store, config, far, device, plan=graph_plan(config, codes="float16"))
    spec = read_description(store, "words", ref).spec
    assert (spec["kind"], spec["codes"]) == ("cagra", "float32")
    assert "float16 would lose neighbours of these vectors" in spec["reason"]


@pytest.mark.parametrize(("build_seconds", "degree"), [(None, 32), (1e-6, 16)])
def test_graph_that_misses_its_target_is_built_again_stronger_if_there_is_time(
    build_seconds: float | None, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune, tuned = actors.segment_builder.tune_with_twin, []

    def missed_once(*args: Any) -> Any:
        points, twins = tune(*args)
        tuned.append(args)
        short = len(tuned) == 1
        return tuple(replace(point, met=False, recall=0.5) if short else point for point in points), twins

    monkeypatch.setattr(actors.segment_builder, "tune_with_twin", missed_once)
    config, store, device = gpu_config("auto", build_seconds=build_seconds), MemoryStore(), double_device()
    ref = published(store, config, gpu_points(config), device, plan=graph_plan(config))
    description = read_description(store, "words", ref)
    assert description.spec["params"]["graph_degree"] == degree
    assert description.operating_points[0].met == (degree == 32)
    assert double_of(device).taken_bytes == double_of(double_device()).taken_bytes


@pytest.mark.parametrize(("failed", "words"), [(GpuMemoryFull, "no room"), (RuntimeError, "FAISS refuses it: no room")])
def test_graph_whose_stronger_one_the_gpu_fails_to_build_stays(
    failed: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tune, tuned = actors.segment_builder.tune_with_twin, []

    def missed_then_failed(*args: Any) -> Any:
        tuned.append(args)
        if len(tuned) > 1:
            raise failed("no room")
        points, twins = tune(*args)
        return tuple(replace(point, met=False, recall=0.5) for point in points), twins

    monkeypatch.setattr(actors.segment_builder, "tune_with_twin", missed_then_failed)
    config, store, device = gpu_config("auto"), MemoryStore(), double_device()
    ref = published(store, config, gpu_points(config), device, plan=graph_plan(config))
    description = read_description(store, "words", ref)
    assert (description.spec["kind"], description.spec["params"]["graph_degree"]) == ("cagra", 16)
    assert description.built["gpu"] == "double"
    assert f"a stronger cagra is not built: {words}" in caplog.text
    assert double_of(device).taken_bytes == double_of(double_device()).taken_bytes


def test_build_that_faiss_refuses_on_the_gpu_is_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("C++ exception RAFT failure: too few rows")

    monkeypatch.setattr("tests.gpu_double.GpuIndexIVFFlat.train", refused)
    config, store = gpu_config("ivf_flat"), MemoryStore()
    spec = read_description(store, "words", published(store, config, gpu_points(config), double_device())).spec
    assert (spec["kind"], spec["device"]) == ("ivf_flat", "gpu")
    assert "double failed to build ivf_flat: FAISS refuses it: C++ exception RAFT failure" in spec["reason"]


def test_build_that_may_not_step_down_is_refused_with_the_reason() -> None:
    config, device = gpu_config("cagra", gpu_full="refuse"), double_device()
    double_of(device).taken_by_others((8 << 30) - double_of(device).taken_bytes - 1_000)
    with pytest.raises(Unavailable, match=r"double failed to build cagra: .* bytes of GPU memory, \d+ can be had"):
        published(MemoryStore(), config, gpu_points(config), device)


# --- load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "metric"), [*((kind, "l2") for kind in KINDS), ("cagra", "cosine")])
def test_gpu_answers_at_the_target_with_true_scores(kind: str, metric: str, tmp_path: Path) -> None:
    made, device = built(kind, metric), double_device()
    segment = made.load(tmp_path, device)
    assert segment.twin is not None
    assert segment.twin.gpu is not None, segment.twin.why
    before, searches = cpu_answers(), len(double_of(device).searches)
    assert recall_of(segment, made.points) >= 0.93
    queries = queries_of(made.config)
    rows, scores = segment.search(queries, 10, AS_TUNED)
    truth, true_scores = true_rows_of(made.points, queries, 10, made.config.metric)
    same = rows == truth
    np.testing.assert_allclose(scores[same], true_scores[same], rtol=1e-4, atol=1e-5)
    assert cpu_answers() == before
    assert len(double_of(device).searches) > searches
    double_of(device).check()


def test_exact_answers_of_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    for metric in ("l2", "cosine", "ip"):
        made = built("flat", metric)
        device = double_device()
        on_gpu, on_cpu = made.load(tmp_path, device), made.load(tmp_path, None)
        queries = queries_of(made.config)
        rows, scores = on_gpu.search(queries, 10, AS_TUNED)
        expected, expected_scores = on_cpu.search(queries, 10, AS_TUNED)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_the_twin_answers_as_well_and_tells(kind: str, tmp_path: Path) -> None:
    made = built(kind)
    segment = made.load(tmp_path, None)
    before = cpu_answers()
    assert recall_of(segment, made.points) >= 0.93
    assert cpu_answers() > before
    assert segment.twin is not None
    assert segment.twin.why == "this process has no GPU"
    twins = made.description.twin_points
    assert segment.promised_point == (twins[0] if twins else made.description.operating_points[0])


def test_promise_of_a_segment_on_the_gpu_is_that_of_its_operating_point(tmp_path: Path) -> None:
    made, device = built("cagra"), double_device()
    assert made.load(tmp_path, device).promised_point == made.description.operating_points[0]


@pytest.mark.parametrize(("kind", "row"), [*((kind, SPOILT) for kind in KINDS), ("flat", COUNT - 1), ("cagra", 0)])
def test_self_test_catches_scores_that_are_wrong_from_some_row_on(kind: str, row: int, tmp_path: Path) -> None:
    """As of milvus issue 49864: beyond 100,000 rows."""
    made, device = built(kind), double_device()
    empty = double_of(device).taken_bytes
    double_of(device).spoil_from(row)
    segment = made.load(tmp_path, device)
    assert segment.twin is not None
    assert segment.twin.gpu is None
    assert segment.twin.why.startswith("its self-test failed: it scores row ")
    assert double_of(device).taken_bytes == empty
    assert recall_of(segment, made.points) >= 0.93
    double_of(device).check()


def test_self_test_that_fails_without_a_twin_refuses_the_load(tmp_path: Path) -> None:
    device = double_device()
    double_of(device).spoil_from(SPOILT)
    with pytest.raises(Unavailable, match=r"its self-test failed: .*; its cpu_twin is turned off"):
        built("cagra").load(tmp_path, device, cpu_twin=False)
    double_of(device).spoil_from(None)
    assert built("cagra").load(tmp_path, device, cpu_twin=False).twin.gpu is not None  # type: ignore[union-attr]


def test_index_that_faiss_refuses_is_answered_for_by_its_twin_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, device, tried = built("flat"), double_device(), []

    def refuse(*args: Any) -> Any:
        tried.append(args)
        raise RuntimeError("Error: 'false' failed: not of this kind")

    monkeypatch.setattr(device.library, "index_cpu_to_gpu", refuse)
    segment, placement = made.load(tmp_path, None), GpuPlacement(device)
    placement.place(segment)
    assert segment.twin is not None
    assert segment.twin.why == "FAISS refuses it: Error: 'false' failed: not of this kind"
    assert recall_of(segment, made.points) == 1.0
    assert placement.promote([segment]) == []
    assert len(tried) == 1


def test_index_that_does_not_fit_as_predicted_is_tried_more_and_more_seldom(tmp_path: Path) -> None:
    made, device, tried = built("ivf_flat"), double_device(), []
    copy = device.library.index_cpu_to_gpu

    def full(*given: Any) -> None:
        tried.append(given)
        raise MemoryError("std::bad_alloc")

    device.library.index_cpu_to_gpu = full
    segment, placement = made.load(tmp_path, None), GpuPlacement(device)
    placement.place(segment)
    for _ in range(12):
        assert placement.promote([segment]) == []
    assert len(tried) == 1 + 3, "with the next promotion, after one more, after three more, after seven more"
    device.library.index_cpu_to_gpu = copy
    promoted = [placement.promote([segment]) for _ in range(7)]
    assert promoted.index([made.ref.segment_id]) == 2


class Faulty:
    """An index on a GPU with something wrong about it."""

    def __init__(self, index: Any, fault: str) -> None:
        self._index = index
        self._fault = fault
        self.count = index.count - (fault == "rows")
        self.lists, self.knobs, self.check = index.lists, index.knobs, index.check

    def search(self, queries: Any, k: int, params: Any, selection: RowSelection | None = None) -> Any:
        if self._fault == "blind":  # never finds what lies behind some row
            selection = RowSelection.of(np.arange(self.count) < self.count - 12)
        if self._fault != "selection" or selection is None:
            labels, scores = self._index.search(queries, k, params, selection)
        else:  # ignores it, and what should not have been found is dropped
            labels, scores = self._index.search(queries, k, params)
            labels = np.where(selection.holds(np.maximum(labels, 0)), labels, -1)
        if self._fault == "labels":
            labels = labels + self.count
        if self._fault == "few":  # the nearest one, again and again
            labels, scores = labels[:, :1].repeat(labels.shape[1], 1), scores[:, :1].repeat(labels.shape[1], 1)
        if self._fault == "neighbours":  # true scores of other rows
            labels = np.where(labels >= 0, 0, labels)
            scores = np.square(queries - self._index_rows()[0]).sum(axis=1)[:, None].repeat(labels.shape[1], 1)
        return labels, scores

    def _index_rows(self) -> Any:
        return built("flat").points.vectors


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("", ""),
        ("rows", "it has 999 rows of 1000"),
        ("labels", "it found row"),
        ("neighbours", "it finds none of the rows 21 to"),
        ("few", "it found 0.100 of the neighbours, 1.000 were promised"),
        ("blind", "it finds none of the rows 988 to 999"),
        ("selection", "it ignores which rows it may find"),
    ],
)
def test_self_test_on_a_gpu_tells_what_is_wrong(fault: str, told: str, tmp_path: Path) -> None:
    made, device = built("flat"), double_device()
    segment = made.load(tmp_path, device)
    assert segment.twin is not None
    index: Any = Faulty(segment.twin.gpu, fault)
    test = made.description.self_test
    searcher = SegmentSearcher(index, made.spec, segment.rows, "l2")
    found = problem_on_gpu(searcher, segment.twin.cpu, made.spec, "l2", test, {})
    assert told in found
    assert bool(told) == bool(found)


def moved(vectors: Any, points: Points) -> Points:
    return Points(points.ids, vectors.astype(np.float32))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_exact_index_whose_gpu_cannot_tell_near_points_apart_is_answered_for_by_its_twin(
    on_gpu: bool, tmp_path: Path
) -> None:
    """Tight heaps around the mean but far from it: |x|^2 + |q|^2 - 2xq leaves nothing of distances within one."""
    config, store, device = gpu_config("flat"), MemoryStore(), double_device()
    points = gpu_points(config)
    heaps = np.repeat([[1.0], [-1.0]], COUNT // 2, axis=0) * 1_000.0
    ref = published(store, config, moved(heaps + 0.5 * points.vectors, points), device if on_gpu else None)
    assert "gpu" not in read_description(store, "words", ref).built
    segment = load_segment(store, "words", ref, "l2", tmp_path, device)
    assert segment.twin is not None
    assert segment.twin.gpu is None
    assert "of the neighbours, 1.000 were promised" in segment.twin.why
    queries = segment.rows.gather_vectors(np.arange(0, COUNT, 50))
    rows, _ = segment.search(queries, 10, AS_TUNED)
    assert (rows == segment.searcher.exact(queries, 10)[0]).all()


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_equal_rows_of_which_the_gpu_finds_others_than_were_recorded_are_as_good(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many texts have one vector; the CPU built the index and finds the first of them."""
    config, store, device = gpu_config(kind), MemoryStore(), double_device()
    points = gpu_points(config)
    vectors = points.vectors.copy()
    vectors[::4] = vectors[0]
    search = getattr(tests.gpu_double, "GpuIndexFlat" if kind == "flat" else "GpuIndexIVFFlat").search

    def last_of_equals(self: Any, x: Any, k: int, **chosen: Any) -> Any:
        distances, labels = search(self, x, min(self.ntotal, k + COUNT // 4), **chosen)
        order = np.lexsort((-labels, distances), axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(labels, order, 1)

    ref = published(store, config, moved(vectors, points), None)
    with monkeypatch.context() as patch:
        patch.setattr(f"tests.gpu_double.{'GpuIndexFlat' if kind == 'flat' else '_Lists'}.search", last_of_equals)
        segment = load_segment(store, "words", ref, "l2", tmp_path, device)
    assert segment.twin is not None
    assert segment.twin.why == ""


def test_twin_that_rounds_more_than_the_gpu_is_held_to_what_it_finds_itself(tmp_path: Path) -> None:
    """Rows far from the origin are moved there on the GPU before they are rounded; on a CPU they are not."""
    config, store, device = gpu_config("flat float16"), MemoryStore(), double_device()
    points = gpu_points(config)
    ref = published(store, config, moved(points.vectors + 5_000.0, points), device)
    description = read_description(store, "words", ref)
    assert description.operating_points[0].met
    assert description.cpu_twin["recall"] < 0.9 < description.self_test.recall
    assert [twin.met for twin in description.twin_points] == [False] * 3
    segment = load_segment(store, "words", ref, "l2", tmp_path, device)
    assert segment.twin is not None
    assert segment.twin.why == ""


# --- filters, limits and knobs ------------------------------------------------------------------------------------


@pytest.fixture
def no_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)


@pytest.mark.usefixtures("no_scans")
@pytest.mark.parametrize("kept_share", [0.97, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_deleted_rows_are_left_out_on_the_gpu(kind: str, kept_share: float, tmp_path: Path) -> None:
    made, device = built(kind), double_device()
    segment = made.load(tmp_path, device)
    mask = np.random.default_rng(5).random(COUNT) < kept_share
    queries = queries_of(made.config)
    before, kept = cpu_answers(), np.flatnonzero(mask)
    double_of(device).searches.clear()
    rows, _ = segment.search(queries, 10, AS_TUNED, RowSelection.of(mask))
    assert mask[rows[rows >= 0]].all()
    truth = kept[true_rows_of(made.points.take(kept), queries, 10, "l2")[0]]
    assert recall_at_k(rows, truth).mean() >= 0.93
    assert any(search["selected"] for search in double_of(device).searches)
    assert cpu_answers() == before


def asked_of(segment: LoadedSegment, device: GpuDevice, mask: Any, **params: Any) -> tuple[Any, list[Any]]:
    """(recall under a selection, what the GPU was asked with it)."""
    double_of(device).searches.clear()
    config, kept = CollectionConfig(DIMENSION, "l2"), np.flatnonzero(mask)
    queries = queries_of(config)
    rows, _ = segment.search(queries, 10, SearchParams(**params), RowSelection.of(mask))
    truth = kept[true_rows_of(built("cagra").points.take(kept), queries, 10, "l2")[0]]
    asked = [search for search in double_of(device).searches if search["selected"]]
    return float(recall_at_k(rows, truth).mean()), asked


@pytest.mark.usefixtures("no_scans")
@pytest.mark.parametrize("cpu_twin", [True, False])
def test_filter_that_needs_more_of_a_graph_than_a_gpu_takes_goes_to_the_twin_or_a_scan(
    cpu_twin: bool, tmp_path: Path
) -> None:
    made, device = built("cagra"), double_device()
    segment = made.load(tmp_path, device, cpu_twin)
    mask = np.random.default_rng(6).random(COUNT) < 0.4
    before = cpu_answers()
    recall, asked = asked_of(segment, device, mask, itopk_size=128)
    assert recall >= 0.95
    assert {search["itopk_size"] for search in asked} <= {128, 256, 512}
    assert asked
    recall, asked = asked_of(segment, device, mask, itopk_size=512)
    assert recall == 1.0 if not cpu_twin else recall >= 0.95
    assert not [search for search in asked if search["itopk_size"] > 512]
    assert cpu_answers() == before, "what is over a limit is no failure"


def test_k_over_what_a_graph_on_a_gpu_gives_goes_to_the_twin(tmp_path: Path) -> None:
    made, device = built("cagra"), double_device()
    before = cpu_answers()
    rows, _ = made.load(tmp_path, device).search(queries_of(made.config, 2), 600, AS_TUNED)
    assert rows.shape == (2, 600)
    assert (rows >= 0).all()
    assert cpu_answers() == before
    alone = made.load(tmp_path, device, cpu_twin=False)
    with pytest.raises(Invalid, match="600 is more than cagra takes on a GPU"):
        alone.search(queries_of(made.config, 2), 600, AS_TUNED)
    assert recall_of(alone, made.points, k=100) >= 0.95
    assert double_of(device).searches[-1]["itopk_size"] >= 101
    assert recall_of(alone, made.points, k=512) >= 0.95  # though one more would tell which tie with the last
    assert double_of(device).searches[-1]["k"] == 512


def test_many_equal_scores_are_found_by_a_scan_where_a_gpu_without_twin_cannot(tmp_path: Path) -> None:
    """Of points that tie with the k-th hit up to 256 more are asked for: 300 + 256 is over 512."""
    config = gpu_config("cagra")
    points = gpu_points(config)
    vectors = points.vectors.copy()
    vectors[::2] = vectors[0]
    store, device = MemoryStore(), double_device()
    ref = published(store, config, Points(points.ids, vectors), device)
    segment = load_segment(store, "words", ref, "l2", tmp_path, device, cpu_twin=False)
    rows, scores = segment.search(vectors[:1], 300, AS_TUNED)
    assert np.sort(rows[rows >= 0]).tolist() == list(range(0, COUNT, 2))
    assert (scores[rows >= 0] == 0.0).all()


@pytest.mark.parametrize(
    ("size", "k", "wider"), [(64, 10, 64), (64, 11, 96), (64, 100, 192), (96, 416, 512), (32, 2_000, 512)]
)
def test_candidates_of_a_graph_on_a_gpu_are_widened_in_steps_up_to_its_limit(size: int, k: int, wider: int) -> None:
    assert widened({"itopk_size": size, "search_width": 2}, k) == {"itopk_size": wider, "search_width": 2}


@pytest.mark.parametrize("device", [double_device(), None], ids=["gpu", "cpu"])
def test_knobs_that_a_kind_takes_are_taken_wherever_it_is_and_others_refused_by_name(
    device: GpuDevice | None, tmp_path: Path
) -> None:
    queries = queries_of(gpu_config(), 2)
    graph = built("cagra").load(tmp_path, device)
    for knobs in ({"itopk_size": 64}, {"search_width": 2}, {"ef_search": 20}, {"rerank": 2.0}, {"itopk_size": 1_000}):
        assert graph.search(queries, 5, SearchParams(**knobs))[0].shape == (2, 5)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="nprobe") as refused:
        graph.search(queries, 5, SearchParams(nprobe=4))
    assert refused.value.errors[0].field == "params.nprobe"
    lists = built("ivf_pq").load(tmp_path, device)
    assert lists.search(queries, 5, SearchParams(nprobe=16, rerank=8.0))[0].shape == (2, 5)
    with pytest.raises(Invalid, match="it takes: nprobe, rerank"):
        lists.search(queries, 5, SearchParams(itopk_size=64))


def test_graph_of_a_cpu_refuses_knobs_of_a_gpu(tmp_path: Path) -> None:
    config = gpu_config("hnsw", device="cpu")
    store = MemoryStore()
    ref = published(store, config, gpu_points(config), None)
    segment = load_segment(store, "words", ref, "l2", tmp_path, double_device())
    assert segment.twin is None, "planned for a CPU, it is none's twin"
    with pytest.raises(Invalid, match="itopk_size"):
        segment.search(queries_of(config, 1), 5, SearchParams(itopk_size=64))


def test_exact_search_does_not_ask_the_gpu(tmp_path: Path) -> None:
    made, device = built("cagra"), double_device()
    segment = made.load(tmp_path, device)
    double_of(device).searches.clear()
    assert recall_of(segment, made.points, params=SearchParams(exact=True)) == 1.0
    assert double_of(device).searches == []
