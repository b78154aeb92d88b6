from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from actors.faiss_index import FaissIndex, build_index
from actors.gpu_device import GpuDevice, GpuLost, GpuMemoryFull, IndexClosed
from actors.gpu_index import GpuIndex, _build_algo, build_on_gpu, place_on_gpu
from actors.rerank import rerank
from cluster.config import Metric
from cluster.errors import Invalid
from cluster.gpu_memory import BATCH_MAX, PROCESS_BYTES, GpuNeed, gpu_need
from cluster.row_selection import RowSelection
from cluster.topk import recall_at_k
from tests.gpu_double import GpuDouble, double_device
from tests.unit.actors.gpu_cases import CASES, COUNT, DIMENSION, SPECS, case_of, rows_of, spec_on_gpu, vectors_of

QUERIES = 20
NAMES = list(SPECS)


@pytest.fixture
def device() -> Any:
    """A device on which nothing was done that FAISS would have gone wrong with."""
    made = double_device()
    yield made
    made.close()
    made.library.check()


def blind_device(free_bytes: int) -> GpuDevice:
    """One with so much free, of whose memory nobody can tell."""
    library = GpuDouble(8 << 30)
    device = GpuDevice(library, lambda: None)
    library.taken_by_others(library.memory()[0] - free_bytes)
    return device


def truth(vectors: Any, queries: Any, metric: Metric, kept: Any = None) -> Any:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    if metric == "l2":
        scores = 2 * scores - np.square(vectors.astype(np.float64)).sum(axis=1)
    if kept is not None:
        scores[:, ~kept] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :10]


def found_of(index: GpuIndex | FaissIndex, case: Any, queries: Any, **chosen: Any) -> Any:
    """Rows in the order of their exact scores: codes alone rank too roughly."""
    width = 80 if case.spec.kind == "ivf_pq" else 10
    labels, _ = index.search(queries, width, case.wide, **chosen)
    return rerank(case.rows, queries, labels, case.metric, 1)[0][:, :10]


# --- built, saved, loaded, placed, searched ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "metric"), CASES)
def test_index_built_on_a_gpu_is_saved_loaded_placed_and_found_in_on_both_devices(
    name: str, metric: Metric, device: GpuDevice
) -> None:
    case, queries = case_of(name, metric), vectors_of(metric, QUERIES, seed=2)
    cpu = case.loaded()
    gpu = case.placed(device, cpu)
    expected = truth(case.vectors, queries, metric)
    floor = 0.9 if case.spec.kind in ("ivf_pq", "cagra") or case.spec.codes == "float16" else 1.0
    for index in (gpu, cpu):
        assert (index.count, index.lists) == (COUNT, case.spec.params.get("nlist", 0))
        assert recall_at_k(found_of(index, case, queries), expected).mean() >= floor
    assert cpu.kind == case.spec.kind


@pytest.mark.parametrize(("name", "metric"), CASES)
def test_scores_are_the_metrics_own(name: str, metric: Metric, device: GpuDevice) -> None:
    case = case_of(name, metric)
    gpu, queries = case.placed(device), case.vectors[:5] * (1 if metric == "cosine" else 2)
    labels, scores = gpu.search(queries, 3, case.wide)
    stored = case.vectors[labels].astype(np.float64)
    if metric == "l2":
        exact = np.square(stored - queries[:, None]).sum(axis=2)
    else:
        exact = (stored * queries[:, None]).sum(axis=2)
    error = 0.3 if case.spec.kind == "ivf_pq" else 2e-2
    np.testing.assert_allclose(scores, exact, atol=error * (1 if metric == "cosine" else 60))
    assert scores.dtype == np.float32
    assert labels.dtype == np.int64


@pytest.mark.parametrize("name", NAMES)
def test_only_selected_rows_are_found_and_all_that_are_asked_for(name: str, device: GpuDevice) -> None:
    case, queries = case_of(name, "l2"), vectors_of("l2", QUERIES, seed=2)
    gpu, kept = case.placed(device), np.arange(COUNT) % 3 == 1
    found = found_of(gpu, case, queries, selection=RowSelection.of(kept))
    assert kept[found].all()
    assert (found >= 0).all()
    assert recall_at_k(found, truth(case.vectors, queries, "l2", kept)).mean() >= 0.85
    assert device.library.searches[-1]["selected"]


@pytest.mark.parametrize("name", NAMES)
def test_fewer_rows_than_are_asked_for_end_in_minus_one(name: str, device: GpuDevice) -> None:
    case = case_of(name, "l2")
    kept = np.zeros(COUNT, dtype=bool)
    kept[[3, 700, 1_100]] = True
    labels, scores = case.placed(device).search(case.vectors[[700]], 10, case.wide, RowSelection.of(kept))
    assert labels.shape == scores.shape == (1, 10)
    assert set(labels[0]) <= {3, 700, 1_100, -1}
    found = labels[0] >= 0
    assert found[: found.sum()].all()  # what is missing comes last
    assert np.isinf(scores[0][~found]).all()
    assert labels[0, 0] == 700


def test_labels_that_stand_for_no_row_or_for_one_that_is_not_selected_are_none(device: GpuDevice) -> None:
    case = case_of("ivf_flat", "l2")
    gpu = case.placed(device)
    kept = np.ones(COUNT, dtype=bool)
    kept[7] = False
    told = np.array([[0xFFFFFFFF, 5, 7, -1, 2**62, 9]]), np.arange(6, dtype=np.float32)[None]
    labels, distances = gpu._sound(*told, RowSelection.of(kept))
    np.testing.assert_array_equal(labels, [[5, 9, -1, -1, -1, -1]])
    np.testing.assert_array_equal(distances, [[1, 5, np.inf, np.inf, np.inf, np.inf]])


def test_row_without_a_finite_distance_is_none(device: GpuDevice) -> None:
    """As places are filled with where fewer rows are selected than asked for, and where float16 overflows."""
    gpu, most = case_of("flat", "ip").placed(device), np.finfo(np.float32).max
    told = np.array([[3, 0, 0, 0, 0]]), np.array([[9.0, np.nan, -np.inf, np.inf, -most]], dtype=np.float32)
    labels, scores = gpu._sound(*told, RowSelection.everything(COUNT))
    np.testing.assert_array_equal(labels, [[3, -1, -1, -1, -1]])
    np.testing.assert_array_equal(scores, [[9.0, -np.inf, -np.inf, -np.inf, -np.inf]])


# --- what a search hands to FAISS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k", "params", "expected"),
    [
        ("flat", 10, {}, {}),
        ("flat", 10, {"rerank": 2.0}, {}),
        ("ivf_flat", 10, {}, {"nprobe": 1}),
        ("ivf_flat", 10, {"nprobe": 5}, {"nprobe": 5}),
        ("ivf_pq", 10, {"nprobe": 99, "rerank": 4.0}, {"nprobe": 16}),
        ("cagra", 10, {}, {"itopk_size": 64, "search_width": 1}),
        ("cagra", 10, {"itopk_size": 33}, {"itopk_size": 64, "search_width": 1}),
        ("cagra", 10, {"itopk_size": 96, "search_width": 4}, {"itopk_size": 96, "search_width": 4}),
        ("cagra", 100, {"itopk_size": 32}, {"itopk_size": 128, "search_width": 1}),
        ("cagra", 10, {"itopk_size": 32, "ef_search": 5_000}, {"itopk_size": 32, "search_width": 1}),
        ("cagra float16", 500, {}, {"itopk_size": 512, "search_width": 1}),
    ],
)
@pytest.mark.parametrize("selected", [False, True])
def test_parameters_go_with_the_call_in_the_class_of_the_kind(
    name: str, k: int, params: dict[str, float], expected: dict[str, int], selected: bool, device: GpuDevice
) -> None:
    case = case_of(name, "l2")
    selection = RowSelection.everything(COUNT) if selected else None
    case.placed(device).search(case.vectors[:7], k, params, selection)
    asked = device.library.searches[-1]
    if case.spec.kind == "flat":
        asked = {key: value for key, value in asked.items() if key != "nprobe"}
    assert asked == {"n": 7, "k": k, "selected": selected} | expected


def test_parameters_do_not_outlive_their_call(device: GpuDevice) -> None:
    case = case_of("ivf_flat", "l2")
    gpu = case.placed(device)
    before = gpu.search(case.vectors[:5], 50, {"nprobe": 1})[0]
    gpu.search(case.vectors[:5], 50, {"nprobe": 16})
    np.testing.assert_array_equal(gpu.search(case.vectors[:5], 50, {"nprobe": 1})[0], before)


def test_more_candidates_kept_in_a_graph_find_more(device: GpuDevice) -> None:
    case, queries = case_of("cagra", "l2"), vectors_of("l2", 200, seed=5)
    gpu, expected = case.placed(device), truth(case_of("cagra", "l2").vectors, queries, "l2")
    recalls = [recall_at_k(gpu.search(queries, 10, {"itopk_size": size})[0], expected).mean() for size in (32, 64, 256)]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[2]


def test_k_is_clamped_to_the_points_there_are(device: GpuDevice) -> None:
    case = case_of("flat", "l2")
    labels, scores = case.placed(device).search(case.vectors[:2], COUNT + 500, {})
    assert labels.shape == scores.shape == (2, COUNT)
    np.testing.assert_array_equal(np.sort(labels[0]), np.arange(COUNT))


@pytest.mark.parametrize(("count", "k"), [(0, 10), (3, 0)])
def test_search_for_nothing_asks_nobody(count: int, k: int, device: GpuDevice) -> None:
    case = case_of("cagra", "l2")
    gpu = case.placed(device)
    before = len(device.library.searches)
    labels, scores = gpu.search(case.vectors[:count], k, {})
    assert labels.shape == scores.shape == (count, 0)
    assert len(device.library.searches) == before


def test_many_queries_are_searched_in_batches_that_memory_was_reckoned_for(device: GpuDevice) -> None:
    case, queries = case_of("ivf_flat", "l2"), vectors_of("l2", 2 * BATCH_MAX + 3, seed=4)
    gpu = case.placed(device)
    before = len(device.library.searches)
    labels, scores = gpu.search(queries, 5, {"nprobe": 16})
    assert [asked["n"] for asked in device.library.searches[before:]] == [BATCH_MAX, BATCH_MAX, 3]
    part = gpu.search(queries[-3:], 5, {"nprobe": 16})
    np.testing.assert_array_equal(labels[-3:], part[0])
    np.testing.assert_array_equal(scores[-3:], part[1])


def test_queries_of_another_dimension_are_refused(device: GpuDevice) -> None:
    with pytest.raises(ValueError, match="16 dimensions"):
        case_of("flat", "l2").placed(device).search(np.zeros((2, 5), np.float32), 3, {})


@pytest.mark.parametrize(("name", "knob"), [("flat", "nprobe"), ("ivf_flat", "itopk_size"), ("ivf_pq", "ef_search")])
def test_parameters_of_other_kinds_are_refused_by_name(name: str, knob: str, device: GpuDevice) -> None:
    gpu = case_of(name, "l2").placed(device)
    with pytest.raises(Invalid, match=f"params.{knob}: does not fit a {SPECS[name].kind} index"):
        gpu.search(np.zeros((1, DIMENSION), np.float32), 3, {knob: 3})


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("flat", ("rerank",)),
        ("ivf_flat", ("nprobe", "rerank")),
        ("cagra", ("itopk_size", "search_width", "rerank")),
    ],
)
def test_knobs_are_those_of_the_kind(name: str, knobs: tuple[str, ...], device: GpuDevice) -> None:
    assert case_of(name, "l2").placed(device).knobs == knobs


@pytest.mark.parametrize(
    ("name", "k", "params", "field"),
    [
        ("cagra", 513, {}, "k"),
        ("cagra", 10, {"itopk_size": 544}, "params.itopk_size"),
        ("cagra", 512, {"itopk_size": 512, "ef_search": 9_999}, None),
        ("ivf_flat", 10, {"nprobe": 99_999}, None),  # clamped to the lists there are
        ("flat", 99_999, {}, None),  # clamped to the points there are
    ],
)
def test_limits_of_the_kind_are_told_before_the_search_that_would_break_them(
    name: str, k: int, params: dict[str, float], field: str | None, device: GpuDevice
) -> None:
    gpu = case_of(name, "l2").placed(device)
    over = gpu.over_limit(k, params)
    assert (over.field if over else None) == field
    assert gpu.takes(k, params) is (field is None)
    if field is not None:
        with pytest.raises(ValueError, match="at most 512"):
            gpu.search(np.zeros((1, DIMENSION), np.float32), k, params)


# --- points far from the origin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["float32", "float16"])
def test_exact_search_of_points_far_from_the_origin_is_exact(codes: Any, device: GpuDevice, tmp_path: Path) -> None:
    """cuVS's sums would cancel, and so do the double's."""
    vectors, queries = vectors_of("l2", 600, seed=1, offset=1_000.0), vectors_of("l2", 20, seed=2, offset=1_000.0)
    dtype = "float32"
    rows, spec = rows_of(vectors, tmp_path, dtype), spec_on_gpu("flat", codes)
    cpu = build_index(spec, DIMENSION, "l2", vectors, 0)
    cpu.add(vectors)
    labels, _ = place_on_gpu(device, cpu, spec, DIMENSION, "l2", rows).search(queries, 10, {})
    exact = np.square(vectors.astype(np.float64)[None] - queries[:, None]).sum(axis=2)
    expected = np.argsort(exact, axis=1)[:, :10]
    assert recall_at_k(labels, expected).mean() >= (1.0 if codes == "float32" else 0.95)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_predicted_measured_counted_and_given_back(name: str, device: GpuDevice) -> None:
    case = case_of(name, "l2")
    free, left = device.free_bytes(), device.left_bytes()
    gpu = case.placed(device)
    assert gpu.predicted_bytes == gpu_need(case.spec, COUNT, DIMENSION).index
    assert gpu.measured_bytes == free - device.free_bytes()
    assert 0 < gpu.measured_bytes <= gpu.predicted_bytes
    assert device.left_bytes() == left - gpu.predicted_bytes
    gpu.close()
    assert (device.free_bytes(), device.left_bytes()) == (free, left)
    with pytest.raises(IndexClosed):
        gpu.search(case.vectors[:1], 1, {})
    assert device.lost == ""


def test_index_that_nobody_holds_any_more_gives_its_memory_back(device: GpuDevice) -> None:
    free = device.free_bytes()
    gpu = case_of("cagra", "l2").placed(device)
    assert device.free_bytes() < free
    del gpu
    gc.collect()
    device.run(lambda resources: None)
    assert device.free_bytes() == free


@pytest.mark.parametrize("name", NAMES)
def test_index_that_is_not_predicted_to_fit_is_refused_with_the_numbers(name: str) -> None:
    case = case_of(name, "l2")
    need = gpu_need(case.spec, COUNT, DIMENSION).load
    device = double_device(PROCESS_BYTES + need - 1)
    with pytest.raises(GpuMemoryFull, match=f"{need} bytes of GPU memory, {need - 1} can be had"):
        case.placed(device)
    double = double_device(PROCESS_BYTES + need)
    assert case.placed(double).count == COUNT


@pytest.mark.parametrize(("name", "bytes_needed"), [("flat", 1_250_000), ("flat float16", 2_000_000)])
def test_vectors_that_are_added_in_pieces_need_room_for_moving_them(
    name: str, bytes_needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name, "l2")
    monkeypatch.setattr("actors.gpu_index.gpu_need", lambda *_: GpuNeed(1_000_000, 0, 0))
    with pytest.raises(GpuMemoryFull, match=f"{bytes_needed} bytes of GPU memory, {bytes_needed - 1} can be had"):
        case.placed(double_device(PROCESS_BYTES + bytes_needed - 1))
    assert case.placed(double_device(PROCESS_BYTES + bytes_needed)).count == COUNT


def test_share_of_the_gpu_bounds_what_is_placed() -> None:
    case = case_of("ivf_flat", "l2")
    need = gpu_need(case.spec, COUNT, DIMENSION).load
    device = double_device(4 * (PROCESS_BYTES + need), share=0.25)
    first = case.placed(device)
    with pytest.raises(GpuMemoryFull):
        case.placed(device)  # the first one's bytes are gone from the share, though the GPU is free
    first.close()
    assert case.placed(device).count == COUNT


def test_room_is_left_for_the_largest_search_of_all_that_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small index beside one whose searches take much: those go on."""
    case, needs = case_of("ivf_flat", "l2"), [GpuNeed(1_000_000, 4_000_000, 0), GpuNeed(1_000_000, 1_000, 0)]
    room = PROCESS_BYTES + 1_000_000 + 6_250_000
    for size in (room - 1, room):
        device, asked = double_device(size), iter(needs)
        monkeypatch.setattr("actors.gpu_index.gpu_need", lambda *_, asked=asked: next(asked))
        first = case.placed(device)
        if size < room:
            with pytest.raises(GpuMemoryFull, match="6250000 bytes of GPU memory, 6249999 can be had"):
                case.placed(device)
        else:
            assert case.placed(device).predicted_bytes == first.predicted_bytes == 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_index_that_does_not_fit_after_all_leaves_nothing_behind(name: str) -> None:
    """As where something else took the memory meanwhile, and where nobody can tell what is free."""
    case, device = case_of(name, "l2"), blind_device(10_000)
    taken = device.library.taken_bytes
    with pytest.raises(GpuMemoryFull, match="out of memory"):
        case.placed(device)
    assert device.library.taken_bytes == taken
    device.close()
    device.library.check()


@pytest.mark.parametrize("name", NAMES)
def test_search_that_finds_no_memory_says_so_and_the_next_one_works(name: str, device: GpuDevice) -> None:
    case = case_of(name, "l2")
    gpu = case.placed(device)
    device.library.run_out_of_memory()
    with pytest.raises(GpuMemoryFull):
        gpu.search(case.vectors[:1], 1, case.wide)
    assert gpu.search(case.vectors[:1], 1, case.wide)[0].tolist() == [[0]]


def test_lost_device_is_lost_for_all_its_indexes(device: GpuDevice) -> None:
    case = case_of("cagra", "l2")
    first, second = case.placed(device), case.placed(device)
    device.library.lose()
    for index in (first, second, first):
        with pytest.raises(GpuLost):
            index.search(case.vectors[:1], 1, {})
    with pytest.raises(GpuLost):
        case.placed(device)
    first.close()


def test_warm_up_links_small_and_large_batches_with_and_without_a_selection(device: GpuDevice) -> None:
    case_of("cagra", "l2").placed(device)
    asked = {(search["n"], search["selected"]) for search in device.library.searches}
    assert asked == {(1, False), (1, True), (BATCH_MAX, False), (BATCH_MAX, True)}


def test_index_whose_warm_up_fails_is_not_kept(device: GpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where cuVS attached no data set because there was no room for it."""
    free = device.free_bytes()

    def search(self: Any, *args: Any, **chosen: Any) -> Any:
        raise RuntimeError("RAFT failure: Attempted to search without a dataset. Please call index.update_dataset(...)")

    monkeypatch.setattr("tests.gpu_double.GpuIndexCagra.search", search)
    with pytest.raises(GpuMemoryFull, match="without a dataset"):
        case_of("cagra", "l2").placed(device)
    assert device.free_bytes() == free


def test_callers_of_many_threads_get_their_own_answers(device: GpuDevice) -> None:
    case = case_of("ivf_flat", "l2")
    gpu, queries = case.placed(device), vectors_of("l2", 64, seed=9)
    alone = {nprobe: gpu.search(queries, 10, {"nprobe": nprobe})[0] for nprobe in (1, 3, 16)}
    assert (alone[1] != alone[16]).any()
    start = threading.Barrier(6)

    def many(nprobe: int) -> bool:
        start.wait(10)
        return all(np.array_equal(gpu.search(queries, 10, {"nprobe": nprobe})[0], alone[nprobe]) for _ in range(20))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(many, (1, 3, 16, 1, 3, 16)))


def test_callers_queries_are_left_alone_and_may_be_read_only(device: GpuDevice, tmp_path: Path) -> None:
    case = case_of("cagra float16", "l2")
    queries = np.asfortranarray(vectors_of("l2", 10, seed=3))[::2]
    copy = queries.copy()
    queries.flags.writeable = False
    found = case.placed(device).search(queries, 5, case.wide)[0]
    np.testing.assert_array_equal(queries, copy)
    assert found.shape == (5, 5)


# --- builds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_build_tells_its_progress_and_holds_only_what_is_served(name: str, device: GpuDevice) -> None:
    case, told = case_of(name, "l2"), []
    free = device.free_bytes()
    cpu, gpu = build_on_gpu(device, case.spec, DIMENSION, "l2", case.rows, 3, told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert cpu.count == gpu.count == COUNT
    assert gpu.measured_bytes == free - device.free_bytes()
    gpu.close()
    assert device.free_bytes() == free


@pytest.mark.parametrize("name", NAMES)
def test_build_that_is_not_predicted_to_fit_is_refused_before_anything_is_made(name: str) -> None:
    case = case_of(name, "l2")
    need = gpu_need(case.spec, COUNT, DIMENSION).peak
    device = double_device(PROCESS_BYTES + need - 1)
    with pytest.raises(GpuMemoryFull, match=f"building {case.spec.kind} of {COUNT} rows takes {need} bytes"):
        build_on_gpu(device, case.spec, DIMENSION, "l2", case.rows, 3)
    assert device.library.builds == []


@pytest.mark.parametrize(
    ("name", "free_bytes"),
    [("ivf_flat", 20_000), ("ivf_pq", 20_000), ("cagra", 20_000), ("cagra", 300_000), ("cagra float16", 300_000)],
)
def test_build_that_runs_out_of_memory_leaves_nothing_behind(name: str, free_bytes: int) -> None:
    """Before it has taken any, and while the neighbours of a graph are looked for."""
    case, device = case_of(name, "l2"), blind_device(free_bytes)
    taken = device.library.taken_bytes
    with pytest.raises(GpuMemoryFull) as caught:
        build_on_gpu(device, case.spec, DIMENSION, "l2", case.rows, 3)
    assert device.library.taken_bytes == taken  # whoever still holds the error, and with it the frames
    del caught
    device.close()
    device.library.check()


def test_lists_are_trained_with_enough_points_for_the_half_that_cuvs_takes(device: GpuDevice) -> None:
    """128 points a list are the sample; of few rows they are repeated."""
    build_on_gpu(device, spec_on_gpu("ivf_flat", nlist=4), DIMENSION, "l2", case_of("flat", "l2").rows, 3)
    build_on_gpu(device, spec_on_gpu("ivf_flat", nlist=1_000), DIMENSION, "l2", case_of("flat", "l2").rows, 3)
    assert [build["rows"] for build in device.library.builds] == [512, 2_400]


QUICK_BYTES = ceil(1.25 * (COUNT * (4 * DIMENSION + 4 * 32) + COUNT * (4 + 5 * 64)))  # the graph, and what builds it


@pytest.mark.parametrize(
    ("left", "algo"),
    [(None, "NN_DESCENT"), (8 << 30, "NN_DESCENT"), (QUICK_BYTES, "NN_DESCENT"), (QUICK_BYTES - 1, "IVF_PQ")],
)
def test_neighbours_of_a_graph_are_found_the_quick_way_where_that_fits(
    left: int | None, algo: str, device: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "left_bytes", lambda: left)
    assert _build_algo(device, SPECS["cagra"], COUNT, DIMENSION, True) == getattr(
        device.library, f"graph_build_algo_{algo}"
    )


@pytest.mark.parametrize(("offset", "algo"), [(0.0, "NN_DESCENT"), (5_000.0, "IVF_PQ")])
def test_neighbours_that_float16_would_lose_are_not_found_the_quick_way(
    offset: float, algo: str, device: GpuDevice, tmp_path: Path
) -> None:
    rows = rows_of(vectors_of("l2", COUNT, seed=8, offset=offset), tmp_path)
    build_on_gpu(device, SPECS["cagra"], DIMENSION, "l2", rows, 3)
    assert device.library.builds[-1]["algo"] == getattr(device.library, f"graph_build_algo_{algo}")


def test_neighbours_of_a_very_large_graph_are_found_by_lists(device: GpuDevice) -> None:
    assert _build_algo(device, SPECS["cagra"], 6_000_000, 1, True) == device.library.graph_build_algo_IVF_PQ


@pytest.mark.parametrize(("name", "base_only"), [("cagra", False), ("cagra float16", True)])
def test_graph_comes_to_the_cpu_as_one_that_it_can_search_and_map(name: str, base_only: bool) -> None:
    loaded = case_of(name, "l2").loaded()
    graph = loaded.faiss_object
    assert isinstance(graph, faiss.IndexHNSWCagra)
    assert graph.base_level_only is base_only
    assert loaded.knobs == ("ef_search", "rerank")


def test_twin_of_a_graph_ignores_what_only_the_gpu_takes_and_others_do_not() -> None:
    query = np.zeros((1, DIMENSION), np.float32)
    case_of("cagra", "l2").loaded().search(query, 3, {"itopk_size": 64, "search_width": 2, "ef_search": 50})
    with pytest.raises(Invalid, match="itopk_size"):
        case_of("ivf_flat", "l2").loaded().search(query, 3, {"itopk_size": 64})


def test_ef_search_reaches_the_twin_of_a_graph() -> None:
    case, queries = case_of("cagra", "l2"), vectors_of("l2", 200, seed=5)
    expected = truth(case.vectors, queries, "l2")
    recalls = [
        recall_at_k(case.loaded().search(queries, 10, {"ef_search": ef})[0], expected).mean() for ef in (10, 200)
    ]
    assert recalls[0] < recalls[1]
