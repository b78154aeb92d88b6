"""One test for each of the faults that an earlier index server had, as far as they are possible here.

Not possible yet are those of GPU indexes, of changing a point in place, and of compaction. Tuned points belong to the
segment, so that a restart is a load.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from actors.exact_search import exact_search
from actors.faiss_index import build_index, load_index, use_threads
from actors.rerank import rerank
from actors.segment_builder import publish_segment
from actors.segment_loader import LoadedSegment, load_segment
from actors.tuner import TUNING_K, Knobs, TuningSet, tune, tuning_queries
from cluster import paths
from cluster.config import CollectionConfig, IndexConfig, Metric
from cluster.errors import Corrupt, Invalid
from cluster.index_policy import choose
from cluster.manifest import SegmentRef
from cluster.memory_store import MemoryStore
from cluster.object_store import ObjectStore, open_store
from cluster.query import SearchParams
from cluster.row_selection import RowSelection
from cluster.segment import SegmentDescription
from cluster.topk import recall_at_k
from cluster.vectors import as_searched
from tests.unit.actors.points import Points, brute_force, build, in_row_order, random_points, random_vectors

pytestmark = pytest.mark.usefixtures("one_target")
COUNT, DIMENSION, QUERIES, K = 2_000, 32, 40, 10
PER_BATCH = 300
SEED = 20261130
INDEXES = {
    "flat": IndexConfig("flat"),
    "hnsw": IndexConfig("hnsw"),
    "hnsw_sq8": IndexConfig("hnsw", codes="sq8"),
    "ivf_flat": IndexConfig("ivf_flat"),
    "ivf_sq8": IndexConfig("ivf_sq8"),
    "ivf_pq": IndexConfig("ivf_pq"),
    "ivf_pq_8_bits": IndexConfig("ivf_pq", pq_bits=8, rerank_store="float16"),
    "ivf_rabitq": IndexConfig("ivf_rabitq", rerank_store="sq8"),
    "factory": IndexConfig("factory", factory="PCAR32,IVF16,SQ8"),
}
LISTS = [name for name, index in INDEXES.items() if index.kind.startswith("ivf")]


@dataclass(frozen=True)
class Stored:
    """A published segment, loaded."""

    store: ObjectStore
    ref: SegmentRef
    folder: Path
    points: Points
    segment: LoadedSegment


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """The segment of each kind of index, built when it is first asked for."""
    known: dict[str, Stored] = {}

    def segment_of(name: str) -> Stored:
        if name not in known:
            known[name] = stored(tmp_path_factory.mktemp(name), config_of(name))
        return known[name]

    return segment_of


def config_of(name: str, metric: Metric = "l2", dimension: int = DIMENSION) -> CollectionConfig:
    return CollectionConfig(dimension, metric, index=INDEXES[name])


def stored(folder: Path, config: CollectionConfig) -> Stored:
    points = in_row_order(random_points(config, COUNT, SEED))
    build(folder, "s1", config, points, PER_BATCH)
    store = MemoryStore()
    ref = publish_segment(store, "c", folder, "s1")
    segment = load_segment(store, "c", ref, config.metric, folder / "cache")
    return Stored(store, ref, folder, points, segment)


def queries_of(metric: Metric = "l2", count: int = QUERIES) -> NDArray[np.float32]:
    return random_vectors(CollectionConfig(DIMENSION, metric), count, SEED + 99)


def ids_of(segment: LoadedSegment, rows: NDArray[np.int64]) -> list[list[int | str]]:
    values = segment.ids.to_pylist()
    return [[values[row] for row in line if row >= 0] for line in rows.tolist()]


def id_recall(found: list[list[int | str]], truth: list[list[int | str]]) -> list[float]:
    """Recall by ids, as a caller sees it."""
    return [len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)]


# --- every named kind is trained, filled and searched -------------------------------------------------------------


@pytest.mark.parametrize("name", INDEXES)
def test_an_explicit_kind_is_built_filled_and_searched(name: str, segments: Callable[[str], Stored]) -> None:
    """ivf_flat and ivf_pq were never trained, and failed at the first add."""
    held = segments(name)
    assert held.segment.spec.kind == INDEXES[name].kind
    assert held.segment.searcher.index.count == COUNT
    rows, _ = held.segment.search(queries_of(), K, SearchParams())
    truth = brute_force(held.points, queries_of(), K, "l2")
    assert np.mean(id_recall(ids_of(held.segment, rows), truth)) >= 0.9


@pytest.mark.parametrize("name", ["hnsw", "hnsw_sq8"])
def test_ef_search_is_observable_on_hnsw(name: str, segments: Callable[[str], Stored]) -> None:
    """It stayed at FAISS's default, whatever was asked for."""
    segment, queries = segments(name).segment, queries_of()
    truth, _ = exact_search(queries, segment.rows.blocks(), 1, "l2")
    few, _ = segment.search(queries, 1, SearchParams(ef_search=1))
    many, _ = segment.search(queries, 1, SearchParams(ef_search=COUNT))
    assert recall_at_k(few, truth).mean() <= 0.8
    assert recall_at_k(many, truth).mean() == 1.0


@pytest.mark.parametrize("name", LISTS)
def test_nprobe_is_observable_on_lists(name: str, segments: Callable[[str], Stored]) -> None:
    segment, queries = segments(name).segment, queries_of()
    rerank_all = None if name in ("ivf_flat", "ivf_sq8") else 32.0
    truth, _ = exact_search(queries, segment.rows.blocks(), K, "l2")
    few, _ = segment.search(queries, K, SearchParams(nprobe=1, rerank=rerank_all))
    many, _ = segment.search(queries, K, SearchParams(nprobe=COUNT, rerank=rerank_all))
    assert recall_at_k(few, truth).mean() <= 0.6
    assert recall_at_k(many, truth).mean() >= 0.99


@pytest.mark.parametrize("name", INDEXES)
def test_a_knob_that_an_index_does_not_have_is_refused(name: str, segments: Callable[[str], Stored]) -> None:
    """It was tried, failed inside FAISS, and the failure swallowed with all the other knobs."""
    segment = segments(name).segment
    params = SearchParams(ef_search=10) if segment.searcher.index.lists else SearchParams(nprobe=1)
    with pytest.raises(Invalid, match="does not fit"):
        segment.search(queries_of(), K, params)


# --- deletions and ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEXES)
def test_delete_then_search_leaves_the_labels_of_the_others_intact(
    name: str, segments: Callable[[str], Stored]
) -> None:
    """Removed rows shifted the labels of all behind them. Here the index itself is asked, and the whole segment."""
    segment, vectors = segments(name).segment, segments(name).points.vectors
    mask = np.ones(COUNT, dtype=bool)
    mask[::3] = False
    asked = np.flatnonzero(mask)[:200]
    selection = RowSelection.of(mask)
    wide = {"nprobe": COUNT, "ef_search": COUNT, "rerank": 32.0}
    params = {knob: wide[knob] for knob in segment.searcher.index.knobs}
    inner = {knob: value for knob, value in params.items() if segment.spec.rerank_store != "rows" or knob != "rerank"}
    candidates, _ = segment.searcher.index.search(vectors[asked], 5 * K, inner, selection)
    assert mask[candidates[candidates >= 0]].all()
    assert (candidates == asked[:, None]).any(axis=1).mean() >= 0.95
    rows, scores = segment.search(vectors[asked], 1, SearchParams(), selection)
    np.testing.assert_array_equal(rows[:, 0], asked)
    np.testing.assert_allclose(scores[:, 0], 0.0, atol=1e-3)


@pytest.mark.parametrize("name", INDEXES)
def test_deleted_rows_are_not_found_by_their_own_vectors(name: str, segments: Callable[[str], Stored]) -> None:
    segment, vectors = segments(name).segment, segments(name).points.vectors
    mask = np.ones(COUNT, dtype=bool)
    mask[100:200] = False
    selection = RowSelection.of(mask)
    for rows in (
        segment.search(vectors[100:200], K, SearchParams(), selection)[0],
        segment.searcher.index.search(vectors[100:200], K, {}, selection)[0],
    ):
        assert not np.isin(rows, np.arange(100, 200)).any()


@pytest.mark.parametrize("name", INDEXES)
def test_negative_ids_are_found_like_all_others(name: str, tmp_path: Path) -> None:
    """Negative ids were taken for "no result": half of all 64-bit hashes vanished."""
    config = CollectionConfig(DIMENSION, "l2", index=INDEXES[name])
    points = random_points(config, COUNT, SEED)
    numbers = np.random.default_rng(SEED).integers(-(2**63), 2**63 - 1, size=COUNT)
    numbers[:3] = -1, -(2**63), 2**63 - 1
    assert (numbers < 0).sum() > COUNT // 3
    points = in_row_order(Points(pa.array(numbers), points.vectors))
    build(tmp_path, "s1", config, points, PER_BATCH)
    store = MemoryStore()
    segment = load_segment(store, "c", publish_segment(store, "c", tmp_path, "s1"), "l2", tmp_path / "cache")
    rows, _ = segment.search(points.vectors, 1, SearchParams())
    own = np.array([line[0] for line in ids_of(segment, rows)]) == points.ids.to_numpy()
    negative = points.ids.to_numpy() < 0
    assert own[negative].mean() >= 0.97
    assert own[~negative].mean() >= 0.97
    np.testing.assert_array_equal(segment.rows.rows_of_ids(points.ids), np.arange(COUNT))


# --- callers' arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("name", INDEXES)
def test_read_only_arrays_are_taken_and_left_as_they_are(name: str, metric: Metric) -> None:
    """Vectors were normalised in place; FAISS writes through the read-only flag."""
    config = config_of(name, metric)
    vectors, queries = random_vectors(config, COUNT, SEED), queries_of(metric)
    before = vectors.copy(), queries.copy()
    vectors.flags.writeable = queries.flags.writeable = False
    index = build_index(choose(COUNT, config), DIMENSION, metric, vectors, seed=3)
    index.add(vectors)
    index.search(queries, K, {}, RowSelection.of(np.arange(COUNT) % 2 == 0))
    np.testing.assert_array_equal(vectors, before[0])
    np.testing.assert_array_equal(queries, before[1])


def test_read_only_arrays_are_left_as_they_are_when_normalised_and_reranked(
    segments: Callable[[str], Stored],
) -> None:
    queries = 3.0 * queries_of()
    before = queries.copy()
    queries.flags.writeable = False
    as_searched(queries, "cosine")
    labels = np.tile(np.arange(50), (QUERIES, 1))
    rerank(segments("hnsw").segment.rows, queries, labels, "cosine", threads=1)
    np.testing.assert_array_equal(queries, before)


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEXES)
def test_load_of_an_index_of_another_dimension_metric_or_count_is_refused(
    name: str, segments: Callable[[str], Stored]
) -> None:
    """An index of 16 dimensions was loaded into a server set to 999."""
    held = segments(name)
    path, spec = held.folder / paths.INDEX, held.segment.spec
    assert load_index(path, spec, DIMENSION, "l2", COUNT, "c/index.faiss").count == COUNT
    for dimension, metric, count in ((DIMENSION + 1, "l2", COUNT), (DIMENSION, "ip", COUNT), (DIMENSION, "l2", 9)):
        with pytest.raises(Corrupt, match=r"c/index\.faiss.*described as"):
            load_index(path, spec, dimension, metric, count, "c/index.faiss")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [paths.INDEX, paths.ROWS, paths.DESCRIPTION])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_load_of_a_truncated_file_is_refused(
    name: str, share: float, segments: Callable[[str], Stored], tmp_path: Path
) -> None:
    held = segments("hnsw")
    copy = tmp_path / "segment"
    shutil.copytree(held.folder, copy, ignore=shutil.ignore_patterns("cache"))
    store = open_store((tmp_path / "store").as_uri())
    ref = publish_segment(store, "c", copy, "s1")
    load_segment(store, "c", ref, "l2", tmp_path / "cache")
    key = paths.segment_file("c", "s1", name)
    data = store.get(key)
    store.put(key, data[: int(len(data) * share)])
    with pytest.raises(Corrupt, match=key):
        load_segment(store, "c", ref, "l2", tmp_path / "cache")


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_file_that_is_truncated_before_its_checksum_is_taken_is_refused(
    name: str, segments: Callable[[str], Stored], tmp_path: Path
) -> None:
    held = segments(name)
    data = (held.folder / paths.INDEX).read_bytes()
    for share in (0.0, 0.3, 0.9):
        (tmp_path / "index").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(Corrupt, match=r"c/index\.faiss"):
            load_index(tmp_path / "index", held.segment.spec, DIMENSION, "l2", COUNT, "c/index.faiss")


# --- tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEXES)
def test_tuned_is_still_tuned_after_a_restart(name: str, segments: Callable[[str], Stored], tmp_path: Path) -> None:
    """The tuned setting was overwritten at every load, and callers' defaults outranked it."""
    held = segments(name)
    written = SegmentDescription.decode((held.folder / paths.DESCRIPTION).read_bytes(), "s1")
    again = load_segment(held.store, "c", held.ref, "l2", tmp_path / "another-cache")
    assert again.description.operating_points == written.operating_points
    params = again.operating_point.params
    knobs = {knob: value for knob, value in params.items() if not knob.startswith("far_")}
    assert set(knobs) <= set(again.searcher.index.knobs)
    assert knobs or name == "flat"
    by_default = again.search(queries_of(), K, SearchParams())
    if knobs and knobs == params:  # else raw knobs would hold for far queries, too
        by_knobs = again.search(queries_of(), K, SearchParams(**{knob: int(value) for knob, value in knobs.items()}))
        np.testing.assert_array_equal(by_default[0], by_knobs[0])
    np.testing.assert_array_equal(by_default[0], held.segment.search(queries_of(), K, SearchParams())[0])


@pytest.mark.parametrize("name", INDEXES)
def test_the_tuners_recall_is_the_recall_of_exact_search_by_arbitrary_ids(
    name: str, segments: Callable[[str], Stored]
) -> None:
    """Row numbers of the truth were compared with ids: recall was 0, and the fastest setting was kept."""
    held, metric = segments(name), "l2"
    segment, vectors = held.segment, held.points.vectors
    assert segment.ids.to_pylist() != list(range(COUNT))
    queries = tuning_queries(queries_of(count=100), vectors[:500], "l2", SEED)
    asked = TuningSet(queries, *exact_search(queries, segment.rows.blocks(), TUNING_K, "l2"))
    index = segment.searcher.index
    for point in tune(segment.searcher, Knobs(index.knobs, COUNT, index.lists), asked, 0.9):
        rows, _ = segment.searcher.search(queries, TUNING_K, point.params)
        recalls = id_recall(ids_of(segment, rows), brute_force(held.points, queries, TUNING_K, metric))
        assert point.recall == pytest.approx(np.mean(recalls), abs=1e-9), f"{point}, seed {SEED}"
        assert point.met


# --- threads and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LISTS, "hnsw", "factory"])
def test_two_threads_with_different_knobs_get_their_own_results(name: str, segments: Callable[[str], Stored]) -> None:
    """nprobe was set on the shared index: one request's leaked into another's."""
    segment, queries = segments(name).segment, queries_of()
    asked = [SearchParams(nprobe=1), SearchParams(nprobe=COUNT)]
    if name == "hnsw":
        asked = [SearchParams(ef_search=1), SearchParams(ef_search=200)]
    alone = [segment.search(queries, 1, params)[0] for params in asked]
    assert (alone[0] != alone[1]).any()

    def search_often(params: SearchParams) -> list[NDArray[np.int64]]:
        use_threads(1)
        return [segment.search(queries, 1, params)[0] for _ in range(40)]

    with ThreadPoolExecutor(2) as pool:
        for mine, found in zip(alone, pool.map(search_often, asked), strict=True):
            for rows in found:
                np.testing.assert_array_equal(rows, mine)


@pytest.mark.parametrize("name", [*LISTS, "hnsw", "factory"])
def test_a_knob_of_one_search_does_not_stay_for_the_next(name: str, segments: Callable[[str], Stored]) -> None:
    index, queries = segments(name).segment.searcher.index, queries_of()
    before, _ = index.search(queries, K, {})
    other, _ = index.search(queries, K, {"ef_search": COUNT} if name == "hnsw" else {"nprobe": COUNT})
    assert (other != before).any()
    np.testing.assert_array_equal(index.search(queries, K, {})[0], before)


@pytest.mark.parametrize("name", [name for name in INDEXES if name != "factory" and "pq" not in name])
def test_predicted_bytes_are_within_a_fifth_of_the_file(name: str, segments: Callable[[str], Stored]) -> None:
    """The vectors of ivf_flat were left out: 93 times too few.

    Not of ivf_pq, which makes a table at loading that no file holds, nor of factory strings, which are estimated.
    """
    segment = segments(name).segment
    size = segment.description.files[paths.INDEX].size_bytes
    assert 0.8 <= segment.spec.predicted_bytes / size <= 1.2
