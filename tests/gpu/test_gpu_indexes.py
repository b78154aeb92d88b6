"""Every kind of index on a GPU: built, saved, loaded, placed and searched; against exact answers and the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import actors.segment_searcher
from actors.faiss_index import load_index, use_threads
from actors.segment_loader import LoadedSegment
from benchmarks.gpu_collection import Made, make, raw_index
from benchmarks.gpu_figures import self_test_figures
from benchmarks.gpu_sets import GpuSet, K, cores
from benchmarks.gpu_ways import hits_of
from cluster import paths
from cluster.errors import Invalid
from cluster.gpu_policy import K_MAX, NPROBE_MAX, k_limit
from cluster.query import Hits, SearchParams
from cluster.row_selection import RowSelection
from tests.gpu.cases import (
    CASES,
    DIMENSION,
    SEED,
    SLACK,
    TARGET,
    Case,
    clusters,
    exact,
    kept_at_random,
    recall,
    scores,
    twin_of,
)

TOLERANCE = {"float32": 1e-4, "float16": 5e-3}  # of scores, relative to the vectors' lengths: products in that format
THREADS, EACH = 8, 20


class Built:
    """A case's collection, loaded, with its vectors; `segment` is on the GPU."""

    def __init__(self, case: Case, collection: Made, vectors: GpuSet) -> None:
        self.case, self.collection, self.set = case, collection, vectors
        self.segment: LoadedSegment = collection.segment
        self.twin = twin_of(collection)
        self.params = self.segment.operating_point.params

    def found(self, params: SearchParams = SearchParams(), selection: RowSelection | None = None) -> Any:  # noqa: B008
        return self.segment.search(self.set.queries, K, params, selection)[0]

    def recall(self, found: Any, phase: str, selection: RowSelection | None = None) -> float:
        truth = (
            self.set.truth
            if selection is None
            else exact(self.set.vectors, self.set.queries, self.set.metric, selection)
        )
        reached = recall(found, truth)
        print(f"{self.case} {phase}: recall@{K} {reached:.4f} at {self.params}, seed {SEED}")
        return reached


@pytest.fixture(scope="module", params=CASES, ids=str)
def built(request: pytest.FixtureRequest, device: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    case: Case = request.param
    vectors = clusters(case.metric)
    collection = make(tmp_path_factory.mktemp("gpu"), "clusters", vectors, case.index, device)
    yield Built(case, collection, vectors)
    collection.delete()


@pytest.fixture(autouse=True)
def all_cores_and_no_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters are answered by the indexes themselves, and not by the scan that would do for so few rows."""
    use_threads(cores())
    monkeypatch.setattr(actors.segment_searcher, "SCAN_FLOATS_MAX", 0)


# --- as built -------------------------------------------------------------------------------------------------------


def test_index_is_of_its_kind_on_the_gpu_and_its_file_is_read_by_a_cpu(built: Built) -> None:
    spec, rows = built.segment.spec, built.segment.rows
    assert (spec.device, spec.kind) == ("gpu", built.case.kind.split()[0])
    assert not built.twin.why
    assert built.twin.gpu is not None
    print(f"{built.case}: {self_test_figures(built.segment, built.twin.gpu)}; {built.twin.facts()}")
    folder = built.collection.data / "collections" / built.collection.name / "segments"
    path = folder / built.segment.description.segment_id / paths.INDEX
    cpu = load_index(path, spec, DIMENSION, built.set.metric, rows.count, path.name)
    point = {name: value for name, value in built.params.items() if name in cpu.knobs}
    labels, _ = cpu.search(built.set.queries, K, point)
    assert built.recall(labels, "its file on a CPU, without rerank") >= (0.5 if spec.kind == "ivf_pq" else TARGET - 0.1)


def test_recall_at_the_tuned_point_reaches_the_target(built: Built) -> None:
    point = built.segment.operating_point
    assert point.target_recall == TARGET
    assert point.met, point
    reached = built.recall(built.found(), "tuned")
    assert reached >= (0.999 if built.case.exact else TARGET - SLACK)


def test_queries_that_are_asked_one_by_one_find_as_much(built: Built) -> None:
    """cuVS searches a graph by another kernel where few are asked at once; points are tuned with many."""
    alone = [built.segment.search(query[None], K, SearchParams())[0][:, :K] for query in built.set.queries]
    reached = built.recall(np.concatenate(alone), "one by one")
    assert reached >= (0.999 if built.case.exact else TARGET - SLACK)


def test_the_twins_own_recall_reaches_the_target(built: Built) -> None:
    """Searched as it answers while the GPU cannot."""
    gpu, why = built.twin.gpu, "a test looks at the twin"
    assert gpu is not None
    twin = type(built.twin)(built.twin.cpu, None, why)
    searcher = actors.segment_searcher.SegmentSearcher(twin, built.segment.spec, built.segment.rows, built.set.metric)
    found, _ = searcher.search(built.set.queries, K, built.params)
    assert built.recall(found, "twin") >= TARGET - SLACK


def test_scores_are_those_of_the_rows(built: Built) -> None:
    rows, told = built.segment.search(built.set.queries, K, SearchParams())
    rows, told = rows[:, :K], told[:, :K]
    assert (rows >= 0).all()
    expected = scores(built.set.vectors, built.set.queries, rows, built.set.metric)
    np.testing.assert_allclose(told, expected, rtol=1e-4, atol=1e-4)
    better = np.diff(told, axis=1)
    assert (better >= 0).all() if built.set.metric == "l2" else (better <= 0).all()


def test_flat_answers_are_the_cpus_within_tolerance(built: Built) -> None:
    """Candidates as they come from the two indexes, before the rows give the final scores; then the final answers."""
    if not built.case.exact:
        pytest.skip("only a flat index has the same candidates on both devices")
    gpu, cpu, queries = built.twin.gpu, built.twin.cpu, built.set.queries
    assert gpu is not None
    on_gpu, on_cpu = gpu.search(queries, K, {}), cpu.search(queries, K, {})
    lengths = float(np.square(built.set.vectors).sum(axis=1).max())
    slack = TOLERANCE[built.segment.spec.codes] * lengths
    np.testing.assert_allclose(on_gpu[1], on_cpu[1], atol=slack)
    assert recall(on_gpu[0], on_cpu[0]) >= (0.999 if built.segment.spec.codes == "float32" else 0.97)
    found, _ = built.segment.search(queries, K, SearchParams())
    truth, _ = built.segment.search(queries, K, SearchParams(exact=True))
    assert recall(found, truth) >= 0.999


def test_raw_search_of_the_same_index_finds_the_same(built: Built) -> None:
    """What FAISS is asked by hand, as the benchmark does, is what the shard asks it."""
    raw = raw_index(built.segment)
    by_hand = raw.use(lambda index: raw.search(index, built.set.queries))
    pairs = zip(built.found()[:, :K], by_hand, strict=True)
    assert np.mean([np.isin(found, candidates).mean() for found, candidates in pairs]) >= 0.99


# --- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_go_with_the_call_and_change_no_other(built: Built) -> None:
    knobs = {"nprobe": (1, built.segment.spec.params.get("nlist", 1)), "itopk_size": (32, 512)}
    name = next((name for name in knobs if name in built.params), None)
    before = built.found()
    if name is None:
        with pytest.raises(Invalid, match="nprobe"):
            built.found(SearchParams(nprobe=4))
        return
    least, most = (built.found(SearchParams(**{name: value})) for value in knobs[name])
    narrow, wide = built.recall(least, f"{name} {knobs[name][0]}"), built.recall(most, f"{name} {knobs[name][1]}")
    assert wide >= narrow - SLACK / 2
    assert wide >= (TARGET if name == "itopk_size" else TARGET - SLACK)
    assert recall(built.found(), before) >= 0.999


def test_more_candidates_are_asked_for_by_rerank(built: Built) -> None:
    if "rerank" not in built.twin.knobs:
        pytest.skip("this kind takes no rerank")
    few, many = (built.recall(built.found(SearchParams(rerank=value)), f"rerank {value}") for value in (1.0, 16.0))
    assert many >= few
    assert few < 1.0 or many == 1.0


def test_limits_of_the_kinds_are_refused_or_answered_by_the_twin(built: Built) -> None:
    """Never an abort: k beyond what the kind takes, k beyond the rows, and more lists than there are."""
    assert built.twin.gpu is not None
    kind, queries = built.segment.spec.kind, built.set.queries[:3]
    assert built.twin.gpu.takes(k_limit(kind) + 1, {}) == (built.segment.rows.count <= k_limit(kind))
    for k in (2_048, min(k_limit(kind) + 1, K_MAX + 1)):
        rows, _ = built.segment.search(queries, k, SearchParams())
        assert rows.shape[1] >= min(k, built.segment.rows.count)
        assert (rows[:, :100] >= 0).all()
    if "nprobe" in built.params:
        rows, _ = built.segment.search(queries, K, SearchParams(nprobe=NPROBE_MAX + 1))
        assert (rows >= 0).all()
    if "itopk_size" in built.params:
        rows, _ = built.segment.search(queries, 100, SearchParams(itopk_size=32, search_width=1))
        assert rows.shape[1] >= 100


def test_a_batch_of_any_size_is_answered(built: Built) -> None:
    asked = np.tile(built.set.queries, (11, 1))
    whole, _ = built.segment.search(asked, K, SearchParams())
    single = np.concatenate([built.segment.search(asked[at : at + 1], K, SearchParams())[0][:, :K] for at in range(20)])
    assert len(whole) == len(asked)
    assert recall(whole[:20], single) >= 0.97  # a graph's search of one query takes another way than that of many
    none, _ = built.segment.search(asked[:0], K, SearchParams())
    assert len(none) == 0


# --- what may be found ----------------------------------------------------------------------------------------------


def test_deleted_rows_are_not_found_and_cost_no_recall(built: Built) -> None:
    mask = np.random.default_rng(SEED).random(built.segment.rows.count) < 0.7
    mask[np.unique(built.set.truth[:, :3])] = False  # the very nearest of every query, too
    live = RowSelection.of(mask)
    found = built.found(selection=live)
    assert live.holds(found[found >= 0]).all()
    assert built.recall(found, "30% deleted, and the nearest three", live) >= TARGET - 2 * SLACK


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_recall_under_a_filter(built: Built, share: float) -> None:
    kept = kept_at_random(built.segment.rows.count, share)
    found = built.found(selection=kept)
    assert kept.holds(found[found >= 0]).all()
    assert built.recall(found, f"{share:.0%} kept", kept) >= TARGET - 2 * SLACK


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_the_gpu_itself_finds_only_what_a_filter_keeps(built: Built, share: float) -> None:
    """cuVS takes the selection as bits; FAISS's own GPU code would ignore it."""
    assert built.twin.gpu is not None
    kept = kept_at_random(built.segment.rows.count, share)
    point = {name: value for name, value in built.params.items() if name in built.twin.gpu.knobs and name != "rerank"}
    labels, _ = built.twin.gpu.search(built.set.queries, K, point, kept)
    found = labels[labels >= 0]
    print(f"{built.case} {share:.0%} kept: {len(found) / labels.size:.1%} of the places are filled")
    assert len(found)
    assert kept.holds(found).all()


# --- callers at the same time ---------------------------------------------------------------------------------------


def test_callers_at_the_same_time_get_their_own_answers(built: Built) -> None:
    queries = built.set.queries
    parts = [queries[start::THREADS] for start in range(THREADS)]
    alone = [built.segment.search(part, K, SearchParams())[0][:, :K] for part in parts]

    def ask(part: Any) -> Any:
        use_threads(1)
        return [built.segment.search(part, K, SearchParams())[0][:, :K] for _ in range(EACH)]

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(ask, parts))
    for own, answers in zip(alone, together, strict=True):
        assert min(recall(answer, own) for answer in answers) >= 0.99
    assert built.twin.facts()["out_of_memory"] == 0


def test_an_answer_of_the_gpu_is_not_marked(built: Built) -> None:
    (hits,) = built.collection.view.search(built.collection.request(built.set.queries))
    assert isinstance(hits, Hits)
    assert hits.degraded == ""
    ids = hits_of((hits,))
    assert recall(ids, built.collection.ids[built.set.truth]) >= TARGET - SLACK
